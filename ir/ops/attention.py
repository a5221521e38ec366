"""Softmax attention, its parts over some of the keys, and the cache its keys and values wait in."""

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


@op(
    "q[b t (g r) d], k[b s g d], v[b s g e], qp:i64[t], kp:i64[s], cu:i64[n+1]? -> o:acc[b t (g r) e], lse:acc[b t (g r)]",
    map="b g r", whole="t s d e n", flops="2*b*t*s*g*r*(d+e)",
)  # fmt: skip
def attention_part(
    q: Tensor, k: Tensor, v: Tensor, qp: Tensor, kp: Tensor, cu: Tensor | None = None,
    *, causal: bool = True, window: int = 0, softcap: float = 0.0, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of the queries at places `qp` to the keys at places `kp` alone, and the log of each softmax's denominator

    Parts over different keys are one attention: o = sum_i exp(lse_i - lse) o_i, lse = log sum_i exp(lse_i). A query that sees
    no key of the part has o = 0 and lse = -inf.
    """
    logits, seen = _logits(q, k, qp, kp, cu, causal, window, softcap, scale)
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    # A row of -inf minus itself is no number; minus 0 its weights are 0.
    weights = torch.exp(logits - lse.masked_fill(~seen.any(-1), 0)[..., None])
    values = wide(v).repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.einsum("bhts,bshe->bthe", weights, values.to(weights.dtype)), lse.transpose(1, 2)


@op(
    "q[b t (g r) d], k[b s g d], v[b s g e], o[b t (g r) e], lse[b t (g r)], d_o[b t (g r) e]?, d_lse[b t (g r)]?, qp:i64[t], "
    "kp:i64[s], cu:i64[n+1]? -> d_q:acc[b t (g r) d], d_k:acc[b s g d], d_v:acc[b s g e]",
    map="b g r", whole="t s d e n", flops="4*b*t*s*g*r*(d+e)", linear="d_o d_lse",
)  # fmt: skip
def attention_part_gradients(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, d_o: Tensor | None, d_lse: Tensor | None, qp: Tensor,
    kp: Tensor, cu: Tensor | None = None,
    *, causal: bool = True, window: int = 0, softcap: float = 0.0, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What a part adds to the cotangents of q, k, v, where o and lse are those of all parts together, or of any that hold it"""
    logits, seen = _logits(q, k, qp, kp, cu, causal, window, softcap, scale)
    d_o = torch.zeros_like(o) if d_o is None else d_o
    factor, g, norm = _factor(q, scale), k.shape[2], wide(lse).transpose(1, 2)
    weights = torch.exp(logits - norm.masked_fill(norm == -torch.inf, 0)[..., None]).masked_fill(~seen, 0)
    delta = (wide(d_o) * wide(o)).sum(-1) - (0 if d_lse is None else wide(d_lse))
    keys, values = (wide(x).repeat_interleave(q.shape[2] // g, 2).to(weights.dtype) for x in (k, v))
    moved = torch.einsum("bthe,bshe->bhts", wide(d_o).to(weights.dtype), values) - delta.transpose(1, 2)[..., None]
    d_logits = weights * moved * factor * (1 - (logits / softcap).square() if softcap else 1)
    d_q = torch.einsum("bhts,bshd->bthd", d_logits, keys)
    d_k = torch.einsum("bhts,bthd->bshd", d_logits, wide(q).to(weights.dtype)).unflatten(2, (g, -1)).sum(3)
    d_v = torch.einsum("bhts,bthe->bshe", weights, wide(d_o).to(weights.dtype)).unflatten(2, (g, -1)).sum(3)
    return d_q, d_k, d_v


def _factor(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _logits(
    q: Tensor, k: Tensor, qp: Tensor, kp: Tensor, cu: Tensor | None, causal: bool, window: int, softcap: float,
    scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The logits [b h t s], and which of them count [t, s]."""
    keys = wide(k).repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("bthd,bshd->bhts", wide(q), keys.to(wide(q).dtype)) * _factor(q, scale)
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    return logits, sees(qp.to(q.device), kp.to(q.device), None if cu is None else cu.to(q.device), causal, window)


def sees(qp: Tensor, kp: Tensor, cu: Tensor | None, causal: bool, window: int) -> Tensor:
    """[t, s]: which keys, by their places, each query may see."""
    i, j = qp[:, None], kp[None]
    mask = (j <= i) if causal else torch.ones(len(qp), len(kp), dtype=torch.bool, device=qp.device)
    if window:
        mask = mask & (j > i - window)
    if cu is not None:
        ends = cu[1:].contiguous()
        mask = mask & (torch.searchsorted(ends, i, right=True) == torch.searchsorted(ends, j, right=True))
    return mask


@attention_part.samples
def _(sample: Any) -> list[Any]:
    """Every query sees a key, so that no result is infinite."""
    q, k, v = sample.randn(1, 3, 6, 3), sample.randn(1, 5, 3, 3), sample.randn(1, 5, 3, 7)
    qp, kp = torch.tensor([1, 6, 3]), torch.tensor([0, 2, 1, 5, 3])
    return [q, k, v, qp, kp, torch.tensor([0, 2, 2, 7]), {"window": 4, "softcap": 2.0}]


@attention_part_gradients.samples
def _(sample: Any) -> list[Any]:
    """The denominators are those of more keys than the part has."""
    q, k, v = sample.randn(1, 3, 6, 3), sample.randn(1, 5, 3, 3), sample.randn(1, 5, 3, 7)
    qp, kp, cu = torch.tensor([1, 6, 3]), torch.tensor([0, 2, 1, 5, 3]), torch.tensor([0, 2, 2, 7])
    o, lse = sample.randn(1, 3, 6, 7), 2 + sample.randn(1, 3, 6).abs()
    return [q, k, v, o, lse, sample.randn(1, 3, 6, 7), sample.randn(1, 3, 6), qp, kp, cu, {"window": 4, "softcap": 2.0}]


@attention_part.vjp
def _(types: Mapping[str, TensorType | None], attrs: Mapping[str, Any]) -> str:
    """The cotangents are made as wide as sums are, and have the operands' own types then."""
    options = ", ".join(f"{name}={name}" for name in attrs)
    own = "".join(f"    d_{x} = cast(w_{x}, dtype='{t.dtype}')\n" for x in "qkv" if (t := types[x]) is not None)
    return f"    w_q, w_k, w_v = attention_part_gradients(q, k, v, o, lse, d_o, d_lse, qp, kp, cu, {options})\n{own}"


attention_part_gradients.no_gradient("the gradient of a gradient is derived only where it is text over ops")


@op("x[b t g d] -> y[b t (g r) d]", map="b t g d", linear="x")
def repeat_heads(x: Tensor, *, r: int) -> Tensor:
    """Every head r times, one behind the other: fewer key heads than ranks, shared out over them"""
    return x.repeat_interleave(r, 2)


@op("y[b t (g r) d] -> x[b t g d]", map="b t g d", sum="r", linear="y", flops="b*t*g*r*d")
def sum_heads(y: Tensor, *, r: int) -> Tensor:
    """The sum of every r heads that stand together"""
    return wide(y).unflatten(2, (-1, r)).sum(3).to(y.dtype)


@repeat_heads.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 5, 3, 7), {"r": 3}]


@sum_heads.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 5, 6, 7), {"r": 3}]


repeat_heads.vjp("d_x = sum_heads(d_y, r=r)")
sum_heads.vjp("d_y = repeat_heads(d_x, r=r)")


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
