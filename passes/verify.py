"""Checks that hold of every graph after every pass: types re-inferred, text read back."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir import Graph, Node, PassError, PlaitError, Replay, Value, dump, parse


def check_types(graph: Graph) -> None:
    """Replay every reached graph and compare each type; then print it and read it back."""
    for part in reached(graph):
        _check_graph(part)
    if parse(dump(graph)) != graph:
        raise PassError(f"{graph.name}: the printed graph reads back as another one")


def reached(graph: Graph) -> tuple[Graph, ...]:
    """The graph and every graph it calls, each distinct one once."""
    found = dict.fromkeys([graph])
    waiting = [graph]
    while waiting:
        for callee in waiting.pop(0).callees:
            if callee not in found:
                found[callee] = None
                waiting.append(callee)
    return tuple(found)


def _check_graph(graph: Graph) -> None:
    """Every operand stands above its use, and every type is the one its op infers."""
    known = {*graph.inputs, *graph.params}
    for node in graph.nodes:
        if stray := [v for v in node.operands if v not in known]:
            raise PassError(f"{graph.name}: {node.op.name} at {node.loc or 'no place'} reads {stray[0].name}, which is not made above it")
        known.update(node.outputs)
    if stray := [v for v in graph.outputs if v not in known]:
        raise PassError(f"{graph.name} returns {stray[0].name}, which it never makes")
    replay = Replay(graph)

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value]:
        made = replay.keep(node)
        _compare(graph, node, made)
        return made

    try:
        replay.run(visit)
    except PlaitError as error:
        raise PassError(f"{graph.name}: types do not hold: {error}") from None


def _compare(graph: Graph, node: Node, made: Sequence[Value]) -> None:
    for was, now in zip(node.outputs, made, strict=True):
        if was.type != now.type:
            raise PassError(f"{graph.name}: {node.op.name} gives {now.type}, the graph says {was.type}")
