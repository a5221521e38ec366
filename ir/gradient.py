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

    graph: Graph  # inputs: what it reads of the forward, then the cotangents that are given; results: d_<input>
    reads: tuple[int, ...]  # which of the forward's inputs, and behind them its results, the first inputs are
    of: tuple[int, ...]  # which forward inputs its results are the cotangents of


def backward(
    kernel: Graph, wanted: Sequence[bool] | None = None, *, given: Sequence[bool] | None = None, results: bool = False
) -> Backward:
    """The gradient of a kernel, which recomputes inside what it needs, in at least float32.

    `wanted` says of which inputs (of all floats otherwise), `given` which float results have cotangents (all otherwise).
    With `results`, the forward's own results are read where that is less to read than what they were made of.
    """
    asked = tuple(wanted) if wanted is not None else (True,) * len(kernel.inputs)
    there = tuple(given) if given is not None else (True,) * len(kernel.outputs)
    made = _backward(kernel, asked, there, spared(kernel) if results else ())
    if made is None:
        raise PassError(f"{kernel.name} has no gradient: no float result depends on a float input whose gradient is wanted")
    return made


def spared(kernel: Graph) -> tuple[int, ...]:
    """The results that the whole gradient reads less for than for what they were made of: it need not make them again."""
    wanted, given = (True,) * len(kernel.inputs), (True,) * len(kernel.outputs)
    made, chosen = _backward(kernel, wanted, given, ()), tuple[int, ...]()
    for i, v in enumerate(kernel.outputs):
        if made is None or not v.type.is_float or v in kernel.outputs[:i] or _is_view(kernel, v):
            continue
        other = _backward(kernel, wanted, given, (*chosen, i))
        if other is not None and _traffic(other) < _traffic(made):
            made, chosen = other, (*chosen, i)
    return chosen


def _is_view(kernel: Graph, value: Value) -> bool:
    """Whether it is an input, or a part of one."""
    while (maker := kernel.makers.get(value)) is not None and maker.is_op("split", "reshape"):
        value = maker.operands[0]
    return maker is None


def _traffic(made: Backward) -> int:
    """Bytes that it reads, of rows mostly."""
    types = [v.type for v in made.graph.inputs]
    return sum(t.bytes(dict.fromkeys(t.symbols, 64)) for t in types)


def _backward(kernel: Graph, wanted: tuple[bool, ...], given: tuple[bool, ...], again: tuple[int, ...]) -> Backward | None:
    return _named_backward(kernel, wanted, given, again, dump(kernel))


@lru_cache(maxsize=4096)
def _named_backward(
    kernel: Graph, wanted: tuple[bool, ...], given: tuple[bool, ...], again: tuple[int, ...], text: str
) -> Backward | None:
    """Graphs are equal whatever their values are called; `text` keeps those apart whose gradients read differently."""
    was, kernel = kernel, _widened(kernel)
    leaves = [v for v, asked in zip(kernel.inputs, wanted, strict=True) if asked and v.type.is_float]
    flows = carrying(kernel, leaves, [v for v, there in zip(kernel.outputs, given, strict=True) if there])
    replay = Replay(kernel, name=f"{kernel.name}_backward")
    b, env, sums = replay.builder, replay.env, Cotangents(replay.builder)
    kept = {kernel.outputs[i]: b.input(was.outputs[i].name, was.outputs[i].type) for i in again}
    for node in kernel.nodes:
        made = zip(node.outputs, replay.keep(node), strict=True)
        env.update({v: _wide(b, kept[v], node.loc) if v in kept else x for v, x in made})
    for v, old, there in zip(kernel.outputs, was.outputs, given, strict=True):
        if there and v.type.is_float:
            sums.add(v, _wide(b, b.input(f"d_{old.name}", cotangent_type(old.type)), ""))
    reverse(kernel.nodes, sums, flows, lambda node, given, asked: pull(b, node, env, given, asked))
    found = {i: d for i, v in enumerate(kernel.inputs) if v in flows and (d := sums.total(v)) is not None}
    if not found:
        return None
    places = [*range(len(was.inputs)), *(len(was.inputs) + i for i in again)]
    graph, read = _pruned(b, [*found.values()], len(places))
    reads = tuple(n for i, n in enumerate(places) if i in read)
    return Backward(named(graph, [f"d_{kernel.inputs[i].name}" for i in found]), reads, tuple(found))


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
        asked = [v is not None and v in flows for v in node.inputs]
        spared = {node.attrs["axis"]} if node.op in ops.COLLECTIVES else set[str]()  # it may move and add at once
        later = not settle or _passes(node, asked, flows)
        given = [(sums.total(v) if later else sums.whole(v, spared)) if v in flows else None for v in node.outputs]
        for value, part in zip(node.inputs, pull_node(node, given, asked), strict=True):
            if value is not None and part is not None:
                sums.add(value, part)


def _passes(node: Node, asked: Sequence[bool], flows: Collection[Value]) -> bool:
    """Whether ranks' parts go on to its one operand as they are: what is added up behind it is no larger."""
    made = [v for v in node.outputs if v in flows]
    moves = node.op in ops.COLLECTIVES or bool(node.attrs.get("over"))
    if not isinstance(node.op, OpDef) or moves or sum(asked) != 1 or len(made) != 1:
        return False
    operand, result = node.inputs[[*asked].index(True)], made[0]
    assert operand is not None
    sizes = dict.fromkeys(operand.type.symbols | result.type.symbols, 1)
    return operand.type.dtype == result.type.dtype and operand.type.count(sizes) <= result.type.count(sizes)


def pull(
    b: Builder, node: Node, env: dict[Value, Value], given: Sequence[Value | None], asked: Sequence[bool]
) -> Sequence[Value | None]:
    """The cotangents of the operands of an op or a kernel."""
    if not any(asked) or all(d is None for d in given):
        return [None] * len(node.inputs)
    inputs = [env[v] if v is not None else None for v in node.inputs]
    if isinstance(node.op, OpDef):
        return pullback(b, node, inputs, [env[v] for v in node.outputs], given, asked)
    made = _backward(node.op, tuple(asked), tuple(d is not None for d in given), spared(node.op))
    if made is None:
        return [None] * len(inputs)
    values = [*inputs, *(env[v] for v in node.outputs)]
    operands = [*(values[i] for i in made.reads), *(d for d in given if d is not None)]
    found = dict(zip(made.of, b.emit(made.graph, operands, names=[v.name for v in made.graph.outputs]), strict=True))
    return [found.get(i) for i in range(len(inputs))]


def named(graph: Graph, names: Sequence[str]) -> Graph:
    """The graph with its results called so; inputs that are returned keep their names."""
    called = dict(zip(graph.outputs, names, strict=True))
    replay = Replay(graph)

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value]:
        return replay.builder.emit(node.op, inputs, node.attrs, [called.get(v, v.name) for v in node.outputs], node.loc)

    return replay.run(visit)
