"""Short convolutions over split tokens: the halo against one device, values and gradients in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plait.ir import OpDef
from plait.ir.ops import anticausal_conv1d, causal_conv1d, conv1d_taps

from tests.ways import Crossing, Tensor, agrees, agrees_pulled, counted, predicted

EVERY = pytest.mark.parametrize("op", [causal_conv1d, anticausal_conv1d, conv1d_taps], ids=lambda o: o.name)
Shape = tuple[int, str, int, int]  # ranks, order, tokens, taps
SHAPES: list[Shape] = [
    (2, "", 10, 4), (3, "", 21, 4), (4, "", 4, 4), (8, "", 16, 4), (3, "", 3, 2), (2, "", 2, 4), (4, "", 8, 1), (1, "", 5, 4),
    (2, "zigzag(2)", 12, 4), (3, "zigzag(3)", 30, 4), (4, "zigzag(4)", 8, 4), (2, "zigzag(2)", 4, 3), (1, "zigzag(1)", 6, 4),
]  # fmt: skip


def operands(op: OpDef, t: int, k: int, *, b: int = 1, c: int = 3, state: bool = False, cu: list[int] | None = None) -> Any:
    rng = torch.Generator().manual_seed(t)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    borders, runs = (torch.tensor(cu), len(cu) - 1) if cu else (None, b)
    end = normal(runs, c, k - 1) if state else None
    x = normal(b, t, c)
    if op is causal_conv1d:
        return [x, normal(c, k), normal(c), end, borders], {"act": "silu"}
    if op is anticausal_conv1d:
        return [x, normal(c, k), end, borders], {}
    return [x, normal(b, t, c), end, borders], {"k": k}


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_halo(op: OpDef, shape: Shape) -> None:
    ranks, order, t, k = shape
    for state in (False, True):
        for cu in (None, [0, t], sorted([0, 1, 1, t // ranks, max(1, t - 2), t, t]), [0, 0, t - 1, t]):
            xs, attrs = operands(op, t, k, b=1 if cu else 2, state=state, cu=cu)
            c = Crossing(op, "halo", ranks, order, attrs)
            agrees(c, xs)
            agrees_pulled(c, xs)
            assert counted(c, xs)[0] == predicted(c, xs)


@EVERY
def test_halo_of_packed_zigzags(op: OpDef) -> None:
    for cu in ([0, 4, 4, 24, 40], [0, 24, 48], [0, 8]):
        for state in (False, True):
            xs, attrs = operands(op, cu[-1], 4, state=state, cu=cu)
            agrees(Crossing(op, "halo", 2, "zigzag(2,packed)", attrs), xs)
