"""Carry the residual: the add at the end of a layer moves to the start of the next, beside the norm that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir import Builder, Graph, Node, Replay, Value, ops
from .registry import Outcome, register
from .remarks import Remark
from .structure import copy_node


@dataclass(frozen=True)
class Ending:
    """How a layer ends: `add(x, delta)`, x being one of its inputs, returned first."""

    input: int
    add: Node
    swapped: bool  # delta stands first

    @property
    def delta(self) -> Value:
        return self.add.operands[0 if self.swapped else 1]


@dataclass(frozen=True)
class Carried:
    """An input that comes as x and delta, still to be added."""

    input: int
    swapped: bool


Variant = tuple[Graph, tuple[Carried, ...], bool]


@register(numerics="exact", model=True)
def carry_residual(graph: Graph) -> Outcome:
    """The add that ends a layer moves to the start of the next layer, where it meets a norm.

    Layers take and give (x, delta). The first has a variant of its own that takes x alone: a delta of zeros would be read
    and added for nothing.
    """
    deferred = {n: end for n in graph.nodes if (end := _deferrable(graph, n)) is not None}
    if not deferred:
        why = "no layer ends in `x + ...` that only another layer reads"
        return graph, (Remark("missed", "carry-residual", graph.name, why),)
    moved = _Carrying(graph, deferred).run()
    where = [Remark("passed", "carry-residual", n.loc, "its last add is done by the layer that reads it") for n in deferred]
    return moved, tuple(where)


def _deferrable(graph: Graph, node: Node) -> Ending | None:
    """The ending of a called layer whose first result is read once, by a layer."""
    end = _ending(node.callee) if node.callee is not None and node.callee.role == "layer" else None
    y = node.outputs[0]
    users = graph.uses.get(y, ())
    if end is None or y in graph.outputs or len(users) != 1:
        return None
    user = users[0]
    once = user.operands.count(y) == 1
    return end if once and user.callee is not None and user.callee.role == "layer" else None


def _ending(layer: Graph) -> Ending | None:
    add = layer.makers.get(layer.outputs[0])
    if add is None or not add.is_op("add") or layer.uses.get(add.outputs[0]) or layer.outputs.count(add.outputs[0]) > 1:
        return None
    for i, swapped in ((0, False), (1, True)):
        x, delta = add.operands[i], add.operands[1 - i]
        if x in layer.inputs and delta in layer.makers:
            return Ending(layer.inputs.index(x), add, swapped)
    return None


class _Carrying:
    """Replays the entry with layers that take and give (x, delta); each distinct variant is made once."""

    def __init__(self, graph: Graph, deferred: dict[Node, Ending]) -> None:
        self.replay, self.deferred = Replay(graph), deferred
        self.pairs = dict[Value, tuple[Value, Value, bool]]()  # the two summands of a value, and whether delta stands first
        self.variants = dict[Variant, Graph]()

    def run(self) -> Graph:
        return self.replay.run(self._visit)

    def _visit(self, node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
        end = self.deferred.get(node)
        carried = tuple(Carried(i, self.pairs[v][2]) for i, v in enumerate(node.operands) if v in self.pairs)
        if node.callee is None or (end is None and not carried):
            return None
        operands = [new for v in node.operands for new in self._expanded(v)]
        layer = self._variant(node.callee, carried, end)
        given = any(c.input == end.input for c in carried) if end else False
        names = _result_names(node, end, given)
        made = self.replay.builder.emit(layer, operands, node.attrs, names, node.loc)
        if end is None:
            return made
        x = made[0] if given else self.replay.env[node.operands[end.input]]
        delta, rest = made[given], made[given + 1 :]
        self.pairs[node.outputs[0]] = (x, delta, end.swapped)
        return [delta, *rest]  # nothing but `pairs` reads the first

    def _expanded(self, value: Value) -> tuple[Value, ...]:
        return self.pairs[value][:2] if value in self.pairs else (self.replay.env[value],)

    def _variant(self, layer: Graph, carried: tuple[Carried, ...], end: Ending | None) -> Graph:
        key = (layer, carried, end is not None)
        if key not in self.variants:
            self.variants[key] = _variant(layer, carried, _ending(layer) if end else None)
        return self.variants[key]


def _result_names(node: Node, end: Ending | None, given: bool) -> list[str]:
    rest = [v.name for v in node.outputs[1:]]
    return [node.outputs[0].name, *rest] if end is None else [*(["x"] if given else []), "delta", *rest]


def _variant(layer: Graph, carried: tuple[Carried, ...], end: Ending | None) -> Graph:
    """The layer with an add in front for each carried input, and without its last add when it defers that."""
    b = Builder(layer.name if carried else f"first_{layer.name}", layer.role)
    swapped = {c.input: c.swapped for c in carried}
    deltas = dict[int, Value]()
    env = dict[Value, Value]()
    for i, v in enumerate(layer.inputs):
        env[v] = b.input(v.name, v.type)
        if i in swapped:
            deltas[i] = b.input("delta", v.type)
    env.update((v, b.param(v.name, v.type, init)) for v, init in zip(layer.params, layer.inits, strict=True))
    b.loc = f"{layer.name}.residual"
    for i, delta in deltas.items():
        x = env[layer.inputs[i]]
        env[layer.inputs[i]] = ops.add(delta, x) if swapped[i] else ops.add(x, delta)
    for node in layer.nodes:
        if end is None or node is not end.add:
            copy_node(b, node, env)
    if end is None:
        return b.finish(env[v] for v in layer.outputs)
    given = [env[layer.inputs[end.input]]] if end.input in deltas else []
    return b.finish([*given, env[end.delta], *(env[v] for v in layer.outputs[1:])])
