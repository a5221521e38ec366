"""The Triton text of each expression, and the device functions that some of them call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .index import Axis, Extent, Index

# {0}, {1}, ... are the arguments.
TEXT: Mapping[str, str] = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "neg": "-{0}", "exp": "tl.exp({0})", "rsqrt": "tl.rsqrt({0})",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))", "tanh": "tanh({0})", "log1p": "log1p({0})", "erf": "tl.erf({0})",
    "max": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "min": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "gt": "{0} > {1}", "odd": "({0} % 2) == 1", "cos": "tl.cos({0})", "sin": "tl.sin({0})",
    "where": "tl.where({0}, {1}, {2})",
}  # fmt: skip

CASTS = {"bf16": "tl.bfloat16", "f16": "tl.float16"}

LIBRARY: Mapping[str, str] = {
    "tanh": '''
@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2 |x|); near 0, where that cancels, the odd series."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    q = x * x
    near = a * (1.0 + q * (-0.3333333333 + q * (0.1333333333 + q * (-0.0539682540 + q * 0.0218694885))))
    y = tl.where(a < 0.3, near, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -y, y)
''',
    "log1p": '''
@triton.jit
def log1p(x):
    """log(1 + x), with what rounding 1 + x loses put back (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))
''',
    "rope_angle": '''
@triton.jit
def rope_angle(p, i, RATE: tl.constexpr, FACTOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, LENGTH: tl.constexpr):
    """p * theta^(-2 i / width) less whole turns, in float64 so that far positions stay sharp; RATE is 2 log2(theta) / width."""
    f = tl.exp2(i.to(tl.float64) * -RATE)
    if FACTOR > 0:
        blend = (LENGTH * f * 0.15915494309189535 - LOW) / (HIGH - LOW)
        blend = tl.minimum(tl.maximum(blend, 0.0), 1.0)
        f = f * (blend + (1.0 - blend) / FACTOR)
    turns = p.to(tl.float64) * f * 0.15915494309189535
    return ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
''',
}


def number(value: float) -> str:
    """A literal."""
    if math.isinf(value):
        return 'float("inf")' if value > 0 else 'float("-inf")'
    return 'float("nan")' if math.isnan(value) else repr(value)


def rope_arguments(table: Sequence[object], place: str) -> str:
    """What `rope_angle` takes behind the position."""
    width, theta, interleaved, *scaling = (float(x) for x in table)  # type: ignore[arg-type] # numbers by construction
    i = f"{place} // 2" if interleaved else f"{place} % {int(width) // 2}"
    factor, low, high, length = scaling or (0.0, 0.0, 1.0, 0.0)
    return f"{i}, {2 * math.log2(theta) / width!r}, {factor!r}, {low!r}, {high!r}, {length!r}"


def index_text(index: Index, sizes: Mapping[str, str]) -> str:
    """An index as text; `sizes` are the names of row sizes."""
    parts = list[str]()
    for term, factor in index.terms:
        if isinstance(term, Axis):
            name = term.name
        elif isinstance(term, Extent):
            name = sizes[term.size]
        else:
            j, half = index_text(term.of, sizes), term.width // 2
            name = f"({j} ^ 1)" if term.interleaved else f"tl.where({j} < {half}, {j} + {half}, {j} - {half})"
            if term.width < term.size:
                name = f"tl.where({j} < {term.width}, {name}, {j})"
        parts.append(name if factor == 1 else f"{name} * {factor}")
    if index.plus or not parts:
        parts.append(str(index.plus))
    return " + ".join(parts).replace("+ -", "- ")
