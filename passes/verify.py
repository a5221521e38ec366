"""Checks that hold of every graph after every pass: types re-inferred, text read back."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir import Graph, Node, PassError, PlaitError, Replay, Value, dump, parse


def check_types(graph: Graph) -> None:
    """Replay every reached graph and compare each type; then print it and read it back."""
    check_order(graph)
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


def check_order(graph: Graph) -> None:
    """Every value is made above its use, in every reached graph; graphs are told apart by identity, a broken one has no key."""
    known = {*graph.inputs, *graph.params}
    for node in graph.nodes:
        if stray := [v for v in node.operands if v not in known]:
            raise PassError(f"{graph.name}: {node.op.name} reads {stray[0].name}, which is not made above it (at {node.loc})")
        known.update(node.outputs)
    if stray := [v for v in graph.outputs if v not in known]:
        raise PassError(f"{graph.name} returns {stray[0].name}, which it never makes")
    for callee in {id(n.callee): n.callee for n in graph.nodes}.values():
        if callee is not None:
            check_order(callee)


def _check_graph(graph: Graph) -> None:
    """Every type is the one that its op infers."""
    replay = Replay(graph)

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value]:
        try:
            made = replay.builder.emit(node.op, inputs, node.attrs, [v.name for v in node.outputs], node.loc)
        except PlaitError as error:
            raise PassError(f"{graph.name}: types do not hold: {error}") from None
        for was, now in zip(node.outputs, made, strict=True):
            if was.type != now.type:
                raise PassError(f"{graph.name}: {node.op.name} gives {now.type}, the graph says {was.type}")
        return made

    replay.run(visit)
