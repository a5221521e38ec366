"""The C++ of a decode step: one library of vector kernels over a tape, so that no model needs a compiler of its own."""

from __future__ import annotations

from . import prelude
from .step_linear import LINEAR

TAPE = """\
enum { I64 = 2 };

// An operand: a place in the table of tensors, bytes from there, strides in elements.
struct Arg { int32_t slot, type; int64_t offset, stride[4]; };
// `units` of work that any thread may do, one where it is not worth sharing; `wait` for what other threads do before it.
struct Ins { int64_t kind, units, wait, size[4], whole[6]; double num[4]; Arg arg[10]; };
// Where tensors are, and of a cache how many tokens it has room for.
struct Tape { char* const* base; const int64_t* rooms; };
// The units of an instruction that are a thread's own.
struct Span { int64_t first, end; };
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
#if defined(__AVX512F__)  // compilers convert sixteen numbers in halves
static inline Vec widen(const uint16_t* p)
{
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
#else
static inline Vec widen(const uint16_t* p) { return (Vec)(__builtin_convertvector(*(const Halves*)p, Words) << 16); }
#endif

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

// Every row of an instruction's operands, a line each: a unit is a row.
template <int N, class F> static void rows(const Tape& t, const Ins& x, Span s, F body)
{
    Line l[N];
    const int64_t inner = x.size[1] * x.size[2];
    for (int64_t r = s.first; r < s.end && r < x.size[0] * inner; r++) {
        for (int a = 0; a < N; a++) l[a] = line(t, x.arg[a], r / inner, r % inner / x.size[2], r % x.size[2]);
        body(l, x.size[3]);
    }
}

template <class F> static void unary(const Tape& t, const Ins& x, Span s, F f)
{
    rows<2>(t, x, s, [&](const Line* l, int64_t n) {
        for (int64_t i = 0; i < n; i += W) put(l[1], i, few(i, n), f(get(l[0], i, few(i, n))));
    });
}

template <class F> static void binary(const Tape& t, const Ins& x, Span s, F f)
{
    rows<3>(t, x, s, [&](const Line* l, int64_t n) {
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

static void pointwise(const Tape& t, const Ins& x, Span s)
{
    const float a = (float)x.num[0], b = (float)x.num[1];
    switch (x.kind) {
    case COPY: return unary(t, x, s, [](Vec y) { return y; });
    case SCALE: return unary(t, x, s, [=](Vec y) { return y * a; });
    case SHIFT: return unary(t, x, s, [=](Vec y) { return y + a; });
    case SILU: return unary(t, x, s, [](Vec y) { return y / (exp_of(-y) + 1.0f); });
    case SIGMOID: return unary(t, x, s, [](Vec y) { return sigmoid_of(y); });
    case RELU: return unary(t, x, s, [](Vec y) { return positive(y); });
    case RELU2: return unary(t, x, s, [](Vec y) { return positive(y) * positive(y); });
    case NEG_EXP: return unary(t, x, s, [](Vec y) { return -exp_of(y); });
    case TANH: return unary(t, x, s, [](Vec y) { return tanh_of(y); });
    case SOFTCAP: return unary(t, x, s, [=](Vec y) { return tanh_of(y / a) * a; });
    case RSQRT: return unary(t, x, s, [](Vec y) { return each(y, [](float z) { return 1.0f / sqrtf(z); }); });
    case SOFTPLUS: return unary(t, x, s, [](Vec y) { return each(y, [](float z) { return z > 20 ? z : log1pf(expf(z)); }); });
    case CLAMP:
        return unary(t, x, s, [=](Vec y) { return each(y, [=](float z) { return z < a ? a : z > b ? b : z; }); });
    case GELU:
        return unary(t, x, s, [](Vec y) { return each(y, [](float z) { return z * 0.5f * (1 + erff(z * .70710678f)); }); });
    case GELU_TANH:
        return unary(t, x, s, [](Vec y) { return 0.5f * y * (1.0f + tanh_of(0.79788456f * (y + 0.044715f * y * y * y))); });
    case ADD: return binary(t, x, s, [](Vec y, Vec z) { return y + z; });
    case SUB: return binary(t, x, s, [](Vec y, Vec z) { return y - z; });
    case MUL: return binary(t, x, s, [](Vec y, Vec z) { return y * z; });
    }
}

// x, w, bias, y
static void norm(const Tape& t, const Ins& x, Span s)
{
    const float eps = (float)x.num[0], more = (float)x.num[1];
    const bool centred = x.kind == LAYER_NORM, mean = x.kind != L2_NORM;
    rows<4>(t, x, s, [&](const Line* l, int64_t n) {
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

# What an instruction may be, in the order of their numbers.
KINDS = (
    "COPY", "SCALE", "SHIFT", "SILU", "SIGMOID", "RELU", "RELU2", "NEG_EXP", "TANH", "SOFTCAP", "RSQRT", "SOFTPLUS",
    "CLAMP", "GELU", "GELU_TANH", "ADD", "SUB", "MUL", "RMS_NORM", "LAYER_NORM", "L2_NORM", "LINEAR", "HEADS", "EMBEDDING",
    "POSITIONS", "TURNS", "ROPE", "CACHE_WRITE", "PAGE_WRITE", "ATTENTION", "CONV", "RECURRENCE", "SELECTIVE_SCAN",
    "RG_LRU", "ROUTE", "DISPATCH", "GROUPED", "SPREAD", "COMBINE",
)  # fmt: skip

ENTRY = """\
// False for an index outside of its table.
static bool instruction(const Tape& t, const Ins& x, Span s)
{
    switch (x.kind) {
    case RMS_NORM: case LAYER_NORM: case L2_NORM: norm(t, x, s); break;
    case LINEAR: linear(t, x, s); break;
    case HEADS: heads(t, x, s); break;
    case EMBEDDING: return embedding(t, x);
    case POSITIONS: positions(t, x); break;
    case TURNS: turns(t, x); break;
    case ROPE: rope(t, x, s); break;
    case CACHE_WRITE: case PAGE_WRITE: return cache_write(t, x);
    case ATTENTION: attention(t, x, s); break;
    case CONV: conv(t, x, s); break;
    case RECURRENCE: recurrence(t, x, s); break;
    case SELECTIVE_SCAN: selective_scan(t, x, s); break;
    case RG_LRU: rg_lru(t, x, s); break;
    case ROUTE: route(t, x, s); break;
    case DISPATCH: dispatch(t, x); break;
    case GROUPED: grouped(t, x, s); break;
    case SPREAD: spread_experts(t, x); break;
    case COMBINE: combine(t, x, s); break;
    default: pointwise(t, x, s);
    }
    return true;
}

// Threads that run one tape together: each waits for the others where an instruction says so, awake for a while.
struct Team {
    alignas(64) std::atomic<int64_t> come{0};
    alignas(64) std::atomic<int64_t> round{0};
    alignas(64) std::atomic<int64_t> stopped{0};

    void meet(int64_t threads)
    {
        const int64_t now = round.load();
        if (come.fetch_add(1) + 1 == threads) {
            come.store(0);
            round.store(now + 1);
            return;
        }
        for (int64_t i = 0; round.load(std::memory_order_acquire) == now; i++) i < 2000 ? breathe() : stand_back();
    }
};

static void part(const Tape& t, const Ins* tape, int64_t count, Team& team, int64_t me, int64_t threads)
{
    Flushed flushed;
    for (int64_t i = 0; i < count; i++) {
        const Ins& x = tape[i];
        if (x.wait && threads > 1) team.meet(threads);
        if ((x.units == 1 && me) || team.stopped.load(std::memory_order_relaxed)) continue;
        const Span all = {0, 1 << 30}, own = {x.units * me / threads, x.units * (me + 1) / threads};
        const Span s = x.units == 1 || threads == 1 ? all : own;
        if (s.first < s.end && !instruction(t, x, s)) team.stopped.store(i + 1);
    }
}

// 0, or the number, from one, of the instruction that met an index outside of its table.
extern "C" __attribute__((visibility("default"))) int run(const Ins* tape, int64_t count, char* const* base,
                                                           const int64_t* rooms, int64_t threads)
{
    const Tape t = {base, rooms};
    Team team;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
    part(t, tape, count, team, omp_get_thread_num(), omp_get_num_threads());
#else
    part(t, tape, count, team, 0, 1);
#endif
    return (int)team.stopped.load();
}
"""

WAITING = """\
#include <atomic>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
static inline void stand_back() { sched_yield(); }
#else
static inline void stand_back() {}
#endif
#if defined(__SSE2__)
static inline void breathe() { _mm_pause(); }
#else
static inline void breathe() {}
#endif
"""


def base() -> str:
    """Everything before the mixers: vectors, the tape, pointwise ops, norms and linears."""
    kinds = f"enum {{ {', '.join(KINDS)} }};\n"
    vectors = (prelude.VECTORS, WAITING, prelude.OPERANDS, prelude.LESS_ONE)
    # Vectors are written out below: more than -O2 makes the compiler four times slower and the code no faster.
    return "\n".join(('#pragma GCC optimize("O2")', *vectors, kinds, TAPE, LINEAR))
