"""What decay does inside a chunk, in C++: one number per head, or one per key channel."""

from __future__ import annotations

ROWS = """\
// Rows that are worked on: few for a short chunk.
static int rows_of(int length) { return length <= 16 ? 16 : length <= 32 ? 32 : 64; }
"""

HEAD = """\
static void share(const Chunk& c, Room& r)
{
    transpose(r.k, DK, r.kt, C, c.rows, DK);
    pairs(r.q, DK, r.kt, r.dots[0], c.rows, 1);
    if (DELTA) pairs(r.k, DK, r.kt, r.dots[1], c.rows, 1);
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

static void read_logs(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    // In double, so that differences of large sums stay exact.
    double log = 0, line[C];
    for (int t = 0; t < c.rows; t++) {
        const float gate = x.decay.data && t < c.length ? number(x.decay, c.row, c.start + t, head) : 0.0f;
        r.log[t] = log += gate < -128.0f ? -128.0f : gate;
    }
    decays(r.log, r.rise, c.rows);
    for (int t = 0; t < c.rows; t++) line[t] = log - r.log[t];
    decays(line, r.fall, c.rows);
}

// What one token leaves of each key's row of the state.
static void fades(const Call& x, int64_t b, int64_t t, int64_t head, float* fade)
{
    const float gate = x.decay.data ? expf(number(x.decay, b, t, head)) : 1.0f;
    for (int i = 0; i < DK; i++) fade[i] = gate;
}

static void factors(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    read_logs(x, c, head, r);
    for (int i = 0; i < DK; i++) r.fade[i] = r.rise[c.rows - 1];
    for (int i = 0; i < c.rows; i++) {
        const int end = i / W * W + W;
        double line[C];
        float *pair = r.pair + i * C, *scores[2] = {r.scores[0] + i * C, r.scores[1] + i * C};
        for (int j = 0; j < end; j++) line[j] = j <= i ? r.log[i] - r.log[j] : -100;
        decays(line, pair, end);
        for (int j = 0; j < end; j += W) at(scores[0] + j) = at(r.dots[0] + i * C + j) * at(pair + j);
        memset(scores[0] + i + 1, 0, sizeof(float) * (C - 1 - i));
        if (!DELTA) continue;
        for (int j = 0; j < end; j += W) at(scores[1] + j) = at(r.dots[1] + i * C + j) * at(pair + j) * r.beta[i];
        memset(scores[1] + i, 0, sizeof(float) * (C - i));
    }
    weigh(r.read[0], r.q, r.rise, c.rows, DK, 1);
    weigh(r.write, r.k, r.fall, c.rows, DK, 1);
    if (!DELTA) return;
    float weight[C];
    for (int t = 0; t < c.rows; t++) weight[t] = r.rise[t] * r.beta[t];
    weigh(r.read[1], r.k, weight, c.rows, DK, -1);
}
"""

HEAD_GRADIENTS = """\
static void begin_gradients(const Chunk& c, Room& r)
{
    for (int kind = 0; kind < KINDS; kind++) memset(r.d_dots[kind], 0, sizeof(float) * PAIRS);
}

// Pairs to the gradients of dots, and what they pull at the sums of decay: rows add, columns subtract.
// Pairs i = j do not decay: left in, they would drown the rest when decay is strong.
static void pull(const Chunk& c, Room& r, float* sums)
{
    float columns[C] = {};
    for (int i = 0; i < c.rows; i++) {
        float *d[2] = {r.d_scores[0] + i * C, r.d_scores[1] + i * C}, line[C] = {};
        for (int kind = 0; kind < KINDS; kind++) {
            const int end = kind ? i : i + 1;  // keys of the delta rule do not meet themselves
            memset(d[kind] + end, 0, sizeof(float) * (C - end));
            for (int j = 0; j <= i; j += W) at(line + j) += at(d[kind] + j) * at(r.scores[kind] + i * C + j);
            const float weight = kind ? r.beta[i] : 1.0f;
            float* to = r.d_dots[kind] + i * C;
            for (int j = 0; j <= i; j += W) at(to + j) += at(d[kind] + j) * at(r.pair + i * C + j) * weight;
        }
        line[i] = 0;
        Vec total = {};
        for (int j = 0; j <= i; j += W) {
            total += at(line + j);
            at(columns + j) += at(line + j);
        }
        sums[i] = sum(total);
    }
    for (int i = 0; i < c.rows; i++) sums[i] -= columns[i];
}

static void factor_gradients(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    float sums[C], writes[C], fade = 0;
    pull(c, r, sums);
    for (int i = 0; i < DK; i++) fade += r.d_fade[i];
    for (int t = 0; t < c.rows; t++) {
        const int at_row = t * DK;
        for (int kind = 0; kind < KINDS; kind++) sums[t] += dot(r.read[kind] + at_row, r.d_read[kind] + at_row, DK);
        writes[t] = dot(r.write + at_row, r.d_write + at_row, DK);
        for (int d = at_row; d < at_row + DK; d += W) {
            at(r.d_q + d) += at(r.d_read[0] + d) * r.rise[t];
            at(r.d_k + d) += at(r.d_write + d) * r.fall[t];
            if (DELTA) at(r.d_k + d) -= at(r.d_read[1] + d) * (r.rise[t] * r.beta[t]);
        }
    }
    if (!x.decay.data) return;
    // A row's decay is in every later row's sum, and in what every earlier row writes to the chunk's end.
    double later = (double)fade * r.fade[0], earlier = 0, of[C];
    for (int t = c.rows - 1; t >= 0; t--) of[t] = later += sums[t];
    for (int t = 0; t < c.length; t++) {
        const float d = (float)(of[t] + earlier);
        write_row(place(x.d_decay, c.row, c.start + t, head), &d, x.d_decay.type, 1, 1);
        earlier += writes[t];
    }
}

static void finish_gradients(const Chunk& c, Room& r)
{
    lower(r.d_dots[0], r.k, DK, r.d_q, c.rows, 1, r.ones);
    lower_turned(r.d_dots[0], r.q, DK, r.d_k, c.rows, 1, r.ones);
    if (!DELTA) return;
    lower(r.d_dots[1], r.k, DK, r.d_k, c.rows, 1, r.ones);
    lower_turned(r.d_dots[1], r.k, DK, r.d_k, c.rows, 1, r.ones);
}
"""

CHANNEL = """\
// A pair i > j of rows decays by the product of factors over (j, i]. Halve the chunk again and again: at the level where i
// falls in the later half and j in the earlier, that is (from the middle to i) x (from j to the middle), row scales of
// numbers in (0, 1]: nothing overflows and no large sums cancel. extra: rise, fall, scaled queries, keys and columns.
static const float FLOOR = 4.2483543e-18f;  // e^-40

static void share(const Chunk&, Room&) {}

static void read_levels(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    float *rise = r.extra[0], *fall = r.extra[1];
    read_rows(rise, x.decay, c, head, x.width, DK, 1);
    for (int i = 0; i < c.rows * DK; i += W) {
        const Vec log = at(rise + i);
        at(rise + i) = exp_of(pick(log < all(-40.0f), all(-40.0f), log));
        at(fall + i) = all(1);
    }
}

// What one token leaves of each key's row of the state.
static void fades(const Call& x, int64_t b, int64_t t, int64_t head, float* fade)
{
    read_row(fade, place(x.decay, b, t, head), x.decay.type, x.width, DK, 1);
    for (int i = 0; i < DK; i += W) at(fade + i) = exp_of(at(fade + i));
}

// From halves of `half` rows to halves of twice as many.
static void widen(float* rise, float* fall, int half, int rows)
{
    for (int o = 0; o < rows; o += 2 * half)
        for (int d = 0; d < DK; d += W) {
            const Vec later = at(rise + (o + 2 * half - 1) * DK + d), earlier = at(rise + (o + half - 1) * DK + d);
            for (int t = o; t < o + half; t++) {
                const Vec f = at(fall + t * DK + d) * later, g = at(rise + (t + half) * DK + d) * earlier;
                at(fall + t * DK + d) = pick(f < all(FLOOR), all(FLOOR), f);
                at(rise + (t + half) * DK + d) = pick(g < all(FLOOR), all(FLOOR), g);
            }
        }
}

// Rows of a level's halves from o on: queries and keys of the later, keys of the earlier as columns.
static void scale_level(Room& r, int o, int half)
{
    const float *rise = r.extra[0], *fall = r.extra[1];
    for (int i = o * DK; i < (o + half) * DK; i += W) {
        const int j = i + half * DK;
        at(r.extra[2] + j) = at(r.q + j) * at(rise + j);
        if (DELTA) at(r.extra[3] + j) = at(r.k + j) * at(rise + j);
        at(r.extra[4] + i) = at(r.k + i) * at(fall + i);
    }
}

static void score_level(Room& r, int o, int half)
{
    const int middle = o + half;
    if (half >= 16) {
        transpose(r.extra[4] + o * DK, DK, r.extra[5], C, half, DK);
        for (int kind = 0; kind < KINDS; kind++)
            product<false>(r.extra[2 + kind] + middle * DK, DK, r.extra[5], C, r.scores[kind] + middle * C + o, C, half, half,
                           DK, 1, nullptr);
        return;
    }
    for (int i = middle; i < middle + half; i++)
        for (int j = o; j < middle; j++)
            for (int kind = 0; kind < KINDS; kind++)
                r.scores[kind][i * C + j] = dot(r.extra[2 + kind] + i * DK, r.extra[4] + j * DK, DK);
}

static void factors(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    float *rise = r.extra[0], *fall = r.extra[1];
    read_levels(x, c, head, r);
    for (int kind = 0; kind < KINDS; kind++) memset(r.scores[kind], 0, sizeof(float) * C * c.rows);
    for (int half = 1; half < c.rows; half *= 2) {
        for (int o = 0; o < c.rows; o += 2 * half) {
            scale_level(r, o, half);
            score_level(r, o, half);
        }
        widen(rise, fall, half, c.rows);
    }
    for (int t = 0; t < c.rows; t++) {
        r.scores[0][t * C + t] = dot(r.q + t * DK, r.k + t * DK, DK);
        for (int j = 0; DELTA && j < t; j++) r.scores[1][t * C + j] *= r.beta[t];
        for (int d = t * DK; d < (t + 1) * DK; d += W) {
            at(r.read[0] + d) = at(r.q + d) * at(rise + d);
            at(r.write + d) = at(r.k + d) * at(fall + d);
            if (DELTA) at(r.read[1] + d) = at(r.k + d) * at(rise + d) * -r.beta[t];
        }
    }
    memcpy(r.fade, rise + (c.rows - 1) * DK, sizeof(float) * DK);
}
"""

CHANNEL_GRADIENTS = """\
static void begin_gradients(const Chunk&, Room&) {}
static void finish_gradients(const Chunk&, Room&) {}

// to_i = sum_j d[i by_i + j by_j] from_j over a few rows; with `more`, added to what is there.
static void mix(const float* d, int by_i, int by_j, const float* from, float* to, int few, bool more)
{
    for (int i = 0; i < few; i++)
        for (int e = 0; e < DK; e += W) {
            Vec total = more ? at(to + i * DK + e) : Vec{};
            for (int j = 0; j < few; j++) total += d[i * by_i + j * by_j] * at(from + j * DK + e);
            at(to + i * DK + e) = total;
        }
}

// A level's part of the gradients: extra 6 and 7 are of queries and of keys as rows, 8 of keys as columns.
static void pull_level(Room& r, int o, int half)
{
    const float *rise = r.extra[0], *fall = r.extra[1];
    const int middle = o + half, width = half * DK;
    float part[2][32 * DK], columns[32 * DK];
    for (int kind = 0; kind < KINDS; kind++) {
        const float *d = r.d_scores[kind] + middle * C + o;
        const float *late = r.extra[2 + kind] + middle * DK, *early = r.extra[4] + o * DK;
        if (half >= 16) {
            product<false>(d, C, early, DK, part[kind], DK, half, DK, half, 1, nullptr);
            product<true>(d, C, late, DK, columns, DK, half, DK, half, 1, kind ? r.ones : nullptr);
        } else {
            mix(d, C, 1, early, part[kind], half, false);
            mix(d, 1, C, late, columns, half, kind > 0);
        }
    }
    for (int e = 0; e < width; e += W) {
        const int early = o * DK + e, late = early + width;
        for (int kind = 0; kind < KINDS; kind++) at(r.extra[6 + kind] + late) += at(part[kind] + e) * at(rise + late);
        at(r.extra[8] + early) += at(columns + e) * at(fall + early);
    }
}

static void pull_levels(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    for (int i = 6; i < 9; i++) memset(r.extra[i], 0, sizeof(float) * KEYS);
    if (DELTA)
        for (int t = 0; t < c.rows; t++) {
            for (int j = 0; j < t; j++) r.d_scores[1][t * C + j] *= r.beta[t];
            for (int d = t * DK; d < (t + 1) * DK; d += W) at(r.d_read[1] + d) *= all(-r.beta[t]);
        }
    read_levels(x, c, head, r);
    for (int half = 1; half < c.rows; half *= 2) {
        for (int o = 0; o < c.rows; o += 2 * half) {
            scale_level(r, o, half);
            pull_level(r, o, half);
        }
        widen(r.extra[0], r.extra[1], half, c.rows);
    }
}

static void factor_gradients(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    pull_levels(x, c, head, r);
    const float *rise = r.extra[0], *fall = r.extra[1];
    float later[DK] = {}, *sums = r.extra[2], *writes = r.extra[3];
    // x dx over rows less k dk over columns is the gradient of the sums of decay. Pairs i = j do not decay: they come last.
    for (int t = 0; t < c.rows; t++) {
        const Vec own = all(r.d_scores[0][t * C + t]);
        for (int d = t * DK; d < (t + 1) * DK; d += W) {
            Vec row = at(r.extra[6] + d) + at(r.d_read[0] + d) * at(rise + d), column = at(r.extra[8] + d), key = {};
            if (DELTA) key = at(r.extra[7] + d) + at(r.d_read[1] + d) * at(rise + d);
            at(sums + d) = at(r.q + d) * row + at(r.k + d) * (key - column);
            at(writes + d) = at(r.d_write + d) * at(r.write + d);
            at(r.d_q + d) += row + own * at(r.k + d);
            at(r.d_k + d) += column + key + at(r.d_write + d) * at(fall + d) + own * at(r.q + d);
        }
    }
    for (int d = 0; d < DK; d++) later[d] = r.d_fade[d] * r.fade[d];
    for (int t = c.rows - 1; t >= 0; t--)
        for (int d = 0; d < DK; d += W) at(sums + t * DK + d) = at(later + d) += at(sums + t * DK + d);
    float earlier[DK] = {};
    for (int t = 0; t < c.length; t++) {
        for (int d = 0; d < DK; d += W) {
            at(sums + t * DK + d) += at(earlier + d);
            at(earlier + d) += at(writes + t * DK + d);
        }
        write_row(place(x.d_decay, c.row, c.start + t, head), sums + t * DK, x.d_decay.type, x.width, 1);
    }
}
"""
