"""Ways of scans of channels: what a rank's tokens do to a state is a factor and a summand for each of its numbers.

A place is passed twice: once from nothing, to learn what it makes; then, with what enters it, for its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..crossing import Cut, Here, Way
from ..op import OpDef, accumulator
from ..ops.pointwise import wide
from ..ops.scan import SCANS, selective_scan
from ..orders import Zigzag, parse_order
from ..sizes import value
from ..types import BYTES, TensorType
from .recurrence import ABOUT, EXCHANGES, Affine, relayed
from .runs import Runs, runs_of

Tensor = torch.Tensor
Held = Mapping[str, Tensor | None]  # operands by name, tokens in rows of runs


def _way(op: OpDef, about: str) -> Callable[..., Way]:
    alone = ("rate", "state", "cu")

    def run(here: Here, *operands: Tensor | None) -> Way:
        x = dict(zip((o.name for o in op.inputs), operands, strict=True))
        first, state = _there(x["x"]), x["state"]
        runs = runs_of(here, first.shape[0], first.shape[1], x["cu"])
        held = {n: y if n in alone or y is None else runs.rows(y) for n, y in x.items()}
        given = [held[o.name] for o in op.inputs[:-2]]
        begun = runs.begun(runs.firsts, state.to(wide(first).dtype) if state is not None else None, [], None)
        _, final = here.run(op, *given, state=begun, cu=runs.cu)
        enter = yield from EXCHANGES[here.by](here, runs, _summary(op, runs, held, *(yield Cut((final,)))))
        came = runs.begun([], None, runs.entering, enter[..., 0])
        begun = came if begun is None else begun + came if came is not None else begun
        o, final = here.run(op, *given, state=begun, cu=runs.cu)
        return runs.whole(o), runs.ended(runs.lasts, final, state, here)

    run.__doc__ = about
    return run


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _summary(op: OpDef, runs: Runs, held: Held, final: Tensor) -> Affine:
    """What every place does to what enters it, [place, lane, c, ..., 1]."""
    goes = [i for i in runs.leaving if not runs.all[i].first]
    parts = [_fade(op, held, tokens) for _, tokens in runs.spans(goes)]
    fade = torch.cat(parts) if parts else final.new_zeros(0, *final.shape[1:])
    made = runs.borders(runs.leaving, runs.chosen(runs.leaving, final))
    return Affine(runs.borders(goes, fade)[..., None], made[..., None])


def _fade(op: OpDef, held: Held, tokens: Callable[[Tensor], Tensor]) -> Tensor:
    """What is left, of a state that enters a run, at its end: [run, c, ...]."""
    if op is selective_scan:
        steps = wide(tokens(_there(held["step"]))).sum(1)
        return (steps[..., None] * wide(_there(held["rate"]))).exp()
    kept = wide(tokens(_there(held["decay"]))).sum(1).exp()
    return kept * (tokens(_there(held["p"])) != 0).all(1)[:, None]


def _sent(op: OpDef, by: str) -> Callable[[Sequence[TensorType | None], Mapping[str, Any], int, Mapping[str, int]], int]:
    def sent(types: Sequence[TensorType | None], attrs: Mapping[str, Any], ranks: int, sizes: Mapping[str, int]) -> int:
        found = dict(zip((o.name for o in op.inputs), types, strict=True))
        x, rate, cu, order = found["x"], found.get("rate"), found["cu"], parse_order(attrs["order"])
        assert x is not None
        batch, _, channels = (value(n, sizes) for n in x.shape)
        ragged = isinstance(order, Zigzag) and order.packed
        lanes = value(cu.shape[0], sizes) - 1 if cu is not None and ragged else batch
        numbers = lanes * channels * (value(rate.shape[1], sizes) if rate is not None else 1)
        return relayed(by, attrs["order"], ranks, numbers, numbers) * BYTES[accumulator(x.dtype)]

    return sent


for _op in SCANS:
    for _by, _text in ABOUT.items():
        _op.way(_by, sent=_sent(_op, _by))(_way(_op, _text))
