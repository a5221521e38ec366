"""Attention whose logits have a bias by distance, over the keys that each row has: encoders, cross attention, ALiBi."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..op import op
from .attention import visible
from .pointwise import wide

Tensor = torch.Tensor


@op(
    "q[b t (g r) d], k[b s g d], v[b s g e], table[n (g r)]?, lengths:i64[b]?, at:i64[]? -> o[b t (g r) e]",
    map="b g r e", scan="t s n", whole="d", flops="2*b*t*s*g*r*(d+e)",
)  # fmt: skip
def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None, lengths: Tensor | None = None, at: Tensor | None = None,
    *, causal: bool = True, reach: int = 128, slopes: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """o_i = softmax_j(scale q_i k_j + bias(j - i)) v_j over the first `lengths` keys of a row, causal or not

    Query i stands at `at` + i (s - t when absent), key j at j. The bias is a row of `table` for each head: that of the bucket
    a distance falls into, T5's, logarithmic up to `reach`, keys behind and ahead apart unless causal; with `slopes` the one
    row times the distance (ALiBi).
    """
    r = q.shape[2] // k.shape[2]
    keys, values = (wide(x).repeat_interleave(r, 2) for x in (k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bthd,bshd->bhts", wide(q), keys.to(wide(q).dtype)) * factor
    if table is not None:
        logits = logits + distance_bias(wide(table), q.shape[1], k.shape[1], at, causal, reach, slopes)
    logits = logits.masked_fill(~seen(q, k, lengths, at, causal), -torch.inf)
    return torch.einsum("bhts,bshe->bthe", torch.softmax(logits, -1), values.to(logits.dtype)).to(q.dtype)


def seen(q: Tensor, k: Tensor, lengths: Tensor | None, at: Tensor | None, causal: bool) -> Tensor:
    """[b or 1, 1, t, s]: which keys each query may see."""
    mask = visible(q.shape[1], k.shape[1], None, at, causal, 0, q.device)[None, None]
    if lengths is None:
        return mask
    return mask & (torch.arange(k.shape[1], device=q.device) < lengths[:, None])[:, None, None]


def distance_bias(table: Tensor, t: int, s: int, at: Tensor | None, causal: bool, reach: int, slopes: bool) -> Tensor:
    """[h, t, s]: what each head adds for each pair."""
    i = torch.arange(t, device=table.device)[:, None] + (s - t if at is None else at)
    distance = torch.arange(s, device=table.device)[None] - i
    if slopes:
        return table[0][:, None, None] * distance.to(table.dtype)
    return table[buckets(distance, table.shape[0], causal, reach)].movedim(-1, 0)


def buckets(distance: Tensor, n: int, causal: bool, reach: int) -> Tensor:
    """The bucket of a key so far ahead (behind where negative): half of them exact, the others logarithmic up to `reach`.

    The logarithm is taken in float32, as it was when published models were trained: borders fall on whole numbers.
    """
    half = n if causal else n // 2
    side = torch.zeros_like(distance) if causal else (distance > 0) * half
    away = (-distance).clamp_min(0) if causal else distance.abs()
    exact = half // 2
    log = torch.log(away.clamp_min(1).to(torch.float32) / exact) / math.log(reach / exact)
    far = (exact + (log * (half - exact)).to(torch.int64)).clamp_max(half - 1)
    return side + torch.where(away < exact, away, far)


@biased_attention.samples
def _(sample: Any) -> list[Any]:
    """Every row has a key; its queries stand behind some keys."""
    q, k, v = sample.randn(2, 5, 6, 3), sample.randn(2, 8, 3, 3), sample.randn(2, 8, 3, 7)
    attrs = {"causal": sample.coin(), "reach": 6}
    return [q, k, v, sample.randn(8, 6), torch.tensor([8, 4]), torch.tensor(3), attrs]


@op("p:i64[b t] -> y:i64[b t]", map="b t")
def shift_positions(p: Tensor, *, by: int) -> Tensor:
    """p + by: positions in a table whose first rows stand for none"""
    return p + by


@shift_positions.samples
def _(sample: Any) -> list[Any]:
    return [torch.arange(10).reshape(2, 5), {"by": 2}]


shift_positions.no_gradient("its result is integers")
