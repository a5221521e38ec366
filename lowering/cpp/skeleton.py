"""A chunked recurrence in C++: what all members of the family share, forward and backward.

Per chunk and value head:   o = read[0] S + scores[0] u;   S' = fade S + write^T u
delta:   u = solve (values + read[1] S), solve = (1 + scores[1])^-1;   additive:   u = values;   values = beta v.
A kind of decay says what scores, read, write and fade are (`factors`), and takes their gradients back to its operands.
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

// A chunk's place: its number, its first token, how many it has, and how many rows are worked on; rows past the last are zero.
struct Chunk { int64_t row, number, start; int length, rows; };

static Chunk chunk_of(const Span& s, int64_t i)
{
    const int64_t start = s.start + i * C;
    const int length = (int)(s.end - start < C ? s.end - start : C);
    return {s.row, s.first + i, start, length, rows_of(length)};
}

// A thread's own memory. What has two entries is of queries and, in the delta rule, of keys.
struct Room {
    float *q, *k, *kt, *dots[2];                                    // of a key head
    float *read[2], *scores[2], *write, *solve, *u, *values, *o;    // of a value head
    float *d_q, *d_k, *d_dots[2];                                   // of a key head
    float *d_read[2], *d_scores[2], *d_write, *d_u, *turned, *u_turned, *before;
    float *pair, *extra[10];                                        // of one kind of decay
    float beta[C], fade[DK], d_fade[DK];
    float ones[DK > C ? DK : C];
    double log[C];
    float rise[C], fall[C];
    float* state;
};

constexpr int64_t KEYS = C * DK, VALUES = C * DV, PAIRS = C * C, STATE = DK * DV;
constexpr int64_t FORWARD_ROOM = 12 * KEYS + 3 * VALUES + 6 * PAIRS;
constexpr int64_t BACKWARD_ROOM = 9 * KEYS + 2 * VALUES + 4 * PAIRS + 2 * STATE;

static float* take(float*& from, int64_t count)
{
    float* taken = from;
    from += count;
    return taken;
}

static void furnish(Room& r, float* from, int64_t heads, bool backward)
{
    for (float** p : {&r.q, &r.k, &r.kt, &r.read[0], &r.read[1], &r.write}) *p = take(from, KEYS);
    for (int i = 0; i < 6; i++) r.extra[i] = take(from, KEYS);
    for (float** p : {&r.u, &r.values, &r.o}) *p = take(from, VALUES);
    for (float** p : {&r.dots[0], &r.dots[1], &r.scores[0], &r.scores[1], &r.solve, &r.pair}) *p = take(from, PAIRS);
    for (float& one : r.ones) one = 1;
    r.state = take(from, heads * STATE);
    if (!backward) return;
    for (float** p : {&r.d_q, &r.d_k, &r.d_read[0], &r.d_read[1], &r.d_write}) *p = take(from, KEYS);
    for (int i = 6; i < 10; i++) r.extra[i] = take(from, KEYS);
    for (float** p : {&r.d_u, &r.u_turned}) *p = take(from, VALUES);
    for (float** p : {&r.d_dots[0], &r.d_dots[1], &r.d_scores[0], &r.d_scores[1]}) *p = take(from, PAIRS);
    for (float** p : {&r.turned, &r.before}) *p = take(from, STATE);
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
    for (int64_t i = 0; i < width; i++) memcpy(to + i * out, from + i * DV, sizeof(float) * out);
}

// to = weight[row] from
static void weigh(float* to, const float* from, const float* weight, int rows, int width, float sign)
{
    for (int t = 0; t < rows; t++)
        for (int d = 0; d < width; d += W) at(to + t * width + d) = at(from + t * width + d) * (sign * weight[t]);
}

// a b where a is lower triangular: no column after the row's own block is read.
static void lower(const float* a, const float* b, int width, float* c, int rows, float alpha, const float* keep)
{
    for (int i = 0; i < rows; i += 32) {
        const int few = rows - i < 32 ? rows - i : 32;
        product<false>(a + i * C, C, b, width, c + i * width, width, few, width, i + few, alpha, keep);
    }
}

// a^T b where a is lower triangular
static void lower_turned(const float* a, const float* b, int width, float* c, int rows, float alpha, const float* keep)
{
    for (int i = 0; i < rows; i += 32) {
        const int few = rows - i < 32 ? rows - i : 32;
        product<true>(a + i * C + i, C, b + i * width, width, c + i * width, width, few, width, rows - i, alpha, keep);
    }
}

// The lower triangle of a b, and what stands beside it in its blocks; b is [depth, C].
static void pairs(const float* a, int depth, const float* b, float* c, int rows, float alpha)
{
    for (int i = 0; i < rows; i += 32) {
        const int few = rows - i < 32 ? rows - i : 32;
        product<false>(a + i * depth, depth, b, C, c + i * C, C, few, i + few, depth, alpha, nullptr);
    }
}

// x = (1 + a)^-1 of a strictly lower a: forward substitution in blocks of 16, then block row by block row.
static void invert(const float* a, float* x, int rows)
{
    float part[16 * C];
    for (int i = 0; i < rows; i++) memset(x + i * C, 0, sizeof(float) * C);
    for (int o = 0; o < rows; o += 16) {
        for (int i = o; i < o + 16; i++) {
            for (int d = 0; d < 16; d += W) {
                Vec row = {};
                for (int j = o; j < i; j++) row -= a[i * C + j] * at(x + j * C + o + d);
                at(x + i * C + o + d) = row;
            }
            x[i * C + i] = 1;
        }
        if (o == 0) continue;
        product<false>(a + o * C, C, x, C, part, C, 16, o, o, 1, nullptr);
        product<false>(x + o * C + o, C, part, C, x + o * C, C, 16, o, 16, -1, nullptr);
    }
}

// Gates and values of a value head's chunk. Beta is kept off zero: backward divides by it.
static void read_values(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    for (int t = 0; t < c.rows; t++) {
        const float beta = x.beta.data && t < c.length ? number(x.beta, c.row, c.start + t, head) : 1.0f;
        r.beta[t] = fabsf(beta) < 1e-20f ? 1e-20f : beta;
    }
    read_rows(r.values, x.v, c, head, x.out, DV, 1);
    weigh(r.values, r.values, r.beta, c.rows, DV, 1);
}

static void read_keys(const Call& x, const Chunk& c, int64_t key, Room& r)
{
    read_rows(r.q, x.q, c, key, x.width, DK, (float)x.scale);
    read_rows(r.k, x.k, c, key, x.width, DK, 1);
    share(c, r);
}
"""

FORWARD = """\
static void save(const Call& x, const Chunk& c, int64_t head, const Room& r)
{
    const int64_t at = lane_of(x, c, head);
    float *u = x.u + at * C * x.out, *solve = x.solve + at * PAIRS;
    for (int t = 0; t < c.rows; t++) memcpy(u + t * x.out, r.u + t * DV, sizeof(float) * x.out);
    for (int t = 0; t < c.rows; t++) memcpy(solve + t * C, r.solve + t * C, sizeof(float) * C);
    memset(u + c.rows * x.out, 0, sizeof(float) * (C - c.rows) * x.out);
    memset(solve + c.rows * C, 0, sizeof(float) * (C - c.rows) * C);
    for (int t = c.rows; t < C; t++) solve[t * C + t] = 1;
}

static void step(const Call& x, const Chunk& c, int64_t head, float* state, Room& r)
{
    read_values(x, c, head, r);
    factors(x, c, head, r);
    if (x.states) write_state(x.states + lane_of(x, c, head) * x.width * x.out, state, x.width, x.out);
    const float* u = r.values;
    if (DELTA) {
        product<false>(r.read[1], DK, state, DV, r.values, DV, c.rows, DV, DK, 1, r.ones);
        invert(r.scores[1], r.solve, c.rows);
        lower(r.solve, r.values, DV, r.u, c.rows, 1, nullptr);
        if (x.states) save(x, c, head, r);
        u = r.u;
    }
    product<false>(r.read[0], DK, state, DV, r.o, DV, c.rows, DV, DK, 1, nullptr);
    lower(r.scores[0], u, DV, r.o, c.rows, 1, r.ones);
    for (int t = 0; t < c.length; t++) write_row(place(x.o, c.row, c.start + t, head), r.o + t * DV, x.o.type, x.out, 1);
    product<true>(r.write, DK, u, DV, state, DV, DK, DV, c.rows, 1, r.fade);
}

// Value heads [first, first + together) of a key head, over a run of tokens.
static void walk(const Call& x, const Span& s, int64_t key, int64_t first, Room& r)
{
    const int64_t size = x.width * x.out, ends = (s.index * x.heads + first) * size;
    for (int64_t h = 0; h < x.together; h++)
        read_state(r.state + h * STATE, x.start ? x.start + ends + h * size : nullptr, x.width, x.out);
    for (int64_t i = 0; i * C < s.end - s.start; i++) {
        const Chunk c = chunk_of(s, i);
        read_keys(x, c, key, r);
        for (int64_t h = 0; h < x.together; h++) step(x, c, first + h, r.state + h * STATE, r);
    }
    for (int64_t h = 0; h < x.together; h++) write_state(x.final + ends + h * size, r.state + h * STATE, x.width, x.out);
}
"""

BACKWARD = """\
// The state's gradient from after a chunk to before it, and on its way those of what made the chunk.
static void step_back(const Call& x, const Chunk& c, int64_t head, float* after, Room& r)
{
    const int64_t at = lane_of(x, c, head);
    read_values(x, c, head, r);
    factors(x, c, head, r);
    const float *u = r.values, *solve = x.solve + at * PAIRS, *state = x.states + at * STATE;
    if (DELTA) {
        for (int t = 0; t < c.rows; t++) read_row(r.u + t * DV, x.u + (at * C + t) * x.out, F32, x.out, DV, 1);
        u = r.u;
    }
    if (x.width != DK || x.out != DV) {
        read_state(r.before, x.states + at * x.width * x.out, x.width, x.out);
        state = r.before;
    }
    if (x.d_o.data)
        read_rows(r.o, x.d_o, c, head, x.out, DV, 1);
    else
        memset(r.o, 0, sizeof(float) * c.rows * DV);
    lower_turned(r.scores[0], r.o, DV, r.d_u, c.rows, 1, nullptr);
    product<false>(r.write, DK, after, DV, r.d_u, DV, c.rows, DV, DK, 1, r.ones);
    transpose(after, DV, r.turned, DK, DK, DV);
    product<false>(u, DV, r.turned, DK, r.d_write, DK, c.rows, DK, DV, 1, nullptr);
    for (int i = 0; i < DK; i++) r.d_fade[i] = dot(state + i * DV, after + i * DV, DV);
    product<true>(r.read[0], DK, r.o, DV, after, DV, DK, DV, c.rows, 1, r.fade);
    transpose(state, DV, r.turned, DK, DK, DV);
    transpose(u, DV, r.u_turned, C, c.rows, DV);
    product<false>(r.o, DV, r.turned, DK, r.d_read[0], DK, c.rows, DK, DV, 1, nullptr);
    pairs(r.o, DV, r.u_turned, r.d_scores[0], c.rows, 1);
    float* values = r.d_u;
    if (DELTA) {
        values = r.o;
        lower_turned(solve, r.d_u, DV, values, c.rows, 1, nullptr);
        product<true>(r.read[1], DK, values, DV, after, DV, DK, DV, c.rows, 1, r.ones);
        product<false>(values, DV, r.turned, DK, r.d_read[1], DK, c.rows, DK, DV, 1, nullptr);
        pairs(values, DV, r.u_turned, r.d_scores[1], c.rows, -1);
    }
    for (int t = 0; t < c.length; t++) {
        // values . u is what the gradient of the delta rule's scores has on its diagonal.
        const float d_beta = dot(values + t * DV, u + t * DV, DV) / r.beta[t];
        if (x.beta.data) write_row(place(x.d_beta, c.row, c.start + t, head), &d_beta, x.d_beta.type, 1, 1);
        write_row(place(x.d_v, c.row, c.start + t, head), values + t * DV, x.d_v.type, x.out, r.beta[t]);
    }
    factor_gradients(x, c, head, r);
}

static void walk_back(const Call& x, const Span& s, int64_t key, int64_t first, Room& r)
{
    const int64_t size = x.width * x.out, ends = (s.index * x.heads + first) * size;
    const int64_t part = (first - key * (x.heads / x.keys)) / x.together * x.part;
    View d_q = x.d_q, d_k = x.d_k;
    d_q.data = (char*)d_q.data + part * 4;
    d_k.data = (char*)d_k.data + part * 4;
    for (int64_t h = 0; h < x.together; h++)
        read_state(r.state + h * STATE, x.d_final ? x.d_final + ends + h * size : nullptr, x.width, x.out);
    for (int64_t i = (s.end - s.start + C - 1) / C - 1; i >= 0; i--) {
        const Chunk c = chunk_of(s, i);
        read_keys(x, c, key, r);
        memset(r.d_q, 0, sizeof(float) * c.rows * DK);
        memset(r.d_k, 0, sizeof(float) * c.rows * DK);
        begin_gradients(c, r);
        for (int64_t h = 0; h < x.together; h++) step_back(x, c, first + h, r.state + h * STATE, r);
        finish_gradients(c, r);
        for (int t = 0; t < c.length; t++) {
            write_row(place(d_q, c.row, c.start + t, key), r.d_q + t * DK, d_q.type, x.width, (float)x.scale);
            write_row(place(d_k, c.row, c.start + t, key), r.d_k + t * DK, d_k.type, x.width, 1);
        }
    }
    for (int64_t h = 0; h < x.together; h++) write_state(x.d_start + ends + h * size, r.state + h * STATE, x.width, x.out);
}
"""
