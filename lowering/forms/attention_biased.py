"""Attention with a bias by distance, over rows of their own lengths: C++ where there is a compiler, else the op's meaning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ir.ops import biased_attention as meaning
from ...ir.ops.biased import buckets, distance_bias, seen
from ..cpp import attention as generated
from . import attention_fast as fast
from .precision import opaque


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None, lengths: Tensor | None = None, at: Tensor | None = None,
    *, causal: bool = True, reach: int = 128, slopes: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + bias) v over each row's keys; one token, or a few, are what the op means, and fuse."""
    if not fast.fits(q, k, v) or q.shape[1] == 1 or fast.brief(q):
        return meaning.reference(q, k, v, table, lengths, at, causal=causal, reach=reach, slopes=slopes, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.plait.biased_attention(q, k, v, table, lengths, at, causal, reach, slopes, factor)[0]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, lengths: Tensor | None, at: Tensor | None, causal: bool,
    reach: int, slopes: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if generated.ready(q, k, v, table, lengths, at):
        sight = _sight(q, k, lengths, at, causal)
        return generated.forward(q, k, v, sight, _logits(q, k, table, sight, reach, slopes, scale))
    o = meaning.reference(q, k, v, table, lengths, at, causal=causal, reach=reach, slopes=slopes, scale=scale)
    return o.contiguous(), o.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


def _backward(
    d_o: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, lengths: Tensor | None,
    at: Tensor | None, causal: bool, reach: int, slopes: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not generated.ready(q, k, v, table, lengths, at):
        return _by_meaning(d_o, q, k, v, table, lengths, at, causal, reach, slopes, scale)
    sight = _sight(q, k, lengths, at, causal)
    logits = _logits(q, k, table, sight, reach, slopes, scale)
    d = generated.backward(d_o, o, lse, q, k, v, sight, logits)
    if table is None or d.bias is None:
        return d.q, d.k, d.v, q.new_empty(0)
    return d.q, d.k, d.v, _of_table(table, _distances(q, k, sight), d.bias, causal, reach, slopes)


def _by_meaning(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, lengths: Tensor | None, at: Tensor | None, causal: bool,
    reach: int, slopes: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of what the op means, with all logits at once."""
    sight, r = _sight(q, k, lengths, at, causal), q.shape[2] // k.shape[2]
    queries, grads, keys, values = q.float(), d_o.float(), *(x.float().repeat_interleave(r, 2) for x in (k, v))
    place = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - sight.at
    logits = torch.einsum("bthd,bshd->bhts", queries, keys) * scale
    if table is not None:
        logits = logits + distance_bias(table.float(), q.shape[1], k.shape[1], at, causal, reach, slopes)
    weights = torch.softmax(logits.masked_fill(~seen(q, k, lengths, at, causal), -torch.inf), -1)
    moved = torch.einsum("bthe,bshe->bhts", grads, values)
    d_logits = weights * (moved - (weights * moved).sum(-1, keepdim=True))
    d_q = torch.einsum("bhts,bshd->bthd", d_logits, keys) * scale
    d_k = torch.einsum("bhts,bthd->bshd", d_logits, queries) * scale
    d_v = torch.einsum("bhts,bthe->bshe", weights, grads)
    d_k, d_v = (d.unflatten(2, (-1, r)).sum(3) for d in (d_k, d_v))
    d_table = (
        q.new_empty(0)
        if table is None
        else _of_table(table, place.flatten(), d_logits.sum(0).flatten(1), causal, reach, slopes)
    )
    d_q, d_k, d_v = (d.to(x.dtype).contiguous() for d, x in zip((d_q, d_k, d_v), (q, k, v), strict=True))
    return d_q, d_k, d_v, d_table


def _of_table(table: Tensor, distance: Tensor, d_bias: Tensor, causal: bool, reach: int, slopes: bool) -> Tensor:
    """The table's gradient from that of the bias at each distance [h, n]."""
    rows = torch.zeros(table.shape, dtype=torch.float64)
    if slopes:
        rows[0] = (d_bias.double() * distance).cumsum(-1)[:, -1]  # an order that no number of threads changes
    else:
        rows.index_add_(0, buckets(distance, len(table), causal, reach), d_bias.double().t())
    return rows.to(table.dtype)


def _sight(q: Tensor, k: Tensor, lengths: Tensor | None, at: Tensor | None, causal: bool) -> generated.Sight:
    return generated.Sight(k.shape[1] - q.shape[1] if at is None else int(at), causal, lengths=lengths)


def _distances(q: Tensor, k: Tensor, sight: generated.Sight) -> Tensor:
    """How far a key may stand ahead of a query: all there are, rising."""
    last = sight.needed(q.shape[1], k.shape[1]).stop
    return torch.arange(1 - q.shape[1], last) - sight.at


def _logits(
    q: Tensor, k: Tensor, table: Tensor | None, sight: generated.Sight, reach: int, slopes: bool, scale: float
) -> generated.Logits:
    if table is None:
        return generated.Logits(scale)
    distance, rows = _distances(q, k, sight), table.float()
    if slopes:
        return generated.Logits(scale, bias=rows[0][:, None] * distance)
    return generated.Logits(scale, bias=rows[buckets(distance, len(table), sight.causal, reach)].t())


_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? lengths, Tensor? at, bool causal, int reach, bool slopes, float scale"
)
_op = torch.library.custom_op(
    "plait::biased_attention", opaque(_forward), mutates_args=(), schema=f"({_OPERANDS}) -> (Tensor, Tensor)"
)
_op_backward = torch.library.custom_op(
    "plait::biased_attention_backward",
    opaque(_backward),
    mutates_args=(),
    schema=f"(Tensor d_o, Tensor o, Tensor lse, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, t, h, _d = q.shape
    return q.new_empty(b, t, h, v.shape[-1]), q.new_empty(b, h, t, dtype=torch.float32)


@_op_backward.register_fake
def _(
    d_o: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_table = q.new_empty(0) if table is None else table.new_empty(table.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_table


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:6])
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[6:]


def _grad(ctx: Any, d_o: Tensor, _d_lse: Tensor) -> tuple[Tensor | None, ...]:
    o, lse, *inputs = ctx.saved_tensors
    *grads, d_table = torch.ops.plait.biased_attention_backward(d_o, o, lse, *inputs, *ctx.options)
    return *grads, None if inputs[3] is None else d_table, *[None] * 6


_op.register_autograd(_grad, setup_context=_save)
