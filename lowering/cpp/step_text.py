"""The C++ of a decode step: one library of vector kernels over a tape, so that no model needs a compiler of its own."""

from __future__ import annotations

from . import prelude

TAPE = """\
enum { I64 = 2 };

// An operand: a place in the table of tensors, bytes from there, strides in elements.
struct Arg { int32_t slot, type; int64_t offset, stride[4]; };
struct Ins { int64_t kind, size[4], whole[6]; double num[4]; Arg arg[10]; };
// Where tensors are, and of a cache how many tokens it has room for.
struct Tape { char* const* base; const int64_t* rooms; int64_t threads; };
// Numbers at one distance.
struct Line { char* p; int64_t type, stride; };

static inline int64_t bytes(int64_t type) { return type == F32 ? 4 : type == BF16 ? 2 : 8; }
static inline char* start(const Tape& t, const Arg& a) { return a.slot < 0 ? nullptr : t.base[a.slot] + a.offset; }

static inline Line line(const Tape& t, const Arg& a, int64_t i, int64_t j, int64_t k)
{
    char* p = start(t, a);
    return {p ? p + (i * a.stride[0] + j * a.stride[1] + k * a.stride[2]) * bytes(a.type) : p, a.type, a.stride[3]};
}

static inline float number(const Line& x, int64_t i)
{
    return x.type == F32 ? ((const float*)x.p)[i * x.stride] : from_bf16(((const uint16_t*)x.p)[i * x.stride]);
}

static inline void put_number(const Line& x, int64_t i, float y)
{
    if (x.type == F32) ((float*)x.p)[i * x.stride] = y;
    else ((uint16_t*)x.p)[i * x.stride] = to_bf16(y);
}

typedef uint16_t Halves __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * W), aligned(4), may_alias));

static inline Vec widen(const float* p) { return at(p); }
static inline Vec widen(const uint16_t* p) { return (Vec)(__builtin_convertvector(*(const Halves*)p, Words) << 16); }

// n numbers, n <= W, from number i on.
static inline Vec get(const Line& x, int64_t i, int64_t n)
{
    if (x.stride == 1 && n == W) return x.type == F32 ? widen((const float*)x.p + i) : widen((const uint16_t*)x.p + i);
    if (x.stride == 0) return all(number(x, 0));
    Vec y = {};
    for (int64_t j = 0; j < n; j++) y[j] = number(x, i + j);
    return y;
}

static inline void put(const Line& x, int64_t i, int64_t n, Vec y)
{
    if (x.stride == 1 && n == W && x.type == F32) at((float*)x.p + i) = y;
    else for (int64_t j = 0; j < n; j++) put_number(x, i + j, y[j]);
}

static inline int64_t few(int64_t i, int64_t n) { return n - i < W ? n - i : W; }

// Every row of an instruction's operands: a line each, behind one another.
template <int N, class F> static void rows(const Tape& t, const Ins& x, F body)
{
    Line l[N];
    for (int64_t i = 0; i < x.size[0]; i++)
        for (int64_t j = 0; j < x.size[1]; j++)
            for (int64_t k = 0; k < x.size[2]; k++) {
                for (int a = 0; a < N; a++) l[a] = line(t, x.arg[a], i, j, k);
                body(l, x.size[3]);
            }
}

template <class F> static void unary(const Tape& t, const Ins& x, F f)
{
    rows<2>(t, x, [&](const Line* l, int64_t n) {
        for (int64_t i = 0; i < n; i += W) put(l[1], i, few(i, n), f(get(l[0], i, few(i, n))));
    });
}

template <class F> static void binary(const Tape& t, const Ins& x, F f)
{
    rows<3>(t, x, [&](const Line* l, int64_t n) {
        for (int64_t i = 0; i < n; i += W) put(l[2], i, few(i, n), f(get(l[0], i, few(i, n)), get(l[1], i, few(i, n))));
    });
}

template <class F> static inline Vec each(Vec x, F f)
{
    for (int i = 0; i < W; i++) x[i] = f(x[i]);
    return x;
}

static inline Vec sigmoid_of(Vec x) { return 1.0f / (exp_of(-x) + 1.0f); }
// -x e^x for small x would lose digits that tanhf keeps.
static inline Vec tanh_of(Vec x) { return each(x, [](float y) { return tanhf(y); }); }
static inline Vec positive(Vec x) { return pick(x < all(0.0f), Vec{}, x); }

static void pointwise(const Tape& t, const Ins& x)
{
    const float a = (float)x.num[0], b = (float)x.num[1];
    switch (x.kind) {
    case COPY: return unary(t, x, [](Vec y) { return y; });
    case SCALE: return unary(t, x, [=](Vec y) { return y * a; });
    case SHIFT: return unary(t, x, [=](Vec y) { return y + a; });
    case SILU: return unary(t, x, [](Vec y) { return y / (exp_of(-y) + 1.0f); });
    case SIGMOID: return unary(t, x, [](Vec y) { return sigmoid_of(y); });
    case RELU: return unary(t, x, [](Vec y) { return positive(y); });
    case RELU2: return unary(t, x, [](Vec y) { return positive(y) * positive(y); });
    case NEG_EXP: return unary(t, x, [](Vec y) { return -exp_of(y); });
    case TANH: return unary(t, x, [](Vec y) { return tanh_of(y); });
    case SOFTCAP: return unary(t, x, [=](Vec y) { return tanh_of(y / a) * a; });
    case RSQRT: return unary(t, x, [](Vec y) { return each(y, [](float z) { return 1.0f / sqrtf(z); }); });
    case SOFTPLUS: return unary(t, x, [](Vec y) { return each(y, [](float z) { return z > 20 ? z : log1pf(expf(z)); }); });
    case CLAMP:
        return unary(t, x, [=](Vec y) { return each(y, [=](float z) { return z < a ? a : z > b ? b : z; }); });
    case GELU: return unary(t, x, [](Vec y) { return each(y, [](float z) { return z * 0.5f * (1 + erff(z * .70710678f)); }); });
    case GELU_TANH:
        return unary(t, x, [](Vec y) { return 0.5f * y * (1.0f + tanh_of(0.79788456f * (y + 0.044715f * y * y * y))); });
    case ADD: return binary(t, x, [](Vec y, Vec z) { return y + z; });
    case SUB: return binary(t, x, [](Vec y, Vec z) { return y - z; });
    case MUL: return binary(t, x, [](Vec y, Vec z) { return y * z; });
    }
}

// x, w, bias, y
static void norm(const Tape& t, const Ins& x)
{
    const float eps = (float)x.num[0], more = (float)x.num[1];
    const bool centred = x.kind == LAYER_NORM, mean = x.kind != L2_NORM;
    rows<4>(t, x, [&](const Line* l, int64_t n) {
        Vec total = {}, squares = {};
        for (int64_t i = 0; centred && i < n; i += W) total += get(l[0], i, few(i, n));
        const float middle = sum(total) / n;
        for (int64_t i = 0; i < n; i += W) {
            const Vec y = get(l[0], i, few(i, n)) - middle;
            if (few(i, n) == W) squares += y * y;
            else for (int64_t j = 0; j < few(i, n); j++) squares[j] += y[j] * y[j];
        }
        const float r = 1.0f / sqrtf(sum(squares) / (mean ? n : 1) + eps);
        for (int64_t i = 0; i < n; i += W) {
            Vec y = (get(l[0], i, few(i, n)) - middle) * r;
            if (l[1].p) y *= get(l[1], i, few(i, n)) + more;
            if (l[2].p) y += get(l[2], i, few(i, n));
            put(l[3], i, few(i, n), y);
        }
    });
}
"""

LINEAR = """\
// Rows first..last of w against M rows of x. Weights are read once, and asked for ahead of the processor's own guess.
template <class T, int M, int R>
static inline void products(const float* x, int64_t ldx, const T* w, int64_t depth, const Line& bias, const Line* y, int64_t o)
{
    Vec sums[R][M] = {};
    int64_t k = 0;
    for (; k + W <= depth; k += W)
        for (int r = 0; r < R; r++) {
            const T* p = w + r * depth + k;
            __builtin_prefetch((const char*)p + 8192);
            const Vec row = widen(p);
            for (int m = 0; m < M; m++) sums[r][m] += row * at(x + m * ldx + k);
        }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) {
            float total = sum(sums[r][m]);
            for (int64_t i = k; i < depth; i++) total += x[m * ldx + i] * widen_one(w[r * depth + i]);
            put_number(y[m], o + r, total + (bias.p ? number(bias, o + r) : 0));
        }
}

template <class T, int M>
static void part(const float* x, int64_t ldx, const T* w, int64_t depth, const Line& bias, const Line* y, int64_t o, int64_t n)
{
    for (; o + 4 <= n; o += 4) products<T, M, 4>(x, ldx, w + o * depth, depth, bias, y, o);
    for (; o < n; o++) products<T, M, 1>(x, ldx, w + o * depth, depth, bias, y, o);
}

template <class T>
static void some(const float* x, int64_t ldx, const T* w, int64_t depth, const Line& bias, const Line* y, int64_t m, int64_t o,
                 int64_t end)
{
    for (; m >= 4; m -= 4, x += 4 * ldx, y += 4) part<T, 4>(x, ldx, w, depth, bias, y, o, end);
    if (m == 3) part<T, 3>(x, ldx, w, depth, bias, y, o, end);
    if (m == 2) part<T, 2>(x, ldx, w, depth, bias, y, o, end);
    if (m == 1) part<T, 1>(x, ldx, w, depth, bias, y, o, end);
}

constexpr int64_t SHARE = 64;  // rows of a weight that one thread takes at a time
constexpr int64_t SMALL = 1 << 17;  // numbers of a weight that one thread reads sooner than it wakes another

// m rows of x, float32, against the o rows of w.
static void linear(const Tape& t, const float* x, int64_t ldx, const char* w, int64_t type, int64_t depth, const Line& bias,
                   const Line* y, int64_t m, int64_t o)
{
    const int64_t parts = (o + SHARE - 1) / SHARE;
#pragma omp parallel for num_threads(t.threads) schedule(static) if (t.threads > 1 && o * depth > SMALL)
    for (int64_t i = 0; i < parts; i++) {
        const int64_t end = (i + 1) * SHARE < o ? (i + 1) * SHARE : o;
        if (type == F32) some(x, ldx, (const float*)w, depth, bias, y, m, i * SHARE, end);
        else some(x, ldx, (const uint16_t*)w, depth, bias, y, m, i * SHARE, end);
    }
}

constexpr int MOST = 256;  // rows of a product

// x [m, depth] in float32, w [o, depth], bias, y [m, o]
static void linear(const Tape& t, const Ins& x)
{
    Line y[MOST];
    for (int64_t m = 0; m < x.size[0]; m++) y[m] = line(t, x.arg[3], 0, 0, m);
    linear(t, (const float*)start(t, x.arg[0]), x.arg[0].stride[2], start(t, x.arg[1]), x.arg[1].type, x.size[2],
           line(t, x.arg[2], 0, 0, 0), y, x.size[0], x.size[1]);
}
"""

# What an instruction may be, in the order of their numbers.
KINDS = (
    "COPY", "SCALE", "SHIFT", "SILU", "SIGMOID", "RELU", "RELU2", "NEG_EXP", "TANH", "SOFTCAP", "RSQRT", "SOFTPLUS", "CLAMP",
    "GELU", "GELU_TANH", "ADD", "SUB", "MUL", "RMS_NORM", "LAYER_NORM", "L2_NORM", "LINEAR", "EMBEDDING", "POSITIONS", "ROPE",
    "CACHE_WRITE", "ATTENTION", "CONV", "RECURRENCE", "ROUTE", "DISPATCH", "GROUPED", "COMBINE",
)  # fmt: skip

ENTRY = """\
// 0, or the number, from one, of the instruction that met an index outside of its table.
extern "C" __attribute__((visibility("default"))) int run(const Ins* tape, int64_t count, char* const* base,
                                                           const int64_t* rooms, int64_t threads)
{
    Flushed flushed;
    const Tape t = {base, rooms, threads};
    for (int64_t i = 0; i < count; i++) {
        const Ins& x = tape[i];
        bool inside = true;
        switch (x.kind) {
        case RMS_NORM: case LAYER_NORM: case L2_NORM: norm(t, x); break;
        case LINEAR: linear(t, x); break;
        case EMBEDDING: inside = embedding(t, x); break;
        case POSITIONS: positions(t, x); break;
        case ROPE: rope(t, x); break;
        case CACHE_WRITE: inside = cache_write(t, x); break;
        case ATTENTION: attention(t, x); break;
        case CONV: conv(t, x); break;
        case RECURRENCE: recurrence(t, x); break;
        case ROUTE: route(t, x); break;
        case DISPATCH: dispatch(t, x); break;
        case GROUPED: grouped(t, x); break;
        case COMBINE: combine(t, x); break;
        default: pointwise(t, x);
        }
        if (!inside) return (int)i + 1;
    }
    return 0;
}
"""

_ONE = """\
static inline float widen_one(float x) { return x; }
static inline float widen_one(uint16_t x) { return from_bf16(x); }
"""


def base() -> str:
    """Everything before the mixers: vectors, the tape, pointwise ops, norms and linears."""
    kinds = f"enum {{ {', '.join(KINDS)} }};\n"
    # Vectors are written out below: more than -O2 makes the compiler four times slower and the code no faster.
    return "\n".join(('#pragma GCC optimize("O2")', prelude.VECTORS, prelude.OPERANDS, kinds, TAPE, _ONE, LINEAR))
