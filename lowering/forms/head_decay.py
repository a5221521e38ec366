"""Factors inside a chunk when decay is one number per head: pairwise decays from one cumulative sum, and their gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """What a group of chunks does to its state: R = 2 rows kinds (query; key of the delta rule), or 1 (query).

    o = read[0] S + scores[0] u;   u = beta v + read[1] S - scores[1] u;   S' = fade S + write^T u
    """

    scores: Tensor  # [R, chunk, lane, row, row]
    read: Tensor  # [R, chunk, lane, row, k]
    write: Tensor  # [chunk, lane, row, k]
    fade: Tensor  # [chunk, lane, 1 or k, 1]
    pairs: Tensor | None = None  # per head: d scores / d (q k^T, k k^T)


@dataclass(frozen=True)
class Gradients:
    """Gradients of `Factors`, in the same shapes."""

    scores: Tensor
    read: Tensor
    write: Tensor
    fade: Tensor
    rows: Tensor  # per head, [2, chunk, lane, row]: read . d read, write . d write


@dataclass(frozen=True)
class HeadDecay:
    """Decay of every chunk: sums since its start (log, float64), and weights of its rows, [chunk, lane, row, 1]."""

    log: Tensor
    query: Tensor  # scale x decay since the start, of what a query reads
    key: Tensor  # -beta x decay since the start, of what the delta rule reads by key
    write: Tensor  # decay to the end
    fade: Tensor  # decay of the whole chunk, [chunk, lane, 1, 1]

    def of(self, low: int, high: int) -> HeadDecay:
        """The same for chunks [low, high)."""
        return HeadDecay(*(x[low:high] for x in (self.log, self.query, self.key, self.write, self.fade)))


# Factors this small are nothing beside the rest and become zero: their products with gradients would be subnormal, and a
# matmul over those runs up to 250 times slower.
_LOG_FLOOR = {torch.float32: -40.0, torch.float64: -600.0}


def _factor(log: Tensor, dtype: torch.dtype) -> Tensor:
    """exp in place, zero where it is next to nothing."""
    floor = _LOG_FLOOR[dtype]
    return torch.threshold_(log.clamp_(floor, 0).exp_(), 1.001 * math.exp(floor), 0.0)


def head_decay(gate: Tensor, beta: Tensor, scale: float) -> HeadDecay:
    """Sums of a float64 gate[chunk, lane, row]: float64 because differences of large sums must stay exact to float32."""
    log = gate.cumsum(-1)
    rise = _factor(log.clone(), beta.dtype).to(beta.dtype).unsqueeze(-1)
    fall = _factor(log[..., -1:] - log, beta.dtype).to(beta.dtype).unsqueeze(-1)
    return HeadDecay(log, rise * scale, -(rise * beta), fall, rise[:, :, -1:])


def head_factors(q: Tensor, k: Tensor, decay: HeadDecay, beta: Tensor | None, scale: float) -> Factors:
    """Factors of q, k [chunk, b*g, row, k]; beta[chunk, lane, row, 1] makes it the delta rule."""
    m, lanes, size = decay.log.shape
    heads, width, kinds = q.shape[1], q.shape[3], 1 if beta is None else 2
    pairs = q.new_empty((kinds, m, lanes, size, size))
    first = pairs[0]
    torch.sub(decay.log.unsqueeze(-1), decay.log.unsqueeze(-2), out=first)
    _factor(first, q.dtype).tril_()
    dots = q.new_empty((kinds, m * heads, size, size))
    read, write = q.new_empty((kinds, m, lanes, size, width)), q.new_empty((m, lanes, size, width))
    queries, keys = q.view(-1, size, width), k.view(-1, size, width)
    torch.baddbmm(dots[0], queries, keys.mT, beta=0, alpha=scale, out=dots[0])
    _weigh(q, decay.query, read[0])
    if beta is not None:
        torch.mul(first, beta, out=pairs[1])
        torch.bmm(keys, keys.mT, out=dots[1])
        _weigh(k, decay.key, read[1])
    _weigh(k, decay.write, write)
    grid = (kinds, m, heads, lanes // heads, size, size)
    scores = (dots.view(kinds, m, heads, 1, size, size) * pairs.view(grid)).view_as(pairs)
    return Factors(scores, read, write, decay.fade, pairs)


def _weigh(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Rows of each key head times the weights of each of its value heads."""
    m, heads, size, width = x.shape
    r = out.shape[1] // heads
    torch.mul(x.unsqueeze(2), weight.view(m, heads, r, size, 1), out=out.view(m, heads, r, size, width))


def head_gradients(
    q: Tensor, k: Tensor, decay: HeadDecay, factors: Factors, grads: Gradients, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and of the log decay of every row; overwrites `grads`."""
    assert factors.pairs is not None
    # The delta rule's keys do not meet themselves.
    grads.scores[1:].diagonal(dim1=-2, dim2=-1).zero_()
    ddecay = _decay_gradients(factors, grads)
    m, heads, size, width = q.shape
    r = decay.log.shape[1] // heads
    dots = grads.scores.mul_(factors.pairs)
    if r > 1:
        dots = dots.view(-1, m, heads, r, size, size).sum(3)
    dots = dots.view(-1, m * heads, size, size)
    queries, keys = q.view(-1, size, width), k.view(-1, size, width)
    dq, dk = torch.empty_like(queries), torch.empty_like(keys)
    torch.baddbmm(dq, dots[0], keys, beta=0, alpha=scale, out=dq)
    torch.baddbmm(dk, dots[0].mT, queries, beta=0, alpha=scale, out=dk)
    _add_heads(dq, grads.read[0], decay.query, r)
    _add_heads(dk, grads.write, decay.write, r)
    if len(dots) == 2:
        dk.baddbmm_(dots[1], keys).baddbmm_(dots[1].mT, keys)
        _add_heads(dk, grads.read[1], decay.key, r)
    return dq, dk, ddecay


def _add_heads(total: Tensor, part: Tensor, weight: Tensor, r: int) -> None:
    """total[chunk*g] += sum over the value heads of a key head of weight * part, without a temporary."""
    parts, weights = part.view(-1, r, *part.shape[2:]), weight.reshape(-1, r, part.shape[2], 1)
    for j in range(r):
        total.addcmul_(parts[:, j], weights[:, j])


def _decay_gradients(factors: Factors, grads: Gradients) -> Tensor:
    """Each factor is exp(sum_i - sum_j): rows add, columns subtract; a row's decay is in every later row's sum."""
    pull = grads.scores[0] * factors.scores[0]
    if len(grads.scores) == 2:
        pull.addcmul_(grads.scores[1], factors.scores[1])
    # Pairs i = j do not decay: left in, they would drown the rest when decay is strong.
    pull.diagonal(dim1=-2, dim2=-1).zero_()
    sums = pull.sum(-1).sub_(pull.sum(-2)).add_(grads.rows[0])
    sums[..., -1] += (grads.fade * factors.fade).squeeze(-1).squeeze(-1)
    # What a row writes to the chunk's end decays in the rows after it only: a sum from the start, for the same reason.
    ddecay = sums.flip(-1).cumsum(-1).flip(-1)
    ddecay[..., 1:] += grads.rows[1].cumsum(-1)[..., :-1]
    return ddecay
