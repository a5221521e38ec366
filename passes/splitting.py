"""A mesh axis that a program is split over: where values live along it, and what types say of ops there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ..ir import Dim, Mesh, OpDef, PlacementError, TensorType, ops
from ..ir.signature import spread
from ..ir.sizes import divide
from ..ir.types import BYTES

Types = Sequence[TensorType | None]
ALONE = Mesh(())


@dataclass(frozen=True)
class Split:
    """A mesh axis that tokens are split over, its number of ranks, the order that tokens are in, and the other axes."""

    axis: str
    ranks: int
    order: str = ""
    mesh: Mesh = ALONE

    def __str__(self) -> str:
        return f"{self.axis}={self.ranks}"

    def dim(self, type_: TensorType) -> int | None:
        """The dim of a value that is split over the axis."""
        return next((i for i, d in enumerate(type_.dims) if self.axis in d.axes), None)

    def lives(self, type_: TensorType) -> bool:
        """Whether ranks hold different parts of a value."""
        return self.dim(type_) is not None or self.axis in type_.partial

    def whole(self, type_: TensorType) -> TensorType:
        """The value, all of it on every rank, tokens in their natural order."""
        dims = [self._without(d) if self.axis in d.axes else d for d in type_.dims]
        return replace(type_, dims=tuple(dims), partial=type_.partial - {self.axis})

    def _without(self, dim: Dim) -> Dim:
        """Of a dim that another axis splits too, the order is that one's."""
        rest = tuple(a for a in dim.axes if a != self.axis)
        return Dim(dim.size, rest, dim.order if rest else "")

    def over(self, type_: TensorType, index: int) -> TensorType:
        """A whole value, split along one dim in its natural order."""
        d = type_.dims[index]
        return type_.with_dim(index, replace(d, axes=(*d.axes, self.axis)))

    def tokens(self, type_: TensorType, index: int) -> TensorType:
        """A whole value, its tokens split in their order."""
        made = self.over(type_, index)
        return made.with_dim(index, replace(made.dims[index], order=self.order or made.dims[index].order))

    def ordered(self, type_: TensorType) -> TensorType:
        """A value whose tokens are split, with them in this split's order."""
        at = self.dim(type_)
        alone = at is not None and type_.dims[at].axes == (self.axis,)
        return type_.with_dim(at, replace(type_.dims[at], order=self.order)) if at is not None and alone else type_

    def even(self, type_: TensorType) -> bool:
        """Whether every rank has as much; symbolic sizes are the caller's word."""
        index = self.dim(type_)
        return index is None or self.divides(type_.dims[index].size, type_.dims[index].axes)

    def divides(self, size: int | str, others: tuple[str, ...] = ()) -> bool:
        """Whether ranks of the axis, and of the others that split a dim, have equal parts of it."""
        known = [self.mesh[a] for a in others if a != self.axis and a in self.mesh]
        return not isinstance(size, int) or size % (self.ranks * prod(known)) == 0


def aligned(op: OpDef, types: Types, attrs: Mapping[str, Any], split: Split) -> list[TensorType | None]:
    """Whole operands split as those they meet, which moves nothing."""
    made = [*types]
    for letter, uses in op.bind(types, attrs).uses.items():
        if op.role(letter) != "map" or not any(split.axis in u.dim.axes for u in uses):
            continue
        order = next(u.dim.order for u in uses if split.axis in u.dim.axes)
        for use in uses:
            type_ = made[use.operand]
            if type_ is not None and not split.lives(type_):
                over = split.over(type_, use.position)
                made[use.operand] = over.with_dim(use.position, replace(over.dims[use.position], order=order))
    return made


def result_letters(op: OpDef, result: int, rest: int) -> list[str]:
    """The letter of each dim of a result, composites as they are written."""
    return [" ".join(a.letters) for a in spread(op.outputs[result].axes, rest)]


def inferred(op: OpDef, types: Types, attrs: Mapping[str, Any], split: Split) -> tuple[TensorType, ...] | None:
    """Types of the results; None where operands cannot live as they do, or would be uneven."""
    if not all(split.even(t) for t in types if t is not None):
        return None
    try:
        return op.infer(types, attrs)
    except PlacementError:
        return None


def token_letters(op: OpDef, types: Types, attrs: Mapping[str, Any], split: Split) -> set[str]:
    """The letters whose dims are split."""
    return {letter for letter, uses in op.bind(types, attrs).uses.items() if any(split.axis in u.dim.axes for u in uses)}


def local_reshape(type_: TensorType, pattern: str, split: Split, home: TensorType) -> str:
    """`(h=8 d)` as `(h d=16)` where h is split: each rank finds its own number of heads, which may be more than at home."""
    index, (left, right) = split.dim(type_), ops.sides(pattern)
    spare = len(type_.dims) - len(left)
    place = None if index is None else index - spare if left[0].letters == ("...",) else index
    if index is None or place is None or place < 0 or len(left[place].letters) != 2 or "=" not in left[place].letters[0]:
        return pattern
    outer, inner = left[place].letters
    size = divide(home.dims[index].size, int(outer.split("=")[1]))
    new = {outer: outer.split("=")[0], inner: f"{inner.split('=')[0]}={size}"}
    texts = [_side([[new.get(x, x) for x in a.letters] for a in left]), _side([_bare(a.letters) for a in right])]
    return " -> ".join(texts)


def _side(axes: Sequence[Sequence[str]]) -> str:
    return " ".join(letters[0] if len(letters) == 1 else f"({' '.join(letters)})" for letters in axes)


def _bare(letters: Sequence[str]) -> list[str]:
    """Sizes are said once, on the left; `u=1` comes of nothing."""
    return [x if x == "u=1" else x.split("=")[0] for x in letters]


def token_bytes(type_: TensorType, tokens: int | None) -> int:
    """Bytes of what stands behind a value's token dim."""
    behind = type_.dims if tokens is None else type_.dims[tokens + 1 :]
    return replace(type_, dims=tuple(behind)).count(dict.fromkeys(type_.symbols, 1)) * BYTES[type_.dtype]
