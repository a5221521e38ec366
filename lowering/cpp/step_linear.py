"""The C++ of a decode step: products of few rows with weights, which are read once for all rows of a block."""

from __future__ import annotations


def _shuffles() -> str:
    """Within four numbers of two vectors each, for every width of a vector."""
    which = {
        "LOW": ((0, 0), (1, 0), (0, 1), (1, 1)), "HIGH": ((0, 2), (1, 2), (0, 3), (1, 3)),
        "FRONT": ((0, 0), (0, 1), (1, 0), (1, 1)), "BACK": ((0, 2), (0, 3), (1, 2), (1, 3)),
    }  # fmt: skip

    def numbers(picked: tuple[tuple[int, int], ...], width: int) -> str:
        return ", ".join(str(side * width + lane + i) for lane in range(0, width, 4) for side, i in picked)

    def lines(width: int) -> str:
        return "\n".join(f"#define {name} {numbers(picked, width)}" for name, picked in which.items())

    return (
        f"#if defined(__AVX512F__)\n{lines(16)}\n#elif defined(__AVX__)\n{lines(8)}\n#else\n{lines(4)}\n#endif\n"
        "#if defined(__clang__)\n#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)\n"
        "#else\n#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})\n#endif\n"
    )


_PRODUCTS = """\
static inline float widen_one(float x) { return x; }
static inline float widen_one(uint16_t x) { return from_bf16(x); }

// What four vectors add up to.
static inline Four sums_of(Vec a, Vec b, Vec c, Vec d)
{
    const Vec ab = SHUFFLED(a, b, LOW) + SHUFFLED(a, b, HIGH), cd = SHUFFLED(c, d, LOW) + SHUFFLED(c, d, HIGH);
    const Vec both = SHUFFLED(ab, cd, FRONT) + SHUFFLED(ab, cd, BACK);
    Four total = {};
#pragma GCC unroll 4
    for (int i = 0; i < W / 4; i++) total += ((const Four*)&both)[i];
    return total;
}

// Rows of weights that lie side by side in memory, of numbers of type T.
template <class T> struct Weights { const T* p; int64_t ld, depth; };

constexpr int64_t AHEAD = 8192;  // bytes that are asked for ahead of the processor's own guess

// R rows of w from o on against M rows of x: every sum is kept in a register, which needs the loops written out.
template <class T, int M, int R>
static inline void products(const float* x, int64_t ldx, const Weights<T>& w, const Line& bias, const Line* y, int64_t o)
{
    Vec sums[M][4] = {};
    const T* first = w.p + o * w.ld;
    int64_t k = 0;
    for (; k + W <= w.depth; k += W) {
        Vec row[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            __builtin_prefetch((const char*)(first + r * w.ld + k) + AHEAD);
            row[r] = widen(first + r * w.ld + k);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const Vec v = at(x + m * ldx + k);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[m][r] += row[r] * v;
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
        Four total = sums_of(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
        for (int r = 0; r < R; r++) {
            float more = bias.p ? number(bias, o + r) : 0;
            for (int64_t i = k; i < w.depth; i++) more += x[m * ldx + i] * widen_one(first[r * w.ld + i]);
            put_number(y[m], o + r, total[r] + more);
        }
    }
}

template <class T, int R>
static inline void some(const float* x, int64_t ldx, const Weights<T>& w, const Line& bias, const Line* y, int64_t m, int64_t o)
{
    for (; m >= 4; m -= 4, x += 4 * ldx, y += 4) products<T, 4, R>(x, ldx, w, bias, y, o);
    if (m == 3) products<T, 3, R>(x, ldx, w, bias, y, o);
    if (m == 2) products<T, 2, R>(x, ldx, w, bias, y, o);
    if (m == 1) products<T, 1, R>(x, ldx, w, bias, y, o);
}
"""

_COLUMNS = """\
// As `products`, for weights whose columns lie side by side: V vectors of outputs from o on.
template <class T, int M, int V>
static inline void spread(const float* x, int64_t ldx, const Weights<T>& w, const Line& bias, const Line* y, int64_t o)
{
    Vec sums[M][V] = {};
    for (int64_t k = 0; k < w.depth; k++) {
        Vec row[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) row[v] = widen(w.p + k * w.ld + o + v * W);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            const Vec one = all(x[m * ldx + k]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sums[m][v] += row[v] * one;
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            put(y[m], o + v * W, W, bias.p ? sums[m][v] + get(bias, o + v * W, W) : sums[m][v]);
}

template <class T, int M>
static void columns(const float* x, int64_t ldx, const Weights<T>& w, const Line& bias, const Line* y, int64_t o, int64_t end)
{
    for (; o + 4 * W <= end; o += 4 * W) spread<T, M, 4>(x, ldx, w, bias, y, o);
    for (; o + W <= end; o += W) spread<T, M, 1>(x, ldx, w, bias, y, o);
    for (; o < end; o++)
        for (int m = 0; m < M; m++) {
            float total = bias.p ? number(bias, o) : 0;
            for (int64_t k = 0; k < w.depth; k++) total += x[m * ldx + k] * widen_one(w.p[k * w.ld + o]);
            put_number(y[m], o, total);
        }
}
"""

_LINEAR = """\
constexpr int64_t BLOCK = 64;  // outputs in a unit of work
constexpr int MOST = 256;  // rows of a product

// Where a weight is, and how far apart its rows and the numbers of a row are; one of the two is one.
struct Matrix { const char* p; int64_t type, row, column, depth; };

template <class T>
static void blocks(const float* x, int64_t ldx, const Matrix& w, const Line& bias, const Line* y, int64_t m, int64_t o,
                   int64_t end)
{
    const Weights<T> rows = {(const T*)w.p, w.column == 1 ? w.row : w.column, w.depth};
    if (w.column == 1) {
        for (; o + 4 <= end; o += 4) some<T, 4>(x, ldx, rows, bias, y, m, o);
        for (; o < end; o++) some<T, 1>(x, ldx, rows, bias, y, m, o);
        return;
    }
    for (; m >= 4; m -= 4, x += 4 * ldx, y += 4) columns<T, 4>(x, ldx, rows, bias, y, o, end);
    for (; m; m--, x += ldx, y++) columns<T, 1>(x, ldx, rows, bias, y, o, end);
}

// m rows of x, float32, against outputs o to end of w.
static void linear(const float* x, int64_t ldx, const Matrix& w, const Line& bias, const Line* y, int64_t m, int64_t o,
                   int64_t end)
{
    if (w.type == F32) blocks<float>(x, ldx, w, bias, y, m, o, end);
    else blocks<uint16_t>(x, ldx, w, bias, y, m, o, end);
}

// The outputs of n that are a thread's own, block by block.
static inline Span outputs(Span s, int64_t n) { return {s.first * BLOCK, s.end * BLOCK < n ? s.end * BLOCK : n}; }

// x [m, depth] in float32, w [o, depth], bias, y [m, o]
static void linear(const Tape& t, const Ins& x, Span s)
{
    Line y[MOST];
    const Span own = outputs(s, x.size[1]);
    for (int64_t m = 0; m < x.size[0]; m++) y[m] = line(t, x.arg[3], 0, 0, m);
    const Matrix w = {start(t, x.arg[1]), x.arg[1].type, x.arg[1].stride[2], x.arg[1].stride[3], x.size[2]};
    const Line bias = line(t, x.arg[2], 0, 0, 0);
    linear((const float*)start(t, x.arg[0]), x.arg[0].stride[2], w, bias, y, x.size[0], own.first, own.end);
}

// x [m, h, depth] in float32, w [h, o, depth], y [m, h, o]: a unit is a head.
static void heads(const Tape& t, const Ins& x, Span s)
{
    const Line none = {nullptr, F32, 0};
    Line y[MOST];
    for (int64_t h = s.first; h < s.end && h < x.size[1]; h++) {
        for (int64_t m = 0; m < x.size[0]; m++) y[m] = line(t, x.arg[2], 0, m, h);
        const Line w = line(t, x.arg[1], 0, h, 0);
        const Matrix own = {w.p, w.type, x.arg[1].stride[2], x.arg[1].stride[3], x.size[3]};
        linear((const float*)line(t, x.arg[0], 0, 0, h).p, x.arg[0].stride[1], own, none, y, x.size[0], 0, x.size[2]);
    }
}
"""

LINEAR = "\n".join((_shuffles(), _PRODUCTS, _COLUMNS, _LINEAR))
