"""Scans of numbers that do not mix: blocks of tokens side by side, and what enters each block after that.

Every scan is s_t = a_t s_{t-1} + u_t over [b, t, ...]. Tokens are cut into about sqrt(t) blocks; all blocks take their first
step together, then their second, ...; then the states between blocks follow one another. No number is ever divided by a
product of decays. A sequence that begins is an a of 0, and an u that holds the state it begins with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.errors import DataError

Maybe = Tensor | None
# Numbers of a token from which the few microseconds of a call are less than what blocks cost in memory.
WIDE = 1 << 10


def scan(a: Tensor, u: Tensor) -> Tensor:
    """s[b t ...] of s_t = a_t s_{t-1} + u_t, from nothing."""
    b, t, *rest = u.shape
    if t < 2:
        return u.clone()
    if u[:, 0].numel() >= WIDE:
        return _in_turn(a, u)
    size = math.isqrt(t - 1) + 1
    pad = -t % size
    a, u = (_blocks(x, size, pad) for x in (a, u))
    s, left = torch.empty_like(u), torch.empty_like(a)
    s[:, :, 0], left[:, :, 0] = u[:, :, 0], a[:, :, 0]
    for i in range(1, size):
        torch.addcmul(u[:, :, i], a[:, :, i], s[:, :, i - 1], out=s[:, :, i])
        torch.mul(left[:, :, i - 1], a[:, :, i], out=left[:, :, i])
    enters = torch.zeros_like(s[:, :, 0])
    for n in range(1, s.shape[1]):
        torch.addcmul(s[:, n - 1, -1], left[:, n - 1, -1], enters[:, n - 1], out=enters[:, n])
    s.addcmul_(left, enters.unsqueeze(2))
    return s.view(b, t + pad, *rest)[:, :t]


def _in_turn(a: Tensor, u: Tensor) -> Tensor:
    """One token after another, where there is enough to do for each."""
    s = u.contiguous().clone()
    for t in range(1, s.shape[1]):
        s[:, t].addcmul_(a[:, t], s[:, t - 1])
    return s


def scan_back(a: Tensor, d_s: Tensor) -> Tensor:
    """g_t = d_t + a_{t+1} g_{t+1}: the cotangent of u, given that of s."""
    later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
    return scan(later.flip(1), d_s.flip(1)).flip(1)


def _blocks(x: Tensor, size: int, pad: int) -> Tensor:
    """[b, blocks, size, ...]; what is behind the end does nothing."""
    if pad:
        x = torch.cat([x, x.new_zeros(x.shape[0], pad, *x.shape[2:])], 1)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).contiguous()


@dataclass(frozen=True)
class Runs:
    """Where sequences that have tokens begin and end: the row and the first and last token of each, and which they are."""

    rows: Tensor
    starts: Tensor
    ends: Tensor
    which: Tensor
    count: int


def borders_of(x: Tensor, cu: Maybe) -> list[int]:
    """Where the sequences of x[b t c] begin, and where the last ends, counted through its rows."""
    b, t = x.shape[:2]
    if cu is None:
        return [i * t for i in range(b + 1)]
    borders = [int(i) for i in cu.tolist()]
    if borders[0] != 0 or borders[-1] != t or borders != sorted(borders):
        raise DataError(f"cu: {borders} of {b} x {t} tokens; it must rise from 0 to {t}, with a batch of 1")
    return borders


def runs_of(x: Tensor, cu: Maybe) -> Runs:
    """The sequences of x[b t ...]: its rows, or packed segments."""
    b, t = x.shape[:2]
    if cu is None:
        rows = torch.arange(b if t else 0, device=x.device)
        return Runs(rows, torch.zeros_like(rows), torch.full_like(rows, t - 1), rows, b)
    borders_of(x, cu)
    which = (cu[1:] > cu[:-1]).nonzero()[:, 0]
    return Runs(torch.zeros_like(which), cu[:-1][which], cu[1:][which] - 1, which, cu.shape[0] - 1)


def begin(runs: Runs, a: Tensor, u: Tensor, state: Maybe) -> Tensor:
    """Begin every sequence, in place; the answer is what each does to its state at its first token."""
    at = (runs.rows, runs.starts)
    first = a[at]
    if state is not None:
        u[at] += first * state[runs.which]
    a[at] = 0
    return first


def begun_back(runs: Runs, first: Tensor, g: Tensor, d_final: Maybe, like: Tensor) -> Tensor:
    """The cotangent of what sequences begin with; one without tokens hands on that of its end."""
    made = torch.zeros_like(like, dtype=g.dtype) if d_final is None else d_final.to(g.dtype, copy=True)
    made[runs.which] = first * g[runs.rows, runs.starts]
    return made


def ended_back(runs: Runs, d_s: Tensor, d_final: Maybe) -> Tensor:
    """Cotangents of all states, in place, with those of sequences' ends."""
    if d_final is not None:
        d_s[runs.rows, runs.ends] += d_final[runs.which]
    return d_s


def finals(runs: Runs, s: Tensor, state: Maybe) -> Tensor:
    """[n ...]: the state of every sequence's last token; a sequence without tokens keeps what it has."""
    made = s.new_zeros(runs.count, *s.shape[2:]) if state is None else state.clone()
    made[runs.which] = s[runs.rows, runs.ends]
    return made


def before(runs: Runs, s: Tensor, state: Maybe) -> Tensor:
    """s_{t-1}, at the beginning of a sequence what it begins with."""
    past = torch.cat([torch.zeros_like(s[:, :1]), s[:, :-1]], 1)
    past[runs.rows, runs.starts] = 0.0 if state is None else state[runs.which]
    return past


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
