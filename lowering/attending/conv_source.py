"""Triton source of the short convolution, by what a call has: segments, a state, a bias, an activation, a final's cotangent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ..recurrent.source import Source
from .conv_text import CONV, FINAL, PAST, SPREAD, TAPS
from .source import made

Parts = Mapping[str, str]


@dataclass(frozen=True)
class ConvTraits:
    """A convolution as its kernels see it."""

    act: str  # none or silu
    bias: bool
    state: bool
    packed: bool
    final: bool = False  # whether the last inputs have a cotangent

    @property
    def name(self) -> str:
        """`silu_bias_packed`."""
        words = [self.act, *(w for w in ("bias", "state", "packed", "final") if getattr(self, w))]
        return "_".join(words)


COMMON: Parts = {
    "tile": """
pid = tl.program_id(0).to(tl.int64)
i_b = pid // tl.cdiv(C, BC)
$block""",
    "block": """
start = i_b * BT
o_t, o_c = tl.arange(0, BT), (pid % tl.cdiv(C, BC)).to(tl.int32) * BC + tl.arange(0, BC)
m_t, m_c = start + o_t < rows, inside(o_c, C, BC)
m = m_t[:, None] & m_c[None, :]
$segment""",
    "run": """
pid = tl.program_id(0).to(tl.int64)
i_n, o_c = pid // tl.cdiv(C, BC), (pid % tl.cdiv(C, BC)).to(tl.int32) * BC + tl.arange(0, BC)
m_c = inside(o_c, C, BC)
i_state = (i_n * C + o_c) * (K - 1)
$borders""",
    "window": """
back = since - (K - 1) + i
m_x = m & (back >= 0)[:, None]
o_x = (start - (K - 1) + i) * s_x_t + (o_t[:, None] * s_x_t + o_c[None, :])
x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
$past""",
    "sum_taps": """
z = tl.zeros((BT, BC), tl.float32)
$add_bias
for i in tl.static_range(K):
    $window
    z += x * tl.load(p_w + o_c * K + i, mask=m_c, other=0.0).to(tl.float32)[None, :]""",
}
ACT: Mapping[str, Parts] = {
    "none": {"bend": "", "unbend": "", "also": ""},
    "silu": {
        "bend": "z = z / (1.0 + tl.exp(-z))",
        "also": ", and the cotangents of what was activated",
        "unbend": """
$sum_taps
share_z = 1.0 / (1.0 + tl.exp(-z))
g *= share_z * (1.0 + z * (1.0 - share_z))
tl.store(p_dz + start * C + (o_t[:, None] * C + o_c[None, :]), g, mask=m)""",
    },
}
BIAS: Mapping[bool, Parts] = {
    False: {"add_bias": "", "sum_bias": ""},
    True: {
        "add_bias": "z += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]",
        "sum_bias": "sums += tl.where(o_k == K, tl.sum(g, 0)[None, :], 0.0)",
    },
}
# A state is read where a segment begins in a tile or a few tokens before it, which most tiles know nothing of.
STATE: Mapping[bool, Parts] = {
    False: {"past": "", "past_one": ""},
    True: {
        "past": """
if tl.min(tl.where(m_t, since, K), 0) < K - 1:
    o_s = (i_n[:, None] * C + o_c[None, :]) * (K - 1) + (K - 1 + back)[:, None]
    before = tl.load(p_state + o_s, mask=m & (back < 0)[:, None], other=0.0)
    x += before.to(p_x.dtype.element_ty).to(tl.float32)""",
        "past_one": """
before = tl.load(p_state + i_state + (K - 1 + place), mask=m_c & (place < 0), other=0.0)
x += before.to(p_x.dtype.element_ty)""",
    },
}
LENGTHS: Mapping[bool, Parts] = {
    False: {
        "segment": """
i_n = (start + o_t) // t
since = (start + o_t - i_n * t).to(tl.int32)
left = t - since""",
        "borders": "begin, end = i_n * t, i_n * t + t",
    },
    True: {
        "segment": """
i_n = tl.load(p_of + start + o_t, mask=m_t, other=0).to(tl.int64)
since = (start + o_t - tl.load(p_cu + i_n)).to(tl.int32)
left = (tl.load(p_cu + i_n + 1) - start - o_t).to(tl.int32)""",
        "borders": "begin, end = tl.load(p_cu + i_n), tl.load(p_cu + i_n + 1)",
    },
}
LAST: Mapping[bool, Parts] = {
    False: {"from_final": "", "past_from_final": ""},
    True: {
        "from_final": """
if tl.min(tl.where(m_t, left, K), 0) < K:
    o_f = (i_n[:, None] * C + o_c[None, :]) * (K - 1) + (K - 1 - left)[:, None]
    z += tl.load(p_dfinal + o_f, mask=m & (left < K)[:, None], other=0.0).to(tl.float32)""",
        "past_from_final": """
before = j - (end - begin)
z += tl.load(p_dfinal + i_state + before, mask=m_c & (before >= 0), other=0.0).to(tl.float32)""",
    },
}


def parts(traits: ConvTraits) -> dict[str, str]:
    """Every part of a convolution."""
    chosen = (ACT[traits.act], BIAS[traits.bias], STATE[traits.state], LENGTHS[traits.packed], LAST[traits.final])
    found = dict(COMMON)
    for part in chosen:
        found |= part
    return found


@cache
def conv_source(traits: ConvTraits) -> Source:
    """`conv` and `final`."""
    found = parts(traits)
    return made("convolution", traits.name, {"conv": (CONV, found), "final": (FINAL, found)})


@cache
def taps_source(traits: ConvTraits) -> Source:
    """`taps`."""
    return made("convolution_taps", traits.name, {"taps": (TAPS, parts(traits))})


@cache
def spread_source(traits: ConvTraits) -> Source:
    """`spread` and `past`."""
    found = parts(traits)
    return made("convolution_transposed", traits.name, {"spread": (SPREAD, found), "past": (PAST, found)})
