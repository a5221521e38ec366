"""Gradients of graphs: nodes walked backwards, cotangents added up, and the backward kernel of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

from . import ops
from .dump import dump
from .errors import PassError
from .graph import Builder, Graph, Node, Replay, Value, parameters
from .op import OpDef
from .types import TensorType
from .vjp import pullback

Pull = Callable[[Node, "list[Value | None]", "list[bool]"], "Sequence[Value | None]"]


@dataclass(frozen=True)
class Backward:
    """The backward kernel of a kernel, and what its inputs and results are."""

    graph: Graph  # inputs: what it reads of the forward, then d_<result> for every float result; results: d_<input>
    reads: tuple[int, ...]  # which forward inputs its first inputs are
    of: tuple[int, ...]  # which forward inputs its results are the cotangents of
    again: tuple[int, ...] = ()  # which forward results stand behind those inputs


def backward(kernel: Graph, wanted: Sequence[bool] | None = None, *, results: bool = False) -> Backward:
    """The gradient of a kernel, which recomputes inside what it needs, in at least float32.

    `wanted` says of which inputs (of all floats otherwise). With `results`, the forward's own results may be read where
    that is less to read than what they were made of.
    """
    asked = tuple(wanted) if wanted is not None else (True,) * len(kernel.inputs)
    made = _least(kernel, asked) if results else _backward(kernel, asked, ())
    if made is None:
        raise PassError(f"{kernel.name} has no gradient: no float result depends on a float input whose gradient is wanted")
    return made


def _least(kernel: Graph, wanted: tuple[bool, ...]) -> Backward | None:
    """The backward kernel that reads least, of those that take results of the forward."""
    made, chosen = _backward(kernel, wanted, ()), tuple[int, ...]()
    for i, v in enumerate(kernel.outputs):
        if made is None or not v.type.is_float or v not in kernel.makers or v in kernel.outputs[:i]:
            continue
        other = _backward(kernel, wanted, (*chosen, i))
        if other is not None and _traffic(other) < _traffic(made):
            made, chosen = other, (*chosen, i)
    return made


def _traffic(made: Backward) -> int:
    """Bytes that it reads, of rows mostly."""
    types = [v.type for v in made.graph.inputs]
    return sum(t.bytes(dict.fromkeys(t.symbols, 64)) for t in types)


def _backward(kernel: Graph, wanted: tuple[bool, ...], again: tuple[int, ...]) -> Backward | None:
    return _named_backward(kernel, wanted, again, dump(kernel))


@lru_cache(maxsize=4096)
def _named_backward(kernel: Graph, wanted: tuple[bool, ...], again: tuple[int, ...], text: str) -> Backward | None:
    """Graphs are equal whatever their values are called; `text` keeps those apart whose gradients read differently."""
    given, kernel = kernel, _widened(kernel)
    leaves = [v for v, asked in zip(kernel.inputs, wanted, strict=True) if asked and v.type.is_float]
    flows, count = carrying(kernel, leaves, kernel.outputs), len(kernel.inputs) + len(again)
    replay = Replay(kernel, name=f"{kernel.name}_backward")
    b, env, sums = replay.builder, replay.env, Cotangents(replay.builder)
    kept = {kernel.outputs[i]: b.input(given.outputs[i].name, given.outputs[i].type) for i in again}
    for node in kernel.nodes:
        made = zip(node.outputs, replay.keep(node), strict=True)
        env.update({v: _wide(b, kept[v], node.loc) if v in kept else x for v, x in made})
    for v, was in zip(kernel.outputs, given.outputs, strict=True):
        if v.type.is_float:
            sums.add(v, _wide(b, b.input(f"d_{was.name}", cotangent_type(was.type)), ""))
    reverse(kernel.nodes, sums, flows, lambda node, given, asked: pull(b, node, env, given, asked))
    found = {i: d for i, v in enumerate(kernel.inputs) if v in flows and (d := sums.total(v)) is not None}
    if not found:
        return None
    graph, read = _pruned(b, [*found.values()], count)
    reads = tuple(i for i in range(len(given.inputs)) if i in read)
    used = tuple(n for i, n in enumerate(again, len(given.inputs)) if i in read)
    return Backward(named(graph, [f"d_{kernel.inputs[i].name}" for i in found]), reads, tuple(found), used)


def _widened(kernel: Graph) -> Graph:
    """The kernel computed in at least float32, as its generated code does: a gradient rounds at its end alone."""
    b = Builder(kernel.name, kernel.role)
    env = {v: b.input(v.name, v.type) for v in kernel.inputs}
    env = {v: _wide(b, x, "") for v, x in env.items()}
    for node in kernel.nodes:
        inputs = [env[v] if v is not None else None for v in node.inputs]
        made = b.emit(node.op, inputs, node.attrs, [v.name for v in node.outputs], node.loc)
        env.update(zip(node.outputs, made, strict=True))
    return b.finish(env[v] for v in kernel.outputs)


def _wide(b: Builder, value: Value, loc: str) -> Value:
    if value.type.dtype not in ("bf16", "f16"):
        return value
    (made,) = b.emit(ops.widen, [value], {}, [value.name], loc)
    return made


def _pruned(b: Builder, results: Sequence[Value], optional: int) -> tuple[Graph, frozenset[int]]:
    """What the results need, each thing once, and which of the inputs stay: of the first `optional` those that are read."""
    whole = _merged(Graph(b.name, tuple(b.inputs), (), (), needed(b.nodes, results), tuple(results), b.role))
    nodes = needed(whole.nodes, whole.outputs)
    read = {*whole.outputs, *(v for n in nodes for v in n.operands)}
    stay = [i for i, v in enumerate(whole.inputs) if i >= optional or v in read]
    return replace(whole, inputs=tuple(whole.inputs[i] for i in stay), nodes=nodes), frozenset(stay)


def _merged(graph: Graph) -> Graph:
    """Equal equations are one, and a widening or cast that changes nothing is none."""
    replay, known = Replay(graph), dict[object, Sequence[Value]]()

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value]:
        if node.is_op("widen", "cast") and node.operands[0].type == node.outputs[0].type:
            return [v for v in inputs if v is not None]
        key = (node.op, tuple(inputs), tuple(node.attrs.items()))
        if key not in known:
            known[key] = replay.builder.emit(node.op, inputs, node.attrs, [v.name for v in node.outputs], node.loc)
        return known[key]

    return replay.run(visit)


def carrying(graph: Graph, leaves: Iterable[Value], results: Iterable[Value]) -> frozenset[Value]:
    """The float values that depend on a leaf and that a result depends on; a layer's parameters are leaves too."""
    active = set(leaves)
    for node in graph.nodes:
        holds = node.callee is not None and any(t.is_float for t, _ in parameters(node.callee).values())
        if holds or not active.isdisjoint(node.operands):
            active.update(v for v in node.outputs if v.type.is_float)
    reaching = {v for v in results if v.type.is_float}
    for node in reversed(graph.nodes):
        if not reaching.isdisjoint(node.outputs):
            reaching.update(v for v in node.operands if v.type.is_float)
    return frozenset(active & reaching)


def needed(nodes: Sequence[Node], results: Iterable[Value]) -> tuple[Node, ...]:
    """The nodes that the results depend on, in order."""
    wanted, kept = set(results), list[Node]()
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outputs):
            kept.append(node)
            wanted.update(node.operands)
    return tuple(reversed(kept))


def cotangent_type(type_: TensorType) -> TensorType:
    """What flows back to a value: of a sum over ranks, each rank's part has the whole cotangent."""
    return replace(type_, partial=frozenset())


class Cotangents:
    """What has flowed back so far, to each value or to each parameter of a called layer by its full name."""

    def __init__(self, b: Builder) -> None:
        self.b, self.parts = b, dict[Value | str, list[Value]]()

    def add(self, to: Value | str, part: Value) -> None:
        self.parts.setdefault(to, []).append(part)

    def total(self, of: Value | str) -> Value | None:
        """The sum, partial over the axes over which every part is: parts are added before ranks are."""
        parts = self.parts.get(of, [])
        if not parts:
            return None
        name = f"d_{of if isinstance(of, str) else of.name}".replace(".", "_")
        common = frozenset[str].intersection(*(p.type.partial for p in parts))
        alike = dict.fromkeys(p.type.partial for p in parts)
        sums = [self._add([p for p in parts if p.type.partial == axes], name) for axes in alike]
        return self._add([self._reduced(s, s.type.partial - common) for s in sums], name)

    def whole(self, of: Value, spared: Collection[str] = ()) -> Value | None:
        """The sum, added up over ranks too, before it goes on; the spared axes are the reader's business."""
        made = self.total(of)
        return made and self._reduced(made, made.type.partial.difference(spared))

    def _add(self, parts: Sequence[Value], name: str) -> Value:
        return reduce(lambda x, y: self.b.emit(ops.add, [x, y], names=[name])[0], parts)

    def _reduced(self, part: Value, axes: Collection[str]) -> Value:
        for axis in sorted(axes):
            (part,) = self.b.emit(ops.all_reduce, [part], {"axis": axis}, [part.name])
        return part


def reverse(nodes: Sequence[Node], sums: Cotangents, flows: Collection[Value], pull_node: Pull) -> None:
    """Walk the nodes backwards; `pull_node` gives the cotangents of a node's operands for those of its results."""
    settle = sums.b.role != "kernel"  # ranks do not talk inside a kernel
    for node in reversed(nodes):
        sums.b.loc = node.loc
        spared = {node.attrs["axis"]} if node.op in ops.COLLECTIVES else set[str]()  # it may move and add at once
        given = [(sums.whole(v, spared) if settle else sums.total(v)) if v in flows else None for v in node.outputs]
        asked = [v is not None and v in flows for v in node.inputs]
        for value, part in zip(node.inputs, pull_node(node, given, asked), strict=True):
            if value is not None and part is not None:
                sums.add(value, part)


def pull(
    b: Builder, node: Node, env: dict[Value, Value], given: Sequence[Value | None], asked: Sequence[bool]
) -> Sequence[Value | None]:
    """The cotangents of the operands of an op or a kernel."""
    if not any(asked) or all(d is None for d in given):
        return [None] * len(node.inputs)
    inputs = [env[v] if v is not None else None for v in node.inputs]
    if isinstance(node.op, OpDef):
        return pullback(b, node, inputs, [env[v] for v in node.outputs], given, asked)
    there = [i for i, d in enumerate(given) if d is not None]
    made = _least(replace(node.op, outputs=tuple(node.op.outputs[i] for i in there)), tuple(asked))
    if made is None:
        return [None] * len(inputs)
    again = [env[node.outputs[there[i]]] for i in made.again]
    operands = [*(inputs[i] for i in made.reads), *again, *(d for d in given if d is not None)]
    found = dict(zip(made.of, b.emit(made.graph, operands, names=[v.name for v in made.graph.outputs]), strict=True))
    return [found.get(i) for i in range(len(inputs))]


def named(graph: Graph, names: Sequence[str]) -> Graph:
    """The graph with its results called so; inputs that are returned keep their names."""
    called = dict(zip(graph.outputs, names, strict=True))
    replay = Replay(graph)

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value]:
        return replay.builder.emit(node.op, inputs, node.attrs, [called.get(v, v.name) for v in node.outputs], node.loc)

    return replay.run(visit)
