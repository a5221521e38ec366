"""Attention to pages of a pool: those that lie side by side are read where they are, others a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir.ops import paged_attention as meaning
from ...ir.ops.caches import pages_of
from .attention import Masking, attend, plain_causal
from .cached import all_rows, row_by_row
from .precision import own_precision

TOKENS = 256  # of scattered pages that are copied together, to be read at once


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, at: Tensor, sinks: Tensor | None = None, cu: Tensor | None = None,
    *, window: int = 0, softcap: float = 0.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Each row's queries against its pages, a part of them after the other."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return meaning.reference(q, k, v, table, at, sinks, cu, window=window, softcap=softcap, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.plait.paged_attention(q, k, v, table, at, sinks, cu, window, softcap, factor)


@own_precision
def _forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, at: Tensor, sinks: Tensor | None, cu: Tensor | None, window: int,
    softcap: float, scale: float,
) -> Tensor:  # fmt: skip
    if cu is None and q.device.type != "cpu":
        keys, values = (pages_of(pool, table).to(q.dtype) for pool in (k, v))
        return all_rows(q, keys, values, at, sinks, window, softcap, scale)
    starts, pages, how = at.tolist(), table.tolist(), Masking(None, 0, True, window, softcap, scale)
    return row_by_row(q, v, cu, len(starts), lambda x, row: _row(x, k, v, pages[row], starts[row], sinks, how))


def _row(q: Tensor, k: Tensor, v: Tensor, pages: Sequence[int], at: int, sinks: Tensor | None, how: Masking) -> Tensor:
    """Queries [1 t h d] behind `at` tokens of one row."""
    size, t = k.shape[1], q.shape[1]
    first = max(0, at - how.window + 1) // size if how.window else 0
    last = -(-(at + t) // size)
    # What several queries see differs from `at` on, and in a window: these pages stay together, so that each sees some of all.
    border = last if t == 1 else first if how.window else at // size
    parts = [*_parts(pages, first, border, size), *([(border, last)] if border < last else [])]

    def part(i: int, j: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
        keys, values = (_read(x, pages[i:j]).to(q.dtype) for x in (k, v))
        behind = Masking(None, at - i * size, True, how.window, how.softcap, how.scale)
        return attend(q, keys[:, : at + t - i * size], values[:, : at + t - i * size], own, behind)

    if len(parts) > 1:
        return _merged([part(i, j, None) for i, j in parts], sinks, q.dtype)
    if at == 0 and sinks is None and not how.softcap and not how.window and k.shape[-1] == v.shape[-1]:
        keys, values = (_read(x, pages[:last]).to(q.dtype)[:, :t] for x in (k, v))
        return plain_causal(q, keys, values, how.scale)
    return part(*parts[0], sinks)[0]


def _parts(pages: Sequence[int], i: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Pages [i, end) of a row in parts: runs side by side in the pool, however long, and a few that are not."""
    while i < end:
        j = i + 1
        while j < end and pages[j] == pages[j - 1] + 1:
            j += 1
        if (j - i) * size < TOKENS:
            j = min(end, i + max(1, TOKENS // size))
        yield i, j
        i = j


def _read(pool: Tensor, pages: Sequence[int]) -> Tensor:
    """[1, tokens, g, d]: a view where pages lie side by side."""
    first, count = pages[0], len(pages)
    if first >= 0 and list(pages) == [*range(first, first + count)]:
        return pool[first : first + count].flatten(0, 1)[None]
    where = torch.tensor(pages, device=pool.device)
    return pool.index_select(0, where).flatten(0, 1)[None] if min(pages) >= 0 else pages_of(pool, where[None])


def _merged(parts: Sequence[tuple[Tensor, Tensor]], sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The softmax over all parts, from that over each and the log of its denominator [g, r, t]."""
    logs = torch.stack([log for _, log in parts])
    total = torch.logsumexp(logs, 0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(total).view(*total.shape[:2], 1).expand(total.shape))
    shares = torch.exp(logs - total).flatten(1, 2).mT[..., None]  # [parts, t, h, 1]
    return sum((share * o.to(share) for share, (o, _) in zip(shares, parts, strict=True)), torch.zeros(())).to(dtype)


_op = torch.library.custom_op(
    "plait::paged_attention",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor table, Tensor at, Tensor? sinks, Tensor? cu, int window, float softcap,"
    " float scale) -> Tensor",
)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])
