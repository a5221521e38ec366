"""Exchanges move in front of the ops that make what they move, where less is to be moved then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..ir import Graph, Node, OpDef, PlacementError, Replay, TensorType, Value, ops
from ..ir.signature import Operand, bind, spread
from .cleanup import dce
from .registry import Outcome, register
from .remarks import Remark
from .splitting import Split, local_reshape


@dataclass(frozen=True)
class Move:
    """What an all_to_all does: dim `src` is no longer split over the axis, dim `dst` is."""

    axis: str
    src: int
    dst: int

    @staticmethod
    def of(node: Node) -> Move:
        return Move(node.attrs["axis"], node.attrs["src"], node.attrs["dst"])

    @property
    def attrs(self) -> dict[str, Any]:
        return {"axis": self.axis, "src": self.src, "dst": self.dst}

    def reversed(self) -> Move:
        return Move(self.axis, self.dst, self.src)


@dataclass(frozen=True)
class Operands:
    """What an op takes on the other side of an exchange: which operands travel how, which are cut, and its attributes."""

    travel: Mapping[int, Move]
    cut: Mapping[int, int]  # operand -> dim
    attrs: Mapping[str, Any]


@register(numerics="exact")
def hoist_exchanges(graph: Graph) -> Outcome:
    """An exchange of what token-wise ops made moves in front of them, where no more travels then.

    all_to_all(scale_columns(softplus(widen(a)), r)) is scale_columns(softplus(widen(all_to_all(a))), shard(r)): half of the
    bytes. What would travel both ways, such as an output gate, stays home. The op does the same work elsewhere; what is read
    at home too stays, since it would be computed twice.
    """
    said = list[Remark]()
    while True:
        sweep = _Sweep(graph)
        graph = sweep.run()
        said += sweep.said
        if not sweep.said:
            return (dce(graph)[0] if said else graph), tuple(said)


class _Sweep:
    """One pass over a graph: every exchange goes one op further up."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.replay = graph, Replay(graph)
        self.said, self.done = list[Remark](), dict[tuple[Value, Move], Value]()  # what travels already, by its old value
        self.lifted = set[Value]()

    def run(self) -> Graph:
        return self.replay.run(self._visit)

    def _visit(self, node: Node, _: list[Value | None]) -> Sequence[Value] | None:
        if node.is_op("all_to_all"):
            return [self._arrived(node)]
        move = move_of(self.graph, node)
        found = other_side(node, move) if move else None
        if move is None or found is None or not self._pays(node, found):
            return None
        self.said.append(Remark("passed", "hoist-exchange", node.loc, self._saved(node, found)))
        self.lifted.add(node.outputs[0])
        return [self._there(node, found)]

    def _arrived(self, node: Node) -> Value:
        """The exchanged value: made here, made before, or by the op that now stands behind its exchange."""
        (old,), move = node.operands, Move.of(node)
        if old in self.lifted:
            return self.replay.env[old]
        return self._exchanged(old, move, node.outputs[0].name, node.loc)

    def _exchanged(self, old: Value, move: Move, name: str, loc: str) -> Value:
        if (old, move) not in self.done:
            b, maker = self.replay.builder, self.graph.makers.get(old)
            if maker is None or not self._returns(old, move):
                self.done[old, move] = b.emit(ops.all_to_all, [self.replay.env[old]], move.attrs, [name], loc)[0]
            elif maker.is_op("all_to_all"):
                self.done[old, move] = self.replay.env[maker.operands[0]]
            else:
                self.done[old, move] = self._there(maker, other_side(maker, move))
        return self.done[old, move]

    def _returns(self, value: Value, move: Move) -> bool:
        """Whether a value was at the other side before, so that nothing travels: it came by an exchange, or is made of such."""
        maker = self.graph.makers.get(value)
        if maker is not None and maker.is_op("all_to_all"):
            return Move.of(maker) == move.reversed() and maker.operands[0] not in self.lifted
        if maker is None or value in self.graph.outputs or len(self.graph.uses[value]) > 1:
            return False  # it would be computed twice
        found = other_side(maker, move)
        return found is not None and all(self._returns(v, m) for v, m in self._travelling(maker, found))

    def _travelling(self, node: Node, found: Operands) -> list[tuple[Value, Move]]:
        """The operands that are to be exchanged, each once."""
        pairs = dict.fromkeys((node.inputs[i], move) for i, move in found.travel.items())
        return [(v, move) for v, move in pairs if v is not None]

    def _there(self, node: Node, found: Operands | None) -> Value:
        """An op's result on the other side, from its operands there."""
        assert found is not None
        given = [
            self._operand(node, i, self.replay.env[v], found) if v is not None else None for i, v in enumerate(node.inputs)
        ]
        return self.replay.builder.emit(node.op, given, found.attrs, [node.outputs[0].name], node.loc)[0]

    def _operand(self, node: Node, index: int, new: Value, found: Operands) -> Value:
        old = node.inputs[index]
        assert old is not None
        if index in found.travel:
            return self._exchanged(old, found.travel[index], old.name, node.loc)
        if index not in found.cut:
            return new
        axis = next(iter(found.travel.values())).axis
        return self.replay.builder.emit(ops.shard, [new], {"axis": axis, "dim": found.cut[index]}, [old.name], node.loc)[0]

    def _fresh(self, node: Node, found: Operands) -> list[Value]:
        """The operands that do not travel yet, and do not come from the other side."""
        return [v for v, m in self._travelling(node, found) if not self._travels(v, m) and not self._returns(v, m)]

    def _travels(self, value: Value, move: Move) -> bool:
        return any(n.is_op("all_to_all") and Move.of(n) == move for n in self.graph.uses.get(value, ()))

    def _pays(self, node: Node, found: Operands) -> bool:
        """No more bytes, and not two exchanges for one."""
        fresh = self._fresh(node, found)
        return len(fresh) < 2 and sum(map(token_bytes, fresh)) <= token_bytes(node.outputs[0])

    def _saved(self, node: Node, found: Operands) -> str:
        now = sum(map(token_bytes, self._fresh(node, found)))
        return f"the all_to_all goes in front of {node.op.name}: {now} bytes a token, were {token_bytes(node.outputs[0])}"


def token_bytes(value: Value) -> int:
    """Bytes of a value with every symbolic size one: what one token has."""
    return value.type.bytes(dict.fromkeys(value.type.symbols, 1))


def move_of(graph: Graph, node: Node) -> Move | None:
    """The exchange that every reader of a node's only result is."""
    if len(node.outputs) != 1 or node.outputs[0] in graph.outputs:
        return None
    users = graph.uses.get(node.outputs[0], ())
    moves = {Move.of(n) if n.is_op("all_to_all") else None for n in users}
    return moves.pop() if len(moves) == 1 else None


def other_side(node: Node, move: Move) -> Operands | None:
    """How an op makes its result's exchanged form of its operands' exchanged forms; None where it cannot."""
    op = node.op
    if not isinstance(op, OpDef) or op.rank_rule or node.attrs.get("over"):
        return None
    where = _reshape_places(node, move) if node.is_op("reshape") else _places(node, op, move)
    types = [v.type if v is not None else None for v in node.inputs]
    given, travel, cut = [*types], dict[int, Move](), dict[int, int]()
    for i, (src, dst) in where.items():
        type_ = types[i]
        assert type_ is not None
        if dst is None or not _fits(type_.dims[dst].size, node.outputs[0].type.dims[move.dst].size):
            return None
        here = Move(move.axis, dst if src is None else src, dst)
        given[i] = _moved(type_, move.axis, src, dst)
        if src is None:
            cut[i] = dst
        else:
            travel[i] = here
    attrs = _local_attrs(node, given, move)
    wanted = _moved(node.outputs[0].type, move.axis, move.src, move.dst)
    return Operands(travel, cut, attrs) if travel and _gives(op, given, attrs, wanted) else None


def _moved(type_: TensorType, axis: str, src: int | None, dst: int) -> TensorType:
    if src is not None:
        d = type_.dims[src]
        type_ = type_.with_dim(src, replace(d, axes=tuple(a for a in d.axes if a != axis)))
    d = type_.dims[dst]
    return type_.with_dim(dst, replace(d, axes=(*d.axes, axis)))


def _fits(size: int | str, of: int | str) -> bool:
    """Whether ranks that divide the one divide the other."""
    return size == of or (isinstance(size, int) and isinstance(of, int) and of > 0 and size % of == 0)


def _places(node: Node, op: OpDef, move: Move) -> dict[int, tuple[int | None, int | None]]:
    """The dims of each operand that are the result's dims `src` and `dst`."""
    bound = op.bind([v.type if v is not None else None for v in node.inputs], node.attrs)
    axes = spread(op.outputs[0].axes, bound.rest)
    found = dict[int, list[int | None]]()
    for k, at in enumerate((move.src, move.dst)):
        for use in bound.uses.get(axes[at].letters[0], ()):
            found.setdefault(use.operand, [None, None])[k] = use.position
    return {i: (pair[0], pair[1]) for i, pair in found.items()}


def _reshape_places(node: Node, move: Move) -> dict[int, tuple[int | None, int | None]]:
    """The same for a reshape, whose letters are in its pattern; outermost ones, as only these may be split."""
    left, right = ops.sides(node.attrs["pattern"])
    known = {y: int(y.split("=")[1]) for a in (*left, *right) for y in a.letters if "=" in y}
    bound = bind("reshape", [Operand("x", left)], [node.operands[0].type], known)
    first = [a.letters[0] for a in spread(left, bound.rest)]
    now = [a.letters[0] for a in spread(right, bound.rest)]
    src, dst = (first.index(now[at]) if now[at] in first else None for at in (move.src, move.dst))
    return {0: (src, dst)}


def _local_attrs(node: Node, given: Sequence[TensorType | None], move: Move) -> Mapping[str, Any]:
    """A reshape parts a dim that is split now into parts whose sizes each rank finds itself."""
    if not node.is_op("reshape") or given[0] is None:
        return node.attrs
    return {**node.attrs, "pattern": local_reshape(given[0], node.attrs["pattern"], Split(move.axis, 1), node.operands[0].type)}


def _gives(op: OpDef, types: Sequence[TensorType | None], attrs: Mapping[str, Any], wanted: TensorType) -> bool:
    try:
        return op.infer(types, attrs) == (wanted,)
    except PlacementError:
        return False
