"""The Triton text of each expression, and the device functions that some of them call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .index import Axis, Extent, Index, Modulo, Term

# {0}, {1}, ... are the arguments.
TEXT: Mapping[str, str] = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}",
    "exp": "tl.exp({0})", "rsqrt": "tl.rsqrt({0})",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))", "tanh": "libdevice.tanh({0})", "log1p": "libdevice.log1p({0})",
    "erf": "tl.erf({0})",
    "max": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "min": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "gt": "{0} > {1}",
    "where": "tl.where({0}, {1}, {2})",
}  # fmt: skip

CASTS = {"bf16": "tl.bfloat16", "f16": "tl.float16"}

LIBRARY: Mapping[str, str] = {
    "rope_wave": '''
@triton.jit
def rope_wave(
    p, i, QUARTER: tl.constexpr, ROUNDED: tl.constexpr, RATE: tl.constexpr, FACTOR: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, LENGTH: tl.constexpr,
):
    """The sine of p theta^(-2 i / width), a quarter turn on: the cosine; RATE is 2 log2(theta) / width.

    Turns are counted in float64, so that far positions stay sharp; within an eighth of a turn, polynomials (Cephes).
    """
    f = tl.exp2(i.to(tl.float64) * -RATE)
    if ROUNDED:
        f = f.to(tl.float32).to(tl.float64)
    f = f * 0.15915494309189535
    if FACTOR > 0:
        at = LENGTH * f if LENGTH > 0 else HIGH + LOW - i.to(tl.float64)
        blend = tl.minimum(tl.maximum((at - LOW) / (HIGH - LOW), 0.0), 1.0)
        f = f * (blend + (1.0 - blend) / FACTOR)
    turns = p.to(tl.float64) * f
    quarters = tl.floor(turns * 4.0 + 0.5)
    x = ((turns - quarters * 0.25) * 6.283185307179586).to(tl.float32)
    q = (quarters - 4.0 * tl.floor(quarters * 0.25)).to(tl.int32) + QUARTER
    z = x * x
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    y = tl.where((q & 1) == 1, c, s)
    return tl.where((q & 2) == 2, -y, y)
''',
}


def number(value: float) -> str:
    """A literal."""
    if math.isinf(value):
        return 'float("inf")' if value > 0 else 'float("-inf")'
    return 'float("nan")' if math.isnan(value) else repr(value)


def rope_arguments(table: Sequence[object]) -> str:
    """What `rope_wave` takes behind position and pair."""
    quarter, rounded, width, theta, *scaling = (float(x) for x in table)  # type: ignore[arg-type] # numbers by construction
    factor, low, high, length = scaling or (0.0, 0.0, 1.0, 0.0)
    return f"{int(quarter)}, {bool(rounded)}, {2 * math.log2(theta) / width!r}, {factor!r}, {low!r}, {high!r}, {length!r}"


def _term(term: Term, sizes: Mapping[str, str]) -> str:
    if isinstance(term, Axis):
        return term.name
    if isinstance(term, Extent):
        return sizes[term.size]
    inside = index_text(term.of, sizes)
    if isinstance(term, Modulo):
        return f"({inside}) % {term.by}"
    j, half = (inside if len(term.of.terms) == 1 and not term.of.plus else f"({inside})"), term.half
    swapped = f"tl.where({j} < {half}, {j} + {half}, {j} - {half})"
    return swapped if 2 * half == term.size else f"tl.where({j} < {2 * half}, {swapped}, {j})"


def index_text(index: Index, sizes: Mapping[str, str]) -> str:
    """An index as text; `sizes` are the names of row sizes."""
    parts = list[str]()
    for term, factor in index.terms:
        name = _term(term, sizes)
        parts.append(name if factor == 1 else f"{name} * {factor}")
    if index.plus or not parts:
        parts.append(str(index.plus))
    return " + ".join(parts).replace("+ -", "- ")
