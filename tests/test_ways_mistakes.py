"""Mistakes that are easy to make where recurrences and convolutions cross ranks; the comparison with one device sees each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from plait.ir.ops import causal_conv1d, kimi_delta_attention, ssd
from plait.ir.ways import conv, recurrence, runs

from tests import test_ways_conv as convs
from tests.test_ways_recurrence import crossing, operands
from tests.ways import Crossing, agrees

Patch = pytest.MonkeyPatch


def _never_through(patch: Patch) -> None:
    patch.setattr(recurrence.Affine, "of", lambda self, state: self.made)


def _scan_with_itself(patch: Patch) -> None:
    before = recurrence._before

    def inclusive(here: Any, own: recurrence.Affine, step: int) -> Any:
        return own.of((yield from before(here, own, step)))

    patch.setattr(recurrence, "_before", inclusive)


def _of_the_wrong_rank(patch: Patch) -> None:
    unflat = recurrence.Affine.unflat
    patch.setattr(recurrence.Affine, "unflat", lambda self, flat: unflat(self, flat.roll(1, 0)))


def _of_the_wrong_row(patch: Patch) -> None:
    across = runs.Runs.across
    patch.setattr(runs.Runs, "across", lambda self, of, crossing: across(self, of, crossing.roll(1, 1)))


def _no_reset(patch: Patch) -> None:
    overlaps = runs._overlaps

    def joined(cut: Sequence[Any], length: int, places: Sequence[int]) -> list[runs.Run]:
        return [replace(r, first=r.first and r.start == 0 and places[r.place] == 0) for r in overlaps(cut, length, places)]

    patch.setattr(runs, "_overlaps", joined)


def _states_begin_everywhere(patch: Patch) -> None:
    rows = runs._rows
    patch.setattr(runs, "_rows", lambda *at: tuple(replace(r, first=True) for r in rows(*at)))


def _no_halo(patch: Patch) -> None:
    def nothing(here: Any, halo: Any, made: torch.Tensor, others: Any) -> Any:
        yield from ()
        return torch.zeros_like(made)

    patch.setattr(conv, "_carried", nothing)


def _one_neighbour(patch: Patch) -> None:
    patch.setattr(conv, "_carried", lambda here, halo, made, others: conv._passed(here, halo, made))


def _late_places_go_on(patch: Patch) -> None:
    """The places of a zigzag's second half, taken to stand in the order of the first."""
    patch.setattr(recurrence, "owner", lambda p, ranks: (p % ranks, p // ranks))


RELAYS: dict[str, tuple[Callable[[Patch], None], str, str, list[int] | None]] = {
    "what a rank does to a state is not applied": (_never_through, "chain", "", None),
    "a scan includes its own rank": (_scan_with_itself, "scan", "", None),
    "the state of the wrong rank": (_of_the_wrong_rank, "states", "", None),
    "the state of the wrong row": (_of_the_wrong_row, "chain", "", None),
    "no reset where a segment begins": (_no_reset, "chain", "", [0, 4, 8]),
    "an initial state for every rank": (_states_begin_everywhere, "states", "", None),
    "a zigzag whose late places are mirrored": (_late_places_go_on, "chain", "zigzag(2)", None),
}
HALOS: dict[str, tuple[Callable[[Patch], None], str, int]] = {
    "a halo is left out": (_no_halo, "", 12),
    "a halo reaches one neighbour": (_one_neighbour, "", 4),
    "a halo is left out of a zigzag": (_no_halo, "zigzag(2)", 16),
}


@pytest.mark.parametrize("name", RELAYS)
def test_a_mistake_in_a_relay_is_seen(name: str, monkeypatch: Patch) -> None:
    mistake, by, order, cu = RELAYS[name]
    for op in (kimi_delta_attention, ssd):
        c = crossing(op, by, 2 if order else 4, order)
        xs = operands(op, 8, b=1 if cu else 2, cu=cu, state=True)
        agrees(c, xs)
        with monkeypatch.context() as patch:
            mistake(patch)
            with pytest.raises(AssertionError, match="is off by"):
                agrees(c, xs)


@pytest.mark.parametrize("name", HALOS)
def test_a_mistake_in_a_halo_is_seen(name: str, monkeypatch: Patch) -> None:
    mistake, order, t = HALOS[name]
    xs, attrs = convs.operands(causal_conv1d, t, 4, b=2, state=True)
    c = Crossing(causal_conv1d, "halo", 2 if order else 4, order, attrs)
    agrees(c, xs)
    with monkeypatch.context() as patch:
        mistake(patch)
        with pytest.raises(AssertionError, match="is off by"):
            agrees(c, xs)
