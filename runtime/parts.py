"""What one rank holds of a value: which places of the whole, in the order and the split that its type says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import torch

from ..ir import Dim, TensorType, TypeMismatch
from ..ir.orders import multiple, permutation
from ..lowering.forms.collectives import all_gather
from .mesh import Place

Tensor = torch.Tensor


def part_of(whole: Tensor, type_: TensorType, place: Place, *, name: str = "a value", cu: Tensor | None = None) -> Tensor:
    """This rank's part of a global tensor, which is in its natural order; `cu` are the borders of packed segments."""
    part = whole
    for i, dim in enumerate(type_.dims):
        if dim.order or dim.axes:
            index = held(dim, whole.shape[i], place, name, cu).to(whole.device)
            part = part.index_select(i, index) if dim.order else part.narrow(i, int(index[0]) if len(index) else 0, len(index))
    return part


def held(dim: Dim, length: int, place: Place, name: str = "a value", cu: Tensor | None = None) -> Tensor:
    """The natural indices of what this rank holds of a dim."""
    ranks = prod(place.mesh[axis] for axis in dim.axes)
    if length % ranks:
        must = f"pad it to a multiple of {max(ranks, multiple(dim.order))}"
        over = " and ".join(f"{axis}={place.mesh[axis]}" for axis in dim.axes)
        raise TypeMismatch(f"{name}: {length} places of {dim} do not divide over {over}; {must}")
    index = permutation(dim.order, length, cu)
    for axis in dim.axes:
        index = index.chunk(place.mesh[axis])[place.groups[axis].rank] if len(index) else index
    return index


def whole_of(part: Tensor, type_: TensorType, place: Place, cu: Tensor | None = None) -> Tensor:
    """The global tensor in its natural order, of which every rank has its part; all ranks of its axes call this."""
    whole = part
    for i, dim in enumerate(type_.dims):
        for axis in reversed(dim.axes):
            whole = all_gather(whole, axis=axis, dim=i, at="a gather of parts")
        if dim.order:
            back = permutation(dim.order, whole.shape[i], cu).argsort()
            whole = whole.index_select(i, back.to(whole.device))
    return whole


@dataclass(frozen=True)
class Piece:
    """A block of a rank's part that is a block of the whole, too."""

    offsets: tuple[int, ...]  # in the whole
    starts: tuple[int, ...]  # in the part
    sizes: tuple[int, ...]

    def of(self, part: Tensor) -> Tensor:
        for i, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            part = part.narrow(i, start, size)
        return part


def pieces(type_: TensorType, shape: tuple[int, ...], place: Place) -> list[Piece]:
    """The blocks that a rank's part of a tensor of this global shape is made of."""
    runs = [
        [*_runs(held(dim, n, place))] if dim.order or dim.axes else [(0, 0, n)]
        for dim, n in zip(type_.dims, shape, strict=True)
    ]
    return [Piece(tuple(r[0] for r in at), tuple(r[1] for r in at), tuple(r[2] for r in at)) for at in product(*runs)]


def _runs(index: Tensor) -> Iterator[tuple[int, int, int]]:
    """Stretches of neighbours: where each starts in the whole and here, and how long it is."""
    cuts = [0, *(int(i) + 1 for i in (index.diff() != 1).nonzero().flatten()), len(index)]
    for a, b in pairwise(cuts):
        if b > a:
            yield int(index[a]), a, b - a
