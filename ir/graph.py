"""Graph: a straight-line program of typed values, in execution order; a call of another graph is a node too."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from .attributes import check_attrs
from .errors import ParseError, PlacementError, TypeMismatch
from .init import Init
from .op import OpDef, unwrap
from .types import TensorType, checked

ROLES = ("graph", "layer", "kernel")


@dataclass(frozen=True, eq=False)
class Value:
    """One result; its name is a hint that `dump` numbers."""

    name: str
    type: TensorType
    builder: Builder = field(repr=False)


@dataclass(frozen=True, eq=False)
class Node:
    """One typed equation: results, an op or a called graph, operands (None where absent), attributes."""

    op: OpDef | Graph
    inputs: tuple[Value | None, ...]
    attrs: Mapping[str, Any]
    outputs: tuple[Value, ...]
    loc: str = ""  # the spec path that it came from

    @property
    def operands(self) -> tuple[Value, ...]:
        return tuple(v for v in self.inputs if v is not None)

    @property
    def callee(self) -> Graph | None:
        return self.op if isinstance(self.op, Graph) else None

    def is_op(self, *names: str) -> bool:
        return isinstance(self.op, OpDef) and self.op.name in names


@dataclass(frozen=True, eq=False)
class Graph:
    """Inputs, parameters (each with its init recipe), equations, results.

    Its role says how it is used: `kernel` is a fused region, called with every operand; `layer` is called once per
    layer with a parameter prefix; `graph` is an entry.
    """

    name: str
    inputs: tuple[Value, ...]
    params: tuple[Value, ...]
    inits: tuple[Init, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]
    role: str = "graph"

    @cached_property
    def uses(self) -> Mapping[Value, tuple[Node, ...]]:
        """The nodes that read each value."""
        found: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.operands):
                found.setdefault(value, []).append(node)
        return {k: tuple(v) for k, v in found.items()}

    @cached_property
    def makers(self) -> Mapping[Value, Node]:
        """The node that makes each value; inputs have none."""
        return {v: n for n in self.nodes for v in n.outputs}

    @property
    def callees(self) -> tuple[Graph, ...]:
        """Distinct graphs called from here, in order of first call."""
        return tuple(dict.fromkeys(n.op for n in self.nodes if isinstance(n.op, Graph)))

    @property
    def layers(self) -> tuple[Graph, ...]:
        return tuple(g for g in self.callees if g.role == "layer")

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """Symbolic sizes of the inputs, in order of appearance."""
        return tuple(dict.fromkeys(s for v in (*self.inputs, *self.params) for s in sorted(v.type.symbols)))

    @cached_property
    def key(self) -> str:
        """Text that is equal for equal programs, whatever their values are called."""
        from .dump import key

        return key(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and (self is other or self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        from .dump import dump

        return dump(self)


class Builder:
    """Grows a graph; every emit is typed at once, so an ill-typed graph cannot exist."""

    def __init__(self, name: str, role: str = "graph") -> None:
        self.name, self.role, self.loc = name, role, ""
        self.inputs, self.params, self.inits, self.nodes = list[Value](), list[Value](), list[Init](), list[Node]()
        self.under_way = dict[Value, Mapping[str, Any]]()  # what is begun, with its attributes; none once it is ended

    def input(self, name: str, type_: TensorType) -> Value:
        value = Value(name, checked(type_, name), self)
        self.inputs.append(value)
        return value

    def param(self, name: str, type_: TensorType, init: Init) -> Value:
        if any(p.name == name for p in self.params):
            raise TypeMismatch(f"{self.name}: parameter {name} is given twice")
        value = Value(name, checked(type_, name), self)
        self.params.append(value)
        self.inits.append(init)
        return value

    def emit(
        self,
        op: OpDef | Graph,
        inputs: Sequence[Value | None],
        attrs: Mapping[str, Any] | None = None,
        names: Sequence[str] = (),
        loc: str | None = None,
    ) -> tuple[Value, ...]:
        """Append one typed node; errors carry `loc`."""
        loc = self.loc if loc is None else loc
        types = [v.type if v is not None else None for v in inputs]
        self._arrive(op, inputs, attrs or {}, loc)
        try:
            if isinstance(op, Graph):
                op, results = _call(op, types)
                full = dict(attrs or {})
            else:
                full = check_attrs(op, attrs or {})
                results = op.infer(types, full)
        except (TypeMismatch, PlacementError) as error:
            raise type(error)(f"{error} (at {loc})" if loc else str(error)) from None
        wanted = [*names] or [o.name for o in op.outputs]
        if len(wanted) != len(results):
            if names:
                raise TypeMismatch(f"{op.name} gives {len(results)} results, {len(wanted)} names stand here")
            wanted = wanted[:1] * len(results)
        outputs = tuple(Value(n, t, self) for n, t in zip(wanted, results, strict=True))
        self.nodes.append(Node(op, tuple(inputs), full, outputs, loc))
        if isinstance(op, OpDef) and op.begins:
            self.under_way[outputs[0]] = full
        return outputs

    def again(self, node: Node, inputs: Sequence[Value | None]) -> tuple[Value, ...]:
        """Emit a node over other values; where these have its operands' types, its results have theirs."""
        pairs = zip(node.inputs, inputs, strict=True)
        if any((a is None) != (b is None) or (a and b and a.type is not b.type and a.type != b.type) for a, b in pairs):
            return self.emit(node.op, inputs, node.attrs, [o.name for o in node.outputs], node.loc)
        self._arrive(node.op, inputs, node.attrs, node.loc)
        outputs = tuple(Value(o.name, o.type, self) for o in node.outputs)
        self.nodes.append(Node(node.op, tuple(inputs), node.attrs, outputs, node.loc))
        if isinstance(node.op, OpDef) and node.op.begins:
            self.under_way[outputs[0]] = node.attrs
        return outputs

    def _arrive(self, op: OpDef | Graph | None, inputs: Iterable[Value | None], attrs: Mapping[str, Any], loc: str) -> None:
        """What is under way is read once, by its end; an end reads nothing else."""
        ends, at = isinstance(op, OpDef) and op.ends, f" (at {loc})" if loc else ""
        for value in inputs:
            begun = self.under_way.get(value) if value is not None else None
            if ends and (not begun or begun != attrs):
                raise TypeMismatch(f"{op.name}: {value.name} must be begun with {dict(attrs)}, and not be ended yet{at}")  # type: ignore[union-attr] # it ends
            if not ends and begun is not None and value is not None:
                raise TypeMismatch(f"{op.name if op else 'return'}: {value.name} is under way; its end alone may read it{at}")
            if ends and value is not None:
                self.under_way[value] = {}

    def call(self, graph: Graph, *inputs: Value, params: str = "") -> Any:
        """Call another graph: a layer with its parameter prefix, or a kernel."""
        return unwrap(self.emit(graph, inputs, {"params": params} if graph.role == "layer" else {}))

    @contextmanager
    def at(self, part: str) -> Generator[None]:
        """Give the nodes emitted inside a longer spec path."""
        outer, self.loc = self.loc, f"{self.loc}.{part}" if self.loc else part
        try:
            yield
        finally:
            self.loc = outer

    def finish(self, outputs: Iterable[Value]) -> Graph:
        results = tuple(outputs)
        self._arrive(None, results, {}, "")
        parts = (self.inputs, self.params, self.inits, self.nodes)
        return Graph(self.name, *map(tuple, parts), results, self.role)  # type: ignore[arg-type] # in the order of the fields


def _call(graph: Graph, types: Sequence[TensorType | None]) -> tuple[Graph, tuple[TensorType, ...]]:
    """The callee for operands of these types: itself, or itself retyped."""
    if len(types) != len(graph.inputs):
        raise TypeMismatch(f"{graph.name} takes {len(graph.inputs)} operands, got {len(types)}")
    if any(t is None for t in types):
        raise TypeMismatch(f"{graph.name}: a called graph takes every operand")
    wanted = cast("Sequence[TensorType]", types)
    if [v.type for v in graph.inputs] != [*wanted]:
        graph = retype(graph, wanted)
    return graph, tuple(v.type for v in graph.outputs)


def retype(graph: Graph, types: Sequence[TensorType], params: Sequence[TensorType] | None = None) -> Graph:
    """The same program over inputs (and parameters) of other types."""
    replay = Replay(graph, types=types, params=params)
    return replay.run(lambda node, inputs: None)


Visit = Callable[[Node, "list[Value | None]"], "Sequence[Value] | None"]


class Replay:
    """Replays a graph into a new builder; `run` is given what to emit in place of each node."""

    def __init__(
        self,
        graph: Graph,
        *,
        types: Sequence[TensorType] | None = None,
        params: Sequence[TensorType] | None = None,
        name: str = "",
    ) -> None:
        self.graph, self.builder = graph, Builder(name or graph.name, graph.role)
        types = types if types is not None else [v.type for v in graph.inputs]
        params = params if params is not None else [v.type for v in graph.params]
        self.env: dict[Value, Value] = {v: self.builder.input(v.name, t) for v, t in zip(graph.inputs, types, strict=True)}
        for value, type_, init in zip(graph.params, params, graph.inits, strict=True):
            self.env[value] = self.builder.param(value.name, type_, init)

    def keep(self, node: Node) -> tuple[Value, ...]:
        """Emit a node as it is, over the new values."""
        inputs = [self.env[v] if v is not None else None for v in node.inputs]
        return self.builder.again(node, inputs)

    def run(self, visit: Visit, nodes: Sequence[Node] | None = None) -> Graph:
        """`visit` returns a node's replacement values, or None to keep it."""
        for node in self.graph.nodes if nodes is None else nodes:
            self.builder.loc = node.loc
            made = visit(node, [self.env.get(v) if v is not None else None for v in node.inputs])
            self.env.update(zip(node.outputs, self.keep(node) if made is None else made, strict=True))
        return self.builder.finish(self.env[v] for v in self.graph.outputs)


def trace(fn: Callable[..., Any], name: str, **types: TensorType) -> Graph:
    """Record what `fn` does to values of these types."""
    builder = Builder(name)
    out = fn(*[builder.input(n, t) for n, t in types.items()])
    return builder.finish(out if isinstance(out, tuple) else (out,))


def each_layer(graph: Graph, change: Callable[[Graph], Graph]) -> Graph:
    """Apply `change` to every distinct layer once, then to the entry itself."""
    changed = {layer: change(layer) for layer in graph.layers}

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
        new = changed.get(node.op) if isinstance(node.op, Graph) else None
        if new is None:
            return None
        return replay.builder.emit(new, inputs, node.attrs, [o.name for o in node.outputs], node.loc)

    replay = Replay(graph)
    return change(replay.run(visit) if changed else graph)


def parameters(graph: Graph, prefix: str = "") -> dict[str, tuple[TensorType, Init]]:
    """Every parameter under its full name, `layers.3.w_in`; a layer that is called twice with one prefix is shared."""
    found = {prefix + v.name: (v.type, init) for v, init in zip(graph.params, graph.inits, strict=True)}
    for node in graph.nodes:
        if node.callee is not None and node.callee.role == "layer":
            found |= parameters(node.callee, f"{prefix}{node.attrs['params']}.")
    return found


def renamed(graph: Graph, name: str) -> Graph:
    return replace(graph, name=name)


def check_name(name: str, what: str) -> str:
    """Refuse text that is no identifier; names reach generated source only through this."""
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name) or name in ("inf", "nan"):
        raise ParseError(f"{what} {name[:40]!r} must be a plain identifier: letters, digits, underscores, no keyword")
    return name
