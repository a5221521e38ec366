"""Softmax attention, and the cache its keys and values wait in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..op import op
from ..types import TensorType
from .pointwise import wide
from .recurrence import segments

Tensor = torch.Tensor


@op(
    "q[b t (g r) d], k[b s g d], v[b s g e], sinks[(g r)]?, cu:i64[n+1]?, at:i64[]? -> o[b t (g r) e]",
    map="b g r e", scan="t s", whole="d n", flops="2*b*t*s*g*r*(d+e)", over="t s",
)  # fmt: skip
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, cu: Tensor | None = None, at: Tensor | None = None,
    *, causal: bool = True, window: int = 0, softcap: float = 0.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """o_i = softmax_j(scale q_i k_j) v_j over the keys that i may see

    Query i stands at `at` + i (s - t when absent), key j at j. Causal keeps j <= that; `window` w keeps the last w keys;
    `cu` keeps both in one packed segment; `sinks` are one more logit per head; `softcap` c bends logits to c tanh(x/c).
    """
    r = q.shape[2] // k.shape[2]
    keys, values = (wide(x).repeat_interleave(r, 2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", wide(q), keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    logits = logits.masked_fill(~visible(q.shape[1], k.shape[1], cu, at, causal, window, q.device), -torch.inf)
    if sinks is not None:
        extra = wide(sinks)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], -1)
    weights = torch.softmax(logits, -1)[..., : k.shape[1]]
    return torch.einsum("bhts,bshe->bthe", weights, values).to(q.dtype)


def visible(t: int, s: int, cu: Tensor | None, at: Tensor | None, causal: bool, window: int, device: torch.device) -> Tensor:
    """[t, s]: which keys each query may see."""
    j = torch.arange(s, device=device)[None]
    i = torch.arange(t, device=device)[:, None] + (s - t if at is None else at)
    mask = (j <= i) if causal else torch.ones(t, s, dtype=torch.bool, device=device)
    if window:
        mask = mask & (j > i - window)
    if cu is not None:
        of = torch.zeros(s, dtype=torch.int64, device=device)
        for n, (_, start, end) in enumerate(segments(1, s, cu)):
            of[start:end] = n
        mask = mask & (of[:t, None] == of[None])
    return mask


@attention.samples
def _(sample: Any) -> list[Any]:
    q, k, v, sinks = sample.randn(1, 5, 6, 3), sample.randn(1, 5, 3, 3), sample.randn(1, 5, 3, 7), sample.randn(6)
    return [q, k, v, sinks, torch.tensor([0, 2, 2, 5]), torch.tensor(0), {"window": 3, "softcap": 2.0}]


@op("cache[b m g d], x[b t g d], at:i64[] -> y[b m g d]", map="b g d", scan="m t", linear="cache x")
def cache_write(cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
    """The cache with x standing at positions at, at + 1, ..."""
    return cache.index_copy(1, torch.arange(x.shape[1], device=x.device) + at, x.to(cache.dtype))


@cache_write.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 7, 2, 4), sample.randn(2, 3, 2, 4), torch.tensor(2)]


@op("cache[b m g d], x[b t g d], at:i64[] -> y[b t g d]", map="b g d", scan="m t", linear="cache", shape="x")
def cache_read(cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
    """What the cache holds at positions at, at + 1, ..., as many as x, which gives its shape alone, has"""
    return cache.index_select(1, torch.arange(x.shape[1], device=x.device) + at)


@cache_read.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 7, 2, 4), sample.randn(2, 3, 2, 4), torch.tensor(2)]


@cache_write.vjp
def _(types: Mapping[str, TensorType | None], attrs: Mapping[str, Any]) -> str:
    """What was written over has no part in the result; zeros are a sum over ranks where the cotangent is."""
    return f"""
        d_x = cache_read(d_y, x, at)
        d_cache = cache_write(d_y, zeros_like(x, partial={_partial(types["d_y"])}), at)
    """


@cache_read.vjp
def _(types: Mapping[str, TensorType | None], attrs: Mapping[str, Any]) -> str:
    """Zeros but where it was read."""
    return f"d_cache = cache_write(zeros_like(cache, partial={_partial(types['d_y'])}), d_y, at)"


def _partial(type_: TensorType | None) -> tuple[str, ...]:
    return tuple(sorted(type_.partial)) if type_ is not None else ()
