"""What ops say themselves of running over split tokens: whether they can, and the bytes that a rank sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..ir import Dim, Node, OpDef, PlacementError, TensorType, TypeMismatch
from ..ir.signature import Axis, Operand

Types = Sequence[TensorType | None]


@dataclass(frozen=True)
class Cut:
    """How tokens are split: over which axis, in which order's text; and the sizes that one group of its ranks works on."""

    axis: str
    ranks: int
    order: str
    batch: int
    seq: int
    segments: int  # of a packed row; rows of the batch where none is packed
    tp: int


def crossing_text(order: str, ranks: int, packed: bool) -> str:
    """The order of split tokens as types have it."""
    return "" if order == "natural" else f"zigzag({ranks}{',packed' if packed else ''})"


def refused(node: Node, way: str, cut: Cut) -> str:
    """Why an op cannot run that way; empty where it can."""
    op = _op(node)
    if op.crossing is None or way not in op.crossing.ways:
        return f"{op.name} has no way called {way}"
    try:
        op.infer(_types(node, cut), _attrs(node, way, cut))
    except (PlacementError, TypeMismatch) as error:
        return str(error)
    return ""


def crossing_bytes(node: Node, way: str, cut: Cut) -> int:
    """Bytes that the busiest rank sends in a forward pass."""
    op = _op(node)
    assert op.crossing is not None
    return op.crossing.ways[way].sent(_types(node, cut), _attrs(node, way, cut), cut.ranks, {})


def _op(node: Node) -> OpDef:
    assert isinstance(node.op, OpDef)
    return node.op


def _attrs(node: Node, way: str, cut: Cut) -> dict[str, object]:
    return {**node.attrs, "over": cut.axis, "by": way, "order": cut.order}


def _types(node: Node, cut: Cut) -> list[TensorType | None]:
    """Operands as one group of ranks has them: tokens split, heads and channels shared out over tp."""
    given = zip(_op(node).inputs, node.inputs, strict=True)
    return [_type(operand, value.type, cut) if value is not None else None for operand, value in given]


def _type(operand: Operand, type_: TensorType, cut: Cut) -> TensorType:
    pairs = zip(operand.axes, type_.dims, strict=True)
    return replace(type_, dims=tuple(_dim(axis, dim, cut) for axis, dim in pairs))


def _dim(axis: Axis, dim: Dim, cut: Cut) -> Dim:
    match axis.letters[0]:
        case "b":
            return Dim(cut.batch)
        case "t" | "s":
            return Dim(cut.seq, (cut.axis,), cut.order)
        case "n":
            return Dim(cut.segments + axis.offset)
        case "g" | "c" if isinstance(dim.size, int):
            return Dim(max(1, dim.size // cut.tp))
        case _:
            return dim
