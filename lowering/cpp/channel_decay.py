"""One decay per key channel inside a chunk, in C++: rows meet in blocks of 16, and later blocks meet all earlier ones."""

from __future__ import annotations

EXTRA, BACK_EXTRA = 7, 8  # operands of keys' size that it needs forward, and more of them backward

CHANNEL = """\
// A pair i > j of rows decays by the product of factors over (j, i]. Where i falls in a later block of 16 rows than j, that is
// (from the start of i's block to i) x (blocks between) x (from j to the end of its block), scales of numbers in (0, 1]:
// nothing overflows and no large sums cancel. Columns of earlier blocks are scaled on by each block that is passed. Within
// 16 rows, where no half of 8 forgets more than e^-40, one middle does for all: rows and columns on the other side of it take
// inverses; elsewhere each pair is its own product.
static const float FLOOR = 4.2483543e-18f;  // e^-40
enum { READ, READ_KEYS, WRITE, QUERIES, ROWS, COLUMNS, LOGS, RISE, FALL, UP, DOWN, D_QUERIES, D_ROWS, D_COLUMNS, D_WRITE };
enum { WHOLE, BEFORE, AFTER };  // what a block leaves, and what those before and after it do

static void share(const Call&, const Chunk&, Room&) {}

static Vec floored(Vec log) { return pick(log < all(-40.0f), all(-40.0f), log); }

// What one token leaves of each key's row of the state.
static void fades(const Call& x, int64_t b, int64_t t, int64_t head, float* fade)
{
    read_row(fade, place(x.decay, b, t, head), x.decay.type, x.width, DK, 1);
    for (int i = 0; i < DK; i += W) at(fade + i) = exp_of(at(fade + i));
}

// Where a block's rows about its middle stand: the way back reads those of all blocks again.
static int64_t middle(const Room& r, int o) { return r.d_qt ? o * DK : 0; }

// A row's queries and keys as a row and its keys as a column, decayed to and from the block's middle.
static inline void scale_row(Room& r, int64_t from, int64_t to, Vec up, Vec down)
{
    at(r.extra[QUERIES] + to) = at(r.q + from) * up;
    if (DELTA) at(r.extra[ROWS] + to) = at(r.k + from) * up;
    at(r.extra[COLUMNS] + to) = at(r.k + from) * down;
    if (!r.d_qt) return;
    at(r.extra[UP] + to) = up;
    at(r.extra[DOWN] + to) = down;
}

// W channels of 16 rows from o on: reads decayed from before them, writes decayed to after them.
static inline void scale_ends(Room& r, int64_t from, const Vec* f, float* whole)
{
    Vec product = all(1);
    for (int t = 0; t < 16; t++) {
        const int64_t i = from + t * DK;
        product *= f[t];
        at(r.read[0] + i) = at(r.q + i) * product;
        if (DELTA) at(r.read[1] + i) = at(r.k + i) * product;
        if (r.d_qt) at(r.extra[RISE] + i) = product;
    }
    at(whole) = product;
    product = all(1);
    for (int t = 15; t >= 0; t--) {
        const int64_t i = from + t * DK;
        at(r.write + i) = at(r.k + i) * product;
        if (r.d_qt) at(r.extra[FALL] + i) = product;
        product *= f[t];
    }
}

// Rows about the middle; whether their factors stay within bounds.
static inline Ints scale_middle(Room& r, int64_t from, int64_t to, const Vec* f, const Vec* inverse)
{
    Vec product = all(1), back = all(1);
    for (int t = 7; t >= 0; t--) {
        scale_row(r, from + t * DK, to + t * DK, back, product);
        product *= f[t];
        back *= inverse[t];
    }
    const Ints mild = (Ints)(product >= all(FLOOR)) & (Ints)(back >= all(FLOOR));
    product = back = all(1);
    for (int t = 8; t < 16; t++) {
        product *= f[t];
        back *= inverse[t];
        scale_row(r, from + t * DK, to + t * DK, product, back);
    }
    return mild & (Ints)(product >= all(FLOOR)) & (Ints)(back >= all(FLOOR));
}

// Decay of 16 rows from o on, and what is scaled by it; whether one middle does.
static bool read_block(Room& r, int o)
{
    Ints mild = (Ints)(all(0) == all(0));
    for (int d = 0; d < DK; d += W) {
        Vec f[16], inverse[16];
        for (int t = 0; t < 16; t++) {
            const Vec log = floored(at(r.extra[LOGS] + (o + t) * DK + d));
            f[t] = exp_of(log);
            inverse[t] = exp_of(-log);
        }
        scale_ends(r, o * DK + d, f, r.left[WHOLE][o / 16] + d);
        mild &= scale_middle(r, o * DK + d, middle(r, o) + d, f, inverse);
    }
    for (int i = 0; i < W; i++)
        if (!mild[i]) return false;
    return true;
}

// Factors of a block's rows, instead of its columns.
static void read_factors(Room& r, int o)
{
    float* to = r.extra[COLUMNS] + middle(r, o);
    for (int i = 0; i < 16 * DK; i += W) at(to + i) = exp_of(floored(at(r.extra[LOGS] + o * DK + i)));
}

// Scores within a block.
static void score_near(Room& r, int o)
{
    transpose(r.extra[COLUMNS] + middle(r, o), DK, r.qt, 16, 16, DK);
    for (int kind = 0; kind < KINDS; kind++)
        block<16>(r.extra[QUERIES + kind] + middle(r, o), DK, r.qt, 16, DK, 0,
                  Blend{r.scores[kind] + o * C + o, C, r.ones, nullptr});
}

// The same, pair by pair.
static void score_apart(Room& r, int o)
{
    const float* factors = r.extra[COLUMNS] + middle(r, o) - o * DK;
    for (int i = o; i < o + 16; i++) {
        const float *q = r.q + i * DK, *own = r.k + i * DK;
        float decay[DK];
        memcpy(decay, factors + i * DK, sizeof decay);
        r.scores[0][i * C + i] = dot(q, own, DK);
        for (int j = i - 1; j >= o; j--) {
            Vec sums[2] = {};
            for (int d = 0; d < DK; d += W) {
                const Vec k = at(r.k + j * DK + d) * at(decay + d);
                sums[0] += at(q + d) * k;
                if (DELTA) sums[1] += at(own + d) * k;
                at(decay + d) *= at(factors + j * DK + d);
            }
            for (int kind = 0; kind < KINDS; kind++) r.scores[kind][i * C + j] = sum(sums[kind]);
        }
    }
}

// Scores of a block's rows and all earlier columns, which then go on to the block's end, where its own join them.
static void score_far(Room& r, int o, int rows)
{
    for (int kind = 0; kind < KINDS; kind++) {
        const Blend end = {r.scores[kind] + o * C, C, r.ones, nullptr};
        const float* from = r.read[kind] + o * DK;
        if (o == 16) block<16>(from, DK, r.kt, C, DK, 0, end);
        if (o == 32) block<32>(from, DK, r.kt, C, DK, 0, end);
        if (o == 48) block<48>(from, DK, r.kt, C, DK, 0, end);
    }
    if (o + 16 == rows) return;
    for (int d = 0; d < DK; d++)
        for (int j = 0; j < o; j += W) at(r.kt + d * C + j) *= r.left[WHOLE][o / 16][d];
    transpose(r.write + o * DK, DK, r.kt + o, C, 16, DK);
}

// Reads and writes of blocks become those of the chunk.
static void spread(Room& r, int rows)
{
    for (int d = 0; d < DK; d += W) {
        Vec before = all(1), after = all(1);
        for (int n = 0; n < rows / 16; n++) {
            at(r.left[BEFORE][n] + d) = before;
            before *= at(r.left[WHOLE][n] + d);
        }
        at(r.fade + d) = before;
        for (int n = rows / 16 - 1; n >= 0; n--) {
            at(r.left[AFTER][n] + d) = after;
            after *= at(r.left[WHOLE][n] + d);
        }
    }
    for (int t = 0; t < rows; t++)
        for (int d = 0; d < DK; d += W) {
            const Vec before = at(r.left[BEFORE][t / 16] + d);
            at(r.read[0] + t * DK + d) *= before;
            if (DELTA) at(r.read[1] + t * DK + d) *= before;
            at(r.write + t * DK + d) *= at(r.left[AFTER][t / 16] + d);
        }
}

static void factors(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    r.read[0] = r.extra[READ];
    r.read[1] = r.read[0] + c.rows * DK;
    r.write = r.extra[WRITE];
    read_rows(r.extra[LOGS], x.decay, c, head, x.width, DK, 1);
    for (int o = 0; o < c.rows; o += 16) {
        r.mild[o / 16] = read_block(r, o);
        if (r.mild[o / 16]) {
            score_near(r, o);
        } else {
            read_factors(r, o);
            score_apart(r, o);
        }
        score_far(r, o, c.rows);
    }
    spread(r, c.rows);
    for (int t = 0; t < c.rows; t++) {
        r.weight[0][t] = r.tail[t] = 1;
        r.weight[1][t] = -r.beta[t];
        memset(r.scores[0] + t * C + t + 1, 0, sizeof(float) * (C - 1 - t < 16 ? C - 1 - t : 16));
        for (int j = 0; DELTA && j < t; j++) r.scores[1][t * C + j] *= r.beta[t];
    }
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

// Gradients of queries and of keys as rows, and of keys as columns, within a block.
static void pull_near(Room& r, int o)
{
    const int row = o * DK;
    for (int kind = 0; kind < KINDS; kind++) {
        const float* d = r.d_scores[kind] + o * C + o;
        product<false, LOWER, DK>(d, C, r.extra[COLUMNS] + row, DK, 16, 16,
                                  Weighed{r.extra[D_QUERIES + kind] + row, r.extra[UP] + row});
        product<true, UPPER, DK>(d, C, r.extra[QUERIES + kind] + row, DK, 16, 16,
                                 Weighed{r.extra[D_COLUMNS] + row, r.extra[DOWN] + row});
    }
}

// The same, pair by pair.
static void pull_apart(Room& r, int o)
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

// Rows of a block of the chunk [0, rows), each times the block's factors.
static void fade_rows(float* to, int rows, const float* factors)
{
    for (int t = 0; t < rows; t++)
        for (int d = 0; d < DK; d += W) at(to + t * DK + d) *= at(factors + d);
}

// Rows of each block from all earlier columns, which go on from block to block.
static void pull_rows(Room& r, int rows)
{
    float *columns = r.extra[WRITE], *own[2] = {r.extra[READ], r.extra[READ_KEYS]};
    for (int o = 0; o < rows; o += 16) {
        const int row = o * DK;
        for (int i = row; i < row + 16 * DK; i += W) {
            at(own[0] + i) = at(r.q + i) * at(r.extra[RISE] + i);
            if (DELTA) at(own[1] + i) = at(r.k + i) * at(r.extra[RISE] + i);
            at(columns + i) = at(r.k + i) * at(r.extra[FALL] + i);
        }
        if (!o) continue;
        for (int kind = 0; kind < KINDS; kind++)
            product<false, ALL, DK>(r.d_scores[kind] + o * C, C, columns, DK, 16, o,
                                    Weighed{r.extra[D_QUERIES + kind] + row, r.extra[RISE] + row});
        fade_rows(columns, o, r.left[WHOLE][o / 16]);
    }
}

// Columns of each block from all later rows, which go back from block to block.
static void pull_columns(Room& r, int rows)
{
    float *sums = r.extra[LOGS], *own[2] = {r.extra[READ], r.extra[READ_KEYS]};
    memset(sums, 0, sizeof(float) * rows * DK);
    for (int o = rows - 16; o > 0; o -= 16) {
        for (int kind = 0; kind < KINDS; kind++)
            product<true, ALL, DK>(r.d_scores[kind] + o * C, C, own[kind] + o * DK, DK, o, 16, Blend{sums, DK, r.ones, r.ones});
        for (int i = (o - 16) * DK; i < o * DK; i += W) at(r.extra[D_COLUMNS] + i) += at(sums + i) * at(r.extra[FALL] + i);
        fade_rows(sums, o - 16, r.left[WHOLE][o / 16 - 1]);
    }
}

// Pairs i = j do not decay: they are taken out, and come last.
static void pull_pairs(const Chunk& c, Room& r, float* own)
{
    for (int t = 0; t < c.rows; t++) {
        own[t] = r.d_scores[0][t * C + t];
        for (int kind = 0; kind < KINDS; kind++)
            memset(r.d_scores[kind] + t * C + t, 0, sizeof(float) * (C - t < 16 ? C - t : 16));
        for (int j = 0; DELTA && j < t; j++) r.d_scores[1][t * C + j] *= r.beta[t];
    }
    for (int i : {D_QUERIES, D_ROWS, D_COLUMNS}) memset(r.extra[i], 0, sizeof(float) * c.rows * DK);
    for (int o = 0; o < c.rows; o += 16) r.mild[o / 16] ? pull_near(r, o) : pull_apart(r, o);
    pull_rows(r, c.rows);
    pull_columns(r, c.rows);
}

static void factor_gradients(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    float own[C], *sums = r.extra[LOGS], *writes = r.extra[COLUMNS], *reads[2] = {r.extra[QUERIES], r.extra[ROWS]};
    pull_pairs(c, r, own);
    transpose(r.d_qt, C, reads[0], DK, DK, C);
    if (DELTA) transpose(r.d_kt, C, reads[1], DK, DK, C);
    transpose(r.extra[D_WRITE], C, writes, DK, DK, C);
    // x dx over rows less k dk over columns is the gradient of the sums of decay.
    for (int t = 0; t < c.rows; t++)
        for (int d = t * DK; d < (t + 1) * DK; d += W) {
            const Vec rise = at(r.extra[RISE] + d) * at(r.left[BEFORE][t / 16] + d - t * DK);
            const Vec fall = at(r.extra[FALL] + d) * at(r.left[AFTER][t / 16] + d - t * DK);
            const Vec q = at(r.q + d), k = at(r.k + d), written = at(writes + d) * fall;
            const Vec row = at(r.extra[D_QUERIES] + d) + at(reads[0] + d) * rise, column = at(r.extra[D_COLUMNS] + d);
            Vec key = {};
            if (DELTA) key = at(r.extra[D_ROWS] + d) + at(reads[1] + d) * rise;
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
