"""Caches whose rows have lengths of their own: rings of slots per row, and pages of a pool.

Row r has read at_r tokens before a call and t_r in it; token p stands in slot p modulo m, so a ring that is as long as the row
never turns, and one of a window's length keeps what the window sees. With `cu` the call's tokens are packed into one row:
segment r of it goes to row r of the cache, and an empty one leaves its row as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from ..op import OpDef, op
from .pointwise import wide
from .recurrence import segments

Tensor = torch.Tensor


@op("tokens:i64[b t], at:i64[n], cu:i64[n+1]? -> p:i64[b t]", map="b", scan="t", whole="n", same="n b cu")
def cached_positions(tokens: Tensor, at: Tensor, cu: Tensor | None = None) -> Tensor:
    """Where each token stands in its own row: from at_r on"""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    if cu is None:
        return at[:, None] + index
    row = row_of(index, cu)
    return (index - cu[row] + at[row])[None]


def row_of(index: Tensor, cu: Tensor) -> Tensor:
    """The packed segment that each of these tokens is in."""
    return torch.searchsorted(cu[1:].contiguous(), index, right=True)


@op(
    "cache[n m g d], x[b t g d], at:i64[n], cu:i64[n+1]? -> y[n m g d]",
    map="b g d", scan="m t", whole="n", same="n b cu", linear="cache x",
)  # fmt: skip
def cached_write(cache: Tensor, x: Tensor, at: Tensor, cu: Tensor | None = None) -> Tensor:
    """The cache with x in the slots of its tokens, at most m of a row"""
    flat = cache.flatten(0, 1).index_copy(0, slots_of(x, at, cu, cache.shape[1]), x.flatten(0, 1).to(cache.dtype))
    return flat.view(cache.shape)


def slots_of(x: Tensor, at: Tensor, cu: Tensor | None, m: int) -> Tensor:
    """The slot of each token of x[b t ...], counted over all rows."""
    place = cached_positions.reference(x, at, cu)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    row = rows if cu is None else row_of(torch.arange(x.shape[1], device=x.device), cu)[None]
    return (row * m + place % m).flatten()


@op("pool[p q g d], x[b t g d], slots:i64[b t] -> y[p q g d]", map="g d", scan="b t p q", linear="pool x")
def page_write(pool: Tensor, x: Tensor, slots: Tensor) -> Tensor:
    """The pool of pages with x in its slots, page * q + place in it; slot -1 is not written"""
    kept = torch.cat([pool.flatten(0, 1), pool.new_zeros(1, *pool.shape[2:])])
    index = torch.where(slots < 0, len(kept) - 1, slots).flatten()
    return kept.index_copy(0, index, x.flatten(0, 1).to(pool.dtype))[:-1].view(pool.shape)


@op("x[b t d], cu:i64[n+1] -> y[b n d]", map="b d", scan="t", whole="n", linear="x")
def segment_ends(x: Tensor, cu: Tensor) -> Tensor:
    """y = the last token of every packed segment; of an empty one the token before it, if there is one, else the first"""
    return x[:, (cu[1:] - 1).clamp_min(0)]


@op(
    "q[b t (g r) d], k[n m g d], v[n m g e], at:i64[n], sinks[(g r)]?, cu:i64[n+1]? -> o[b t (g r) e]",
    map="b g r e", scan="t m", whole="n d", flops="2*b*t*m*g*r*(d+e)", same="n b cu",
)  # fmt: skip
def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, at: Tensor, sinks: Tensor | None = None, cu: Tensor | None = None,
    *, window: int = 0, softcap: float = 0.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of a call's tokens to what their rows of the cache hold, their own keys and values included

    Slot j of row r holds the last token before at_r + t_r that is j modulo m, if there is one. Options are attention's.
    """
    heads = k.shape[2]
    rows = [list[Tensor]() for _ in range(q.shape[0])]
    for n, (b, start, end) in enumerate(segments(q.shape[0], q.shape[1], cu)):
        queries = wide(q)[b, start:end].unflatten(1, (heads, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        logits = torch.einsum("tgrd,mgd->grtm", queries, wide(k)[n].to(queries.dtype))
        logits = torch.tanh(logits / softcap) * softcap if softcap else logits
        logits = logits.masked_fill(~held(at[n], end - start, k.shape[1], window), -torch.inf)
        extra = wide(logits.new_full((q.shape[2],), -torch.inf) if sinks is None else sinks).view(heads, -1, 1, 1)
        weights = torch.softmax(torch.cat([logits, extra.to(logits).expand(-1, -1, end - start, 1)], -1), -1)[..., :-1]
        rows[b].append(torch.einsum("grtm,mge->tgre", weights, wide(v)[n].to(weights.dtype)).flatten(1, 2))
    return torch.stack([torch.cat(row) for row in rows]).to(q.dtype)


@op(
    "q[b t (g r) d], k[p c g d], v[p c g e], table:i64[n f], at:i64[n], sinks[(g r)]?, cu:i64[n+1]? -> o[b t (g r) e]",
    map="b g r e", scan="t p c f", whole="n d", flops="2*b*t*f*c*g*r*(d+e)", same="n b cu",
)  # fmt: skip
def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, at: Tensor, sinks: Tensor | None = None, cu: Tensor | None = None,
    *, window: int = 0, softcap: float = 0.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of a call's tokens to what their rows hold in the pages of a pool, their own included

    Token p of row r stands in page table[r, p / c], place p modulo c; page -1 holds zeros. Options are attention's.
    """
    rows = (pages_of(pool, table) for pool in (k, v))
    return cached_attention.reference(q, *rows, at, sinks, cu, window=window, softcap=softcap, scale=scale)


def pages_of(pool: Tensor, table: Tensor) -> Tensor:
    """[n, f * c, g, d]: each row's pages, one behind the other."""
    return (pool[table.clamp_min(0)] * (table >= 0)[:, :, None, None, None]).flatten(1, 2)


def held(at: Tensor, t: int, m: int, window: int) -> Tensor:
    """[t, m]: which slots of one row's ring each of the t tokens behind `at` may see."""
    place = at + torch.arange(t, device=at.device)[:, None]
    last = at + t - 1
    stands = last - (last - torch.arange(m, device=at.device)) % m
    seen = (stands >= 0) & (stands <= place)
    return seen & (stands > place - window) if window else seen


CACHES: tuple[OpDef, ...] = (cached_write, page_write, segment_ends, cached_attention, paged_attention)
cached_positions.no_gradient("its result is integers")


def _rows(sample: Any) -> tuple[int, Tensor | None]:
    """Three rows, each a row of the call or a segment of it."""
    cu = torch.tensor([0, 2, 2, 5]) if sample.coin() else None
    return (1, cu) if cu is not None else (3, cu)


@cached_positions.samples
def _(sample: Any) -> list[Any]:
    batch, cu = _rows(sample)
    return [torch.zeros(batch, 5, dtype=torch.int64), torch.tensor([4, 0, 9]), cu]


@cached_write.samples
def _(sample: Any) -> list[Any]:
    batch, cu = _rows(sample)
    return [sample.randn(3, 7, 2, 4), sample.randn(batch, 5, 2, 4), torch.tensor([1, 0, 9]), cu]


@cached_attention.samples
def _(sample: Any) -> list[Any]:
    batch, cu = _rows(sample)
    q, k, v = sample.randn(batch, 5, 6, 3), sample.randn(3, 7, 3, 3), sample.randn(3, 7, 3, 7)
    return [q, k, v, torch.tensor([1, 0, 9]), sample.randn(6), cu, {"window": 3, "softcap": 2.0}]


@page_write.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(4, 3, 2, 5), sample.randn(2, 3, 2, 5), torch.tensor([[0, 7, -1], [11, 3, 4]])]


@segment_ends.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 5, 3), torch.tensor([0, 0, 2, 2, 5])]


@paged_attention.samples
def _(sample: Any) -> list[Any]:
    batch, cu = _rows(sample)
    q, k, v, table = sample.randn(batch, 5, 6, 3), sample.randn(9, 4, 3, 3), sample.randn(9, 4, 3, 7), _table()
    return [q, k, v, table, torch.tensor([1, 0, 9]), sample.randn(6), cu, {"window": 3, "softcap": 2.0}]


def _table() -> Tensor:
    """Pages of three rows, some side by side in the pool and some apart."""
    return torch.tensor([[5, 6, -1, -1], [0, 8, -1, -1], [1, 2, 7, 4]])
