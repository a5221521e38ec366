"""Overlap: exchanges begin as early as they can and end where they are read, with other work in between."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace

from ..ir import Graph, Node, Replay, Value, ops
from .outline import communicates
from .registry import Outcome, register
from .remarks import Remark
from .structure import copy_node
from .tokens import Tokens, tokens_of


@register(numerics="exact")
def overlap(graph: Graph) -> Outcome:
    """An all_to_all is begun where it can be and ended where it is read; what does not need it runs while it is under way.

    Runs last, after `differentiate` and `fuse`: work is where it will stay. Collectives keep their order, on every rank alike.
    """
    order = [*_Schedule(graph).run()]
    hidden = {n: _between(graph, order, n) for n in order if n.is_op("all_to_all")}
    tokens = tokens_of(graph)
    worth = {n: work for n, work in hidden.items() if tokens.flops(work) > 0}
    if not worth:
        return graph, ()
    return _emitted(graph, order, worth), tuple(_said(n, work, tokens) for n, work in worth.items())


def _said(node: Node, work: Sequence[Node], tokens: Tokens) -> Remark:
    names = ", ".join(dict.fromkeys(n.op.name for n in work))
    return Remark("passed", "overlap", node.loc, f"{tokens.flops(work)} FLOPs a token run while it is under way: {names}")


class _Schedule:
    """Nodes in an order in which no exchange is awaited while there is other work."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.place = {n: i for i, n in enumerate(graph.nodes)}
        self.before = {n: {graph.makers[v] for v in n.operands if v in graph.makers} for n in graph.nodes}
        self.waiting = [n for n in graph.nodes if communicates(n)]
        self.under_way = set[Node]()  # exchanges that are begun and not read yet
        self.left = dict.fromkeys(graph.nodes)

    def run(self) -> Iterator[Node]:
        done = set[Node]()
        while self.left:
            node = self._next([n for n in self.left if self.before[n] <= done])
            yield node
            done.add(node)
            del self.left[node]
            self.under_way -= self.before[node]
            if self.waiting and node is self.waiting[0]:
                self.waiting = self.waiting[1:]
                self.under_way |= {node} if node.is_op("all_to_all") else set()

    def _next(self, ready: Sequence[Node]) -> Node:
        """The next exchange; else what leads to it without a wait; else what needs no wait; else whatever stood first."""
        exchange = self.waiting[0] if self.waiting else None
        free = [n for n in ready if not communicates(n)]
        if exchange in ready and exchange is not None and (self._ready(exchange) or not any(map(self._ready, free))):
            return exchange
        leading = self._needs(exchange) if exchange is not None else set[Node]()
        for choice in ([n for n in free if self._ready(n) and n in leading], [n for n in free if self._ready(n)], free):
            if choice:
                return min(choice, key=self.place.__getitem__)
        return min(ready, key=self.place.__getitem__)

    def _ready(self, node: Node) -> bool:
        """Whether it reads nothing that is under way."""
        return self.under_way.isdisjoint(self.before[node])

    def _needs(self, node: Node) -> set[Node]:
        """What is left to do before a node."""
        found, todo = set[Node](), [node]
        while todo:
            todo += (more := [n for n in self.before[todo.pop()] if n in self.left and n not in found])
            found.update(more)
        return found


def _between(graph: Graph, order: Sequence[Node], exchange: Node) -> list[Node]:
    """What runs from an exchange to its first reader, or to the end."""
    at, readers = order.index(exchange), set(graph.uses.get(exchange.outputs[0], ()))
    end = next((i for i, n in enumerate(order) if n in readers), len(order))
    return [*order[at + 1 : end]]


def _emitted(graph: Graph, order: Sequence[Node], worth: Mapping[Node, Sequence[Node]]) -> Graph:
    """The graph in this order, its exchanges begun and ended apart."""
    replay, begun = Replay(graph), dict[Value, Node]()

    def end(values: Container[Value]) -> None:
        for value in [v for v in begun if v in values]:
            was = begun.pop(value)
            made = replay.builder.emit(ops.end_all_to_all, [replay.env[value]], was.attrs, [value.name], was.loc)
            replay.env[value] = made[0]

    for node in order:
        end({*node.operands})
        copy_node(replay.builder, replace(node, op=ops.begin_all_to_all) if node in worth else node, replay.env)
        begun |= {node.outputs[0]: node} if node in worth else {}
    end([*begun])
    return replay.builder.finish(replay.env[v] for v in graph.outputs)
