"""Where tokens live once a sequence is cut into chunks: [b t h d] <-> [chunk, lane, row, d], a lane being a (batch, head)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ...ir.errors import DataError

CHUNK = 64
# Rows (lanes x chunks x chunk size) worked on together: enough to hide call overhead, few enough to stay near a core's cache.
GROUP = 2048


@dataclass(frozen=True)
class Segment:
    """A run of chunks that share one state: a whole batch, or one packed sequence."""

    first: int
    end: int
    index: int


@dataclass(frozen=True)
class Chunks:
    """How tokens are cut: `count` chunks of `size` rows; packed sequences also say which token each row holds."""

    size: int
    count: int
    tokens: int
    lanes: int
    segments: tuple[Segment, ...]
    rows: Tensor | None = None
    empty: Tensor | None = None

    def groups(self) -> Iterator[tuple[int, int]]:
        """Ranges of chunks that are worked on together."""
        width = max(1, GROUP // max(1, self.lanes * self.size))
        for low in range(0, self.count, width):
            yield low, min(low + width, self.count)

    def begins(self) -> dict[int, int]:
        """First chunk of a segment -> its index."""
        return {s.first: s.index for s in self.segments}

    def ends(self) -> dict[int, int]:
        """Last chunk of a segment -> its index."""
        return {s.end - 1: s.index for s in self.segments}


def cut(tokens: int, lanes: int, size: int) -> Chunks:
    """Chunks of a batch of equally long sequences."""
    count = -(-tokens // size)
    return Chunks(size, count, tokens, lanes, (Segment(0, count, 0),) if count else ())


def cut_packed(cu: Tensor, tokens: int, lanes: int, size: int) -> Chunks:
    """Chunks of packed sequences: each starts a chunk of its own, its last chunk padded with empty rows."""
    borders = [int(x) for x in cu.tolist()]
    if borders[0] != 0 or borders[-1] != tokens or any(a > b for a, b in pairwise(borders)):
        raise DataError(f"cu: {borders} must rise from 0 to the number of tokens, {tokens}; pass cumulative lengths")
    segments = list[Segment]()
    first = 0
    for index, (low, high) in enumerate(pairwise(borders)):
        end = first + -(-(high - low) // size)
        if end > first:
            segments.append(Segment(first, end, index))
        first = end
    return _with_rows(Chunks(size, first, tokens, lanes, tuple(segments)), cu, borders)


def _with_rows(chunks: Chunks, cu: Tensor, borders: list[int]) -> Chunks:
    """The token of every chunk row, as one index."""
    starts = [0] * chunks.count
    limits = [0] * chunks.count
    for s in chunks.segments:
        for c in range(s.first, s.end):
            starts[c] = borders[s.index] + (c - s.first) * chunks.size
            limits[c] = borders[s.index + 1]
    row = torch.tensor(starts, dtype=torch.int64, device=cu.device)[:, None] + torch.arange(chunks.size, device=cu.device)
    empty = row >= torch.tensor(limits, dtype=torch.int64, device=cu.device)[:, None]
    return replace(chunks, rows=row.masked_fill_(empty, 0).reshape(-1), empty=empty)


def gather(x: Tensor, chunks: Chunks, low: int, high: int, out: Tensor, weight: Tensor | None = None) -> Tensor:
    """Rows of chunks [low, high) of x[b t h d], times weight, into out[high-low, b*h, size, d]; rows past the end are zero."""
    size, b, h = chunks.size, x.shape[0], x.shape[2]
    grid = out.view(high - low, b, h, size, x.shape[3])
    if chunks.rows is not None and chunks.empty is not None:
        picked = x.index_select(1, chunks.rows[low * size : high * size]).unflatten(1, (high - low, size))
        grid.copy_(picked.permute(1, 0, 3, 2, 4))
        grid.masked_fill_(chunks.empty[low:high, None, None, :, None], 0)
        return out if weight is None else out.mul_(weight)
    whole = min(high, chunks.tokens // size) - low
    if whole and weight is None:
        grid[:whole].copy_(_by_chunk(x, size, low, whole))
    elif whole and weight is not None:
        torch.mul(_by_chunk(x, size, low, whole), weight[:whole].view(whole, b, h, size, 1), out=grid[:whole])
    if whole < high - low:
        rest = chunks.tokens % size
        grid[whole, :, :, :rest].copy_(x[:, chunks.tokens - rest :].transpose(1, 2))
        grid[whole, :, :, rest:].zero_()
        if weight is not None:
            out[whole].mul_(weight[whole])
    return out


def _by_chunk(x: Tensor, size: int, low: int, count: int) -> Tensor:
    """View [chunk, b, h, row, d] of `count` full chunks of x[b t h d]."""
    batch, token, head, channel = x.stride()
    shape = (count, x.shape[0], x.shape[2], size, x.shape[3])
    return x.as_strided(shape, (size * token, batch, head, token, channel), x.storage_offset() + low * size * token)


def scatter(source: Tensor, chunks: Chunks, low: int, high: int, x: Tensor, weight: Tensor | None = None) -> None:
    """The inverse of `gather`: writes the rows of chunks [low, high), times weight, into x[b t h d]."""
    size, b, h = chunks.size, x.shape[0], x.shape[2]
    whole = 0 if chunks.rows is not None else min(high, chunks.tokens // size) - low
    direct = weight is not None and whole == high - low and source.dtype == x.dtype
    if weight is not None and not direct:
        source = source * weight
    grid = source.view(high - low, b, h, size, x.shape[3])
    if direct and weight is not None:
        torch.mul(grid, weight.view(whole, b, h, size, 1), out=_by_chunk(x, size, low, whole))
    elif chunks.rows is not None and chunks.empty is not None:
        keep = (~chunks.empty[low:high]).reshape(-1).nonzero().squeeze(1)
        rows = grid.permute(1, 0, 3, 2, 4).flatten(1, 2).index_select(1, keep)
        x.index_copy_(1, chunks.rows[low * size : high * size].index_select(0, keep), rows.to(x.dtype))
    else:
        if whole:
            _by_chunk(x, size, low, whole).copy_(grid[:whole])
        if whole < high - low:
            rest = chunks.tokens % size
            x[:, chunks.tokens - rest :].copy_(grid[whole, :, :, :rest].transpose(1, 2))


def gather_gate(gate: Tensor, chunks: Chunks, dtype: torch.dtype) -> Tensor:
    """A whole gate[b t h] laid out as [chunk, lane, row]."""
    out = gate.new_empty((chunks.count, chunks.lanes, chunks.size, 1), dtype=dtype)
    return gather(gate.unsqueeze(-1), chunks, 0, chunks.count, out).squeeze(-1)
