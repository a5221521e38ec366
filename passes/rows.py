"""What the named fusions leave: maximal regions of row-wise ops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..ir import Graph, Node, OpDef
from .outline import Region, compatible, convex, outline_all, region
from .registry import Outcome, register
from .remarks import Remark
from .structure import bytes_saved, is_view, row_wise


@register(numerics="exact")
def outline_rows(graph: Graph, *, min_ops: int = 2, max_ops: int = 40) -> Outcome:
    """Maximal convex regions of ops that work row by row become one kernel each."""
    if graph.role == "kernel":
        return graph, ()
    found = [r for r in _regions(graph, max_ops) if sum(_worth(n) for n in r.nodes) >= min_ops and r.results(graph)]
    kept = compatible(graph, found)
    if not kept:
        return graph, ()
    return outline_all(graph, kept), tuple(_passed(graph, r) for r in kept)


def _worth(node: Node) -> int:
    """How many ops a node counts for: none for a view, two for a norm or an activation, whose gradient is several ops."""
    return 0 if is_view(node) else 1 if isinstance(node.op, OpDef) and node.op.linear else 2


def _passed(graph: Graph, made: Region) -> Remark:
    saved = bytes_saved(made.nodes, made.operands, made.results(graph))
    why = f"{len(made.nodes)} ops become one kernel, {saved} bytes a token less memory traffic"
    return Remark("passed", "rows", made.loc, why)


def _regions(graph: Graph, max_ops: int) -> list[Region]:
    """Connected regions, trimmed of what stays a view outside, in the graph's order."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    found = list[Region]()
    for cluster in _clusters(graph, place, max_ops):
        found += [region(graph, part, "rows") for part in _connected(graph, _trimmed(graph, cluster), place)]
    return sorted(found, key=lambda r: place[r.nodes[0]])


def _eligible(node: Node) -> bool:
    """Row-wise, with rows: a scalar is no work for a kernel."""
    return row_wise(node) and any(v.type.dims for v in node.outputs)


def _clusters(graph: Graph, place: Mapping[Node, int], max_ops: int) -> list[frozenset[Node]]:
    """Grow greedily in order: each node joins the clusters of its operands while the union stays convex."""
    cluster = dict[Node, frozenset[Node]]()
    for node in graph.nodes:
        if not _eligible(node):
            continue
        mine = frozenset([node])
        for maker in (graph.makers.get(v) for v in node.operands):
            if maker not in cluster or cluster[maker] <= mine:
                continue
            joined = mine | cluster[maker]
            if len(joined) <= max_ops and convex(graph, joined, place):
                mine = joined
        cluster.update(dict.fromkeys(mine, mine))
    return list(dict.fromkeys(cluster[n] for n in graph.nodes if n in cluster))


def _trimmed(graph: Graph, nodes: Iterable[Node]) -> set[Node]:
    """Without the views at its edges that serve outside: there they are views, inside they would be copies."""
    kept = set(nodes)
    while drop := {n for n in kept if is_view(n) and _at_edge(graph, n, kept)}:
        kept -= drop
    return kept


def _at_edge(graph: Graph, node: Node, kept: set[Node]) -> bool:
    inside = [any(user in kept for user in graph.uses.get(v, ())) for v in node.outputs]
    outside = [v in graph.outputs or any(user not in kept for user in graph.uses.get(v, ())) for v in node.outputs]
    first = not any(graph.makers.get(v) in kept for v in node.operands)
    return not any(inside) or (first and any(outside))


def _connected(graph: Graph, nodes: set[Node], place: Mapping[Node, int]) -> list[set[Node]]:
    """The parts that values hold together."""
    parts = list[set[Node]]()
    for node in sorted(nodes, key=place.__getitem__):
        near = {graph.makers.get(v) for v in node.operands} & nodes
        touching = [p for p in parts if p & near]
        parts = [p for p in parts if not p & near] + [{node}.union(*touching)]
    return parts
