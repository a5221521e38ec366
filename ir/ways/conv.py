"""Ways of short convolutions: the k - 1 inputs before a place come from the place before it, in its direction.

A convolution is a recurrence whose state are its last k - 1 inputs: a run of at least as many tokens leaves a state that does
not depend on what entered. So one message to the next place is all there is, unless places are shorter than the taps: then
every rank is told what all of them leave, and puts it together. The transpose goes from the end to the start.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..crossing import Gather, Here, Shift, Way
from ..op import OpDef
from ..ops.conv import anticausal_conv1d, causal_conv1d, conv1d_taps
from ..orders import Zigzag, parse_order
from ..sizes import value
from ..types import BYTES, TensorType
from .runs import Run, Runs, owner, runs_of

Tensor = torch.Tensor
Exchanged = Generator[Any, Any, Tensor]  # what enters each of a rank's places, [place, lane, c, k-1]
Types = Sequence[TensorType | None]


@dataclass(frozen=True)
class Halo:
    """What goes from place to place, and which way: on (1), or back (-1)."""

    runs: Runs
    behind: int  # inputs that a place needs of others
    step: int

    @property
    def out(self) -> list[int]:
        return self.runs.leaving if self.step == 1 else self.runs.entering

    @property
    def into(self) -> list[int]:
        return self.runs.entering if self.step == 1 else self.runs.leaving

    def through(self, state: Tensor, length: int) -> Tensor:
        """What is left of a state [..., k-1] behind a run that it passes: it moves, and falls off at the end."""
        kept = max(0, self.behind - length)
        gone = state.new_zeros(*state.shape[:-1], self.behind - kept)
        if self.step == 1:
            return torch.cat([state[..., self.behind - kept :], gone], -1)
        return torch.cat([gone, state[..., :kept]], -1)


def _carried(here: Here, halo: Halo, made: Tensor, others: Callable[[int], Runs]) -> Exchanged:
    """What enters, given what every place makes of nothing; `others` are the runs of any rank."""
    if halo.runs.total < 3 or halo.runs.shortest >= halo.behind:
        return (yield from _passed(here, halo, made))
    told, runs = (yield Gather(made)), halo.runs
    enters, state = dict[int, Tensor](), torch.zeros_like(made[0])
    for p in range(runs.total) if halo.step == 1 else reversed(range(runs.total)):
        enters[p] = state
        rank, mine = owner(p, here.ranks)
        lengths = {r.lane: r.length for r in others(rank).all if r.place == mine and _passes(r)}
        rows = [halo.through(x, lengths[i]) if i in lengths else torch.zeros_like(x) for i, x in enumerate(state.unbind(0))]
        state = told[rank, mine] + (torch.stack(rows) if rows else state)
    return torch.stack([enters[p] for p in runs.places])


def _passes(run: Run) -> bool:
    return not run.first and not run.last


def _passed(here: Here, halo: Halo, made: Tensor) -> Exchanged:
    """One message to the next place; early places go on with ranks, late ones back, and the middle is one rank's own."""
    early = yield Shift(made[0], halo.step, ring=False)
    if len(halo.runs.places) == 1:
        return early[None]
    late = yield Shift(made[1], -halo.step, ring=False)
    if here.rank < here.ranks - 1:
        return torch.stack([early, late])
    return torch.stack([early, made[0]] if halo.step == 1 else [made[1], late])


# -- what a place leaves ----------------------------------------------------------------------


def _halo(here: Here, x: Tensor, taps: int, cu: Tensor | None, step: int) -> tuple[Halo, Callable[[int], Runs]]:
    def others(rank: int) -> Runs:
        return runs_of(replace(here, rank=rank), x.shape[0], x.shape[1], cu)

    return Halo(others(here.rank), taps - 1, step), others


def _history(
    here: Here, x: Tensor, state: Tensor | None, cu: Tensor | None, taps: int
) -> Generator[Any, Any, tuple[Runs, Tensor | None]]:
    """The runs, and the k - 1 inputs before each: the sequence's own state where it begins."""
    halo, others = _halo(here, x, taps, cu, 1)
    runs, rows = halo.runs, halo.runs.rows(x)
    begun = runs.begun(runs.firsts, state, [], None)
    tails = [_tail(runs, i, rows, begun, halo.behind) for i in halo.out]
    made = torch.stack(tails) if tails else x.new_zeros(0, x.shape[2], halo.behind)
    enter = yield from _carried(here, halo, runs.borders(halo.out, made), others)
    came = runs.begun([], None, runs.entering, enter)
    return runs, came if begun is None else begun if came is None else begun + came


def _tail(runs: Runs, i: int, rows: Tensor, begun: Tensor | None, behind: int) -> Tensor:
    """The last k - 1 inputs of a run [c, k-1], with what its sequence began with where it is shorter."""
    run = runs.all[i]
    own = rows[i] if runs.cu is None else rows[0, run.start : run.end]
    last = own[max(0, len(own) - behind) :].T
    missing = behind - last.shape[1]
    if not missing:
        return last
    past = rows.new_zeros(len(last), missing) if begun is None else begun[i, :, behind - missing :].to(rows.dtype)
    return torch.cat([past, last], 1)


# -- the ways ---------------------------------------------------------------------------------


def _sent(op: OpDef, x: str) -> Callable[[Types, Mapping[str, Any], int, Mapping[str, int]], int]:
    """Bytes for what goes from place to place; packed zigzags are counted as if no part of a segment were shorter."""

    def sent(types: Types, attrs: Mapping[str, Any], ranks: int, sizes: Mapping[str, int]) -> int:
        by_name = {o.name: t for o, t in zip(op.inputs, types, strict=True) if t is not None}
        tokens, order = by_name[x], parse_order(attrs["order"])
        batch, length, columns = (value(n, sizes) for n in tokens.shape)
        behind = (attrs["k"] if "k" in attrs else value(by_name["w"].shape[1], sizes)) - 1
        ragged = isinstance(order, Zigzag) and order.packed and "cu" in by_name
        lanes = value(by_name["cu"].shape[0], sizes) - 1 if ragged else batch
        size, places = lanes * columns * behind * BYTES[tokens.dtype], 1 if order is None else 2
        short = not ragged and ranks * places > 2 and length // (ranks * places) < behind
        return size * ((ranks - 1) * places if short else min(places, ranks - 1))

    return sent


@causal_conv1d.way("halo", sent=_sent(causal_conv1d, "x"))
def _(
    here: Here, x: Tensor, w: Tensor, bias: Tensor | None = None, state: Tensor | None = None, cu: Tensor | None = None
) -> Way:
    """The last k - 1 inputs of a place go to the next one."""
    runs, past = yield from _history(here, x, state, cu, w.shape[1])
    y, final = here.run(causal_conv1d, runs.rows(x), w, bias, past, runs.cu, **here.attrs)
    return runs.whole(y), runs.ended(runs.lasts, final, state, here)


@conv1d_taps.way("halo", sent=_sent(conv1d_taps, "x"))
def _(here: Here, x: Tensor, g: Tensor, state: Tensor | None = None, cu: Tensor | None = None) -> Way:
    """The last k - 1 inputs of a place go to the next one; a rank's sums are over its own tokens."""
    runs, past = yield from _history(here, x, state, cu, here.attrs["k"])
    return here.run(conv1d_taps, runs.rows(x), runs.rows(g), past, runs.cu, **here.attrs)


@anticausal_conv1d.way("halo", sent=_sent(anticausal_conv1d, "g"))
def _(here: Here, g: Tensor, w: Tensor, final: Tensor | None = None, cu: Tensor | None = None) -> Way:
    """What the first tokens of a place say of the k - 1 before them goes to the place before."""
    halo, others = _halo(here, g, w.shape[1], cu, -1)
    runs, rows = halo.runs, halo.runs.rows(g)
    ends = runs.begun(runs.lasts, final, [], None)
    made = [g.new_zeros(0, g.shape[2], halo.behind)]
    for of, tokens in runs.spans(halo.out):
        last = runs.chosen(of, ends) if ends is not None else None
        made.append(here.run(anticausal_conv1d, tokens(rows)[:, : halo.behind], w, last)[1])
    enter = yield from _carried(here, halo, runs.borders(halo.out, torch.cat(made)), others)
    came = runs.begun([], None, halo.into, enter)
    later = came if ends is None else ends if came is None else ends + came
    x, start = here.run(anticausal_conv1d, rows, w, later, runs.cu)
    return runs.whole(x), runs.ended(runs.firsts, start, final, here)
