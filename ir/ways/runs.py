"""Runs: which parts of which sequences a rank holds, when tokens are split in natural order or as a zigzag.

The whole sequence is cut into *places*, in order: a rank holds one in natural order, two as a zigzag (one from each end).
A *lane* is a sequence that may cross the borders of places: a row of the batch, the one packed row, or, where every packed
segment is a zigzag by itself, a segment. What crosses the borders of this rank's places is [place, lane, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..crossing import Here
from ..errors import PlacementError, TypeMismatch
from ..ops.recurrence import segments
from ..orders import Zigzag, parse_order

Tensor = torch.Tensor


@dataclass(frozen=True)
class Run:
    """Tokens of one sequence that stand together on a rank."""

    sequence: int  # the row of the batch, or the packed segment
    start: int  # of the rank's tokens
    end: int
    place: int  # which of the rank's places
    lane: int
    first: bool  # whether the sequence begins here
    last: bool  # whether it ends here

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Runs:
    """What a rank holds. Without `cu` all runs are equally long and are rows: [b t ...] is [b*places, t/places, ...]."""

    all: tuple[Run, ...]
    places: tuple[int, ...]  # where the rank's places stand among all
    total: int  # places of all ranks
    lanes: int
    empty: tuple[int, ...]  # sequences without tokens
    sequences: int
    size: int  # tokens of a place
    cu: Tensor | None
    ragged: bool = False  # every packed segment crosses every border

    @cached_property
    def entering(self) -> list[int]:
        """Runs that go on with what another place began."""
        return [i for i, r in enumerate(self.all) if not r.first]

    @cached_property
    def leaving(self) -> list[int]:
        """Runs that another place goes on with."""
        return [i for i, r in enumerate(self.all) if not r.last]

    @cached_property
    def firsts(self) -> list[int]:
        return [i for i, r in enumerate(self.all) if r.first]

    @cached_property
    def lasts(self) -> list[int]:
        return [i for i, r in enumerate(self.all) if r.last]

    def rows(self, x: Tensor) -> Tensor:
        """A rank's tokens with a row for every run, or packed as they are."""
        return x if self.cu is not None else x.unflatten(1, (len(self.places), -1)).flatten(0, 1)

    def whole(self, x: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return x if self.cu is not None else x.unflatten(0, (-1, len(self.places))).flatten(1, 2)

    @property
    def shortest(self) -> int:
        """The fewest tokens that a sequence may have in a place that it passes; the same on all ranks."""
        return min((r.length for r in self.all), default=0) if self.ragged else self.size

    def spans(self, of: list[int]) -> list[tuple[list[int], Callable[[Tensor], Tensor]]]:
        """Some runs in order, with what picks their tokens: rows side by side, stretches of a packed row one by one."""
        if self.cu is not None:
            return [([i], _between(self.all[i].start, self.all[i].end)) for i in of]
        return [(of, lambda x: self.chosen(of, x))] if of else []

    def chosen(self, runs: Sequence[int], values: Tensor) -> Tensor:
        """[len(runs), ...] of what there is for every run."""
        return values if len(runs) == len(self.all) else values.index_select(0, _index(runs, values))

    def borders(self, runs: Sequence[int], values: Tensor) -> Tensor:
        """[place, lane, ...] of what there is for these runs, zeros where none of them stands."""
        at = [self.all[i].place * self.lanes + self.all[i].lane for i in runs]
        return laid(at, values, len(self.places) * self.lanes).unflatten(0, (len(self.places), self.lanes))

    def across(self, runs: Sequence[int], crossing: Tensor) -> Tensor:
        """[len(runs), ...]: what crosses the border where each of these runs stands."""
        at = [self.all[i].place * self.lanes + self.all[i].lane for i in runs]
        return crossing.flatten(0, 1).index_select(0, _index(at, crossing))

    def begun(self, runs: Sequence[int], given: Tensor | None, others: Sequence[int], crossing: Tensor | None) -> Tensor | None:
        """[run, ...]: what is given for the sequences of `runs`, and what crosses to the `others`; None is zeros."""
        parts = list[Tensor]()
        if given is not None:
            parts.append(laid(runs, given.index_select(0, _index(self._sequences(runs), given)), len(self.all)))
        if crossing is not None:
            parts.append(laid(others, self.across(others, crossing), len(self.all)))
        return parts[0] + parts[1] if len(parts) == 2 else parts[0] if parts else None

    def ended(self, runs: Sequence[int], values: Tensor, given: Tensor | None, here: Here) -> Tensor:
        """[sequence, ...]: what `runs` end with; a sequence without tokens ends as it began, which the first rank says."""
        found = laid(self._sequences(runs), self.chosen(runs, values), self.sequences)
        if given is None or not self.empty or here.rank:
            return found
        kept = given.index_select(0, _index(self.empty, given)).to(found.dtype)
        return found + laid(self.empty, kept, self.sequences)

    def _sequences(self, runs: Sequence[int]) -> list[int]:
        return [self.all[i].sequence for i in runs]


def _between(start: int, end: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x[:, start:end]


def _index(at: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor([*at], dtype=torch.int64, device=like.device)


def laid(at: Sequence[int], values: Tensor, count: int) -> Tensor:
    """[count, ...]: values at some places, zeros elsewhere."""
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, _index(at, values), values)


def owner(place: int, ranks: int) -> tuple[int, int]:
    """The rank that holds a place, and which of its own it is."""
    return (place, 0) if place < ranks else (2 * ranks - 1 - place, 1)


def runs_of(here: Here, batch: int, tokens: int, cu: Tensor | None) -> Runs:
    """What a rank holds of sequences of which it has `tokens`."""
    order = parse_order(here.order)
    if isinstance(order, Zigzag) and order.parts != here.ranks:
        raise PlacementError(f"{here.by}: tokens are in order {order}, must be zigzag({here.ranks}) over {here.ranks} ranks")
    places = (here.rank,) if order is None else (here.rank, 2 * here.ranks - 1 - here.rank)
    total = here.ranks * len(places)
    if tokens % len(places):
        raise TypeMismatch(f"{here.by}: a rank has {tokens} tokens in order {order}; pad the sequence to a multiple of {total}")
    size = tokens // len(places)
    if cu is None:
        return Runs(_rows(batch, size, places, total), places, total, batch, (), batch, size, None)
    whole = segments(batch, tokens * here.ranks, cu)
    ragged = isinstance(order, Zigzag) and order.packed
    cut = [(s, a, b) for s, (_, a, b) in enumerate(whole) if a < b]
    runs = _zigzags(cut, places, total) if ragged else _overlaps(cut, size, places)
    borders = torch.tensor([0, *(r.end for r in runs)], dtype=cu.dtype, device=cu.device)
    empty = tuple(s for s, (_, a, b) in enumerate(whole) if a == b)
    return Runs(tuple(runs), places, total, len(whole) if ragged else 1, empty, len(whole), size, borders, ragged)


def _rows(batch: int, length: int, places: Sequence[int], total: int) -> tuple[Run, ...]:
    """Every row of the batch crosses every place."""
    return tuple(
        Run(b, j * length, (j + 1) * length, j, b, p == 0, p == total - 1) for b in range(batch) for j, p in enumerate(places)
    )


def _overlaps(cut: Sequence[tuple[int, int, int]], length: int, places: Sequence[int]) -> list[Run]:
    """Places are parts of the packed row: segments begin and end inside them."""
    found = list[Run]()
    for j, p in enumerate(places):
        low, high = p * length, (p + 1) * length
        for s, a, b in cut:
            if a < high and b > low:
                start, end = max(a, low) - low + j * length, min(b, high) - low + j * length
                found.append(Run(s, start, end, j, 0, a >= low, b <= high))
    return found


def _zigzags(cut: Sequence[tuple[int, int, int]], places: Sequence[int], total: int) -> list[Run]:
    """Every segment has a part in every place."""
    found, at = list[Run](), 0
    for s, a, b in cut:
        if (b - a) % total:
            raise TypeMismatch(
                f"a packed segment of {b - a} tokens is no zigzag of {total} chunks; pad it to a multiple of that"
            )
        size = (b - a) // total
        for j, p in enumerate(places):
            found.append(Run(s, at, at + size, j, s, p == 0, p == total - 1))
            at += size
    return found
