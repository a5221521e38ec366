"""Traffic of a placed program: what a rank sends, exchange by exchange, read from types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

from ..ir import Dim, Graph, Mesh, Node, OpDef, PassError, TensorType, ops
from ..ir.sizes import symbols, value

MOVING = (*(op for op in ops.COLLECTIVES if op is not ops.shard), ops.begin_all_to_all)


@dataclass(frozen=True)
class Transfer:
    """One exchange between the ranks of a mesh axis, at one call of its layer."""

    op: str  # `all_to_all`, or an op with its way, `attention.ring`
    loc: str
    axis: str
    layer: str  # the parameter prefix of the call that it is in; empty in the entry itself
    value: str  # what is sent
    bytes: int  # that the rank which sends most sends


Key = TypeVar("Key")
Known = dict[Graph, tuple[Transfer, ...]]


@dataclass(frozen=True)
class Sum:
    """Exchanges together."""

    exchanges: int
    bytes: int


def traffic(graph: Graph, mesh: Mesh, sizes: Mapping[str, int]) -> tuple[Transfer, ...]:
    """Every exchange of a placed program in order, a layer's at each of its calls; `sizes` are the whole program's, by symbol.

    What an exchange sends is counted as collectives are: pairwise, and round a ring for a sum.
    """
    wanted = {s for g in (graph, *graph.callees) for s in g.symbols}
    if missing := sorted(wanted - sizes.keys()):
        raise PassError(f"{graph.name}: no size is given for {', '.join(missing)}; its symbols are {', '.join(sorted(wanted))}")
    return _inside(graph, mesh, sizes, Known())


def _inside(graph: Graph, mesh: Mesh, sizes: Mapping[str, int], known: Known) -> tuple[Transfer, ...]:
    if graph not in known:
        known[graph] = tuple(t for node in graph.nodes for t in _at(node, mesh, sizes, known))
    return known[graph]


def _at(node: Node, mesh: Mesh, sizes: Mapping[str, int], known: Known) -> Sequence[Transfer]:
    if isinstance(node.op, Graph):
        prefix = str(node.attrs.get("params", ""))
        return [replace(t, layer=t.layer or prefix) for t in _inside(node.op, mesh, sizes, known)]
    if node.op in MOVING:
        axis, moved = node.attrs["axis"], node.operands[0]
        sent = _collective(node.op, _held(moved.type, mesh, sizes), mesh[axis])
        return [Transfer(node.op.name, node.loc, axis, "", moved.name, sent)]
    if node.op.crossing and node.attrs["over"]:
        return [_crossing(node, node.op, mesh, sizes)]
    return []


def _collective(op: OpDef, held: int, ranks: int) -> int:
    """Bytes that a rank sends to others, of those that it holds."""
    if op is ops.all_gather:
        return (ranks - 1) * held
    if op is ops.all_reduce:
        return 2 * (ranks - 1) * held // ranks
    return (ranks - 1) * (held // ranks)


def _held(type_: TensorType, mesh: Mesh, sizes: Mapping[str, int]) -> int:
    """Bytes of a rank's part of a value."""
    return type_.bytes({**sizes}) // prod(mesh[a] for d in type_.dims for a in d.axes)


def _crossing(node: Node, op: OpDef, mesh: Mesh, sizes: Mapping[str, int]) -> Transfer:
    """What an op sends that runs over split tokens, by its own word."""
    assert op.crossing is not None
    axis, way = node.attrs["over"], node.attrs["by"]
    types = [_along(v.type, axis, mesh, sizes) if v is not None else None for v in node.inputs]
    one, given = op.crossing.ways[way], (types, node.attrs, mesh[axis], sizes)
    sent = one.sent(*given) + (one.sent_back(*given) if op.gradient_of else 0)  # a gradient goes the way again, and back
    return Transfer(f"{op.name}.{way}", node.loc, axis, "", node.outputs[0].name, sent)


def _along(type_: TensorType, axis: str, mesh: Mesh, sizes: Mapping[str, int]) -> TensorType:
    """A value as one group of ranks along the axis sees it: its own share of what other axes split."""
    return replace(type_, dims=tuple(_share(d, axis, mesh, sizes) for d in type_.dims))


def _share(dim: Dim, axis: str, mesh: Mesh, sizes: Mapping[str, int]) -> Dim:
    others = [a for a in dim.axes if a != axis]
    if not others:
        return dim
    size = value(dim.size, {s: sizes[s] for s in symbols(dim.size)}) // prod(mesh[a] for a in others)
    return Dim(size, tuple(a for a in dim.axes if a == axis), dim.order)


def by_layer(found: Iterable[Transfer]) -> dict[str, Sum]:
    """Exchanges and bytes of every call of a layer, the entry's own under ''."""
    return _summed((t.layer, t.bytes) for t in found)


def by_axis(graph: Graph, found: Iterable[Transfer]) -> dict[tuple[str, str], Sum]:
    """Exchanges and bytes of all calls of every distinct layer over every mesh axis; the entry's own are under its name."""
    names = {str(n.attrs["params"]): n.op.name for n in graph.nodes if n.callee is not None and n.callee.role == "layer"}
    return _summed(((names.get(t.layer, graph.name), t.axis), t.bytes) for t in found)


def _summed(parts: Iterable[tuple[Key, int]]) -> dict[Key, Sum]:
    made = dict[Key, Sum]()
    for key, size in parts:
        before = made.get(key, Sum(0, 0))
        made[key] = Sum(before.exchanges + 1, before.bytes + size)
    return made
