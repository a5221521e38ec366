"""The C++ that attention forward and backward share: operands as panels, products of panels, and what queries see."""

from __future__ import annotations

STRUCTURES = """\
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// An operand or result [batch, tokens, heads, width]: elements side by side, the rest by strides.
struct View {
    void* data;
    int64_t type, batch, token, head;
};
// Everything is as wide as a pointer. Query i stands at `place` + i; a window of 0 is none; `borders` are packed segments'
// ends, of queries and keys alike; `lengths` the keys that each row has.
struct Call {
    View q, k, v, o, d_o, d_q, d_k, d_v;
    float *lse, *sinks, *bias, *d_bias, *d_sinks, *packed, *partial;
    const int64_t *borders, *lengths;
    int64_t segments, place, causal, window, batch, queries, keys, heads, groups, width, out, reach, splits, threads;
    double scale, cap;
};
enum { PLAIN, CAPPED, BIASED };
constexpr int N = 64, BLOCK = N * N;  // queries and keys of a block, and columns of a panel; a panel's numbers
constexpr float LOG2E = 1.44269504f, NEVER = -1e30f;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t blocks_of(int64_t n) { return (n + N - 1) / N; }

// Channels of keys and of values, padded to vectors, and their panels.
struct Heads {
    int dk, dv, pk, pv;

    explicit Heads(const Call& x)
        : dk((int)(x.width + 15) / 16 * 16), dv((int)(x.out + 15) / 16 * 16), pk((dk + N - 1) / N), pv((dv + N - 1) / N)
    {
    }
    int both() const { return (pk + pv) * BLOCK; }
};
"""

NUMBERS = """\
constexpr int64_t F16 = 2;

// Halves are scaled as floats, which makes subnormal ones normal.
static inline float from_half(uint16_t x)
{
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7FFF;
    const uint32_t bits = rest < 0x7C00 ? rest << 13 : (rest << 13) | 0x7F800000;
    float y;
    memcpy(&y, &bits, 4);
    y = rest < 0x7C00 ? y * 0x1p112f : y;
    uint32_t made;
    memcpy(&made, &y, 4);
    made |= sign;
    memcpy(&y, &made, 4);
    return y;
}

static inline uint16_t to_half(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (size >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
    if (size < 0x38800000) return (uint16_t)(sign | (uint32_t)nearbyintf(fabsf(x) * 0x1p24f));
    return (uint16_t)(sign | ((size + 0xFFF + (size >> 13 & 1) - 0x38000000) >> 13));
}

static inline const void* place(const View& x, int64_t b, int64_t t, int64_t h)
{
    return (const char*)x.data + (b * x.batch + t * x.token + h * x.head) * (x.type == F32 ? 4 : 2);
}

static inline void get_row(float* to, const View& x, const void* from, int64_t skip, int64_t n, int64_t width, float scale)
{
    from = (const char*)from + skip * (x.type == F32 ? 4 : 2);
    if (x.type != F16) return read_row(to, from, x.type, n, width, scale);
    for (int64_t i = 0; i < width; i++) to[i] = i < n ? from_half(((const uint16_t*)from)[i]) * scale : 0;
}

static inline void put_row(const View& x, const void* at, int64_t skip, const float* from, int64_t n, float scale)
{
    void* to = (char*)at + skip * (x.type == F32 ? 4 : 2);
    if (x.type != F16) return write_row(to, from, x.type, n, scale);
    for (int64_t i = 0; i < n; i++) ((uint16_t*)to)[i] = to_half(from[i] * scale);
}

// The larger of each two numbers; b where one is NaN.
static inline Vec larger(Vec a, Vec b)
{
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return pick(a > b, a, b);
#endif
}

// e^x for x that are not above 0 by much, to 2e-7; far below it is too small to be normal, which is 0; NaN stays NaN.
static inline Vec weight_of(Vec x)
{
    x = larger(all(-87.9f), x);
    const Vec shifted = x * LOG2E + 12582912.0f, r = x * LOG2E - (shifted - 12582912.0f);
    Vec p = r * 1.326472721e-3f + 9.671512813e-3f;
    p = p * r + 5.550733745e-2f;
    p = p * r + 2.402224208e-1f;
    p = p * r + 6.931469776e-1f;
    p = p * r + 1.0f;
    // A whole number shifted by 23 bits is a power: what stands above it falls out.
    return (Vec)((Ints)p + ((Ints)shifted << 23));
}

// The hyperbolic tangent as a quotient of polynomials, to 3e-7 of itself.
static inline Vec tanh_of(Vec x)
{
    x = pick(x > all(7.9053111f), all(7.9053111f), pick(x < all(-7.9053111f), all(-7.9053111f), x));
    const Vec s = x * x;
    Vec p = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
    p = p * s + -8.60467152213735e-11f;
    p = p * s + 5.12229709037114e-08f;
    p = p * s + 1.48572235717979e-05f;
    p = p * s + 6.37261928875436e-04f;
    p = p * s + 4.89352455891786e-03f;
    const Vec q = ((s * 1.19825839466702e-06f + 1.18534705686654e-04f) * s + 2.26843463243900e-03f) * s + 4.89352518554385e-03f;
    return x * p / q;
}

static inline float top_of(Vec x)
{
    Four top = ((const Four*)&x)[0];
    for (int i = 1; i < W / 4; i++) {
        const Four other = ((const Four*)&x)[i];
        top = top < other ? other : top;
    }
    const float a = top[0] < top[1] ? top[1] : top[0], b = top[2] < top[3] ? top[3] : top[2];
    return a < b ? b : a;
}

static inline Ints lanes()
{
    Ints x;
    for (int i = 0; i < W; i++) x[i] = i;
    return x;
}

// Which of the keys from `first` on, a vector of them, stand in [lo, hi).
static inline Ints among(Ints lane, int64_t lo, int64_t hi) { return (lane >= (int32_t)lo) & (lane < (int32_t)hi); }
"""

TILES = """\
// Sums over `depth` of R rows and V vectors of columns; a's panels and b's are gone through together. TA: a is [depth, row].
template <bool TA, int R, int V, class End>
static __attribute__((noinline)) void tile(const float* a, const float* b, int depth, int64_t row, int64_t column,
                                           const End end)
{
    Vec sums[R][V];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++) sums[i][j] = Vec{};
    for (; depth > 0; depth -= N, a += BLOCK, b += BLOCK) {
        const int rest = depth < N ? depth : N;
        for (int k = 0; k < rest; k++) {
            Vec line[V];
            for (int j = 0; j < V; j++) line[j] = at(b + k * N + W * j);
            for (int i = 0; i < R; i++) {
                const float x = TA ? a[k * N + i] : a[i * N + k];
                for (int j = 0; j < V; j++) sums[i][j] += x * line[j];
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int j = 0; j < V; j++) end(row + i, column + W * j, sums[i][j]);
}

// The same for columns [from, to), multiples of 16.
template <bool TA, int R, class End>
static inline void columns(const float* a, const float* b, int depth, int row, int from, int to, const End& end)
{
    for (; to - from >= TILE * W; from += TILE * W) tile<TA, R, TILE>(a, b + from, depth, row, from, end);
    if constexpr (TILE > 2) {
        if (to - from >= 2 * W) tile<TA, R, 2>(a, b + from, depth, row, from, end), from += 2 * W;
        if (to - from >= W) tile<TA, R, 1>(a, b + from, depth, row, from, end);
    }
}

// Rows [row, row + tall) of a block, tall 6 or 4, and what of the other side they meet; `whole` if all of that is seen.
struct Strip {
    int row, tall, from, to;
    bool whole;
};
constexpr int STRIPS = 16;

static inline int padded(int n) { return n < 4 ? 4 : (n + 1) / 2 * 2; }

// Cuts rows into sixes and fours: all even counts from 4 on are sums of these.
static inline int tall_of(int row, int rows)
{
    const int fours = rows % 6 == 2 ? 2 : rows % 6 == 4 ? 1 : 0;
    return rows - row > 4 * fours ? 6 : 4;
}

// What becomes of sums: they are kept, or added to what there is, which may fade row by row.
struct Store {
    float* to;
    inline void operator()(int64_t i, int64_t j, Vec sum) const { at(to + i * N + j) = sum; }
};
struct Add {
    float* to;
    inline void operator()(int64_t i, int64_t j, Vec sum) const { at(to + i * N + j) += sum; }
};
struct Blend {
    float* to;
    const float* keep;
    inline void operator()(int64_t i, int64_t j, Vec sum) const { at(to + i * N + j) = at(to + i * N + j) * keep[i] + sum; }
};

// a b for each strip's rows and own columns.
template <class End>
static void scores(const Strip* strips, int count, const float* a, const float* b, int depth, const End end)
{
    for (const Strip* s = strips; s < strips + count; s++) {
        if (s->tall == 6) columns<false, 6>(a + s->row * N, b, depth, s->row, s->from, s->to, end);
        else columns<false, 4>(a + s->row * N, b, depth, s->row, s->from, s->to, end);
    }
}

// a b for columns in panels, each strip over its own part of the other side; a may be given as [depth, row].
template <bool TA, class End>
static void gather(const Strip* strips, int count, const float* a, const float* b, int width, End end)
{
    for (; width > 0; width -= N, b += BLOCK, end.to += BLOCK)
        for (const Strip* s = strips; s < strips + count; s++) {
            const float *x = TA ? a + s->from * N + s->row : a + s->row * N + s->from, *y = b + s->from * N;
            if (s->tall == 6) columns<TA, 6>(x, y, s->to - s->from, s->row, 0, width < N ? width : N, end);
            else columns<TA, 4>(x, y, s->to - s->from, s->row, 0, width < N ? width : N, end);
        }
}
"""

SIGHT = """\
// A block of queries: where it is, and the keys [lo, hi) that each sees, which do not fall from query to query.
struct Queries {
    int64_t b, head, first;
    int n, rows;
    int64_t lo[N], hi[N];
};

// The end of the packed segment that a token is in: the first border behind it.
static inline int64_t segment_of(const Call& x, int64_t token)
{
    int64_t low = 0, high = x.segments;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (x.borders[middle + 1] > token) high = middle;
        else low = middle + 1;
    }
    return low;
}

static Queries queries_of(const Call& x, int64_t b, int64_t head, int64_t block)
{
    Queries q;
    q.b = b, q.head = head, q.first = block * N;
    q.n = (int)least(N, x.queries - q.first), q.rows = padded(q.n);
    const int64_t most = x.lengths ? least(x.lengths[b], x.keys) : x.keys;
    for (int i = 0; i < q.n; i++) {
        const int64_t token = q.first + i, place = x.place + token;
        q.lo[i] = x.window ? place - x.window + 1 : 0;
        q.hi[i] = x.causal ? least(place + 1, most) : most;
        if (x.borders) {
            const int64_t segment = segment_of(x, token), start = x.borders[segment];
            if (start > q.lo[i]) q.lo[i] = start;
            if (segment < x.segments) q.hi[i] = least(x.borders[segment + 1], q.hi[i]);
        }
        if (q.lo[i] < 0) q.lo[i] = 0;
        if (q.hi[i] < 0) q.hi[i] = 0;
    }
    return q;
}

// Strips of queries that see any of the keys [j, j + n), and which.
static int see(Strip* strips, const Queries& q, int64_t j, int n)
{
    int count = 0;
    for (int row = 0, tall; row < q.n; row += tall) {
        tall = tall_of(row, q.rows);
        const int last = (int)least(row + tall, q.n) - 1;
        const int64_t low = q.lo[row] - j, high = q.hi[last] - j;
        const int from = low > 0 ? (int)least(low, N) / 16 * 16 : 0, to = high > 0 ? (int)(least(high, n) + 15) / 16 * 16 : 0;
        if (from >= to) continue;
        const bool whole = q.lo[last] - j <= from && q.hi[row] - j >= to;
        strips[count++] = {row, tall, from, to, whole};
    }
    return count;
}

// Strips of keys [j, j + n) that any query sees, and which queries do.
static int seen(Strip* strips, const Queries& q, int64_t j, int n)
{
    int count = 0, from = 0, to = 0;
    const int rows = padded(n);
    for (int row = 0, tall; row < n; row += tall) {
        tall = tall_of(row, rows);
        while (from < q.n && q.hi[from] - j <= row) from++;
        while (to < q.n && q.lo[to] - j < row + tall) to++;
        if (from < to) strips[count++] = {row, tall, from, to, true};
    }
    return count;
}

// Tokens of a head stand further apart than a processor looks by itself: a row is asked for so many rows ahead.
constexpr int SOON = 6;

template <bool WRITE> static inline void ask(const View& x, int64_t b, int64_t t, int64_t head, int64_t width)
{
    const char* row = (const char*)place(x, b, t, head);
    for (int64_t i = 0; i < width * (x.type == F32 ? 4 : 2); i += 64) __builtin_prefetch(row + i, WRITE);
}

// n tokens of a head as panels of N columns, scaled; tokens that there are not are zeros.
static void read_rows(float* to, const View& x, int64_t b, int64_t t, int64_t head, int n, int64_t width, int d, float scale)
{
    for (int i = 0; i < N; i++) {
        if (i + SOON < n) ask<false>(x, b, t + i + SOON, head, width);
        for (int p = 0; p < d; p += N) {
            const int wide = d - p < N ? d - p : N;
            const int64_t there = i < n ? least(width - p, wide) : 0;
            get_row(to + p * N + i * N, x, i < n ? place(x, b, t + i, head) : x.data, there ? p : 0, there, wide, scale);
        }
    }
}

static void write_rows(const View& x, const float* from, int64_t b, int64_t t, int64_t head, int n, int64_t width, float scale)
{
    for (int i = 0; i < n; i++) {
        if (i + SOON < n) ask<true>(x, b, t + i + SOON, head, width);
        for (int64_t p = 0; p < width; p += N)
            put_row(x, place(x, b, t + i, head), p, from + p * N + i * N, least(N, width - p), scale);
    }
}

static void turn(const float* from, float* to, int d)
{
    for (int p = 0; p < d; p += N) transpose(from + p * N, N, to + p * N, N, N, d - p < N ? d - p : N);
}
"""
