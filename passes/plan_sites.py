"""What a plan is about: the layers that mix tokens, and what of each travels, stays, or is summed up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir import Graph, Node, OpDef, PassError, TensorType, Value, ops
from ..ir.op import accumulator
from ..ir.ops import Traits
from ..ir.signature import Operand
from ..ir.types import BYTES
from .outline import inline

TRAITS: dict[str, Traits] = {op.name: traits for op, traits in ops.FAMILY.items()}
# Ops whose result is head by head, and token by token, a function of one operand that has tokens.
HEADWISE = frozenset({
    "add_bias", "cast", "clamp", "neg_exp", "reshape", "scale", "scale_columns", "scale_heads", "shift", "sigmoid", "softplus",
    "widen",
})  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """A value of tokens and heads: how many heads, and the bytes of one at one token."""

    name: str
    heads: int
    bytes: int

    def features(self, ranks: int, tp: int = 1) -> int:
        """Bytes a token that leave for `ranks` ranks: heads are copied where there are fewer than ranks."""
        return max(self.local(tp), ranks) * self.bytes

    def local(self, tp: int) -> int:
        """Heads of one of `tp` ranks."""
        return max(1, self.heads // tp)


@dataclass(frozen=True, eq=False)
class Mixer:
    """An op that must see whole sequences, in a layer of the program that is whole."""

    node: Node
    moved: tuple[Moved, ...]  # what travels in when heads are exchanged: q, k, v, gates, each before it was widened
    read: tuple[Moved, ...]  # the same as the op itself reads them
    result: Moved
    gate: Moved | None  # what the result is multiplied with, which stays where it is
    conv: Node | None  # the short convolution in front

    @property
    def op(self) -> OpDef:
        assert isinstance(self.node.op, OpDef)
        return self.node.op

    @property
    def traits(self) -> Traits | None:
        """What kind of recurrence; none is attention."""
        return TRAITS.get(self.op.name)

    @property
    def kind(self) -> str:
        return "recurrence" if self.traits else "attention"

    @property
    def dtype(self) -> str:
        return self.node.operands[0].type.dtype

    @property
    def groups(self) -> int:
        """Heads of keys, each read by as many heads of queries or values."""
        return int(self.operand("k").dims[2].size)

    @property
    def heads(self) -> int:
        return self.result.heads

    def operand(self, name: str) -> TensorType:
        """The type of an operand."""
        found = self.given(name)
        assert found is not None
        return found.type

    def given(self, name: str) -> Value | None:
        """The value of an operand; none where it is absent."""
        return next((v for o, v in zip(self.op.inputs, self.node.inputs, strict=True) if o.name == name), None)

    def columns(self, name: str) -> int:
        """The size of a head of an operand."""
        return int(self.operand(name).dims[3].size)

    def state(self, tp: int = 1) -> int:
        """Bytes of a recurrence's state."""
        return self.result.local(tp) * self.columns("k") * self.columns("v") * BYTES[accumulator(self.dtype)]

    def transition(self, tp: int = 1) -> int:
        """Bytes of what a run of tokens does to the state before it: a matrix, a row, or a number a head."""
        assert self.traits is not None
        key = self.columns("k")
        each = key * key if self.traits.update == "delta" else key if self.traits.decay == "channel" else 1
        return self.result.local(tp) * each * BYTES[accumulator(self.dtype)]


@dataclass(frozen=True, eq=False)
class Step:
    """One call of a layer that mixes tokens."""

    layer: str
    mixers: tuple[Mixer, ...]
    hidden: int  # bytes a token of what flows from layer to layer


def steps(graph: Graph) -> tuple[Step, ...]:
    """The calls that mix tokens, in order; what an entry mixes itself comes first, as one."""
    known = {layer: Step(layer.name, mixers(layer), _hidden(layer)) for layer in graph.layers}
    own = Step(graph.name, mixers(graph), _hidden(graph))
    called = [known[n.callee] for n in graph.nodes if n.callee is not None and n.callee in known]
    return tuple(step for step in (own, *called) if step.mixers)


def _hidden(graph: Graph) -> int:
    lead = next((v for v in graph.inputs if v.type.is_float and len(v.type.dims) > 2), None)
    return _token_bytes(lead) if lead else 0


def _token_bytes(value: Value) -> int:
    """Bytes of one token of [batch, tokens, ...]."""
    return math.prod(d.size for d in value.type.dims[2:] if isinstance(d.size, int)) * BYTES[value.type.dtype]


def mixers(layer: Graph) -> tuple[Mixer, ...]:
    """Every attention and recurrence of a graph; fused regions are opened."""
    layer = inline(layer) if any(g.role == "kernel" for g in layer.callees) else layer
    return tuple(_mixer(layer, node) for node in layer.nodes if node.is_op("attention", *TRAITS))


def _mixer(layer: Graph, node: Node) -> Mixer:
    _check_sizes(node)
    out, conv = node.outputs[0], _before(layer, node, "causal_conv1d")
    heads = int(out.type.dims[2].size)
    result = Moved("o", heads, _token_bytes(out) // heads)
    sources = {v: _source(layer, v) for v in node.operands}
    return Mixer(node, _moved(node, sources), _moved(node, {}), result, _gate(layer, node, heads), conv)


def _check_sizes(node: Node) -> None:
    for value in node.operands:
        if open_ := next((d.size for d in value.type.dims[2:] if isinstance(d.size, str)), None):
            why = f"{value.name} is {value.type}; heads and columns must be numbers, {open_} is none"
            raise PassError(f"{node.op.name} has no price{f' at {node.loc}' if node.loc else ''}: {why}")


def _moved(node: Node, sources: Mapping[Value, Value]) -> tuple[Moved, ...]:
    """Operands of tokens and heads, each by its source; one source of two operands travels once."""
    assert isinstance(node.op, OpDef)
    found = dict[Value, Moved]()
    for operand, value in zip(node.op.inputs, node.inputs, strict=True):
        if value is not None and _is_token(operand, value):
            source, heads = sources.get(value, value), int(value.type.dims[2].size)
            source = value if _token_bytes(source) % heads else source
            found.setdefault(source, Moved(operand.name, heads, _token_bytes(source) // heads))
    return tuple(found.values())


def _is_token(operand: Operand, value: Value) -> bool:
    return len(value.type.dims) > 2 and operand.name != "state"


def _source(layer: Graph, value: Value) -> Value:
    """What a value is computed from, head by head, back to where it is narrowest."""
    best = at = value
    while (maker := layer.makers.get(at)) and maker.is_op(*HEADWISE):
        tokens = [v for v in maker.operands if _shares_tokens(v, value)]
        if len(tokens) != 1:
            break
        at = tokens[0]
        best = at if _token_bytes(at) <= _token_bytes(best) else best
    return best


def _shares_tokens(value: Value, other: Value) -> bool:
    return value.type.shape[:2] == other.type.shape[:2]


def _before(layer: Graph, node: Node, name: str) -> Node | None:
    """The nearest node of an op that reaches another node."""
    wanted = set(node.operands)
    for maker in reversed(layer.nodes[: layer.nodes.index(node)]):
        if wanted.intersection(maker.outputs):
            if maker.is_op(name):
                return maker
            wanted.update(maker.operands)
    return None


def _gate(layer: Graph, node: Node, heads: int) -> Moved | None:
    """What the result is multiplied with that does not come from it."""
    reached = {node.outputs[0]}
    for user in layer.nodes[layer.nodes.index(node) + 1 :]:
        if not reached.intersection(user.operands):
            continue
        other = next((v for v in user.operands if v not in reached), None)
        if user.is_op("mul") and other is not None and _shares_tokens(other, node.outputs[0]):
            return Moved("gate", heads, _token_bytes(other) // heads)
        reached.update(user.outputs)
    return None


def distinct(found: Sequence[Step]) -> tuple[Step, ...]:
    """The steps of different layers, in order of first call."""
    return tuple({step.layer: step for step in reversed(found)}[name] for name in dict.fromkeys(s.layer for s in found))
