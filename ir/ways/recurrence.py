"""Ways of linear recurrences: over a run of tokens the state is affine, S' = M S + U, so only summaries travel.

U is the state that the run ends in from where it began (from zero, where another rank has its beginning), M what it does
to a state that enters: [k, k] for the delta rule, a number per head or per key channel where the rule is additive.

A place is passed in three steps: summaries of the runs that leave it, an exchange that tells what enters, outputs. The
delta rule computes outputs afterwards, with the states that enter. An additive rule computes outputs first, from nothing,
which gives U on the way; what enters then adds one product: scale (q_t decay_1 .. decay_t) S.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..crossing import Cut, Gather, Here, Hop, Shift, Way
from ..op import OpDef, accumulator
from ..ops.pointwise import wide
from ..ops.recurrence import FAMILY, FINALS, Traits
from ..orders import Zigzag, parse_order
from ..sizes import value
from ..types import BYTES, TensorType
from .runs import Runs, laid, owner, runs_of

Tensor = torch.Tensor
Exchanged = Generator[Any, Any, Tensor]  # what enters each of a rank's places, [place, lane, head, k, v]
Types = Sequence[TensorType | None]


@dataclass(frozen=True)
class Affine:
    """S -> through S + made; where `through` is a scaling, it is [..., 1, 1] or [..., k, 1]."""

    through: Tensor
    made: Tensor

    def of(self, state: Tensor) -> Tensor:
        return _applied(self.through, state) + self.made

    def after(self, before: Affine) -> Affine:
        return Affine(_applied(self.through, before.through), self.of(before.made))

    @property
    def flat(self) -> Tensor:
        """[place, lane, head, numbers], to be sent as one."""
        return torch.cat([self.through.flatten(3), self.made.flatten(3)], 3)

    def unflat(self, flat: Tensor) -> Affine:
        """What this one was told by another; both have the same shapes."""
        parts = flat.split([self.through.shape[3:].numel(), self.made.shape[3:].numel()], -1)
        return Affine(parts[0].unflatten(-1, self.through.shape[3:]), parts[1].unflatten(-1, self.made.shape[3:]))

    def place(self, i: int) -> Affine:
        return Affine(self.through[i], self.made[i])


def _applied(through: Tensor, state: Tensor) -> Tensor:
    return through * state if through.shape[-1] == 1 else through @ state


# -- exchanges --------------------------------------------------------------------------------


def _chain(here: Here, runs: Runs, summary: Affine) -> Exchanged:
    """The state goes from place to place; `through` stays where it was made."""
    enters = [torch.zeros_like(summary.made[0]) for _ in runs.places]
    for p in range(runs.total - 1):
        (source, mine), (target, theirs) = owner(p, here.ranks), owner(p + 1, here.ranks)
        out = summary.place(mine).of(enters[mine]) if here.rank == source else torch.zeros_like(summary.made[0])
        came = yield Hop(out, source, target)
        if here.rank == target:
            enters[theirs] = came
    return torch.stack(enters)


def _states(here: Here, runs: Runs, summary: Affine) -> Exchanged:
    """Every rank is told all summaries, and puts together those before its own."""
    told = summary.unflat((yield Gather(summary.flat)))
    state, enters = torch.zeros_like(summary.made[0]), dict[int, Tensor]()
    for p in range(max(runs.places) + 1):
        enters[p] = state
        rank, mine = owner(p, here.ranks)
        state = Affine(told.through[rank, mine], told.made[rank, mine]).of(state)
    return torch.stack([enters[p] for p in runs.places])


def _scan(here: Here, runs: Runs, summary: Affine) -> Exchanged:
    """Summaries of 1, 2, 4, ... places; as a zigzag once up, and from the middle once down."""
    first = summary.place(0)
    early = yield from _before(here, first, 1)
    if len(runs.places) == 1:
        return early[None]
    turn, late = first.of(early), summary.place(1)
    if here.rank == here.ranks - 1:
        # All that is before the middle is known here: no state enters the way down but this one.
        enters, late = turn, Affine(torch.zeros_like(late.through), late.of(turn))
    else:
        enters = torch.zeros_like(turn)
    down = yield from _before(here, late, -1)
    return torch.stack([early, enters + down])


def _before(here: Here, own: Affine, step: int) -> Exchanged:
    """What all places before this one make of nothing; places go up with ranks, or down."""
    all_, past, before = own, torch.zeros_like(own.made), None
    reach = 1
    while reach < here.ranks:
        flat = Affine(all_.through[None], all_.made[None])
        came = flat.unflat((yield Shift(flat.flat, step * reach, ring=False))).place(0)
        past = came.made if before is None else _applied(before, came.made) + past
        before = came.through if before is None else _applied(before, came.through)
        all_, reach = all_.after(came), 2 * reach
    return past


EXCHANGES: dict[str, Callable[[Here, Runs, Affine], Exchanged]] = {"chain": _chain, "states": _states, "scan": _scan}


# -- places -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A rank's operands, tokens in rows of runs; `begun` is what its runs start from, if a sequence begins with a state."""

    runs: Runs
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    begun: Tensor | None
    slope: Tensor | None

    def gates(self) -> list[Tensor]:
        """The op's operands between v and state."""
        return [x for x in (self.slope, None if self.slope is not None else self.decay, self.beta) if x is not None]


def _held(here: Here, op: OpDef, operands: Sequence[Tensor | None]) -> tuple[Held, Tensor | None]:
    x = dict(zip((o.name for o in op.inputs), operands, strict=True))
    v, state, slope = x["v"], x["state"], x.get("slope")
    assert v is not None
    runs = runs_of(here, v.shape[0], v.shape[1], x["cu"])
    row = {n: runs.rows(y) if y is not None else None for n, y in x.items() if n not in ("state", "cu", "slope")}
    decay = row.get("decay") if slope is None else slope.expand(*_present(row["v"]).shape[:2], -1)
    begun = runs.begun(runs.firsts, state.to(wide(v).dtype) if state is not None else None, [], None)
    q, k, v = (_present(row[n]) for n in "qkv")
    return Held(runs, q, k, v, decay, row.get("beta"), begun, slope), state


def _present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _delta(here: Here, op: OpDef, x: Held) -> Way:
    """Summaries first, by a pass without outputs; then the op with what enters."""
    runs = x.runs
    summary = Affine(*(yield Cut(_summaries(here, op, x))))
    enter = yield from EXCHANGES[here.by](here, runs, summary)
    begun = _sum(x.begun, runs.begun([], None, runs.entering, enter))
    return here.run(op, x.q, x.k, x.v, *x.gates(), state=begun, cu=runs.cu, **here.attrs)


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return x + y if x is not None and y is not None else x if y is None else y


def _summaries(here: Here, op: OpDef, x: Held) -> tuple[Tensor, Tensor]:
    """through and made of every place, [place, lane, head, k, k] and [place, lane, head, k, v]."""
    runs, width = x.runs, x.k.shape[3]
    if runs.ragged:
        # Every segment crosses every border: one pass over all of them is cheaper than one each.
        ends = runs.chosen(runs.leaving, _ends(here, op, x, [*range(len(runs.all))], lambda y: y, runs.cu))
    else:
        parts = [_ends(here, op, x, of, tokens, None) for of, tokens in runs.spans(runs.leaving)]
        ends = torch.cat(parts) if parts else wide(x.v).new_zeros(0, x.v.shape[2], width, width + x.v.shape[3])
    both = runs.borders(runs.leaving, ends)
    return both[..., :width], both[..., width:]


def _ends(here: Here, op: OpDef, x: Held, of: list[int], tokens: Callable[[Tensor], Tensor], cu: Tensor | None) -> Tensor:
    """[run, head, k, k + v]: where some runs bring the unit state without values, and what they begin with, with them."""
    k, v, decay, beta = (tokens(y) if y is not None else None for y in (x.k, x.v, x.decay, x.beta))
    assert k is not None and v is not None
    begun = x.runs.chosen(of, x.begun) if x.begun is not None else None
    goes = [not x.runs.all[i].first for i in of]
    if not any(goes):
        # A run that begins its sequence is not passed through.
        return F.pad(here.run(FINALS[op], k, v, decay, beta, begun, cu), (k.shape[3], 0))
    unit = torch.eye(k.shape[3], dtype=wide(v).dtype, device=v.device)
    unit = (unit * unit.new_tensor(goes)[:, None, None, None]).expand(-1, v.shape[2], -1, -1)
    starts = unit.new_zeros(*unit.shape[:3], v.shape[3]) if begun is None else begun
    none = v.new_zeros(()).expand(*v.shape[:3], k.shape[3])
    return here.run(FINALS[op], k, torch.cat([none, v], 3), decay, beta, torch.cat([unit, starts], 3), cu)


def _additive(here: Here, op: OpDef, x: Held) -> Way:
    """Outputs first, from nothing; then what enters is added to them."""
    runs = x.runs
    made = here.run(op, x.q, x.k, wide(x.v), *x.gates(), state=x.begun, cu=runs.cu, **here.attrs)
    o, final, fade = yield Cut((*made, _fades(x)))
    goes = [i for i in runs.leaving if not runs.all[i].first]
    through = runs.borders(goes, fade[[runs.entering.index(i) for i in goes]])
    summary = Affine(through, runs.borders(runs.leaving, runs.chosen(runs.leaving, final)))
    enter = yield from EXCHANGES[here.by](here, runs, summary)
    if not runs.entering:
        return o, final
    came = runs.across(runs.entering, enter)
    return _added(o, x, came, here.attrs["scale"]), final + laid(runs.entering, fade * came, len(runs.all))


def _fades(x: Held) -> Tensor:
    """What is left, of the state that enters a run, at its end: [entering, head, 1 or k, 1]."""
    assert x.decay is not None
    spans = x.runs.spans(x.runs.entering)
    parts = [_per_key(_faded(wide(tokens(x.decay)).sum(1))) for _, tokens in spans]
    shape = x.decay.shape[2:] if x.decay.dim() == 4 else (*x.decay.shape[2:], 1)
    return torch.cat(parts) if parts else wide(x.v).new_zeros(0, *shape, 1)


def _per_key(fade: Tensor) -> Tensor:
    return fade[..., None] if fade.dim() == 3 else fade[..., None, None]


def _added(o: Tensor, x: Held, came: Tensor, scale: float) -> Tensor:
    """The outputs with what they read of the states that came, [entering, head, k, v]."""
    assert x.decay is not None
    found, at = list[Tensor](), list[int]()
    for of, tokens in x.runs.spans(x.runs.entering):
        left = _faded(wide(tokens(x.decay)).cumsum(1))
        found.append(_reads(wide(tokens(x.q)) * scale, left, came[len(at) : len(at) + len(of)]))
        at += of
    if x.runs.cu is None:
        return o.index_add(0, torch.tensor(at, device=o.device), found[0].to(o.dtype))
    ranges = [torch.arange(x.runs.all[i].start, x.runs.all[i].end, device=o.device) for i in at]
    return o.index_add(1, torch.cat(ranges), torch.cat(found, 1).to(o.dtype))


# What is left is zero below exp of these: it is nothing beside the rest, and products of subnormal numbers are slow.
_FLOOR = {torch.float32: -40.0, torch.float64: -600.0}


def _faded(log: Tensor) -> Tensor:
    return torch.where(log < _FLOOR[log.dtype], 0.0, log.exp())


def _reads(q: Tensor, left: Tensor, state: Tensor) -> Tensor:
    """q_t of what is left of a state: q[n t g k], left[n t (g r)] or [n t (g r) k], state[n (g r) k v] -> [n t (g r) v]"""
    g, r = q.shape[2], left.shape[2] // q.shape[2]
    if left.dim() == 4:
        rows = (q.repeat_interleave(r, 2) * left).transpose(1, 2)
        return (rows @ state).transpose(1, 2)
    both = state.unflatten(1, (g, r)).transpose(2, 3).flatten(3)
    made = (q.transpose(1, 2) @ both).unflatten(3, (r, -1)).transpose(1, 2)
    return made.flatten(2, 3) * left[..., None]


# -- the ways ---------------------------------------------------------------------------------


def _way(op: OpDef, traits: Traits, about: str) -> Callable[..., Way]:
    def run(here: Here, *operands: Tensor | None) -> Way:
        x, state = _held(here, op, operands)
        o, final = yield from (_delta if traits.update == "delta" else _additive)(here, op, x)
        return x.runs.whole(o).to(x.v.dtype), x.runs.ended(x.runs.lasts, final, state, here)

    run.__doc__ = about
    return run


def _sent(op: OpDef, traits: Traits, by: str) -> Callable[[Types, Mapping[str, Any], int, Mapping[str, int]], int]:
    def sent(types: Types, attrs: Mapping[str, Any], ranks: int, sizes: Mapping[str, int]) -> int:
        made, through = _numbers(op, traits, types, attrs, sizes)
        return relayed(by, attrs["order"], ranks, made, through) * BYTES[accumulator(_type(op, types, "v").dtype)]

    return sent


def relayed(by: str, order: str, ranks: int, made: int, through: int) -> int:
    """The most numbers that a rank sends, given how many are in a place's summary."""
    places = 1 if parse_order(order) is None else 2
    if by == "chain":
        return min(places, ranks - 1) * made
    rounds = (ranks - 1) * places if by == "states" else max(_shifts(r, ranks, places) for r in range(ranks))
    return rounds * (made + through)


def _numbers(op: OpDef, traits: Traits, types: Types, attrs: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[int, int]:
    """How many numbers are in a place's U and M."""
    q, v, cu = (_type(op, types, "q"), _type(op, types, "v"), types[-1])
    batch, _, heads, width = (value(n, sizes) for n in v.shape)
    keys, order = value(q.shape[3], sizes), parse_order(attrs["order"])
    ragged = isinstance(order, Zigzag) and order.packed
    lanes = value(cu.shape[0], sizes) - 1 if cu is not None and ragged else batch
    through = keys * keys if traits.update == "delta" else keys if traits.decay == "channel" else 1
    return lanes * heads * keys * width, lanes * heads * through


def _type(op: OpDef, types: Types, name: str) -> TensorType:
    found = next(t for o, t in zip(op.inputs, types, strict=True) if o.name == name)
    assert found is not None
    return found


def _shifts(rank: int, ranks: int, places: int) -> int:
    """How often a rank passes a summary on."""
    steps = [1 << i for i in range((ranks - 1).bit_length())]
    return sum(rank + s < ranks for s in steps) + (sum(rank >= s for s in steps) if places == 2 else 0)


ABOUT = {
    "chain": "The state alone goes from rank to rank; what a rank does to it stays there.",
    "states": "Every rank is told every summary and puts together those before its own.",
    "scan": "Summaries of 1, 2, 4, ... ranks are passed on, in as many steps as ranks have binary digits.",
}
for _op, _traits in FAMILY.items():
    for _by, _text in ABOUT.items():
        _op.way(_by, sent=_sent(_op, _traits, _by))(_way(_op, _traits, _text))
