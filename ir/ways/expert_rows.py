"""Ways of rows to their experts: one exchange of as many rows as each rank has for each other, known from their counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..crossing import Exchange, Gather, Here, Way
from ..ops.expert_rows import return_rows, send_rows
from ..types import BYTES, TensorType

Tensor = torch.Tensor


@dataclass(frozen=True)
class Trip:
    """How many rows go to each rank and come of each, and how those that come stand by expert."""

    to: tuple[int, ...]
    of: tuple[int, ...]
    by_expert: Tensor  # which of the rows that come stands at each place


def _counted(types: Sequence[TensorType | None], attrs: Mapping[str, Any], ranks: int, sizes: Mapping[str, int]) -> int:
    """All counts, and the rows of other ranks' experts, if every expert has as many."""
    rows, counts = types[0], types[1]
    assert rows is not None and counts is not None
    return (ranks - 1) * (counts.count({**sizes}) * 8 + rows.count({**sizes}) // ranks**2 * BYTES[rows.dtype])


def _trip(here: Here, counts: Tensor) -> Way:
    """Every rank's counts of all experts say who has what for whom."""
    every = (yield Gather(counts)).unflatten(1, (here.ranks, -1))  # [source, target, expert]
    whole = every.sum(-1)
    own = every[:, here.rank]
    experts = torch.arange(own.shape[1], device=own.device).repeat(here.ranks).repeat_interleave(own.flatten())
    to, of = (tuple(x.tolist()) for x in (whole[here.rank], whole[:, here.rank]))
    return Trip(to, of, experts.sort(stable=True).indices)


@send_rows.way("exchange", sent=_counted, orders=("",))
def _(here: Here, rows: Tensor, counts: Tensor) -> Way:
    """Rows stand by expert, so those for one rank are one run; what comes is put by expert again."""
    trip = yield from _trip(here, counts)
    came = yield Exchange(rows, trip.to, trip.of)
    return came[trip.by_expert]


@return_rows.way("exchange", sent=_counted, orders=("",))
def _(here: Here, sent: Tensor, counts: Tensor) -> Way:
    """As they came, back to where they were."""
    trip = yield from _trip(here, counts)
    came = torch.zeros_like(sent).index_copy(0, trip.by_expert, sent)
    return (yield Exchange(came, trip.of, trip.to))
