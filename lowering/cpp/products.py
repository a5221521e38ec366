"""The matrix products of a chunk in C++: register tiles, whole or triangular, and what becomes of their sums."""

from __future__ import annotations

PRODUCTS = """\
// Sums of products of R rows and V vectors of columns, handed to `end` where they are complete. TA: a is given as [depth, row].
template <bool TA, int R, int V, class End>
static inline void tile(const float* a, int lda, const float* b, int ldb, int depth, int row, int column, const End& end)
{
    Vec sums[R][V];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++) sums[i][j] = Vec{};
    for (int k = 0; k < depth; k++) {
        Vec line[V];
        for (int j = 0; j < V; j++) line[j] = at(b + (int64_t)k * ldb + W * j);
        for (int i = 0; i < R; i++) {
            const float x = TA ? a[(int64_t)k * lda + i] : a[(int64_t)i * lda + k];
            for (int j = 0; j < V; j++) sums[i][j] += x * line[j];
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < V; j++) end(row + i, column + W * j, sums[i][j]);
}

// ALL of a; LOWER: nothing of a stands right of its diagonal; UPPER: nothing left of it. What is left out is never read
// beyond a tile, in which it must be zero.
enum Part { ALL, LOWER, UPPER };

// Rows come in sixes and fours: all even counts from 4 on are sums of these.
template <bool TA, Part PART, int V, class End>
static inline void strip(const float* a, int lda, const float* b, int ldb, int rows, int depth, int column, const End& end)
{
    const int fours = rows % 6 == 2 ? 2 : rows % 6 == 4 ? 1 : 0;
    for (int i = 0; i < rows;) {
        const int tall = rows - i > 4 * fours ? 6 : 4;
        const int from = PART == UPPER ? i : 0, to = PART == LOWER ? i + tall : depth;
        const float *x = TA ? a + (int64_t)from * lda + i : a + (int64_t)i * lda + from, *y = b + (int64_t)from * ldb + column;
        if (tall == 6) tile<TA, 6, V>(x, lda, y, ldb, to - from, i, column, end);
        else tile<TA, 4, V>(x, lda, y, ldb, to - from, i, column, end);
        i += tall;
    }
}

// a b for N columns, a multiple of 16, as are rows.
template <bool TA, Part PART, int N, class End>
static __attribute__((noinline)) void product(const float* a, int lda, const float* b, int ldb, int rows, int depth,
                                              const End& end)
{
    constexpr int WIDE = N / (TILE * W) * (TILE * W);
    for (int j = 0; j < WIDE; j += TILE * W) strip<TA, PART, TILE>(a, lda, b, ldb, rows, depth, j, end);
    if constexpr (TILE > 2 && N - WIDE >= 2 * W) strip<TA, PART, 2>(a, lda, b, ldb, rows, depth, WIDE, end);
    if constexpr ((N - WIDE) % (2 * W) >= W) strip<TA, PART, 1>(a, lda, b, ldb, rows, depth, N - W, end);
}

// to = keep to + weight sum, a factor per row each; without keep, what is there is overwritten.
struct Blend {
    float* to;
    int ld;
    const float *weight, *keep;
    inline void operator()(int i, int j, Vec sum) const
    {
        Vec& out = at(to + (int64_t)i * ld + j);
        out = keep ? out * keep[i] + sum * weight[i] : sum * weight[i];
    }
};

// Columns [0, N) of rows [row, row + 16): as many vectors as are asked for.
template <int N, class End>
static inline void block(const float* a, int lda, const float* b, int ldb, int depth, int row, const End& end)
{
    for (int j = 0; j + TILE * W <= N; j += TILE * W) {
        for (int i = 0; i < 12; i += 6) tile<false, 6, TILE>(a + i * lda, lda, b + j, ldb, depth, row + i, j, end);
        tile<false, 4, TILE>(a + 12 * lda, lda, b + j, ldb, depth, row + 12, j, end);
    }
    constexpr int REST = N % (TILE * W) / W, FROM = N - REST * W;
    if constexpr (REST > 0) {
        for (int i = 0; i < 12; i += 6) tile<false, 6, REST>(a + i * lda, lda, b + FROM, ldb, depth, row + i, FROM, end);
        tile<false, 4, REST>(a + 12 * lda, lda, b + FROM, ldb, depth, row + 12, FROM, end);
    }
}

// The lower triangle of a b, and what stands beside it in its blocks of 16; b is [depth, C].
template <class End>
static __attribute__((noinline)) void pairs(const float* a, int depth, const float* b, int ldb, int rows, const End& end)
{
    block<16>(a, depth, b, ldb, depth, 0, end);
    if (rows > 16) block<32>(a + 16 * depth, depth, b, ldb, depth, 16, end);
    if (rows > 32) block<48>(a + 32 * depth, depth, b, ldb, depth, 32, end);
    if (rows > 48) block<64>(a + 48 * depth, depth, b, ldb, depth, 48, end);
}
"""

TRANSPOSE = """\
// Exchanges blocks of `half` lanes between rows that stand `half` apart: done for all powers of two, it transposes.
template <int HALF> static inline void exchange(Vec* rows)
{
#if defined(__clang__) || !defined(__GNUC__)
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++)
            if (!(i & HALF) && (j & HALF)) {
                const float x = rows[i][j];
                rows[i][j] = rows[i + HALF][j - HALF];
                rows[i + HALF][j - HALF] = x;
            }
#else
    Ints low, high;
    for (int j = 0; j < W; j++) {
        low[j] = j & HALF ? j - HALF + W : j;
        high[j] = j & HALF ? j + W : j + HALF;
    }
    for (int i = 0; i < W; i++)
        if (!(i & HALF)) {
            const Vec a = rows[i], b = rows[i + HALF];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i + HALF] = __builtin_shuffle(a, b, high);
        }
#endif
    if constexpr (HALF > 1) exchange<HALF / 2>(rows);
}

// b[column, row] = a[row, column]
static __attribute__((noinline)) void transpose(const float* a, int lda, float* b, int ldb, int rows, int columns)
{
    for (int i = 0; i < rows; i += W)
        for (int j = 0; j < columns; j += W) {
            Vec block[W];
            for (int y = 0; y < W; y++) block[y] = at(a + (int64_t)(i + y) * lda + j);
            exchange<W / 2>(block);
            for (int y = 0; y < W; y++) at(b + (int64_t)(j + y) * ldb + i) = block[y];
        }
}
"""
