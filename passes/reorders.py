"""Reorders of tokens move to where they cost least: out of runs of layers, through ops that know no order, into the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..ir import Graph, Node, PassError, Replay, TensorType, Value, ops, parse_mesh
from ..ir.orders import Zigzag, parse_order
from .exchanges import token_bytes
from .orders import RESULTS, Labels, Tokens, behind, counts_here, in_order, is_reorder, orders
from .outline import inline
from .registry import Outcome, register
from .remarks import Remark
from .verify import reached


@register(numerics="reassociates", model=True)
def move_reorders(graph: Graph, *, mesh: str = "cp=2", axis: str = "cp", copy: float = 0.5) -> Outcome:
    """Every op runs in the order of tokens that makes reorders cheapest: few, at narrow values, none between recurrences.

    A reorder of split tokens is an exchange, of whole ones a copy, of which a byte costs `copy` of one that is sent. Layers
    are in one order at their borders; inputs of the program come in whichever order is best, as their types then say.
    """
    parse_mesh(mesh)[axis]  # an axis of the mesh, or a clear error
    if not 0.0 <= copy < float("inf"):
        raise PassError(f"move-reorders: copy is {copy}, must be at least 0: what a copied byte costs of one that is sent")
    flat = _inlined(graph)
    tokens = _tokens(flat, axis, copy)
    if tokens is None:
        return graph, (Remark("missed", "move-reorders", graph.name, "tokens are in one order everywhere"),)
    moving = _Moving(tokens, {})
    labels, _ = orders(flat, tokens, moving.cost, None)
    made = _Emit(flat, labels, tokens, moving).run()
    if made == flat:
        return graph, (Remark("missed", "move-reorders", graph.name, "reorders are where they cost least"),)
    before, after = [*_reorders(flat)], [*_reorders(made)]
    told = f"{_told(before)} become {_told(after)}"
    return made, (Remark("passed", "move-reorders", graph.name, told),)


def _inlined(graph: Graph) -> Graph:
    """Kernels as ops again, in layers too."""
    if not any(g.role == "kernel" for g in reached(graph)):
        return graph
    replay = Replay(inline(graph))
    return replay.run(
        lambda node, inputs: (
            None
            if node.callee is None
            else replay.builder.emit(inline(node.callee), inputs, node.attrs, [v.name for v in node.outputs], node.loc)
        )
    )


def _tokens(graph: Graph, axis: str, copy: float) -> Tokens | None:
    """The one order beside the natural that tokens are in, anywhere in the program; None where there is none."""
    lead = next((v.type for v in graph.inputs if len(v.type.dims) > 1), None)
    if lead is None:
        raise PassError(f"{graph.name}: no input has tokens; one must be [batch, tokens, ...], such as i64[b, s]")
    types = [v.type for g in reached(graph) for v in (*g.inputs, *(v for n in g.nodes for v in n.outputs))]
    found = sorted({d.order for t in types for d in t.dims if isinstance(parse_order(d.order), Zigzag)})
    if len(found) > 1:
        raise PassError(f"{graph.name}: tokens are in orders {' and '.join(found)}; there may be one beside the natural")
    return Tokens(lead.dims[1].size, axis, found[0], copy) if found else None


def _reorders(graph: Graph) -> Iterator[Node]:
    """Every reorder of tokens, a layer's at each of its calls."""
    for node in graph.nodes:
        if node.callee is not None:
            yield from _reorders(node.callee)
        elif is_reorder(node):
            yield node


def _told(found: list[Node]) -> str:
    sent = [n for n in found if n.attrs["over"]]
    size = sum(token_bytes(n.operands[0]) for n in found)
    return f"{len(found)} reorders ({len(sent)} of them exchanges) of {size} bytes a token"


@dataclass(frozen=True)
class _Moving:
    """Layers in either order at their borders, each made once."""

    tokens: Tokens
    known: dict[tuple[Graph, bool], tuple[Labels, int]]

    def found(self, layer: Graph, zigzag: bool) -> tuple[Labels, int]:
        if (layer, zigzag) not in self.known:
            self.known[layer, zigzag] = orders(layer, self.tokens, self.cost, zigzag)
        return self.known[layer, zigzag]

    def cost(self, layer: Graph, zigzag: bool) -> int:
        return self.found(layer, zigzag)[1]


class _Emit:
    """A graph replayed with every node in its order, and a reorder wherever two orders meet."""

    def __init__(self, graph: Graph, labels: Labels, tokens: Tokens, moving: _Moving) -> None:
        self.graph, self.labels, self.tokens, self.moving = graph, labels, tokens, moving
        types = [tokens.ordered(v.type, labels[v]) for v in graph.inputs]
        self.replay, self.source = Replay(graph, types=types), behind(graph)
        self.copies, self.layers = dict[tuple[Value, bool], Value](), dict[tuple[Graph, bool], Graph]()

    def run(self) -> Graph:
        for node in self.graph.nodes:
            if not is_reorder(node):
                self._node(node)
        self.replay.builder.loc = ""
        return self.replay.builder.finish(self._result(v) for v in self.graph.outputs)

    def _node(self, node: Node) -> None:
        zigzag, b = self.labels[node], self.replay.builder
        b.loc = node.loc
        inputs = [self._at(v, zigzag) if v is not None else None for v in node.inputs]
        callee = node.op if isinstance(node.op, Graph) else None
        op: Any = self._layer(callee, zigzag) if callee else node.op
        attrs = node.attrs if callee else in_order(node, self.tokens, zigzag)
        made = b.emit(op, inputs, attrs, [v.name for v in node.outputs], node.loc)
        self.replay.env.update(zip(node.outputs, made, strict=True))

    def _layer(self, layer: Graph, zigzag: bool) -> Graph:
        if (layer, zigzag) not in self.layers:
            labels = self.moving.found(layer, zigzag)[0]
            self.layers[layer, zigzag] = _Emit(layer, labels, self.tokens, self.moving).run()
        return self.layers[layer, zigzag]

    def _result(self, value: Value) -> Value:
        """In the order of the border; a program's results stay as they were made."""
        return self._at(value, self.labels[RESULTS])

    def _at(self, old: Value, zigzag: bool) -> Value:
        """A value in an order, brought there once."""
        root = self.source.get(old, old)
        new = self.replay.env[root]
        dim = self.tokens.dim(new.type)
        if dim is None or new.type == self.tokens.ordered(new.type, zigzag):
            return new
        if (root, zigzag) not in self.copies:
            maker = self.graph.makers.get(root)
            again = maker is not None and counts_here(maker)
            self.copies[root, zigzag] = self._counted(maker, zigzag) if maker and again else self._reordered(new, dim, zigzag)
        return self.copies[root, zigzag]

    def _counted(self, node: Node, zigzag: bool) -> Value:
        """Positions of tokens as if these stood in another order: nothing moves, since only where they stand is read."""
        b, wanted = self.replay.builder, self.tokens.order if zigzag else ""
        tokens, *rest = (self._at(v, self.labels[node]) if v is not None else None for v in node.inputs)
        assert tokens is not None
        there = b.emit(ops.relabel, [tokens], {"dim": 1, "order": wanted, "was": tokens.type.dims[1].order}, [tokens.name])
        return b.emit(ops.positions, [*there, *rest], in_order(node, self.tokens, zigzag), [node.outputs[0].name], node.loc)[0]

    def _reordered(self, value: Value, dim: int, zigzag: bool) -> Value:
        place = value.type.dims[dim]
        attrs = {"dim": dim, "order": self.tokens.order if zigzag else "", "was": place.order}
        attrs |= {"over": self.tokens.axis, "by": "exchange"} if place.axes else {}
        borders = self._borders(value.type) if "packed" in self.tokens.order else None
        return self.replay.builder.emit(ops.reorder, [value, borders], attrs, [value.name])[0]

    def _borders(self, type_: TensorType) -> Value:
        """The borders of packed segments, which some op of the graph reads."""
        names = [(v, o.name) for n in self.graph.nodes for v, o in zip(n.inputs, n.op.inputs, strict=True) if v is not None]
        found = next((v for v, name in names if name == "cu" and v in self.graph.inputs), None)
        if found is None:
            raise PassError(
                f"{self.graph.name}: {type_} is to be reordered by segment, but the graph is not given their borders"
            )
        return self.replay.env[found]
