"""A kernel of a placed program as one rank runs it: no axes, and of what is split a rank's share of the size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from ..ir import Builder, Dim, Graph, Mesh, Node, PlaitError, Replay, TensorType, Value, ops
from ..ir.orders import Sections, parse_order
from .rows import Declined


def local_kernel(kernel: Graph, mesh: Mesh | None) -> Graph:
    """The kernel over the types of a rank's own tensors. Raises Declined where a share cannot be said."""
    types = [v.type for v in kernel.inputs]
    if not any(d.axes or d.order for t in types for d in t.dims) and not any(t.partial for t in types):
        return kernel
    if mesh is None:
        raise Declined("its tensors are split over a mesh that the lowering was not told")
    try:
        replay = Replay(kernel, types=[_local(t, mesh) for t in types])
        return replay.run(lambda node, inputs: _own(replay.builder, node, inputs))
    except PlaitError as error:
        raise Declined(f"over a rank's own tensors it has no types: {error}") from None


def _own(b: Builder, node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
    """What means something else on a share: sections of which each rank has a part, and sums that other ranks add to."""
    names, width = [v.name for v in node.outputs], sum(_width(v) for v in inputs if v is not None)
    match node.op.name, parse_order(node.attrs.get("order", "")):
        case "split", _ if node.attrs["parts"] * width == sum(node.attrs["sizes"]):
            sizes = tuple(n // node.attrs["parts"] for n in node.attrs["sizes"])
            return b.emit(node.op, inputs, {"sizes": sizes}, names, node.loc)
        case "join", Sections() as order if order.parts * width == sum(order.sizes):
            return b.emit(ops.concat, inputs, {}, names, node.loc)
        case "zeros_like", _:
            return b.emit(node.op, inputs, {}, names, node.loc)
        case _:
            return None


def _width(value: Value) -> int:
    size = value.type.dims[-1].size if value.type.dims else 0
    return size if isinstance(size, int) else 0


def _local(type_: TensorType, mesh: Mesh) -> TensorType:
    return replace(type_, dims=tuple(_share(d, mesh) for d in type_.dims), partial=frozenset[str]())


def _share(dim: Dim, mesh: Mesh) -> Dim:
    """A number divided by the ranks; a symbol that is split is another one, since the whole may stand beside it."""
    if not dim.axes:
        return dim.bare
    ranks = prod(mesh[axis] for axis in dim.axes)
    if isinstance(dim.size, int):
        return Dim(dim.size // ranks)
    if not dim.size.isidentifier():
        raise Declined(f"{dim} has no share that is one symbol")
    return Dim("_".join([dim.size, *dim.axes]))
