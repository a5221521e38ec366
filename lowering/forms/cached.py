"""Caches whose rows have lengths of their own: writing where they lie, and attention to what each row holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ir.ops import cached_attention as meaning
from ...ir.ops.caches import slots_of
from .attention import Masking, attend, plain_causal
from .precision import own_precision


def cached_write(cache: Tensor, x: Tensor, at: Tensor, cu: Tensor | None = None) -> Tensor:
    """x in the slots of its tokens, in place: nothing else may still read the old cache [n m g d]."""
    slots = slots_of(x, at, cu, cache.shape[1])
    cache.flatten(0, 1).index_copy_(0, slots, x.flatten(0, 1).to(cache.dtype))
    return cache


def page_write(pool: Tensor, x: Tensor, slots: Tensor) -> Tensor:
    """x in its slots of the pool [p q g d], in place; a token without a slot writes once more what the first with one does."""
    flat, rows, index = pool.flatten(0, 1), x.flatten(0, 1).to(pool.dtype), slots.flatten()
    kept = index >= 0
    first = kept.int().argmax()[None]
    # Where none has a slot, slot 0 is written with what it holds.
    other = torch.where(kept.any(), rows.index_select(0, first), flat[:1])
    index = torch.where(kept, index, index.index_select(0, first).clamp_min(0))
    flat.index_copy_(0, index, torch.where(kept[:, None, None], rows, other))
    return pool


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, at: Tensor, sinks: Tensor | None = None, cu: Tensor | None = None,
    *, window: int = 0, softcap: float = 0.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Each row's queries against the part of its ring that they see; see the op for where tokens stand."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return meaning.reference(q, k, v, at, sinks, cu, window=window, softcap=softcap, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.plait.cached_attention(q, k, v, at, sinks, cu, window, softcap, factor)


@own_precision
def _forward(
    q: Tensor, k: Tensor, v: Tensor, at: Tensor, sinks: Tensor | None, cu: Tensor | None, window: int, softcap: float,
    scale: float,
) -> Tensor:  # fmt: skip
    k, v = k.to(q.dtype), v.to(q.dtype)
    if cu is None and q.device.type != "cpu":
        return all_rows(q, k, v, at, sinks, window, softcap, scale)
    starts, how = at.tolist(), Masking(None, 0, True, window, softcap, scale)
    if cu is None and len(set(starts)) == 1:
        return _tokens(q, k, v, sinks, how, starts[0], slice(None))
    return row_by_row(q, v, cu, len(starts), lambda x, row: _tokens(x, k, v, sinks, how, starts[row], slice(row, row + 1)))


def row_by_row(q: Tensor, v: Tensor, cu: Tensor | None, rows: int, attend: Callable[[Tensor, int], Tensor]) -> Tensor:
    """What `attend` makes of each row's own queries [1 t h d], where they stand in q."""
    borders = cu.tolist() if cu is not None else range(0, rows * q.shape[1] + 1, q.shape[1])
    flat = q.flatten(0, 1)
    out = q.new_empty(*flat.shape[:2], v.shape[-1])
    for row in range(rows):
        own = slice(borders[row], borders[row + 1])
        if own.start < own.stop:
            out[own] = attend(flat[None, own], row)[0]
    return out.view(*q.shape[:3], v.shape[-1])


def _tokens(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, how: Masking, at: int, rows: slice) -> Tensor:
    """Queries [b t h d] behind `at` tokens, the same for all of these rows of the cache."""
    end, m = at + q.shape[1], k.shape[1]
    first = max(0, end - m, at - how.window + 1 if how.window else 0)
    keys, values = (_unrolled(x[rows], first, end) for x in (k, v))
    bare = sinks is None and not how.softcap and (not how.window or how.window >= end)
    if at == first and bare and k.shape[-1] == v.shape[-1]:
        return plain_causal(q, keys, values, how.scale)
    return attend(q, keys, values, sinks, Masking(None, at - first, True, how.window, how.softcap, how.scale))[0]


def _unrolled(x: Tensor, first: int, end: int) -> Tensor:
    """Tokens [first, end) of rings [b m g d], in order."""
    m = x.shape[1]
    i, j = first % m, (end - 1) % m + 1
    return x[:, i:j] if i < j else torch.cat([x[:, i:], x[:, :j]], 1)


def all_rows(
    q: Tensor, k: Tensor, v: Tensor, at: Tensor, sinks: Tensor | None, window: int, softcap: float, scale: float
) -> Tensor:
    """Every slot of every row under a mask: the host waits for nothing."""
    (b, t, h, _), g = q.shape, k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = torch.einsum("btgrd,bmgd->bgrtm", q.to(wide).unflatten(2, (g, -1)) * scale, k.to(wide))
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    logits = logits.masked_fill(~_seen(at, t, k.shape[1], window)[:, None, None], -torch.inf)
    if sinks is not None:
        extra = sinks.to(wide).view(1, g, -1, 1, 1).expand(b, -1, -1, t, 1)
        logits = torch.cat([logits, extra], -1)
    weights = torch.softmax(logits, -1)[..., : k.shape[1]]
    return torch.einsum("bgrtm,bmge->btgre", weights, v.to(wide)).reshape(b, t, h, v.shape[-1]).to(q.dtype)


def _seen(at: Tensor, t: int, m: int, window: int) -> Tensor:
    """[b, t, m]: which slots each query may see."""
    place = (at[:, None] + torch.arange(t, device=at.device))[:, :, None]
    last = (at + t - 1)[:, None]
    stands = (last - (last - torch.arange(m, device=at.device)) % m)[:, None]
    seen = (stands >= 0) & (stands <= place)
    return seen & (stands > place - window) if window else seen


_op = torch.library.custom_op(
    "plait::cached_attention",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor at, Tensor? sinks, Tensor? cu, int window, float softcap, float scale)"
    " -> Tensor",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])
