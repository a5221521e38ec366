"""Factors inside a chunk when every key channel has its own decay.

A pair i > j of rows decays by the product of exp(decay) over (j, i]. Halve the chunk again and again: at the level where i
falls in the later half and j in the earlier, that product is (from the middle to i) x (from j to the middle), a row scale of
q and k times a row scale of k. Both factors are products of numbers in [0, 1], so nothing overflows and no large sums cancel.
Levels of at least BLOCK rows are matmuls of halves; the finer ones share matmuls of BLOCK rows and keep their own entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .head_decay import Factors, Gradients

BLOCK = 16
# Factors are held above exp of these: they are nothing beside the rest, and a product of two is still no subnormal number.
LOG_FLOOR = {torch.float32: -40.0, torch.float64: -300.0}


@dataclass(frozen=True)
class Level:
    """Row scales at one level of halving: from the start of a row's half through it, and from after it to its half's end."""

    half: int
    rise: Tensor
    fall: Tensor


def levels(decay: Tensor) -> Iterator[Level]:
    """All levels of decay[chunk, lane, row, k] in (0, 1], finest first; the last, of a whole chunk, spans no pairs.

    Tensors are updated in place: a level is valid until the next is asked for.
    """
    size, floor = decay.shape[-2], math.exp(LOG_FLOOR[decay.dtype])
    rise, fall = decay.clone(), torch.ones_like(decay)
    half = 1
    while half < size:
        yield Level(half, rise, fall)
        rises, falls = (x.unflatten(2, (-1, 2, half)) for x in (rise, fall))
        falls[:, :, :, 0].mul_(rises[:, :, :, 1, -1:]).clamp_(min=floor)
        rises[:, :, :, 1].mul_(rises[:, :, :, 0, -1:]).clamp_(min=floor)
        half *= 2
    yield Level(half, rise, fall)


def level_mask(half: int, like: Tensor) -> Tensor:
    """1 where, within a block of BLOCK rows, the row is in a later half and the column in the earlier one beside it."""
    part = torch.arange(BLOCK, device=like.device) // half
    row, column = part[:, None], part[None, :]
    return ((row % 2 == 1) & (column == row - 1)).to(like.dtype)


def channel_factors(q: Tensor, k: Tensor, decay: Tensor, beta: Tensor | None, scale: float) -> Factors:
    """Factors of q, k [chunk, b*g, row, k]; decay[chunk, lane, row, k] in [0, 1]; beta[chunk, lane, row, 1]
    makes it the delta rule.
    """
    q, k = per_lane(q * scale, decay), per_lane(k, decay)
    rows = (q,) if beta is None else (q, k)
    scores = q.new_zeros((len(rows), *q.shape[:3], q.shape[2]))
    blocks = q.new_zeros((q.shape[0] * q.shape[1] * (q.shape[2] // BLOCK), len(rows) * BLOCK, BLOCK))
    last = None
    for level in levels(decay):
        last = level
        if level.half < BLOCK:
            left, right = block_rows(rows, k, level)
            blocks.addcmul_(torch.bmm(left, right.mT), level_mask(level.half, q).repeat(len(rows), 1))
        elif level.half < q.shape[2]:
            for kind, x in enumerate(rows):
                left, right = half_rows(x, k, level)
                part = torch.bmm(left.flatten(0, 2), right.flatten(0, 2).mT)
                half_pairs(scores[kind], level.half).copy_(part.view(*left.shape[:3], level.half, level.half))
    assert last is not None
    grid = blocks.view(*q.shape[:2], -1, len(rows), BLOCK, BLOCK)
    for kind in range(len(rows)):
        block_pairs(scores[kind]).copy_(grid[:, :, :, kind])
    scores[0].diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    return _finish(rows, k, scores, last, beta)


def _finish(rows: tuple[Tensor, ...], k: Tensor, scores: Tensor, whole: Level, beta: Tensor | None) -> Factors:
    """The scores, and the row scales of the whole chunk."""
    read = k.new_empty((len(rows), *k.shape))
    for kind, x in enumerate(rows):
        torch.mul(x, whole.rise, out=read[kind])
    if beta is not None:
        scores[1].mul_(beta)
        read[1].mul_(-beta)
    return Factors(scores, read, k * whole.fall, whole.rise[:, :, -1].unsqueeze(-1))


def per_lane(x: Tensor, like: Tensor) -> Tensor:
    """Key heads repeated for their value heads."""
    r = like.shape[1] // x.shape[1]
    return x if r == 1 else x.repeat_interleave(r, 1)


def block_rows(rows: tuple[Tensor, ...], k: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Scaled rows in blocks: left [block, kinds*BLOCK, k] and right [block, BLOCK, k]."""
    grid = (-1, BLOCK)
    rise = level.rise.unflatten(2, grid)
    left = k.new_empty((*rise.shape[:3], len(rows), BLOCK, k.shape[3]))
    for kind, x in enumerate(rows):
        torch.mul(x.unflatten(2, grid), rise, out=left[:, :, :, kind])
    return left.view(-1, len(rows) * BLOCK, k.shape[3]), (k * level.fall).view(-1, BLOCK, k.shape[3])


def half_rows(x: Tensor, k: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Scaled later halves of x and earlier halves of k: [chunk, lane, pair, half, k] each."""
    grid = (-1, 2, level.half)
    left = x.unflatten(2, grid)[:, :, :, 1] * level.rise.unflatten(2, grid)[:, :, :, 1]
    return left, k.unflatten(2, grid)[:, :, :, 0] * level.fall.unflatten(2, grid)[:, :, :, 0]


def half_pairs(scores: Tensor, half: int) -> Tensor:
    """View [chunk, lane, pair, half, half] of the entries with row in a later half and column in the earlier one beside it."""
    grid = scores.unflatten(3, (-1, 2, half)).unflatten(2, (-1, 2, half))
    return grid[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)


def block_pairs(scores: Tensor) -> Tensor:
    """View [chunk, lane, block, BLOCK, BLOCK] of the diagonal blocks."""
    grid = scores.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    return grid.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)


def channel_gradients(
    q: Tensor, k: Tensor, decay: Tensor, beta: Tensor | None, factors: Factors, grads: Gradients, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and of the log decay of every row; overwrites `grads`."""
    heads = q.shape[1]
    q, k = per_lane(q * scale, decay), per_lane(k, decay)
    rows = (q,) if beta is None else (q, k)
    if beta is not None:
        grads.scores[1].mul_(beta)
        grads.read[1].mul_(-beta)
    left = [torch.zeros_like(q) for _ in rows]
    right = torch.zeros_like(k)
    last = None
    for level in levels(decay):
        last = level
        if level.half < BLOCK:
            _block_gradients(rows, k, level, grads.scores, left, right)
        elif level.half < q.shape[2]:
            _half_gradients(rows, k, level, grads.scores, left, right)
    assert last is not None
    for kind in range(len(rows)):
        left[kind].addcmul_(grads.read[kind], last.rise)
    dq, dk, ddecay = _decay_gradients(rows, k, factors, grads, left, right, last)
    return _per_key(dq, heads).mul_(scale), _per_key(dk, heads), ddecay


def _block_gradients(
    rows: tuple[Tensor, ...], k: Tensor, level: Level, scores: Tensor, left: list[Tensor], right: Tensor
) -> None:
    """Adds a fine level's part to the gradients of rows (left) and of k as a column (right)."""
    kinds, grid = len(rows), (-1, BLOCK)
    x, y = block_rows(rows, k, level)
    pairs = torch.stack([block_pairs(s) for s in scores], 3).mul_(level_mask(level.half, k)).view(-1, kinds * BLOCK, BLOCK)
    rise = level.rise.unflatten(2, grid)
    dx = torch.bmm(pairs, y).view(*rise.shape[:3], kinds, BLOCK, -1)
    for kind in range(kinds):
        left[kind].unflatten(2, grid).addcmul_(dx[:, :, :, kind], rise)
    right.addcmul_(torch.bmm(pairs.mT, x).view_as(right), level.fall)


def _half_gradients(
    rows: tuple[Tensor, ...], k: Tensor, level: Level, scores: Tensor, left: list[Tensor], right: Tensor
) -> None:
    """Adds a coarse level's part to the gradients of rows (left) and of k as a column (right)."""
    grid = (-1, 2, level.half)
    rise, fall = level.rise.unflatten(2, grid)[:, :, :, 1], level.fall.unflatten(2, grid)[:, :, :, 0]
    for kind, row in enumerate(rows):
        x, y = half_rows(row, k, level)
        pairs = half_pairs(scores[kind], level.half).flatten(0, 2)
        dx, dy = torch.bmm(pairs, y.flatten(0, 2)).view_as(x), torch.bmm(pairs.mT, x.flatten(0, 2)).view_as(y)
        left[kind].unflatten(2, grid)[:, :, :, 1].addcmul_(dx, rise)
        right.unflatten(2, grid)[:, :, :, 0].addcmul_(dy, fall)


def _decay_gradients(
    rows: tuple[Tensor, ...],
    k: Tensor,
    factors: Factors,
    grads: Gradients,
    left: list[Tensor],
    right: Tensor,
    whole: Level,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each factor is exp(sum_i - sum_j): x dx over rows less k dk over columns is the gradient of the decay sums."""
    dsum = rows[0] * left[0] - k * right
    if len(rows) == 2:
        dsum.addcmul_(k, left[1])
        right.add_(left[1])
    dsum[:, :, -1] += (grads.fade * factors.fade).squeeze(-1)
    right.addcmul_(grads.write, whole.fall)
    # Pairs i = j do not decay: added only now, they cannot drown the rest.
    own = grads.scores[0].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    dq, dk = left[0].addcmul_(own, k), right.addcmul_(own, rows[0])
    ddecay = _over_time(dsum, grads.write.mul_(factors.write))
    return dq, dk, ddecay


def _over_time(sums: Tensor, writes: Tensor) -> Tensor:
    """A row's decay is in every later row's sum, and in what every earlier row writes to the chunk's end."""
    size = sums.shape[2]
    ones = sums.new_ones(size, size)
    lanes = (sums.shape[0] * sums.shape[1], -1, -1)
    later, earlier = ones.triu().expand(lanes), ones.tril(-1).expand(lanes)
    return torch.bmm(later, sums.flatten(0, 1)).baddbmm_(earlier, writes.flatten(0, 1)).view_as(sums)


def _per_key(x: Tensor, heads: int) -> Tensor:
    """Value heads summed into their key head."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)
