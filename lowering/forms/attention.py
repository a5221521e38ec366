"""Softmax attention: C++ where there is a compiler, else SDPA where it fits, or blocks of queries against their keys."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_fast as fast
from .precision import own_precision

# Queries of one block, and the most logits that are worked on at once.
QUERIES = 128
LOGITS = 1 << 20


@dataclass(frozen=True)
class Masking:
    """Which keys a query sees, and what else happens to its logits."""

    cu: list[int] | None
    at: int
    causal: bool
    window: int
    softcap: float
    scale: float


@dataclass(frozen=True)
class Block:
    """Some heads' queries [i0, i1) and the keys [j0, j1) that any of them sees; `hidden` is None when all see all."""

    heads: slice
    queries: slice
    keys: slice
    hidden: Tensor | None  # [queries, keys]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    cu: Tensor | None = None,
    at: Tensor | None = None,
    *,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the keys each query may see; see the op for what the options hide."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = k.to(q.dtype), v.to(q.dtype)
    if sinks is None and cu is None and not window and not softcap and k.shape[-1] == v.shape[-1]:
        if q.shape[1] == 1 and (at is None or not causal):
            return _one_query(q, k, v, factor)
        own = fast.fits(q, k, v) and not fast.brief(q)
        if not own and (not causal or (at is None and q.shape[1] == k.shape[1])):
            return _sdpa(q, k, v, factor, causal)
    return torch.ops.plait.attention(q, k, v, sinks, cu, at, causal, window, softcap, factor)[0]


def plain_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of tokens to themselves and those before, and nothing else."""
    own = fast.fits(q, k, v) and not fast.brief(q)
    return attend(q, k, v, None, Masking(None, 0, True, 0, 0.0, scale))[0] if own else _sdpa(q, k, v, scale, True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    # In bfloat16 the CPU's kernel runs 17 times slower backward (head 256, no matrix unit) than in float32.
    cast = _wide if q.device.type == "cpu" else torch.Tensor.contiguous
    queries, keys, values = (cast(x).transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[2] != k.shape[2]
    o = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal, scale=scale, enable_gqa=gqa)
    return o.transpose(1, 2).to(q.dtype)


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The heads of one group stand as rows, so that its keys are read once."""
    rows = _fold(q, k.shape[2])
    o = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return o.reshape(q.shape[0], 1, q.shape[2], v.shape[-1])


def _fold(q: Tensor, g: int) -> Tensor:
    """[b 1 (g r) d] -> [b, g, r, d]"""
    return q.reshape(q.shape[0], g, q.shape[2] // g, q.shape[3])


@own_precision
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu: Tensor | None,
    at: Tensor | None,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the log of each softmax's denominator [b*g, r, t]."""
    return attend(q, k, v, sinks, _masking(q, k, cu, at, causal, window, softcap, scale))


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: Masking) -> tuple[Tensor, Tensor]:
    """As above, told where queries stand."""
    alone = q.shape[1] == 1 and how.cu is None and not how.softcap
    if alone and k.shape[-1] == v.shape[-1] and q.device.type == "cpu":
        return _decode(q, k, v, sinks, how)
    if fast.empty(q, k):
        return fast.nothing(q, k, v)
    if fast.generates(q, k, v, sinks):
        return fast.forward(q, k, v, sinks, how)
    if fast.flashes(q, k, v, sinks, how):
        return fast.flash(q, k, v, how)
    queries, keys, values = by_group(q, k.shape[2]), by_key(k), by_key(v)
    extra = None if sinks is None else _sinks(sinks, len(keys), queries.shape[1])
    o, lse = values.new_zeros(*queries.shape[:3], v.shape[-1]), queries.new_zeros(queries.shape[:3])
    for block in _blocks(queries, keys, how):
        where = (block.heads, slice(None), block.queries)
        o[where], lse[where] = attend_block(queries, keys, values, extra, block, how)
    return from_group(o, q.shape[0]).to(q.dtype), lse


def _decode(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: Masking) -> tuple[Tensor, Tensor]:
    """One query against a cache: only the keys it sees are read, where they lie."""
    j0, j1 = _seen(0, 1, k.shape[1], how)
    seen = (x[:, j0 : max(j0, j1)].transpose(1, 2) for x in (k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o, lse = flash(_fold(q, k.shape[2]), *seen, 0.0, False, attn_mask=None, scale=how.scale)
    lse = _wide(lse).flatten(0, 1)[..., None]
    o = o.flatten(0, 1)[:, :, None]
    if sinks is not None:
        extra = _sinks(sinks, len(lse), lse.shape[1])[..., 0]
        o = (_wide(o) * torch.sigmoid(lse - extra)[..., None]).to(q.dtype)
        lse = torch.logaddexp(lse, extra)
    return from_group(o, q.shape[0]), lse.contiguous()


def attend_block(
    queries: Tensor, keys: Tensor, values: Tensor, extra: Tensor | None, block: Block, how: Masking
) -> tuple[Tensor, Tensor]:
    logits = _logits(queries, keys, block, how)
    if block.hidden is not None:
        logits.masked_fill_(block.hidden, -torch.inf)
    # A row that sees nothing has maximum -inf: a finite stand-in makes its weights 0 rather than NaN.
    top = logits.amax(-1, keepdim=True).clamp_min_(-1e30)
    if extra is not None:
        top = torch.maximum(top, extra[block.heads])
    weights = logits.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    if extra is not None:
        total = total + torch.exp(extra[block.heads] - top)
    total = total.clamp_min_(torch.finfo(total.dtype).tiny)
    o = _matmul(weights, values[block.heads, block.keys]).div_(total)
    return o, (top + total.log())[..., 0]


@own_precision
def _backward(
    do: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu: Tensor | None,
    at: Tensor | None,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    how = _masking(q, k, cu, at, causal, window, softcap, scale)
    if fast.empty(q, k):
        return (
            torch.zeros_like(q),
            torch.zeros_like(k),
            torch.zeros_like(v),
            (q if sinks is None else sinks).new_zeros(q.shape[2]),
        )
    if fast.generates(q, k, v, sinks):
        dq, dk, dv, of_sinks = fast.backward(do, o, lse, q, k, v, sinks, how)
        return dq, dk, dv, q.new_zeros(q.shape[2]) if sinks is None or of_sinks is None else of_sinks.to(sinks.dtype)
    if fast.flashes(q, k, v, sinks, how):
        return *fast.flash_backward(do, o, lse, q, k, v, how), q.new_zeros(q.shape[2])
    return _by_blocks(do, o, lse, q, k, v, sinks, how)


def _by_blocks(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: Masking
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g, b = k.shape[2], q.shape[0]
    queries, keys, values, grads = by_group(q, g), by_key(k), by_key(v), by_group(do, g)
    delta = (grads * by_group(o, g)).sum(-1, keepdim=True)
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for block in _blocks(queries, keys, how):
        attend_block_backward((queries, keys, values), (dq, dk, dv), grads, delta, lse, block, how)
    if sinks is None:
        dsinks = q.new_zeros(q.shape[2])
    else:
        share = torch.exp(_sinks(sinks, len(keys), queries.shape[1]) - lse[..., None])
        dsinks = -(share * delta).reshape(b, g, -1, q.shape[1]).sum((0, 3)).reshape(-1).to(sinks.dtype)
    return from_group(dq, b).to(q.dtype), from_keys(dk, b).to(k.dtype), from_keys(dv, b).to(v.dtype), dsinks


def attend_block_backward(
    operands: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    do: Tensor,
    delta: Tensor,
    lse: Tensor,
    block: Block,
    how: Masking,
) -> None:
    """Add what one block gives to the gradients of queries, keys and values."""
    (queries, keys, values), (dq, dk, dv) = operands, grads
    at_queries, at_keys = (block.heads, slice(None), block.queries), (block.heads, block.keys)
    logits = _logits(queries, keys, block, how)
    weights = torch.exp(logits - lse[at_queries][..., None])
    if block.hidden is not None:
        weights.masked_fill_(block.hidden, 0)
    dlogits = _matmul(do[at_queries], values[at_keys].mT).sub_(delta[at_queries]).mul_(weights)
    if how.softcap:
        dlogits.mul_(1 - (logits / how.softcap).square_())
    dlogits.mul_(how.scale)
    dv[at_keys] += weights.flatten(1, 2).mT @ do[at_queries].flatten(1, 2)
    dk[at_keys] += dlogits.flatten(1, 2).mT @ queries[at_queries].flatten(1, 2)
    dq[at_queries] = _matmul(dlogits, keys[at_keys])


def _logits(queries: Tensor, keys: Tensor, block: Block, how: Masking) -> Tensor:
    logits = _matmul(queries[block.heads, :, block.queries] * how.scale, keys[block.heads, block.keys].mT)
    return logits.div_(how.softcap).tanh_().mul_(how.softcap) if how.softcap else logits


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a[n r t x] @ b[n x y], the r heads of a group as more rows: keys are never repeated."""
    return (a.flatten(1, 2) @ b).unflatten(1, a.shape[1:3])


def _blocks(queries: Tensor, keys: Tensor, how: Masking) -> Iterator[Block]:
    n, r, t, _ = queries.shape
    for i0 in range(0, t, QUERIES):
        i1 = min(i0 + QUERIES, t)
        j0, j1 = _seen(i0, i1, keys.shape[1], how)
        if j0 < j1:
            hidden = _hidden(i0, i1, j0, j1, how, queries.device)
            step = max(1, LOGITS // (r * (i1 - i0) * (j1 - j0)))
            for h in range(0, n, step):
                yield Block(slice(h, h + step), slice(i0, i1), slice(j0, j1), hidden)


def _seen(i0: int, i1: int, s: int, how: Masking) -> tuple[int, int]:
    """The keys that queries [i0, i1) can see at all."""
    j0 = max(0, how.at + i0 - how.window + 1) if how.window else 0
    j1 = min(s, how.at + i1) if how.causal else s
    if how.cu is None:
        return j0, j1
    last = len(how.cu) - 1
    first, final = bisect_right(how.cu, i0), bisect_right(how.cu, i1 - 1)
    return max(j0, how.cu[first - 1]), min(j1, s if final > last else how.cu[final])


def _hidden(i0: int, i1: int, j0: int, j1: int, how: Masking, device: torch.device) -> Tensor | None:
    i, j = torch.arange(i0, i1, device=device)[:, None], torch.arange(j0, j1, device=device)[None]
    hidden = torch.zeros(i1 - i0, j1 - j0, dtype=torch.bool, device=device)
    if how.causal:
        hidden |= j > how.at + i
    if how.window:
        hidden |= j <= how.at + i - how.window
    if how.cu is not None:
        bounds = torch.tensor(how.cu[1:], device=device)
        hidden |= torch.bucketize(i, bounds, right=True) != torch.bucketize(j, bounds, right=True)
    return hidden if hidden.any() else None


def _masking(
    q: Tensor,
    k: Tensor,
    cu: Tensor | None,
    at: Tensor | None,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
) -> Masking:
    start = k.shape[1] - q.shape[1] if at is None else int(at)
    return Masking(None if cu is None else cu.tolist(), start, causal, window, softcap, scale)


def _wide(x: Tensor) -> Tensor:
    """Sums run in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def by_group(q: Tensor, g: int) -> Tensor:
    """[b t (g r) d] -> [b*g, r, t, d]"""
    return _wide(q).unflatten(2, (g, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def from_group(q: Tensor, b: int) -> Tensor:
    """[b*g, r, t, d] -> [b t (g r) d]"""
    return q.unflatten(0, (b, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def by_key(k: Tensor) -> Tensor:
    """[b s g d] -> [b*g, s, d]"""
    return _wide(k).transpose(1, 2).flatten(0, 1).contiguous()


def from_keys(k: Tensor, b: int) -> Tensor:
    """[b*g, s, d] -> [b s g d]"""
    return k.unflatten(0, (b, -1)).transpose(1, 2).contiguous()


def _sinks(sinks: Tensor, groups: int, r: int) -> Tensor:
    """[(g r)] -> [b*g, r, 1, 1]"""
    return _wide(sinks).view(-1, r, 1, 1).repeat(groups * r // sinks.shape[0], 1, 1, 1)


_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu, Tensor? at, bool causal, int window, float softcap, float scale"
)
_op = torch.library.custom_op("plait::attention", _forward, mutates_args=(), schema=f"({_OPERANDS}) -> (Tensor, Tensor)")
_op_backward = torch.library.custom_op(
    "plait::attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor do, Tensor o, Tensor lse, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    (b, t, h, _d), g = q.shape, k.shape[2]
    lse = q.new_empty(b * g, h // g, t, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return q.new_empty(b, t, h, v.shape[-1]), lse


@_op_backward.register_fake
def _(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = (q if sinks is None else sinks).new_empty(q.shape[2])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:6])
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[6:]


def _grad(ctx: Any, do: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    o, lse, *inputs = ctx.saved_tensors
    *grads, dsinks = torch.ops.plait.attention_backward(do, o, lse, *inputs, *ctx.options)
    return *grads, None if inputs[3] is None else dsinks, *[None] * 6


_op.register_autograd(_grad, setup_context=_save)
