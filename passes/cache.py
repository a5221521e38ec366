"""The cached program: the same graph reads a prompt and decodes, its states going in and out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..ir import Builder, Dim, Graph, Node, OpDef, PassError, Replay, TensorType, Value, ops, tensor_type
from .registry import Outcome, register
from .remarks import Remark

LENGTH = "m"  # tokens a key or value cache has room for
KINDS = ("k_cache", "v_cache", "conv_state", "recurrent_state")
_RECURRENCES = tuple(op.name for op in ops.FAMILY)
_ROLES: dict[str, tuple[str, ...]] = {
    "attention": ("k_cache", "v_cache"),
    "causal_conv1d": ("conv_state",),
    **dict.fromkeys(_RECURRENCES, ("recurrent_state",)),
}


@dataclass(frozen=True)
class State:
    """What a cached program keeps from call to call: an input, and the result in the same place."""

    name: str
    type: TensorType
    kind: str


@dataclass(frozen=True)
class _Cached:
    """A layer with states: its graph, and what they are, in the order of its added inputs and results."""

    graph: Graph
    states: tuple[State, ...]
    reads_at: bool


@register(numerics="exact", model=True)
def with_cache(graph: Graph, *, last: bool = False) -> Outcome:
    """The program that continues where it stopped: inputs `at` and every state, states out; `last` keeps the last token alone.

    Prefill and decode are this one graph. Inputs are the given ones, `at`, then states; results the given ones, then states
    in the same order. A fresh sequence has at = 0 and zeros everywhere.
    """
    _refuse(graph)
    made = _Caching(graph, last).run()
    said = [Remark("passed", "with-cache", s.name, f"{s.kind} {s.type}") for s in cache_states(made)]
    return made, tuple(said)


def cache_states(graph: Graph) -> tuple[State, ...]:
    """The states of a cached program, in order of its inputs and of its last results."""
    names = [v.name for v in graph.inputs]
    if "at" not in names:
        raise PassError(f"{graph.name} has no input `at`: it is not a cached program; run with-cache on it first")
    return tuple(State(v.name, v.type, _kind(v.name)) for v in graph.inputs[names.index("at") + 1 :])


def _kind(name: str) -> str:
    found = next((k for k in KINDS if k in name), None)
    if found is None:
        raise PassError(f"input {name} stands behind `at` and is no state; a state's name holds one of {', '.join(KINDS)}")
    return found


def _refuse(graph: Graph) -> None:
    """Name what cannot be cached, and what to do about it."""
    if any(v.name == "at" for v in graph.inputs):
        raise PassError(f"{graph.name} has an input `at`: it is cached already")
    if LENGTH in graph.symbols:
        raise PassError(f"{graph.name}: {LENGTH} is a size of its inputs already; rename it, a cache's length is called that")
    for part in (graph, *graph.layers):
        for node in part.nodes:
            if why := _obstacle(node):
                raise PassError(f"with-cache: {node.op.name} at {node.loc or part.name}: {why}")


def _obstacle(node: Node) -> str:
    if node.callee is not None:
        inside = node.callee.role == "kernel" and any(n.is_op(*_ROLES, "positions") for n in node.callee.nodes)
        return "it holds a state inside a kernel; run with-cache before fuse" if inside else ""
    op = node.op
    assert isinstance(op, OpDef)
    given = {o.name for o, v in zip(op.inputs, node.inputs, strict=True) if v is not None}
    if "cu" in given:
        return "it is packed (cu); a cache holds one sequence per row, so build without packing"
    if {"state", "at"} & given and node.is_op(*_ROLES, "positions"):
        return "it has a state already"
    if node.is_op("attention") and not node.attrs["causal"]:
        return "it is not causal, so earlier tokens depend on later ones; no cache can serve it"
    return "it is for training; build without dropout" if node.is_op("dropout") else ""


class _Caching:
    """Replays the entry with cached layers; state inputs are made as layers ask for them."""

    def __init__(self, graph: Graph, last: bool) -> None:
        self.graph, self.head, replay = graph, _head(graph) if last else None, Replay(graph)
        self.builder, self.env = replay.builder, replay.env
        self.at = self.builder.input("at", tensor_type("i64"))
        self.layers = dict[Graph, _Cached]()
        self.states, self.taken = list[Value](), {v.name for v in (*graph.inputs, *graph.params)}

    def run(self) -> Graph:
        for node in self.graph.nodes:
            self.env.update(zip(node.outputs, self._emit(node), strict=True))
        return self.builder.finish([*(self.env[v] for v in self.graph.outputs), *self.states])

    def _emit(self, node: Node) -> Sequence[Value]:
        inputs = [self.env[v] if v is not None else None for v in node.inputs]
        if node.callee is None or node.callee.role != "layer":
            made, states = _emit_op(self.builder, node, inputs, self.at, lambda role, t: self._state("", role, t))
            self.states += states
            return made
        if node is self.head:
            inputs = self._last_tokens(node, inputs)
        cached = self._layer(node.callee)
        prefix = node.attrs["params"].replace(".", "_")
        given = [self._state(prefix, s.name, s.type) for s in cached.states]
        extra = [self.at] if cached.reads_at else []
        names = [*(v.name for v in node.outputs), *(v.name for v in given)]
        made = self.builder.emit(cached.graph, [*inputs, *extra, *given], node.attrs, names, node.loc)
        self.states += made[len(node.outputs) :]
        return made[: len(node.outputs)]

    def _layer(self, layer: Graph) -> _Cached:
        if layer not in self.layers:
            self.layers[layer] = _cached(layer)
        return self.layers[layer]

    def _state(self, prefix: str, role: str, type_: TensorType) -> Value:
        """A new input of the entry, named after where it belongs."""
        name = base = f"{prefix}_{role}" if prefix else role
        n = 1
        while name in self.taken:
            n += 1
            name = f"{base}_{n}"
        self.taken.add(name)
        return self.builder.input(name, type_)

    def _last_tokens(self, node: Node, inputs: Sequence[Value | None]) -> list[Value | None]:
        """Only the last token of every float `[b, t, d]` operand reaches the head."""
        self.builder.loc = node.loc
        return [ops.last_token(v) if v is not None and v.type.is_float and len(v.type.dims) == 3 else v for v in inputs]


def _emit_op(
    b: Builder, node: Node, inputs: Sequence[Value | None], at: Value | None, make: Callable[[str, TensorType], Value]
) -> tuple[Sequence[Value], list[Value]]:
    """Emit one node with the states it needs: its results, and the states that come out."""
    given, states = list(inputs), list[Value]()
    b.loc = node.loc
    if node.is_op("attention"):
        assert at is not None
        for i, role in zip((1, 2), _ROLES["attention"], strict=True):
            new = given[i]
            assert new is not None
            given[i] = ops.cache_write(make(role, _cache_type(new.type)), new, at)
            states.append(given[i])  # type: ignore[arg-type] # just written
    elif node.is_op(*_ROLES):
        given[_position(node, "state")] = make(_ROLES[node.op.name][0], node.outputs[1].type)
    if node.is_op("attention", "positions"):
        given[_position(node, "at")] = at
    made = b.emit(node.op, given, node.attrs, [v.name for v in node.outputs], node.loc)
    if node.is_op(*_ROLES) and not states:
        states.append(made[1])
    return made, states


def _position(node: Node, operand: str) -> int:
    assert isinstance(node.op, OpDef)
    return [o.name for o in node.op.inputs].index(operand)


def _cache_type(new: TensorType) -> TensorType:
    """Room for `m` tokens where the new keys have t of them."""
    return new.with_dim(1, Dim(LENGTH))


def _cached(layer: Graph) -> _Cached:
    """A layer whose states come in behind its inputs and go out behind its results."""
    replay = Replay(layer)
    b, env = replay.builder, replay.env
    at = b.input("at", tensor_type("i64")) if any(n.is_op("attention", "positions") for n in layer.nodes) else None
    found, out = list[State](), list[Value]()

    def make(role: str, type_: TensorType) -> Value:
        count = sum(s.kind == role for s in found)
        name = f"{role}_{count + 1}" if count else role
        found.append(State(name, type_, role))
        return b.input(name, type_)

    for node in layer.nodes:
        made, states = _emit_op(b, node, [env[v] if v is not None else None for v in node.inputs], at, make)
        env.update(zip(node.outputs, made, strict=True))
        out += states
    return _Cached(b.finish([*(env[v] for v in layer.outputs), *out]), tuple(found), at is not None)


def _head(graph: Graph) -> Node:
    """The last call of a layer, which must work token by token."""
    calls = [n for n in graph.nodes if n.callee is not None and n.callee.role == "layer"]
    callee = calls[-1].callee if calls else None
    if callee is None or any(n.is_op(*_ROLES) for n in callee.nodes):
        why = "last=true needs a last layer that works token by token"
        raise PassError(f"with-cache: {graph.name} ends in no head of its own; {why}")
    if any(n.is_op("cross_entropy", "linear_cross_entropy") for n in callee.nodes):
        raise PassError(f"with-cache: {callee.name} computes a loss of all tokens; last=true is for the task 'logits'")
    return calls[-1]
