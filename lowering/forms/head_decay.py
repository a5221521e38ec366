"""Factors inside a chunk when decay is one number per head: pairwise decays from one cumulative sum, and their gradient."""

from __future__ import annotations

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


@dataclass(frozen=True)
class HeadDecay:
    """Decay sums of every chunk: since its start (log, float64), as factors from the start and to the end."""

    log: Tensor
    rise: Tensor
    fall: Tensor

    def of(self, low: int, high: int) -> HeadDecay:
        """The same for chunks [low, high)."""
        return HeadDecay(self.log[low:high], self.rise[low:high], self.fall[low:high])


def head_decay(gate: Tensor, dtype: torch.dtype) -> HeadDecay:
    """Sums of a float64 gate[chunk, lane, row]: float64 because differences of large sums must stay exact to float32."""
    log = gate.cumsum(-1)
    return HeadDecay(log, log.exp().to(dtype), (log[..., -1:] - log).exp().to(dtype))


def causal_mask(size: int, like: Tensor) -> Tensor:
    """0 on and below the diagonal, -inf above."""
    return like.new_full((size, size), float("-inf")).triu_(1)


def head_factors(q: Tensor, k: Tensor, decay: HeadDecay, beta: Tensor | None, mask: Tensor) -> Factors:
    """Factors of q, k [chunk, b*g, row, k]; beta (of the delta rule) and decay are [chunk, lane, row]."""
    m, lanes, size = decay.rise.shape
    kinds = 1 if beta is None else 2
    r, width = lanes // q.shape[1], q.shape[3]
    pairs = q.new_empty((kinds, m, lanes, size, size))
    torch.sub(decay.log.unsqueeze(-1), decay.log.unsqueeze(-2), out=pairs[0])
    pairs[0].add_(mask).exp_()
    dots = q.new_empty((kinds, m * q.shape[1], size, size))
    read = q.new_empty((kinds, m, lanes, size, width))
    rise = decay.rise.unsqueeze(-1)
    torch.mul(_spread(q, r), rise.unflatten(1, (-1, r)), out=read[0].unflatten(1, (-1, r)))
    keys = k.flatten(0, 1)
    torch.bmm(q.flatten(0, 1), keys.mT, out=dots[0])
    if beta is not None:
        torch.mul(pairs[0], beta.unsqueeze(-1), out=pairs[1])
        pairs[1].diagonal(dim1=-2, dim2=-1).zero_()
        torch.bmm(keys, keys.mT, out=dots[1])
        weight = (rise * beta.unsqueeze(-1)).neg_()
        torch.mul(_spread(k, r), weight.unflatten(1, (-1, r)), out=read[1].unflatten(1, (-1, r)))
    scores = torch.mul(dots.view(kinds, m, -1, 1, size, size), pairs.unflatten(2, (-1, r))).flatten(2, 3)
    write = torch.mul(_spread(k, r), decay.fall.unsqueeze(-1).unflatten(1, (-1, r))).flatten(1, 2)
    return Factors(scores, read, write, decay.rise[..., -1, None, None], pairs)


def _spread(x: Tensor, r: int) -> Tensor:
    """[chunk, b*g, ...] seen once per value head; no copy."""
    return x.unsqueeze(2).expand(-1, -1, r, -1, -1)


def head_gradients(
    q: Tensor, k: Tensor, decay: HeadDecay, beta: Tensor | None, factors: Factors, grads: Gradients
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and of the decay sums; overwrites `grads`."""
    dlog = _decay_sums(factors, grads)
    heads = q.shape[1]
    r = decay.rise.shape[1] // heads
    assert factors.pairs is not None
    dots = grads.scores.mul_(factors.pairs)
    if r > 1:
        dots = dots.unflatten(2, (heads, r)).sum(3)
    dots = dots.flatten(1, 2)
    queries, keys = q.flatten(0, 1), k.flatten(0, 1)
    dq = torch.bmm(dots[0], keys)
    dk = torch.bmm(dots[0].mT, queries)
    _add_heads(dq, grads.read[0], decay.rise, heads)
    _add_heads(dk, grads.write, decay.fall, heads)
    if beta is not None:
        dk.baddbmm_(dots[1], keys).baddbmm_(dots[1].mT, keys)
        _add_heads(dk, grads.read[1], (decay.rise * beta).neg_(), heads)
    return dq.view_as(q), dk.view_as(k), dlog


def _add_heads(total: Tensor, part: Tensor, weight: Tensor, heads: int) -> None:
    """total[chunk*g] += sum over the value heads of a key head of weight * part, without a temporary."""
    r = part.shape[1] // heads
    grid = total.view(part.shape[0], heads, *part.shape[2:])
    parts, weights = part.unflatten(1, (heads, r)), weight.unsqueeze(-1).unflatten(1, (heads, r))
    for j in range(r):
        grid.addcmul_(parts[:, :, j], weights[:, :, j])


def _decay_sums(factors: Factors, grads: Gradients) -> Tensor:
    """Gradient of the decay sums: each factor is exp(sum_i - sum_j), so rows add and columns subtract."""
    pull = grads.scores[0] * factors.scores[0]
    reads = grads.read[0] * factors.read[0]
    if grads.scores.shape[0] == 2:
        pull.addcmul_(grads.scores[1], factors.scores[1])
        reads.addcmul_(grads.read[1], factors.read[1])
    # Terms without decay (i = j; the last row's write) are left out: under strong decay they would drown the rest.
    pull.diagonal(dim1=-2, dim2=-1).zero_()
    writes = (grads.write * factors.write).sum(-1)
    writes[..., -1] = 0
    dlog = pull.sum(-1).sub_(pull.sum(-2)).add_(reads.sum(-1)).sub_(writes)
    dlog[..., -1] += writes.sum(-1) + (grads.fade * factors.fade).squeeze(-1).squeeze(-1)
    return dlog
