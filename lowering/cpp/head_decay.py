"""One decay per head inside a chunk, in C++: queries and keys meet once for all value heads, decay comes on top."""

from __future__ import annotations

HEAD = """\
static void share(const Call& x, const Chunk& c, Room& r)
{
    transpose(r.k, DK, r.kt, C, c.rows, DK);
    if (r.d_qt) transpose(r.q, DK, r.qt, C, c.rows, DK);
    if (DELTA) pairs(r.k, DK, r.kt, C, c.rows, Blend{r.dots[1], C, r.ones, nullptr});
    if (x.q.data || r.d_qt) pairs(r.q, DK, r.kt, C, c.rows, Blend{r.dots[0], C, r.ones, nullptr});
}

// e^x of n logs; nothing where it is next to nothing. What a float loses of a log comes on top.
static void decays(const double* logs, float* to, int n)
{
    float near[C], rest[C];
    for (int i = 0; i < n; i++) near[i] = (float)logs[i];
    for (int i = 0; i < n; i++) rest[i] = (float)(logs[i] - near[i]) + 1.0f;
    for (int i = 0; i < n; i += W)
        at(to + i) = pick(at(near + i) < all(-40.0f), Vec{}, exp_of(at(near + i)) * at(rest + i));
}

// e^(log - from), or its inverse.
static void decays_from(const double* logs, double from, double sign, float* to, int n)
{
    double line[C];
    for (int t = 0; t < n; t++) line[t] = sign * (logs[t] - from);
    decays(line, to, n);
}

static void read_logs(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    // In double, so that differences of large sums stay exact.
    double log = 0;
    for (int t = 0; t < c.rows; t++) {
        const float gate = x.decay.data && t < c.length ? number(x.decay, c.row, c.start + t, head) : 0.0f;
        r.log[t] = log += gate < -128.0f ? -128.0f : gate;
    }
    decays(r.log, r.rise, c.rows);
    decays_from(r.log, log, -1, r.fall, c.rows);
}

// What one token leaves of each key's row of the state.
static void fades(const Call& x, int64_t b, int64_t t, int64_t head, float* fade)
{
    const float gate = x.decay.data ? expf(number(x.decay, b, t, head)) : 1.0f;
    for (int i = 0; i < DK; i++) fade[i] = gate;
}

// How pairs of rows decay. Where a chunk forgets little, that is a product of what each row decays from the chunk's middle.
static void pair_decays(const Chunk& c, Room& r)
{
    double low = 0, high = 0;
    for (int t = 0; t < c.rows; t++) {
        low = r.log[t] < low ? r.log[t] : low;
        high = r.log[t] > high ? r.log[t] : high;
    }
    if (high - low < 60) {
        float rows[C], columns[C];
        decays_from(r.log, (low + high) / 2, 1, rows, c.rows);
        decays_from(r.log, (low + high) / 2, -1, columns, c.rows);
        for (int i = 0; i < c.rows; i++)
            for (int j = 0; j <= i; j += W) at(r.pair + i * C + j) = at(columns + j) * rows[i];
        return;
    }
    for (int i = 0; i < c.rows; i++) {
        const int end = i / W * W + W;
        double line[C];
        for (int j = 0; j < end; j++) line[j] = j <= i ? r.log[i] - r.log[j] : -100;
        decays(line, r.pair + i * C, end);
    }
}

// What stands right of column j in a row, as far as tiles and vectors look.
static void clear(float* row, int j) { memset(row + j, 0, sizeof(float) * (C - j < 16 ? C - j : 16)); }

static void factors(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    read_logs(x, c, head, r);
    pair_decays(c, r);
    for (int i = 0; i < c.rows; i++) {
        float *pair = r.pair + i * C, *scores[2] = {r.scores[0] + i * C, r.scores[1] + i * C};
        clear(pair, i + 1);
        for (int j = 0; j <= i; j += W) at(scores[0] + j) = at(r.dots[0] + i * C + j) * at(pair + j);
        clear(scores[0], i + 1);
        r.weight[0][i] = r.rise[i];
        r.weight[1][i] = -r.rise[i] * r.beta[i];
        r.tail[i] = r.fall[i];
        if (!DELTA) continue;
        for (int j = 0; j <= i; j += W) at(scores[1] + j) = at(r.dots[1] + i * C + j) * (at(pair + j) * r.beta[i]);
        clear(scores[1], i);
    }
    r.read[0] = r.q;
    r.read[1] = r.write = r.k;
    for (float& fade : r.fade) fade = r.rise[c.rows - 1];
}
"""

HEAD_GRADIENTS = """\
static void begin_gradients(const Chunk&, Room& r)
{
    for (float* d : {r.d_qt, r.d_kt}) memset(d, 0, sizeof(float) * KEYS);
    for (int kind = 0; kind < KINDS; kind++) memset(r.d_dots[kind], 0, sizeof(float) * PAIRS);
}

static void begin_pulls(Room& r)
{
    for (float* d : {r.sums, r.writes}) memset(d, 0, sizeof(float) * C);
}

// What the state gives to the gradients of queries and keys; times them, it is what it gives to the sums of decay.
struct Pull {
    const float *weight, *keys;
    float *to, *sums;
    inline void operator()(int d, int t, Vec sum) const
    {
        sum *= at(weight + t);
        at(to + d * C + t) += sum;
        at(sums + t) += at(keys + d * C + t) * sum;
    }
};

static Pull pull(Room& r, int what)  // queries that read, keys that read, keys that write
{
    if (what == 0) return {r.weight[0], r.qt, r.d_qt, r.sums};
    return {what == 1 ? r.weight[1] : r.tail, r.kt, r.d_kt, what == 1 ? r.sums : r.writes};
}

// Pairs to the gradients of dots, and what they pull at the sums of decay: rows add, columns subtract.
// Pairs i = j do not decay: left in, they would drown the rest when decay is strong.
static void pull_pairs(const Chunk& c, Room& r)
{
    float columns[C] = {};
    for (int i = 0; i < c.rows; i++) {
        const int row = i * C;
        r.d_dots[0][row + i] += r.d_scores[0][row + i];
        r.d_scores[0][row + i] = r.d_scores[1][row + i] = 0;
        Vec total = {};
        for (int j = row; j <= row + i; j += W) {
            const Vec pair = at(r.pair + j);
            Vec line = at(r.d_scores[0] + j) * at(r.scores[0] + j);
            at(r.d_dots[0] + j) += at(r.d_scores[0] + j) * pair;
            if (DELTA) {
                line += at(r.d_scores[1] + j) * at(r.scores[1] + j);
                at(r.d_dots[1] + j) += at(r.d_scores[1] + j) * (pair * r.beta[i]);
            }
            total += line;
            at(columns + j - row) += line;
        }
        r.sums[i] += sum(total);
    }
    for (int i = 0; i < c.rows; i++) r.sums[i] -= columns[i];
}

static void factor_gradients(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    pull_pairs(c, r);
    if (!x.decay.data) return;
    float fade = 0;
    for (int i = 0; i < DK; i++) fade += r.d_fade[i];
    // A row's decay is in every later row's sum, and in what every earlier row writes to the chunk's end.
    double later = (double)fade * r.fade[0], earlier = 0, of[C];
    for (int t = c.rows - 1; t >= 0; t--) of[t] = later += r.sums[t];
    for (int t = 0; t < c.length; t++) {
        const float d = (float)(of[t] + earlier);
        write_row(place(x.d_decay, c.row, c.start + t, head), &d, x.d_decay.type, 1, 1);
        earlier += r.writes[t];
    }
}

static void finish_gradients(const Chunk& c, Room& r)
{
    transpose(r.d_qt, C, r.d_q, DK, DK, C);
    transpose(r.d_kt, C, r.d_k, DK, DK, C);
    const Blend to_q = {r.d_q, DK, r.ones, r.ones}, to_k = {r.d_k, DK, r.ones, r.ones};
    product<false, LOWER, DK>(r.d_dots[0], C, r.k, DK, c.rows, c.rows, to_q);
    product<true, UPPER, DK>(r.d_dots[0], C, r.q, DK, c.rows, c.rows, to_k);
    if (!DELTA) return;
    product<false, LOWER, DK>(r.d_dots[1], C, r.k, DK, c.rows, c.rows, to_k);
    product<true, UPPER, DK>(r.d_dots[1], C, r.k, DK, c.rows, c.rows, to_k);
}
"""
