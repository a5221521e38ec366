"""Experts over ranks: every rank has its own, rows of tokens go to them and come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir import Graph, Node, OpDef, Value, ops, parse_mesh
from .batch import RULES as BATCH
from .batch import over_batch
from .registry import Outcome, register
from .remarks import Remark
from .splitting import Split
from .tensor_walk import Rule, Walk


@register(numerics="reassociates", model=True)
def split_experts(graph: Graph, *, mesh: str = "ep=2", axis: str = "ep") -> Outcome:
    """Split the experts over a mesh axis, and the batch with them: `w_in: [64@ep, 2816, 2048]`, tokens `[b@ep, s]`.

    Rows of tokens go to the ranks that have their experts, as many as there are, and back: two exchanges a layer.
    """
    whole = parse_mesh(mesh)
    return experts(graph, Split(axis, whole[axis], mesh=whole))


def experts(graph: Graph, split: Split) -> Outcome:
    """`split-experts` over a split that is given."""
    return over_batch(graph, split, "split-experts", RULES)


def away(graph: Graph) -> frozenset[Value]:
    """What is made of rows that are with their experts; nothing where such a row is read as a token's own."""
    found = set[Value]()
    for node in graph.nodes:
        there = not found.isdisjoint(node.operands)
        if node.is_op("grouped_linear") or (there and not node.is_op("combine")):
            found.update(node.outputs)
        row = isinstance(node.op, OpDef) and (node.op.row or node.is_op("grouped_linear", "spread_experts", "combine"))
        if (there and not row) or not found.isdisjoint(graph.outputs):
            return frozenset()
    return frozenset(found)


def _legal(walk: Walk, node: Node, weight: Value) -> bool:
    """Whether ranks have equal numbers of experts, and rows split over them."""
    experts = weight.type.dims[0]
    rows, axis = walk.type(node.operands[0]), walk.split.axis
    return axis in rows.dims[0].axes and walk.split.divides(experts.size, experts.axes) and bool(away(walk.graph))


def expert(walk: Walk, node: Node) -> Sequence[Value] | None:
    """One linear per expert of this rank, on the rows that all ranks have for it."""
    rows, w, counts = node.operands
    if not _legal(walk, node, w) or not walk.fresh(w):
        if walk.fresh(w):
            why = f"{w.name} is {w.type}; dim 0 must be a multiple of {walk.split}, and rows must go to experts alone"
            walk.notes.said.append(Remark("missed", "experts", node.loc, f"{why}; every rank has all experts"))
        return None
    here, own = walk.at(rows), _own_counts(walk, counts)
    if rows not in away(walk.graph):
        here = _exchanged(walk, ops.send_rows, rows, counts)
    there = walk.at(w, walk.split.over(walk.type(w), 0))
    return walk.b.emit(node.op, [here, there, own], node.attrs, [v.name for v in node.outputs], node.loc)


def _own_counts(walk: Walk, counts: Value) -> Value:
    """How many rows this rank's experts have, of all ranks."""
    type_ = walk.type(counts)
    return walk.at(counts, walk.split.over(walk.split.whole(type_), 0))


def _exchanged(walk: Walk, op: OpDef, rows: Value, counts: Value) -> Value:
    here, name = walk.at(rows), "to" if op is ops.send_rows else "back from"
    why = f"rows of {here.type.dims[-1].size} numbers go {name} the ranks that have their experts"
    walk.notes.said.append(Remark("passed", "experts", walk.b.loc, why))
    return walk.b.emit(op, [here, walk.at(counts)], {"over": walk.split.axis, "by": "exchange"})[0]


def shared(walk: Walk, node: Node) -> Sequence[Value] | None:
    """A vector of each of this rank's experts, for the rows that all ranks have for it."""
    w, counts, rows = node.operands
    if rows not in away(walk.graph) or not walk.fresh(w) or not _sent(walk, counts):
        return None
    there, own = walk.at(w, walk.split.over(walk.type(w), 0)), _own_counts(walk, counts)
    return walk.b.emit(node.op, [there, own, walk.at(rows)], node.attrs, [v.name for v in node.outputs], node.loc)


def returned(walk: Walk, node: Node) -> Sequence[Value] | None:
    """Rows come back to their tokens before they are added up."""
    rows, order, weights = node.operands
    if rows not in away(walk.graph) or walk.split.axis not in walk.type(rows).dims[0].axes:
        return None
    counts = next((n.outputs[2] for n in walk.graph.nodes if n.is_op("dispatch") and order in n.outputs), None)
    if counts is None or not _sent(walk, counts):
        return None
    back = _exchanged(walk, ops.return_rows, rows, counts)
    return walk.b.emit(node.op, [back, walk.at(order), walk.at(weights)], node.attrs, [v.name for v in node.outputs], node.loc)


def _sent(walk: Walk, counts: Value) -> bool:
    """Whether these rows were sent to experts."""
    return any(v is counts for v, _ in walk.copies)


RULES: Mapping[str, Rule] = {**BATCH, "grouped_linear": expert, "spread_experts": shared, "combine": returned}
