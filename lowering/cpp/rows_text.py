"""The C++ of each expression of a row kernel, and the functions that some of them call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ...ir.ops.position import frequencies
from ..rows.index import Axis, Declined, Index, Modulo, Swapped, Term

# {0}, {1}, ... are the arguments.
TEXT: Mapping[str, str] = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}",
    "exp": "exp_one({0})", "rsqrt": "1.0f / sqrtf({0})", "sigmoid": "1.0f / (1.0f + exp_one(-{0}))",
    "tanh": "tanh_one({0})", "log1p": "log1p_one({0})", "erf": "erf_one({0})",
    "max": "max_of({0}, {1})", "min": "min_of({0}, {1})", "gt": "{0} > {1}", "where": "{0} ? {1} : {2}",
}  # fmt: skip
TYPES = {"f32": "float", "bf16": "uint16_t", "f16": "_Float16", "i64": "int64_t", "i32": "int32_t", "bool": "bool"}

FUNCTIONS = """\
// Loops over one number each, without branches: the compiler makes vectors of them.
#define ALWAYS static inline __attribute__((always_inline))

template <class To, class From> ALWAYS To bits(From x)
{
    To y;
    memcpy(&y, &x, sizeof(To));
    return y;
}

// e^x to 2e-7, after Cephes; NaN stays NaN.
ALWAYS float exp_one(float x)
{
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const int32_t power = (int32_t)((uint32_t)(bits<int32_t>(shifted) - 0x4B400000 + 127) << 23);
    return (p * r * r + r + 1.0f) * bits<float>(power);
}

ALWAYS float tanh_one(float x)
{
    const float z = x * x, far = 1.0f - 2.0f / (exp_one(2.0f * fabsf(x)) + 1.0f);
    float p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return fabsf(x) < 0.625f ? p * z * x + x : x < 0.0f ? -far : far;
}

// log(1 + x) for x of 0 or more.
ALWAYS float log1p_one(float x)
{
    const float u = 1.0f + x, lost = x - (u - 1.0f);
    int32_t e = (bits<int32_t>(u) >> 23) - 127;
    float m = bits<float>((bits<int32_t>(u) & 0x7FFFFF) | 0x3F800000);
    const bool above = m > 1.41421356f;
    m = above ? m * 0.5f : m;
    const float f = m - 1.0f, n = (float)(above ? e + 1 : e), z = f * f;
    float p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float y = (p * f * z - 0.5f * z + n * -2.12194440e-4f) + f + n * 0.693359375f + lost / u;
    return x < 3.4e38f ? y : x;
}

// A ratio of polynomials, as Eigen and XLA have it.
ALWAYS float erf_one(float x)
{
    const float c = x < -4.0f ? -4.0f : x > 4.0f ? 4.0f : x, z = c * c;
    float p = z * -2.72614225801306e-10f + 2.77068142495902e-8f;
    p = p * z - 2.10102402082508e-6f;
    p = p * z - 5.69250639462346e-5f;
    p = p * z - 7.34990630326855e-4f;
    p = p * z - 2.95459980854025e-3f;
    p = p * z - 1.60960333262415e-2f;
    float q = z * -1.45660718464996e-5f - 2.13374055278905e-4f;
    q = q * z - 1.68282697438203e-3f;
    q = q * z - 7.37332916720468e-3f;
    q = q * z - 1.42647390514189e-2f;
    return c * p / q;
}

// NaN stays NaN.
ALWAYS float max_of(float a, float b) { return a > b || a != a ? a : b; }
ALWAYS float min_of(float a, float b) { return a < b || a != a ? a : b; }

ALWAYS float load(float x) { return x; }
ALWAYS int64_t load(int64_t x) { return x; }
ALWAYS int64_t load(int32_t x) { return x; }
ALWAYS float load(uint16_t x) { return bits<float>((uint32_t)x << 16); }
ALWAYS void store(float* to, float x) { *to = x; }
ALWAYS void store(uint16_t* to, float x) { *to = to_bf16(x); }
ALWAYS float round_bf16(float x) { return load(to_bf16(x)); }

// The sine (a quarter turn on: the cosine) of place p turning so many times a place. Turns are counted in float64, so that
// far positions stay sharp; within an eighth of a turn, polynomials (Cephes). Beyond 2^51, no bits are left for a quarter:
// adding 1.5 * 2^52 rounds to a whole number and leaves it in the low bits, which is the same in a vector.
ALWAYS float wave(int64_t p, double rate, int quarter)
{
    const double turns = (double)p * rate, shifted = turns * 4.0 + 6755399441055744.0;
    const float x = (float)((turns - (shifted - 6755399441055744.0) * 0.25) * 6.283185307179586);
    const int32_t q = (int32_t)bits<int64_t>(shifted) + quarter;
    const float z = x * x;
    const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x;
    const float c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
    const float y = q & 1 ? c : s;
    return q & 2 ? -y : y;
}
"""

HALF = """\
ALWAYS float load(_Float16 x) { return (float)x; }
ALWAYS void store(_Float16* to, float x) { *to = (_Float16)x; }
ALWAYS float round_f16(float x) { return (float)(_Float16)x; }
"""


def number(value: float) -> str:
    """A literal."""
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    return "NAN" if math.isnan(value) else f"{value!r}f" if value >= 0 else f"({value!r}f)"


def rates(table: Sequence[object]) -> list[float]:
    """Turns a place of each pair of a rotation, as `rope` has them."""
    rounded, width, theta, *scaling = table
    like = torch.empty(0, dtype=torch.float64)
    found = frequencies(int(width), float(theta), tuple(scaling), like, bool(rounded))  # type: ignore[arg-type] # numbers by construction
    return (found / (2 * math.pi)).tolist()


def index_text(index: Index) -> str:
    """An index as text."""
    parts = [_term(t) if f == 1 else f"{_term(t)} * {f}" for t, f in index.terms]
    if index.plus or not parts:
        parts.append(str(index.plus))
    return " + ".join(parts).replace("+ -", "- ")


def _term(term: Term) -> str:
    if isinstance(term, Axis):
        return term.name
    if not isinstance(term, Modulo | Swapped):
        raise Declined("an index is counted from the last token, and it has no C++")
    inside = index_text(term.of)
    if isinstance(term, Modulo):
        return f"(({inside}) % {term.by})"
    swapped = f"(({inside}) < {term.half} ? ({inside}) + {term.half} : ({inside}) - {term.half})"
    return swapped if 2 * term.half == term.size else f"(({inside}) < {2 * term.half} ? {swapped} : ({inside}))"
