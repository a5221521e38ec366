"""One decay per key channel inside a chunk, in C++: pairs of rows meet in blocks of 16, and those in halves of the chunk."""

from __future__ import annotations

EXTRA, BACK_EXTRA = 9, 6  # operands of keys' size that it needs forward, and more of them backward

CHANNEL = """\
// A pair i > j of rows decays by the product of factors over (j, i]. Where i falls in a later half and j in the earlier, that
// is (from the middle to i) x (from j to the middle), row scales of numbers in (0, 1]: nothing overflows and no large sums
// cancel. Within 16 rows, where no half of 8 forgets more than e^-40, one middle does for all: rows and columns on the other
// side of it take inverses; elsewhere each pair is its own product.
static const float FLOOR = 4.2483543e-18f;  // e^-40
enum { RISE, FALL, READ, READ_KEYS, WRITE, QUERIES, ROWS, COLUMNS, LOGS, UP, DOWN, D_QUERIES, D_ROWS, D_COLUMNS, D_WRITE };

static void share(const Call&, const Chunk&, Room&) {}

static Vec floored(Vec log) { return pick(log < all(-40.0f), all(-40.0f), log); }

// What one token leaves of each key's row of the state.
static void fades(const Call& x, int64_t b, int64_t t, int64_t head, float* fade)
{
    read_row(fade, place(x.decay, b, t, head), x.decay.type, x.width, DK, 1);
    for (int i = 0; i < DK; i += W) at(fade + i) = exp_of(at(fade + i));
}

// A row's queries and keys as a row and its keys as a column, decayed to and from the block's middle.
static inline void scale_row(Room& r, int64_t i, Vec up, Vec down)
{
    at(r.extra[QUERIES] + i) = at(r.q + i) * up;
    if (DELTA) at(r.extra[ROWS] + i) = at(r.k + i) * up;
    at(r.extra[COLUMNS] + i) = at(r.k + i) * down;
    if (!r.d_qt) return;
    at(r.extra[UP] + i) = up;
    at(r.extra[DOWN] + i) = down;
}

// Decay of 16 rows from o on, from before them and to after them, and what is scaled by it; whether one middle does.
static bool read_block(Room& r, int o)
{
    Ints mild = (Ints)(all(0) == all(0));
    for (int d = 0; d < DK; d += W) {
        Vec f[16], inverse[16], product = all(1), back = all(1);
        const int64_t at_row = (int64_t)o * DK + d;
        for (int t = 0; t < 16; t++) {
            const Vec log = floored(at(r.extra[LOGS] + at_row + t * DK));
            f[t] = exp_of(log);
            inverse[t] = exp_of(-log);
            at(r.extra[RISE] + at_row + t * DK) = product *= f[t];
        }
        product = all(1);
        for (int t = 15; t >= 0; t--) {
            at(r.extra[FALL] + at_row + t * DK) = product;
            product *= f[t];
        }
        product = all(1);
        for (int t = 7; t >= 0; t--) {
            scale_row(r, at_row + t * DK, back, product);
            product *= f[t];
            back *= inverse[t];
        }
        mild &= (Ints)(product >= all(FLOOR)) & (Ints)(back >= all(FLOOR));
        product = back = all(1);
        for (int t = 8; t < 16; t++) {
            product *= f[t];
            back *= inverse[t];
            scale_row(r, at_row + t * DK, product, back);
        }
        mild &= (Ints)(product >= all(FLOOR)) & (Ints)(back >= all(FLOOR));
    }
    for (int i = 0; i < W; i++)
        if (!mild[i]) return false;
    return true;
}

// Factors of a block's rows, instead of its columns.
static void read_factors(Room& r, int o)
{
    for (int i = o * DK; i < (o + 16) * DK; i += W) at(r.extra[COLUMNS] + i) = exp_of(floored(at(r.extra[LOGS] + i)));
}

// From halves of `half` rows to halves of twice as many.
static void widen(float* rise, float* fall, int half, int rows)
{
    for (int o = 0; o < rows; o += 2 * half)
        for (int d = 0; d < DK; d += W) {
            const Vec later = at(rise + (o + 2 * half - 1) * DK + d), earlier = at(rise + (o + half - 1) * DK + d);
            for (int t = o; t < o + half; t++) {
                at(fall + t * DK + d) *= later;
                at(rise + (t + half) * DK + d) *= earlier;
            }
        }
}

// Rows of a level's halves from o on: queries and keys of the later, keys of the earlier as columns.
static void scale_level(Room& r, int o, int half)
{
    const float *rise = r.extra[RISE], *fall = r.extra[FALL];
    for (int i = o * DK; i < (o + half) * DK; i += W) {
        const int j = i + half * DK;
        at(r.extra[QUERIES] + j) = at(r.q + j) * at(rise + j);
        if (DELTA) at(r.extra[ROWS] + j) = at(r.k + j) * at(rise + j);
        at(r.extra[COLUMNS] + i) = at(r.k + i) * at(fall + i);
    }
}

// Visits blocks of 16 rows, then halves of 16 and of 32.
template <class Visit> static void over_levels(const Call& x, const Chunk& c, int64_t head, Room& r, const Visit& visit)
{
    read_rows(r.extra[LOGS], x.decay, c, head, x.width, DK, 1);
    for (int o = 0; o < c.rows; o += 16) {
        const bool mild = read_block(r, o);
        if (!mild) read_factors(r, o);
        visit.block(o, mild);
    }
    for (int half = 16; half < c.rows; half *= 2) {
        for (int o = 0; o < c.rows; o += 2 * half) {
            scale_level(r, o, half);
            visit.level(o, half);
        }
        widen(r.extra[RISE], r.extra[FALL], half, c.rows);
    }
}

struct Score {
    Room& r;

    void block(int o, bool mild) const
    {
        if (!mild) return apart(o);
        transpose(r.extra[COLUMNS] + o * DK, DK, r.kt, 16, 16, DK);
        for (int kind = 0; kind < KINDS; kind++)
            ::block<16>(r.extra[QUERIES + kind] + o * DK, DK, r.kt, 16, DK, 0,
                        Blend{r.scores[kind] + o * C + o, C, r.ones, nullptr});
    }

    // Pair by pair.
    void apart(int o) const
    {
        for (int i = o; i < o + 16; i++) {
            const float *q = r.q + i * DK, *own = r.k + i * DK;
            float decay[DK];
            memcpy(decay, r.extra[COLUMNS] + i * DK, sizeof decay);
            r.scores[0][i * C + i] = dot(q, own, DK);
            for (int j = i - 1; j >= o; j--) {
                Vec sums[2] = {};
                for (int d = 0; d < DK; d += W) {
                    const Vec k = at(r.k + j * DK + d) * at(decay + d);
                    sums[0] += at(q + d) * k;
                    if (DELTA) sums[1] += at(own + d) * k;
                    at(decay + d) *= at(r.extra[COLUMNS] + j * DK + d);
                }
                for (int kind = 0; kind < KINDS; kind++) r.scores[kind][i * C + j] = sum(sums[kind]);
            }
        }
    }

    void level(int o, int half) const
    {
        transpose(r.extra[COLUMNS] + o * DK, DK, r.kt, C, half, DK);
        for (int kind = 0; kind < KINDS; kind++)
            for (int i = o + half; i < o + 2 * half; i += 16) {
                const Blend end = {r.scores[kind] + i * C + o, C, r.ones, nullptr};
                const float* rows = r.extra[QUERIES + kind] + i * DK;
                if (half == 16) ::block<16>(rows, DK, r.kt, C, DK, 0, end);
                else ::block<32>(rows, DK, r.kt, C, DK, 0, end);
            }
    }
};

static void factors(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    r.read[0] = r.extra[READ];
    r.read[1] = r.read[0] + c.rows * DK;
    r.write = r.extra[WRITE];
    over_levels(x, c, head, r, Score{r});
    const float *rise = r.extra[RISE], *fall = r.extra[FALL];
    for (int t = 0; t < c.rows; t++) {
        r.weight[0][t] = r.tail[t] = 1;
        r.weight[1][t] = -r.beta[t];
        memset(r.scores[0] + t * C + t + 1, 0, sizeof(float) * (C - 1 - t < 16 ? C - 1 - t : 16));
        for (int j = 0; DELTA && j < t; j++) r.scores[1][t * C + j] *= r.beta[t];
        for (int d = t * DK; d < (t + 1) * DK; d += W) {
            at(r.read[0] + d) = at(r.q + d) * at(rise + d);
            at(r.write + d) = at(r.k + d) * at(fall + d);
            if (DELTA) at(r.read[1] + d) = at(r.k + d) * at(rise + d);
        }
    }
    memcpy(r.fade, rise + (c.rows - 1) * DK, sizeof(float) * DK);
}
"""

CHANNEL_GRADIENTS = """\
static void begin_gradients(const Chunk& c, Room& r)
{
    for (float* d : {r.d_q, r.d_k}) memset(d, 0, sizeof(float) * c.rows * DK);
}

static void finish_gradients(const Chunk&, Room&) {}

static void begin_pulls(Room& r)
{
    for (float* d : {r.d_qt, r.d_kt, r.extra[D_WRITE]}) memset(d, 0, sizeof(float) * KEYS);
}

// What the state gives to the gradients of queries that read, keys that read and keys that write.
struct Pull {
    const float* weight;
    float* to;
    inline void operator()(int d, int t, Vec sum) const { at(to + d * C + t) = sum * at(weight + t); }
};

static Pull pull(Room& r, int what)
{
    float* to[] = {r.d_qt, r.d_kt, r.extra[D_WRITE]};
    return {what == 1 ? r.weight[1] : r.tail, to[what]};
}

struct Weighed {
    float* to;
    const float* weight;
    inline void operator()(int i, int j, Vec sum) const { at(to + i * DK + j) += sum * at(weight + i * DK + j); }
};

// Gradients of queries and of keys as rows, and of keys as columns.
struct Back {
    Room& r;

    void block(int o, bool mild) const
    {
        if (!mild) return apart(o);
        const int row = o * DK;
        for (int kind = 0; kind < KINDS; kind++) {
            const float* d = r.d_scores[kind] + o * C + o;
            product<false, LOWER, DK>(d, C, r.extra[COLUMNS] + row, DK, 16, 16,
                                      Weighed{r.extra[D_QUERIES + kind] + row, r.extra[UP] + row});
            product<true, UPPER, DK>(d, C, r.extra[QUERIES + kind] + row, DK, 16, 16,
                                     Weighed{r.extra[D_COLUMNS] + row, r.extra[DOWN] + row});
        }
    }

    void apart(int o) const
    {
        for (int i = o; i < o + 16; i++) {
            float decay[DK];
            memcpy(decay, r.extra[COLUMNS] + i * DK, sizeof decay);
            for (int j = i - 1; j >= o; j--)
                for (int d = 0; d < DK; d += W) {
                    const int own = i * DK + d, other = j * DK + d;
                    const Vec f = at(decay + d), k = at(r.k + other) * f;
                    const float of_q = r.d_scores[0][i * C + j], of_k = DELTA ? r.d_scores[1][i * C + j] : 0;
                    at(r.extra[D_QUERIES] + own) += k * of_q;
                    at(r.extra[D_ROWS] + own) += k * of_k;
                    at(r.extra[D_COLUMNS] + other) += (at(r.q + own) * of_q + at(r.k + own) * of_k) * f;
                    at(decay + d) = f * at(r.extra[COLUMNS] + other);
                }
        }
    }

    void level(int o, int half) const
    {
        const int early = o * DK, late = (o + half) * DK;
        for (int kind = 0; kind < KINDS; kind++) {
            const float* d = r.d_scores[kind] + (o + half) * C + o;
            product<false, ALL, DK>(d, C, r.extra[COLUMNS] + early, DK, half, half,
                                    Weighed{r.extra[D_QUERIES + kind] + late, r.extra[RISE] + late});
            product<true, ALL, DK>(d, C, r.extra[QUERIES + kind] + late, DK, half, half,
                                   Weighed{r.extra[D_COLUMNS] + early, r.extra[FALL] + early});
        }
    }
};

// Pairs i = j do not decay: they are taken out, and come last.
static void pull_pairs(const Call& x, const Chunk& c, int64_t head, Room& r, float* own)
{
    for (int t = 0; t < c.rows; t++) {
        own[t] = r.d_scores[0][t * C + t];
        for (int kind = 0; kind < KINDS; kind++)
            memset(r.d_scores[kind] + t * C + t, 0, sizeof(float) * (C - t < 16 ? C - t : 16));
        for (int j = 0; DELTA && j < t; j++) r.d_scores[1][t * C + j] *= r.beta[t];
    }
    for (int i : {D_QUERIES, D_ROWS, D_COLUMNS}) memset(r.extra[i], 0, sizeof(float) * c.rows * DK);
    over_levels(x, c, head, r, Back{r});
}

static void factor_gradients(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    float own[C], *sums = r.extra[LOGS], *writes = r.extra[COLUMNS], *reads[2] = {r.extra[QUERIES], r.extra[ROWS]};
    pull_pairs(x, c, head, r, own);
    transpose(r.d_qt, C, reads[0], DK, DK, C);
    if (DELTA) transpose(r.d_kt, C, reads[1], DK, DK, C);
    transpose(r.extra[D_WRITE], C, writes, DK, DK, C);
    const float *rise = r.extra[RISE], *fall = r.extra[FALL];
    // x dx over rows less k dk over columns is the gradient of the sums of decay.
    for (int t = 0; t < c.rows; t++)
        for (int d = t * DK; d < (t + 1) * DK; d += W) {
            const Vec q = at(r.q + d), k = at(r.k + d), written = at(writes + d) * at(fall + d);
            const Vec row = at(r.extra[D_QUERIES] + d) + at(reads[0] + d) * at(rise + d), column = at(r.extra[D_COLUMNS] + d);
            Vec key = {};
            if (DELTA) key = at(r.extra[D_ROWS] + d) + at(reads[1] + d) * at(rise + d);
            at(sums + d) = q * row + k * (key - column);
            at(writes + d) = written * k;
            at(r.d_q + d) += row + k * own[t];
            at(r.d_k + d) += column + key + written + q * own[t];
        }
    for (int d = 0; d < DK; d += W) {
        // A row's decay is in every later row's sum, and in what every earlier row writes to the chunk's end.
        Vec later = at(r.d_fade + d) * at(r.fade + d), earlier = {};
        for (int t = c.rows - 1; t >= 0; t--) at(sums + t * DK + d) = later += at(sums + t * DK + d);
        for (int t = 0; t < c.length; t++) {
            at(sums + t * DK + d) += earlier;
            earlier += at(writes + t * DK + d);
        }
    }
    for (int t = 0; t < c.length; t++)
        write_row(place(x.d_decay, c.row, c.start + t, head), sums + t * DK, x.d_decay.type, x.width, 1);
}
"""
