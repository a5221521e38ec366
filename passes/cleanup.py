"""Cleaning up: what is never used goes, what is computed twice is computed once, what does nothing is nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ..ir import Graph, Node, OpDef, Replay, Value, each_layer, ops
from .outline import communicates
from .registry import Outcome, register
from .remarks import Remark
from .rewrite import rewrite
from .simplifications import RULES

Wanted = dict[Graph, frozenset[int]]  # which results of a called graph are read anywhere


@register(numerics="exact")
def simplify(graph: Graph) -> Outcome:
    """Ops that change nothing disappear: scale by 1, a reorder there and back, a gather of a shard."""
    return rewrite(graph, RULES)


@register(numerics="exact")
def cse(graph: Graph) -> Outcome:
    """Equal ops on equal operands become one; dropouts and collectives never do."""
    replay, known, remarks = Replay(graph), dict[Hashable, tuple[Value, ...]](), list[Remark]()

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
        if not _repeatable(node):
            return None
        key = _key(node, inputs)
        if key in known:
            remarks.append(Remark("passed", "cse", node.loc, f"{node.op.name} is computed above already"))
            return known[key]
        known[key] = replay.keep(node)
        return known[key]

    return replay.run(visit), tuple(remarks)


def _repeatable(node: Node) -> bool:
    """Not random, not a collective, and no layer: two calls are two sets of parameters' uses."""
    if node.callee is not None:
        return node.callee.role == "kernel"
    return node.op is not ops.dropout and not communicates(node)


def _key(node: Node, inputs: Sequence[Value | None]) -> Hashable:
    """Equal for nodes that compute the same; operands of a commuting op in one order."""
    operands = tuple(inputs)
    if isinstance(node.op, OpDef) and node.op.commutes and len({v.type for v in node.operands}) == 1:
        operands = frozenset(operands) if len(set(operands)) > 1 else operands
    return node.op, operands, tuple((k, repr(v)) for k, v in sorted(node.attrs.items()))


@register(numerics="exact", model=True)
def dce(graph: Graph) -> Outcome:
    """What nothing reads goes, results of layers and kernels included; inputs and parameters stay."""
    before = _size(graph)
    after = _without_unused(graph)
    removed = before - _size(after)
    return after, ((Remark("passed", "dce", graph.name, f"{removed} ops that nothing reads are gone"),) if removed else ())


def _size(graph: Graph) -> int:
    return len(graph.nodes) + sum(_size(g) for g in graph.callees)


def _without_unused(graph: Graph) -> Graph:
    """Narrow the called graphs to what any call of them wants, then drop what is dead."""
    live = _live(graph)
    wanted = Wanted()
    for node in graph.nodes:
        if node in live and node.callee is not None:
            read = frozenset(i for i, v in enumerate(node.outputs) if _is_read(graph, v, live))
            wanted[node.callee] = wanted.get(node.callee, frozenset()) | (read or frozenset([0]))
    narrowed = {callee: _narrowed(callee, keep) for callee, keep in wanted.items()}
    replay = Replay(graph)
    for node in graph.nodes:
        if node not in live:
            continue
        if node.callee is None:
            replay.env.update(zip(node.outputs, replay.keep(node), strict=True))
            continue
        kept = [v for i, v in enumerate(node.outputs) if i in wanted[node.callee]]
        inputs = [replay.env[v] for v in node.operands]
        made = replay.builder.emit(narrowed[node.callee], inputs, node.attrs, [v.name for v in kept], node.loc)
        replay.env.update(zip(kept, made, strict=True))
    return replay.builder.finish(replay.env[v] for v in graph.outputs)


def _live(graph: Graph) -> set[Node]:
    """Nodes that a result needs, and calls that hold parameters."""
    needed, live = set(graph.outputs), set[Node]()
    for node in reversed(graph.nodes):
        holds = node.callee is not None and bool(node.callee.params)
        if holds or any(v in needed for v in node.outputs):
            live.add(node)
            needed.update(node.operands)
    return live


def _is_read(graph: Graph, value: Value, live: set[Node]) -> bool:
    return value in graph.outputs or any(n in live for n in graph.uses.get(value, ()))


def _narrowed(graph: Graph, keep: frozenset[int]) -> Graph:
    """The graph with some of its results, itself cleaned up."""
    outputs = tuple(v for i, v in enumerate(graph.outputs) if i in keep)
    return _without_unused(Graph(graph.name, graph.inputs, graph.params, graph.inits, graph.nodes, outputs, graph.role))


@register(numerics="exact", model=True)
def canonicalize(graph: Graph) -> Outcome:
    """Simplify, merge what is equal and drop what is unused, until nothing changes."""
    remarks = list[Remark]()

    def change(part: Graph) -> Graph:
        for step in (simplify, cse):
            part, said = step(part)
            remarks.extend(said)
        return part

    while True:
        before, graph = graph, each_layer(graph, change)
        graph, said = dce(graph)
        remarks += said
        if graph == before:
            return graph, tuple(remarks)
