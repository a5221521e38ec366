"""The cached program: the same graph reads a prompt and decodes, its states going in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..ir import Builder, Dim, Graph, Node, OpDef, PassError, Replay, TensorType, Value, ops
from ..ir.sizes import plus
from .cleanup import dce
from .latent import absorbed
from .registry import Outcome, register
from .remarks import Remark

LENGTH = "m"  # tokens a key or value cache has room for
PAGES, PAGE, HELD = "pages", "page", "held"  # of a pool, tokens of a page, pages of a row
KINDS = ("k_cache", "v_cache", "conv_state", "recurrent_state")
_RECURRENCES = tuple(op.name for op in (*ops.FAMILY, *ops.SCANS))
_ROLES: dict[str, tuple[str, ...]] = {
    "attention": ("k_cache", "v_cache"),
    "biased_attention": ("k_cache", "v_cache"),
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
    reads: tuple[str, ...]  # which of the entry's own inputs it takes


@dataclass(frozen=True)
class _Style:
    """How rows are told apart: by one `at`, or each by its own; where keys and values of full attention wait."""

    rows: Dim | None = None
    paged: bool = False


@register(numerics="exact", model=True)
def with_cache(graph: Graph, *, last: bool = False, rows: bool = False, paged: bool = False) -> Outcome:
    """The program that continues where it stopped: inputs `at` and every state, states out; `last` keeps each row's last token.

    Prefill and decode are this one graph. Inputs are the given ones, `at`, then states; results the given ones, then states
    in the same order. A fresh sequence has at = 0 and zeros everywhere.

    With `rows` each row has its own `at`, packed tokens may go to rows of states (segment r to row r), and the keys of a
    window wait in a ring of w<window> slots. With `paged` those of full attention wait in a pool of pages: `slots` says where
    each token's stand (-1: nowhere), `table` which pages each row has.

    Keys and values that are projections of narrower rows are not kept: the rows are, and queries go to them.
    """
    _refuse(graph, rows or paged)
    narrow = absorbed(graph)
    made = _Caching(narrow, last, _Style(_rows(graph), paged) if rows or paged else _Style()).run()
    made = made if narrow is graph else dce(made)[0]
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


def _borders(graph: Graph) -> Value | None:
    return next((v for v in graph.inputs if v.name == "cu"), None)


def _rows(graph: Graph) -> Dim:
    """How many rows states have: one for each row of the tokens, or for each packed segment."""
    cu = _borders(graph)
    return graph.inputs[0].type.dims[0] if cu is None else Dim(plus(cu.type.dims[0].size, -1))


def _refuse(graph: Graph, rows: bool) -> None:
    """Name what cannot be cached, and what to do about it."""
    if any(v.name == "at" for v in graph.inputs):
        raise PassError(f"{graph.name} has an input `at`: it is cached already")
    if LENGTH in graph.symbols:
        raise PassError(f"{graph.name}: {LENGTH} is a size of its inputs already; rename it, a cache's length is called that")
    for part in (graph, *graph.layers):
        for node in part.nodes:
            if _given(part, node):
                continue
            if why := _obstacle(node) or (_rows_obstacle(node) if rows else _packed(node)):
                raise PassError(f"with-cache: {node.op.name} at {node.loc or part.name}: {why}")


def _given(graph: Graph, node: Node) -> bool:
    """Attention to keys and values that the program is given: they are the same for every token."""
    if not node.is_op("biased_attention") or node.attrs["causal"]:
        return False
    return all(v in graph.inputs for v in node.inputs[1:3])


def _biased(node: Node) -> bool:
    """Attention with a bias by distance, to the tokens themselves."""
    return node.is_op("biased_attention") and bool(node.attrs["causal"])


def _obstacle(node: Node) -> str:
    if node.callee is not None:
        inside = node.callee.role == "kernel" and any(n.is_op(*_ROLES, "positions") for n in node.callee.nodes)
        return "it holds a state inside a kernel; run with-cache before fuse" if inside else ""
    op = node.op
    assert isinstance(op, OpDef)
    given = {o.name for o, v in zip(op.inputs, node.inputs, strict=True) if v is not None}
    if {"state", "at"} & given and node.is_op(*_ROLES, "positions"):
        return "it has a state already"
    if node.is_op("attention", "biased_attention") and not node.attrs["causal"]:
        return "it is not causal, so earlier tokens depend on later ones; no cache can serve it"
    return "it is for training; build without dropout" if node.is_op("dropout") else ""


def _packed(node: Node) -> str:
    given = node.callee is None and any(o.name == "cu" and v for o, v in zip(node.op.inputs, node.inputs, strict=True))  # type: ignore[union-attr] # an op
    return (
        "it is packed (cu); one `at` is for rows that are equally long, so build without packing, or say rows=true"
        if given
        else ""
    )


def _rows_obstacle(node: Node) -> str:
    """What attention has that attention to rings has not."""
    if node.is_op("biased_attention"):
        return "it has a bias by distance, which rows of their own lengths (rows=true) have no form of"
    if not node.is_op("attention"):
        return ""
    assert isinstance(node.op, OpDef)
    known = {"causal", "over", "by", "order", *ops.cached_attention.attrs}
    extra = [k for k, v in node.attrs.items() if k not in known and v != node.op.attrs[k]]
    own = {o.name for o in ops.cached_attention.inputs}
    extra += [o.name for o, v in zip(node.op.inputs, node.inputs, strict=True) if v is not None and o.name not in own]
    return f"it has {', '.join(extra)}, which rows of their own lengths (rows=true) have no form of" if extra else ""


class _Caching:
    """Replays the entry with cached layers; state inputs are made as layers ask for them."""

    def __init__(self, graph: Graph, last: bool, style: _Style) -> None:
        self.graph, self.head, replay = graph, _head(graph) if last else None, Replay(graph)
        self.builder, self.env, self.style = replay.builder, replay.env, style
        self.places = _Places(self.builder, graph, style, [n for g in (graph, *graph.layers) for n in g.nodes])
        self.layers = dict[Graph, _Cached]()
        self.states, self.taken = list[Value](), {v.name for v in (*graph.inputs, *graph.params)}

    def run(self) -> Graph:
        for node in self.graph.nodes:
            self.env.update(zip(node.outputs, self._emit(node), strict=True))
        return self.builder.finish([*(self.env[v] for v in self.graph.outputs), *self.states])

    def _emit(self, node: Node) -> Sequence[Value]:
        inputs = [self.env[v] if v is not None else None for v in node.inputs]
        if node.callee is None or node.callee.role != "layer":
            made, states = _emit_op(self.places, self.graph, node, inputs, lambda role, t: self._state("", role, t))
            self.states += states
            return made
        if node is self.head:
            inputs = self._last_tokens(node, inputs)
        cached = self._layer(node.callee)
        prefix = node.attrs["params"].replace(".", "_")
        given = [self._state(prefix, s.name, s.type) for s in cached.states]
        extra = [self.places.values[name] for name in cached.reads]
        names = [*(v.name for v in node.outputs), *(v.name for v in given)]
        made = self.builder.emit(cached.graph, [*inputs, *extra, *given], node.attrs, names, node.loc)
        self.states += made[len(node.outputs) :]
        return made[: len(node.outputs)]

    def _layer(self, layer: Graph) -> _Cached:
        if layer not in self.layers:
            self.layers[layer] = _cached(layer, self.graph, self.style)
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
        """Only the last token of every row of the float `[b, t, d]` operands reaches the head."""
        self.builder.loc = node.loc
        cu = _borders(self.graph)
        ends = ops.last_token if cu is None else partial(ops.segment_ends, cu=self.env[cu])
        return [ends(v) if v is not None and v.type.is_float and len(v.type.dims) == 3 else v for v in inputs]


class _Places:
    """The inputs of a graph that say where tokens stand, as far as its nodes read them."""

    def __init__(self, builder: Builder, entry: Graph, style: _Style, nodes: Sequence[Node]) -> None:
        self.builder, self.style = builder, style
        tokens, self.values = entry.inputs[0].type, dict[str, Value]()
        if style.paged and style.rows and any(n.is_op("attention") and not n.attrs["window"] for n in nodes):
            self.values["slots"] = builder.input("slots", TensorType("i64", tokens.dims))
            self.values["table"] = builder.input("table", TensorType("i64", (style.rows, Dim(HELD))))
        if builder.role != "layer" or any(n.is_op("attention", "positions") or _biased(n) for n in nodes):
            rows = (style.rows,) if style.rows else ()
            self.values["at"] = builder.input("at", TensorType("i64", rows))

    def write(self, node: Node, new: Value, cu: Value | None, make: Callable[[TensorType], Value]) -> Value:
        """The cache that a call's keys or values are written into."""
        at, rows, window = self.values["at"], self.style.rows, node.attrs.get("window", 0)
        if rows is None:
            written = ops.cache_write(make(_cache_type(new.type, LENGTH)), new, at)
        elif window or "slots" not in self.values:
            ring = _cache_type(new.type, f"w{window}" if window else LENGTH).with_dim(0, rows)
            written = ops.cached_write(make(ring), new, at, cu=cu)
        else:
            pool = _cache_type(new.type, PAGE).with_dim(0, Dim(PAGES))
            written = ops.page_write(make(pool), new, self.values["slots"])
        return written

    def attend(
        self, node: Node, given: Sequence[Value | None], cu: Value | None, attrs: Mapping[str, Any], names: Sequence[str]
    ) -> Sequence[Value]:
        """Attention of rows to what was written of them."""
        if node.attrs["window"] or "table" not in self.values:
            return self.builder.emit(ops.cached_attention, [*given[:3], self.values["at"], given[3], cu], attrs, names)
        where = [self.values["table"], self.values["at"]]
        return self.builder.emit(ops.paged_attention, [*given[:3], *where, given[3], cu], attrs, names)


def _emit_op(
    places: _Places, graph: Graph, node: Node, inputs: Sequence[Value | None], make: Callable[[str, TensorType], Value]
) -> tuple[Sequence[Value], list[Value]]:
    """Emit one node with the states it needs: its results, and the states that come out."""
    given, states, b = list(inputs), list[Value](), places.builder
    b.loc = node.loc
    rows, names = places.style.rows is not None, [v.name for v in node.outputs]
    if node.is_op("attention") or _biased(node):
        cu = given[_position(node, "cu")] if node.is_op("attention") else None
        part = _part_of_keys(graph, node)
        for i, role in zip((1, 2), _ROLES["attention"], strict=True):
            new = given[i]
            assert new is not None
            if i == 2 and part is not None:
                given[i] = ops.split(states[0], sizes=part.attrs["sizes"])[part.outputs.index(node.operands[i])]
                continue
            given[i] = written = places.write(node, new, cu, lambda t, role=role: make(role, t))
            states.append(written)
        if rows:
            attrs = {k: v for k, v in node.attrs.items() if k in ops.cached_attention.attrs}
            return places.attend(node, given, cu, attrs, names), states
    elif node.is_op("positions") and rows:
        cu = given[_position(node, "cu")]
        return b.emit(ops.cached_positions, [given[0], places.values["at"], cu], {}, names), states
    elif node.is_op(*_ROLES) and not node.is_op("biased_attention"):
        given[_position(node, "state")] = make(_ROLES[node.op.name][0], node.outputs[1].type)
    if node.is_op("attention", "positions") or _biased(node):
        given[_position(node, "at")] = places.values["at"]
    made = b.emit(node.op, given, node.attrs, names, node.loc)
    if node.is_op(*_ROLES) and not node.is_op("biased_attention") and not states:
        states.append(made[1])
    return made, states


def _part_of_keys(graph: Graph, node: Node) -> Node | None:
    """The split that an attention's values are, where they are a part of its keys: they wait with them."""
    keys, values = node.operands[1:3]
    maker = graph.makers.get(values)
    return maker if maker is not None and maker.is_op("split") and maker.operands[0] is keys else None


def _position(node: Node, operand: str) -> int:
    assert isinstance(node.op, OpDef)
    return [o.name for o in node.op.inputs].index(operand)


def _cache_type(new: TensorType, room: str) -> TensorType:
    """Room for so many tokens where the new keys have t of them."""
    return new.with_dim(1, Dim(room))


def _cached(layer: Graph, entry: Graph, style: _Style) -> _Cached:
    """A layer whose states come in behind its inputs and go out behind its results."""
    layer, given = absorbed(layer), layer
    replay = Replay(layer)
    b, env = replay.builder, replay.env
    places = _Places(b, entry, style, layer.nodes)
    found, out = list[State](), list[Value]()

    def make(role: str, type_: TensorType) -> Value:
        count = sum(s.kind == role for s in found)
        name = f"{role}_{count + 1}" if count else role
        found.append(State(name, type_, role))
        return b.input(name, type_)

    for node in layer.nodes:
        inputs = [env[v] if v is not None else None for v in node.inputs]
        made, states = _emit_op(places, layer, node, inputs, make)
        env.update(zip(node.outputs, made, strict=True))
        out += states
    made = b.finish([*(env[v] for v in layer.outputs), *out])
    return _Cached(made if layer is given else dce(made)[0], tuple(found), tuple(places.values))


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
