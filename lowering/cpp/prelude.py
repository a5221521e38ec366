"""What every generated C++ file starts with: vectors, exp, operands of any dtype, and the matrix products of a chunk."""

from __future__ import annotations

VECTORS = """\
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

// Floats in a vector, and vectors in a tile of a product. What a machine lacks, the compiler writes out.
#if defined(__AVX512F__)
constexpr int W = 16, TILE = 4;
#elif defined(__AVX__)
constexpr int W = 8, TILE = 2;
#else
constexpr int W = 4, TILE = 2;
#endif
typedef float Vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * W), aligned(4), may_alias));

static inline Vec at(const float* p) { return *(const Vec*)p; }
static inline Vec& at(float* p) { return *(Vec*)p; }
static inline Vec all(float x) { return x - Vec{}; }
static inline Vec pick(Ints mask, Vec yes, Vec no) { return (Vec)((mask & (Ints)yes) | (~mask & (Ints)no)); }

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

static inline float sum(Vec x)
{
    Four total = {};
    for (int i = 0; i < W / 4; i++) total += ((const Four*)&x)[i];
    return (total[0] + total[1]) + (total[2] + total[3]);
}

static inline float dot(const float* a, const float* b, int n)
{
    Vec total = {};
    for (int i = 0; i < n; i += W) total += at(a + i) * at(b + i);
    return sum(total);
}

// e^x to 2e-7, after Cephes; NaN stays NaN.
static inline Vec exp_of(Vec x)
{
    x = pick(x < all(-87.0f), all(-87.0f), x);
    x = pick(x > all(88.0f), all(88.0f), x);
    const Vec shifted = x * 1.44269504f + 12582912.0f;
    const Vec n = shifted - 12582912.0f;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const Ints power = ((Ints)shifted - 0x4B400000 + 127) << 23;
    return (p * r * r + r + 1.0f) * (Vec)power;
}

// Asks for large pages behind a large new result: its first touch is then cheaper than the work that fills it.
static void fresh(void* p, int64_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uint64_t page = 1 << 21, low = ((uint64_t)p + page - 1) & ~(page - 1), high = ((uint64_t)p + bytes) & ~(page - 1);
    if (p && high > low) madvise((void*)low, high - low, MADV_HUGEPAGE);
#endif
}

// Products of subnormal numbers are up to 250 times slower: within a kernel they are zero.
struct Flushed {
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    Flushed() { _mm_setcsr(before | 0x8040); }
    ~Flushed() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    Flushed()
    {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | (1ull << 24)));
    }
    ~Flushed() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};
"""

OPERANDS = """\
enum { F32 = 0, BF16 = 1 };

static inline float from_bf16(uint16_t x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline uint16_t to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return x == x ? (uint16_t)rounded : (uint16_t)0x7FC0;
}

// n numbers into floats, times scale; zeros up to `width`.
static inline void read_row(float* to, const void* from, int64_t type, int64_t n, int64_t width, float scale)
{
    if (type == F32)
        for (int64_t i = 0; i < n; i++) to[i] = ((const float*)from)[i] * scale;
    else
        for (int64_t i = 0; i < n; i++) to[i] = from_bf16(((const uint16_t*)from)[i]) * scale;
    for (int64_t i = n; i < width; i++) to[i] = 0;
}

static inline void write_row(void* to, const float* from, int64_t type, int64_t n, float scale)
{
    if (type == F32)
        for (int64_t i = 0; i < n; i++) ((float*)to)[i] = from[i] * scale;
    else
        for (int64_t i = 0; i < n; i++) ((uint16_t*)to)[i] = to_bf16(from[i] * scale);
}
"""

LESS_ONE = """\
// e^x - 1, exact to a few bits of itself near 0 too.
static inline Vec exp_less_one(Vec x)
{
    x = pick(x < all(-87.0f), all(-87.0f), x);
    x = pick(x > all(88.0f), all(88.0f), x);
    const Vec shifted = x * 1.44269504f + 12582912.0f;
    const Vec n = shifted - 12582912.0f;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const Vec power = (Vec)(((Ints)shifted - 0x4B400000 + 127) << 23);
    return (p * r * r + r) * power + (power - 1.0f);
}
"""

AHEAD = """\
// A row that will be read soon, asked for bit by bit beside other work: rows in time stand further apart than a processor
// looks by itself, and asking for all at once would hold up what is read now.
struct Ahead {
    const char* row;
    int64_t size;
    Ahead(const void* p, int64_t type, int64_t place) : row((const char*)p), size(type == F32 ? 4 : 2) { row += place * size; }
    inline void ask(int64_t number) const { __builtin_prefetch(row + number * size); }
};
"""
