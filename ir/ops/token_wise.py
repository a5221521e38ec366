"""Rows of tokens, in an order that every rank makes for itself: they may be split over any mesh axes, if all are alike.

`rows: [6*b*s@cp, d]` are those of a rank's own tokens `[b, s@cp, ...]`; `counts: [e]+cp` say how many rows an expert has, and
add up over ranks. Where ranks have experts of their own, `counts: [e@ep]` are of the rows that came to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PlacementError
from ..op import OpDef
from ..signature import Axis, Operand, spread
from ..types import Dim, TensorType

Given = Sequence[tuple[Operand, Sequence[Axis], TensorType]]


@dataclass(frozen=True)
class Rows:
    """Where an op's rows live, its experts, and its tokens dim by dim."""

    axes: tuple[str, ...]
    experts: tuple[str, ...]
    tokens: dict[str, Dim]

    def off(self, axes: Sequence[Axis], type_: TensorType, counts: bool) -> TensorType:
        """An operand's type as if there were one rank."""
        dims = [Dim(d.size) if _own(a) or a.letters == ("e",) else d for a, d in zip(axes, type_.dims, strict=True)]
        return replace(type_, dims=tuple(dims), partial=frozenset[str]() if counts else type_.partial)

    def on(self, axes: Sequence[Axis], type_: TensorType) -> TensorType:
        """A result's type on the ranks that there are."""
        dims = [self._dim(a, d) for a, d in zip(axes, type_.dims, strict=True)]
        summed = frozenset(self.axes) - {*self.experts} if not any(map(_own, axes)) else frozenset[str]()
        return replace(type_, dims=tuple(dims), partial=summed | (type_.partial if type_.is_float else frozenset[str]()))

    def _dim(self, axis: Axis, dim: Dim) -> Dim:
        if axis.letters == ("e",):
            return Dim(dim.size, self.experts)
        if _is_row(axis):
            return Dim(dim.size, self.axes)
        return self.tokens.get(axis.letters[0], dim)


def _is_row(axis: Axis) -> bool:
    return axis.letters == ("n",) or (len(axis.letters) > 1 and axis.letters[-1] == "k")


def _is_token(axis: Axis) -> bool:
    return axis.letters[0].startswith("...") and len(axis.letters) == 1


def _own(axis: Axis) -> bool:
    """Whether its places are a rank's own: rows, or tokens."""
    return _is_row(axis) or _is_token(axis)


def token_wise(op: OpDef) -> None:
    """Let an op of rows run on every rank's own."""

    def rule(*types: TensorType | None, **attrs: Any) -> tuple[TensorType, ...]:
        """What is split alike may be split, which letters cannot say: rows are a product of dims, in an order of their own."""
        rest = op.bind(types, attrs).rest
        spread_inputs = [spread(o.axes, rest) for o in op.inputs]
        given = [(o, a, t) for o, a, t in zip(op.inputs, spread_inputs, types, strict=True) if t is not None]
        rows = _rows(op, given)
        alone = zip(op.inputs, spread_inputs, types, strict=True)
        bare = [rows.off(a, t, o.name == "counts") if t is not None else None for o, a, t in alone]
        made = op.result_types(*op.placed(bare, attrs))
        return tuple(rows.on(spread(o.axes, rest), t) for o, t in zip(op.outputs, made, strict=True))

    op.infers(rule)


def _rows(op: OpDef, given: Given) -> Rows:
    """What the operands agree on; a PlacementError where they do not."""
    found = {_axes(axes, t) for _, axes, t in given if any(map(_own, axes))}
    tokens = [{a.letters[0]: d for a, d in zip(axes, t.dims, strict=True) if _is_token(a)} for _, axes, t in given]
    tokens = [x for x in tokens if x]
    experts = {d.axes for _, axes, t in given for a, d in zip(axes, t.dims, strict=True) if a.letters == ("e",)}
    rows, own = next(iter(found), ()), next(iter(experts), ())
    counted = [t.partial for o, _, t in given if o.name == "counts"]
    alike = len(found) < 2 and len(experts) < 2 and all(x == tokens[0] for x in tokens)
    if not alike or any({*own, *partial} != {*rows} for partial in counted):
        shown = ", ".join(f"{o.name} is {t}" for o, _, t in given)
        raise PlacementError(f"{op.name}: {shown}; rows and tokens must be split alike, and counts add up over their ranks")
    return Rows(rows, own, tokens[0] if tokens else {})


def _axes(axes: Sequence[Axis], type_: TensorType) -> tuple[str, ...]:
    return tuple(x for a, d in zip(axes, type_.dims, strict=True) if _own(a) for x in d.axes)
