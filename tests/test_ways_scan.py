"""Scans of channels over split tokens: every way, order and packing against one device, values, gradients and bytes."""

from __future__ import annotations

import pytest
import torch
from plait.ir import OpDef, parse_type
from plait.ir.ops import BACKWARD, SCANS, positions, rg_lru, selective_scan

from tests.ways import Crossing, Tensor, agrees, agrees_back, counted, predicted

EVERY = pytest.mark.parametrize("op", SCANS, ids=lambda o: o.name)
BY = pytest.mark.parametrize("by", ("chain", "states", "scan"))


def operands(op: OpDef, t: int, *, b: int = 1, state: bool = False, cu: list[int] | None = None) -> list[Tensor | None]:
    """Float64 operands; positions that begin anew in the middle of a row too."""
    rng = torch.Generator().manual_seed(t)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    c, s = 3, 2
    borders, runs = (torch.tensor(cu), len(cu) - 1) if cu else (None, b)
    x = normal(b, t, c)
    if op is rg_lru:
        places = positions(torch.zeros(b, t).long(), None if cu else torch.tensor(2), borders)
        places[:, t // 2] = 0
        return [x, -normal(b, t, c).abs() - 0.05, places, normal(runs, c) if state else None, borders]
    scan = [x, normal(b, t, c).abs(), -normal(c, s).abs(), normal(b, t, s), normal(b, t, s)]
    return [*scan, normal(runs, c, s) if state else None, borders]


def packed(t: int, ranks: int) -> list[int]:
    """A short segment, an empty one, one that ends where another begins inside a rank, and the last token."""
    return sorted([0, 1, 1, min(t, t // ranks + 1), t - 1, t])


@EVERY
@BY
def test_every_way(op: OpDef, by: str) -> None:
    """One token a rank and many; either order; a batch or packed segments, with states that are given."""
    for ranks, order, t in ((1, "", 3), (3, "", 9), (4, "", 4), (2, "zigzag(2)", 8), (3, "zigzag(3)", 6)):
        c = Crossing(op, by, ranks, order, {})
        for xs in (
            operands(op, t, b=2, state=True), operands(op, t, cu=packed(t, ranks), state=True), operands(op, t, b=2),
            operands(op, t, cu=[0, 0, t, t], state=True), operands(op, t, cu=packed(t, ranks)),
        ):  # fmt: skip
            agrees(c, xs)
            assert counted(c, xs)[0] == predicted(c, xs)
        agrees_back(c, BACKWARD[op], operands(op, t, b=2, state=True))


@EVERY
def test_segments_that_are_zigzags_by_themselves(op: OpDef) -> None:
    for by, cu in (("chain", [0, 4, 4, 16]), ("states", [0, 8, 12]), ("scan", [0, 4, 12])):
        c, xs = Crossing(op, by, 2, "zigzag(2,packed)", {}), operands(op, cu[-1], cu=cu, state=True)
        agrees(c, xs)
        assert counted(c, xs)[0] == predicted(c, xs)


def test_what_travels_does_not_grow_with_tokens() -> None:
    """Mamba 2.8B: 5,120 channels of 16 numbers in float32, 328 KB whatever the length."""
    types = [parse_type(f"bf16[1, 65536, {n}]") for n in (5120, 5120)] + [parse_type("f32[5120, 16]")]
    types += [parse_type("bf16[1, 65536, 16]")] * 2 + [None, None]
    assert selective_scan.crossing
    sent = {by: way.sent(types, {"order": ""}, 8, {}) for by, way in selective_scan.crossing.ways.items()}
    assert sent == {"chain": 5120 * 16 * 4, "states": 7 * 2 * 5120 * 16 * 4, "scan": 3 * 2 * 5120 * 16 * 4}
