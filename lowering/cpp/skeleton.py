"""A chunked recurrence in C++: what all members of the family share, and the way forward.

Per chunk and value head, rows of queries and keys being `read` (and keys `write`), times a weight of each row:

    o = weight[0] read[0] S + scores[0] u;    S' = fade S + write^T (tail u)
    delta: u = (1 + scores[1])^-1 (beta v + weight[1] read[1] S);    additive: u = beta v

A kind of decay says what read, write, scores, weights and fade are (`factors`), and takes their gradients back to operands.
"""

from __future__ import annotations

ROOM = """\
constexpr int C = 64;  // tokens of a chunk

// A run of tokens with one state: a row of the batch or a packed segment, and the number of its first chunk.
struct Span { int64_t index, row, start, end, first; };

static Span span_of(const Call& x, int64_t n)
{
    if (!x.borders) return {n, n, 0, x.tokens, 0};
    int64_t first = 0;
    for (int64_t i = 0; i < n; i++) first += (x.borders[i + 1] - x.borders[i] + C - 1) / C;
    return {n, 0, x.borders[n], x.borders[n + 1], first};
}

// Rows that are worked on: few for a short chunk.
static int rows_of(int length) { return length <= 16 ? 16 : length <= 32 ? 32 : 64; }

// A chunk's place: its number, its first token, how many it has, and how many rows are worked on; rows past the last are
// zero. Before the first chunk of a run without a state there is nothing; after the last one, perhaps no gradient.
struct Chunk { int64_t row, number, start; int length, rows; bool blank, last; };

static Chunk chunk_of(const Call& x, const Span& s, int64_t i)
{
    const int64_t start = s.start + i * C;
    const int length = (int)(s.end - start < C ? s.end - start : C);
    return {s.row, s.first + i, start, length, rows_of(length), i == 0 && !x.start, start + length == s.end && !x.d_final};
}

// A thread's own memory. What has two entries is of queries and, in the delta rule, of keys.
// `turned` has tokens side by side: [channel, C].
struct Room {
    float *q, *k, *qt, *kt, *dots[2];                           // of a key head; queries and keys: one row after another
    float *read[2], *write, *scores[2], *values, *u, *w, *o;    // of a value head
    float *diagonal;                                            // inverses of the blocks of 16 on 1 + scores[1]'s diagonal
    float *d_q, *d_k, *d_qt, *d_kt, *d_dots[2];                 // of a key head
    float *d_scores[2], *d_u, *pulled, *turned[3], *before;     // of a value head; turned: of d_o, u and d_values
    float *pair, *extra[EXTRA + BACK_EXTRA + 1];                 // of one kind of decay
    float beta[C], weight[2][C], tail[C], ones[DK > C ? DK : C], minus[C], fade[DK], d_fade[DK];
    float sums[C], writes[C];
    double log[C];
    float rise[C], fall[C];
    float left[3][C / 16][DK];  // of one kind of decay: by blocks of 16 rows, for each channel
    bool mild[C / 16];
    float* state;
};

constexpr int64_t KEYS = C * DK, VALUES = C * DV, PAIRS = C * C, STATE = DK * DV;
constexpr int64_t FORWARD_ROOM = (4 + EXTRA) * KEYS + 4 * VALUES + 5 * PAIRS + 16 * C;
constexpr int64_t BACKWARD_ROOM = (4 + BACK_EXTRA) * KEYS + 6 * VALUES + 4 * PAIRS + STATE;

static float* take(float*& from, int64_t count)
{
    float* taken = from;
    from += count;
    return taken;
}

static void furnish(Room& r, float* from, int64_t heads, bool backward)
{
    r = {};
    for (float** p : {&r.q, &r.k, &r.qt, &r.kt}) *p = take(from, KEYS);
    for (int i = 0; i < EXTRA; i++) r.extra[i] = take(from, KEYS);
    for (float** p : {&r.values, &r.u, &r.w, &r.o}) *p = take(from, VALUES);
    for (float** p : {&r.dots[0], &r.dots[1], &r.scores[0], &r.scores[1], &r.pair}) *p = take(from, PAIRS);
    r.diagonal = take(from, 16 * C);
    r.state = take(from, heads * STATE);
    for (float& one : r.ones) one = 1;
    for (float& one : r.minus) one = -1;
    if (!backward) return;
    for (float** p : {&r.d_q, &r.d_k, &r.d_qt, &r.d_kt}) *p = take(from, KEYS);
    for (int i = EXTRA; i < EXTRA + BACK_EXTRA; i++) r.extra[i] = take(from, KEYS);
    for (float** p : {&r.d_u, &r.turned[0], &r.turned[1], &r.turned[2]}) *p = take(from, VALUES);
    r.pulled = take(from, 2 * VALUES);
    for (float** p : {&r.d_dots[0], &r.d_dots[1], &r.d_scores[0], &r.d_scores[1]}) *p = take(from, PAIRS);
    r.before = take(from, STATE);
}
"""

PARTS = """\
static void* place(const View& x, int64_t b, int64_t t, int64_t h)
{
    return (char*)x.data + (b * x.batch + t * x.token + h * x.head) * (x.type == F32 ? 4 : 2);
}

// Where a value head's chunk stands among all that is saved.
static int64_t lane_of(const Call& x, const Chunk& c, int64_t head) { return (c.number * x.batch + c.row) * x.heads + head; }

static float number(const View& x, int64_t b, int64_t t, int64_t h)
{
    float y = 0;
    read_row(&y, place(x, b, t, h), x.type, 1, 1, 1);
    return y;
}

static void read_rows(float* to, const View& x, const Chunk& c, int64_t h, int64_t n, int width, float scale)
{
    for (int t = 0; t < c.length; t++) read_row(to + t * width, place(x, c.row, c.start + t, h), x.type, n, width, scale);
    memset(to + c.length * width, 0, sizeof(float) * (c.rows - c.length) * width);
}

// A state of nothing is zero.
static void read_state(float* to, const float* from, int64_t width, int64_t out)
{
    for (int i = 0; i < DK; i++)
        if (from && i < width)
            read_row(to + i * DV, from + i * out, F32, out, DV, 1);
        else
            memset(to + i * DV, 0, sizeof(float) * DV);
}

static void write_state(float* to, const float* from, int64_t width, int64_t out)
{
    if (out == DV)
        memcpy(to, from, sizeof(float) * width * out);
    else
        for (int64_t i = 0; i < width; i++) memcpy(to + i * out, from + i * DV, sizeof(float) * out);
}

// to = weight[row] from
static void weigh(float* to, const float* from, const float* weight, int rows, int width)
{
    for (int t = 0; t < rows; t++)
        for (int d = 0; d < width; d += W) at(to + t * width + d) = at(from + t * width + d) * weight[t];
}

// Inverses of 1 + a's blocks of 16 on the diagonal, of a strictly lower a: forward substitution, all blocks side by side.
static void invert(const float* a, float* x, int rows)
{
    memset(x, 0, sizeof(float) * 16 * rows);
    for (int i = 0; i < 16; i++)
        for (int o = 0; o < rows; o += 16) {
            float *block = x + o * 16, *row = block + i * 16;
            const float* line = a + (o + i) * C + o;
            for (int d = 0; d < 16; d += W) {
                Vec sum = {};
                for (int j = 0; j < i; j++) sum -= line[j] * at(block + j * 16 + d);
                at(row + d) = sum;
            }
            row[i] = 1;
        }
}

// u = (1 + a)^-1 x and w = tail u, block row by block row; x is used up.
struct Solved {
    float *u, *w;
    const float* tail;
    inline void operator()(int i, int j, Vec sum) const
    {
        at(u + i * DV + j) = sum;
        at(w + i * DV + j) = sum * tail[i];
    }
};

static void solve(Room& r, const float* a, float* x, float* u, int rows)
{
    for (int o = 0; o < rows; o += 16) {
        if (o) product<false, ALL, DV>(a + o * C, C, u, DV, 16, o, Blend{x + o * DV, DV, r.minus, r.ones});
        const Solved end = {u + o * DV, r.w + o * DV, r.tail + o};
        product<false, LOWER, DV>(r.diagonal + o * 16, 16, x + o * DV, DV, 16, 16, end);
    }
}

// Gates of a value head's chunk. Beta is kept off zero: backward divides by it.
static void read_beta(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    for (int t = 0; t < C; t++) {
        const float beta = x.beta.data && t < c.length ? number(x.beta, c.row, c.start + t, head) : 1.0f;
        r.beta[t] = fabsf(beta) < 1e-20f ? 1e-20f : beta;
    }
}

static void share(const Call& x, const Chunk& c, Room& r);

static void read_keys(const Call& x, const Chunk& c, int64_t key, Room& r)
{
    r.k = r.q + c.rows * DK;
    if (x.q.data) read_rows(r.q, x.q, c, key, x.width, DK, (float)x.scale);
    else memset(r.q, 0, sizeof(float) * c.rows * DK);
    read_rows(r.k, x.k, c, key, x.width, DK, 1);
    share(x, c, r);
}
"""

FORWARD = """\
static void save(const Call& x, const Chunk& c, int64_t head, const float* u)
{
    float* to = x.u + lane_of(x, c, head) * C * x.out;
    for (int t = 0; t < c.rows && u != to; t++) memcpy(to + t * x.out, u + t * DV, sizeof(float) * x.out);
    memset(to + c.rows * x.out, 0, sizeof(float) * (C - c.rows) * x.out);
}

// u of a chunk and w = tail u. What is saved is worked out where it is kept, if its rows need no padding.
static float* updates(const Call& x, const Chunk& c, int64_t head, const float* state, Room& r)
{
    read_rows(r.values, x.v, c, head, x.out, DV, 1);
    if (!DELTA || c.blank)
        weigh(r.values, r.values, r.beta, c.rows, DV);
    else
        product<false, ALL, DV>(r.read[1], DK, state, DV, c.rows, DK, Blend{r.values, DV, r.weight[1], r.beta});
    if (!DELTA) {
        weigh(r.w, r.values, r.tail, c.rows, DV);
        return r.values;
    }
    float* u = x.states && x.out == DV ? x.u + lane_of(x, c, head) * C * DV : r.u;
    invert(r.scores[1], r.diagonal, c.rows);
    solve(r, r.scores[1], r.values, u, c.rows);
    if (x.states) save(x, c, head, u);
    return u;
}

static void read_out(const Call& x, const Chunk& c, int64_t head, const float* state, const float* u, Room& r)
{
    const bool direct = x.o.type == F32 && x.out == DV && c.length == c.rows;
    float* o = direct ? (float*)place(x.o, c.row, c.start, head) : r.o;
    const int ld = direct ? (int)x.o.token : DV;
    if (!c.blank) product<false, ALL, DV>(r.read[0], DK, state, DV, c.rows, DK, Blend{o, ld, r.weight[0], nullptr});
    product<false, LOWER, DV>(r.scores[0], C, u, DV, c.rows, c.rows, Blend{o, ld, r.ones, c.blank ? nullptr : r.ones});
    for (int t = 0; t < c.length && !direct; t++)
        write_row(place(x.o, c.row, c.start + t, head), o + t * DV, x.o.type, x.out, 1);
}

static void step(const Call& x, const Chunk& c, int64_t head, float* state, Room& r)
{
    read_beta(x, c, head, r);
    factors(x, c, head, r);
    if (x.states) write_state(x.states + lane_of(x, c, head) * x.width * x.out, state, x.width, x.out);
    const float* u = updates(x, c, head, state, r);
    if (x.o.data) read_out(x, c, head, state, u, r);
    product<true, ALL, DV>(r.write, DK, r.w, DV, DK, c.rows, Blend{state, DV, r.ones, r.fade});
}

// Value heads [first, first + together) of a key head, over a run of tokens.
static void walk(const Call& x, const Span& s, int64_t key, int64_t first, Room& r)
{
    const int64_t size = x.width * x.out, ends = (s.index * x.heads + first) * size;
    for (int64_t h = 0; h < x.together; h++)
        read_state(r.state + h * STATE, x.start ? x.start + ends + h * size : nullptr, x.width, x.out);
    for (int64_t i = 0; i * C < s.end - s.start; i++) {
        const Chunk c = chunk_of(x, s, i);
        read_keys(x, c, key, r);
        for (int64_t h = 0; h < x.together; h++) step(x, c, first + h, r.state + h * STATE, r);
    }
    for (int64_t h = 0; h < x.together; h++) write_state(x.final + ends + h * size, r.state + h * STATE, x.width, x.out);
}
"""
