"""A graph replayed over split values: types judge each op, a collective makes what it cannot take into what it can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..ir import Graph, Init, Node, OpDef, PlacementError, Replay, TensorType, Value, ops
from .outline import inline
from .remarks import Remark
from .splitting import Split, inferred, local_reshape, token_bytes

Types = Sequence[TensorType | None]
TOKENS = 1  # the dim of tokens: [batch, tokens, ...]


class Unfit(PlacementError):
    """What a layer computes does not part as its parameters would be split; it is better left whole."""


@dataclass(frozen=True)
class Terms:
    """What a walk is asked for: the split, rules for some ops, and whether tokens are split where features are whole."""

    split: Split
    rules: Mapping[str, Rule]
    tokens: bool = False
    plain: bool = False  # no parameter is split
    wants: Callable[[Graph, Value, Split], TensorType] = lambda graph, value, split: value.type


@dataclass
class Notes:
    """What is shared by the walks of all layers: those that are done, and what is to be said."""

    known: dict[tuple[Graph, tuple[TensorType, ...]], Graph] = field(default_factory=dict[Any, Graph])
    said: list[Remark] = field(default_factory=list[Remark])


class Walk:
    """One graph being replayed: values as they were made, copies of them elsewhere, parameters typed at their first use."""

    def __init__(self, graph: Graph, types: Sequence[TensorType], terms: Terms, notes: Notes) -> None:
        self.graph = graph = inline(graph) if any(g.role == "kernel" for g in graph.callees) else graph
        self.terms, self.split, self.notes = terms, terms.split, notes
        replay = Replay(graph, types=types)
        self.b, self.env = replay.builder, {v: replay.env[v] for v in graph.inputs}
        self.b.params, self.b.inits = [], []
        self.inits: dict[Value, Init] = dict(zip(graph.params, graph.inits, strict=True))
        self.copies = dict[tuple[Value, TensorType], Value]()
        self.later = dict[Value, Node]()  # made of one parameter alone, where it is first used
        self.tokens = next((v.type.shape[:2] for v in graph.inputs if len(v.type.dims) > 1), ())

    def run(self) -> Graph:
        for node in self.graph.nodes:
            self.b.loc = node.loc
            self._layer(node) if isinstance(node.op, Graph) else self._op(node)
        self.b.loc = ""
        results = [self.settled(v) for v in self.graph.outputs]
        for value in self.graph.params:
            self.at(value)
        self._in_order()
        return self.b.finish(results)

    def _in_order(self) -> None:
        """Parameters as the graph had them, not as they were first used."""
        places = {v.name: i for i, v in enumerate(self.graph.params)}
        pairs = sorted(zip(self.b.params, self.b.inits, strict=True), key=lambda p: places[p[0].name])
        self.b.params, self.b.inits = [p for p, _ in pairs], [i for _, i in pairs]

    # -- nodes ----------------------------------------------------------------------------

    def _layer(self, node: Node) -> None:
        """A layer's borders are settled; a parameter that is handed to it is split as it wants."""
        layer = node.callee
        assert layer is not None
        for value, own in zip(node.operands, layer.inputs, strict=True):
            if self.fresh(value):
                self.at(value, self.terms.wants(layer, own, self.split))
        inputs = [self.at(v) if v in self.inits else self.settled(v) for v in node.operands]
        made = placed(layer, [v.type for v in inputs], self.terms, self.notes)
        self.env.update(zip(node.outputs, self.b.emit(made, inputs, node.attrs, [v.name for v in node.outputs]), strict=True))

    def _op(self, node: Node) -> None:
        if self._waits(node):
            self.later[node.outputs[0]] = node
            return
        rule = self.terms.rules.get(node.op.name)
        made = rule(self, node) if rule else None
        self.env.update(zip(node.outputs, made or self.plain(node), strict=True))

    def _waits(self, node: Node) -> bool:
        """Whether it is of one parameter, number by number: it is made where it is used, as that splits the parameter."""
        same = len(node.inputs) == len(node.outputs) == 1 and node.operands[0].type.shape == node.outputs[0].type.shape
        assert isinstance(node.op, OpDef)
        return same and node.op.row and set(node.op.roles.values()) == {"map"} and self.fresh(node.operands[0])

    def plain(self, node: Node, given: Types | None = None) -> Sequence[Value]:
        """The op on its operands: as they are, or as far from it as types ask for."""
        assert isinstance(node.op, OpDef)
        first = given if given is not None else [self.type(v) if v is not None else None for v in node.inputs]
        for types in self._attempts(first):
            full, attrs = self.aligned(node, types), dict(node.attrs)
            if node.is_op("reshape") and full[0] is not None:
                attrs["pattern"] = local_reshape(full[0], attrs["pattern"], self.split, full[0])
            made = inferred(node.op, full, attrs, self.split)
            if made is not None and all(self.split.even(t) for t in made):
                return self.emit(node, full, attrs)
        raise PlacementError(f"{node.op.name}: its operands cannot be made whole over {self.split.axis} (at {node.loc})")

    def _attempts(self, types: Types) -> Iterator[list[TensorType | None]]:
        """From nothing moved to everything whole."""
        yield [*types]
        yield [self._near(t) if t is not None else None for t in types]
        yield [self.rest(t) if t is not None else None for t in types]
        yield [self.split.whole(t) if t is not None else None for t in types]

    def _near(self, type_: TensorType) -> TensorType:
        """Sums may stay open; what is split is made whole."""
        return type_ if self.split.axis in type_.partial else self.split.whole(type_)

    def rest(self, type_: TensorType) -> TensorType:
        """Where a sum is closed: over tokens that are split, or everywhere."""
        if self.split.axis not in type_.partial:
            return type_
        whole = self.split.whole(type_)
        stays = self.terms.tokens and type_.shape[:2] == self.tokens and len(type_.dims) > 2
        return self.split.over(whole, TOKENS) if stays else whole

    def aligned(self, node: Node, types: Types) -> list[TensorType | None]:
        """Whole operands split as those they meet, in the same order; parameters are made so."""
        made, op = [*types], node.op
        assert isinstance(op, OpDef)
        for letter, uses in op.bind(types, node.attrs).uses.items():
            lead = next((u.dim for u in uses if self.split.axis in u.dim.axes), None)
            if lead is None or op.role(letter) not in ("map", "sum"):
                continue
            for use in uses:
                type_, value = made[use.operand], node.inputs[use.operand]
                assert type_ is not None and value is not None
                if not self.split.lives(type_) and (not lead.order or self.fresh(value)):
                    made[use.operand] = self.placed(type_, use.position, lead.order)
        return made

    def placed(self, type_: TensorType, index: int, order: str) -> TensorType:
        made = self.split.over(type_, index)
        return made.with_dim(index, replace(made.dims[index], order=order)) if order else made

    def emit(self, node: Node, types: Types, attrs: Mapping[str, Any]) -> Sequence[Value]:
        given = zip(node.inputs, types, strict=True)
        inputs = [self.at(v, t) if v is not None and t is not None else None for v, t in given]
        return self.b.emit(node.op, inputs, attrs, [v.name for v in node.outputs], node.loc)

    # -- values ---------------------------------------------------------------------------

    def fresh(self, value: Value) -> bool:
        """Whether it is a parameter that nothing has used yet, or made of one."""
        return (value in self.inits or value in self.later) and value not in self.env

    def _first(self, value: Value, type_: TensorType) -> Value:
        """A parameter, typed at its first use, or what is made of it."""
        if node := self.later.get(value):
            operand = node.operands[0]
            there = self.at(operand, replace(operand.type, dims=type_.dims))
            self.env[value] = self.b.emit(node.op, [there], node.attrs, [value.name], node.loc)[0]
        else:
            self.env[value] = self.b.param(value.name, type_, self.inits[value])
        return self.env[value]

    def type(self, value: Value) -> TensorType:
        return value.type if self.fresh(value) else self.env[value].type

    def settled(self, value: Value) -> Value:
        """A value as layers hand it on: no sum is open and no feature is split; the batch may be, and tokens where they are."""
        type_ = self.rest(self.type(value))
        dim = self.split.dim(type_)
        stays = dim is None or dim < TOKENS + self.terms.tokens
        return self.at(value, type_ if stays else self.split.whole(type_))

    def at(self, value: Value, wanted: TensorType | None = None) -> Value:
        """A value where it is wanted, moved there once; a parameter that is used first is made there."""
        if self.fresh(value):
            return self._first(value, wanted or value.type)
        if wanted is None or self.env[value].type == wanted:
            return self.env[value]
        if (value, wanted) not in self.copies:
            whole = self.split.whole(wanted)
            near = self.copies.get((value, whole), self.env[value]) if whole != wanted else self.env[value]
            self.copies[value, wanted] = self.moved(near, wanted)
        return self.copies[value, wanted]

    def moved(self, value: Value, wanted: TensorType) -> Value:
        """By one collective, or by way of a whole copy; an order of features is undone once they are whole."""
        src, dst = self.split.dim(value.type), self.split.dim(wanted)
        if src is not None and (dst is not None or value.type.dims[src].order != wanted.dims[src].order):
            value = self._whole(value, src)
        elif self.split.axis in value.type.partial:
            op, attrs = (ops.all_reduce, {}) if dst is None else (ops.reduce_scatter, {"dim": dst})
            value = self._sent(op, value, attrs)
        elif src is not None:
            value = self._sent(ops.all_gather, value, {"dim": src})
        if dst is not None and self.split.dim(value.type) is None:
            if wanted.dims[dst].order and value.type.dims[dst].order != wanted.dims[dst].order:
                value = ops.reorder(value, dim=dst, order=wanted.dims[dst].order, was=value.type.dims[dst].order)
            value = ops.shard(value, axis=self.split.axis, dim=dst)
        assert value.type == wanted, f"{value.type} is not {wanted}"
        return value

    def _whole(self, value: Value, src: int) -> Value:
        """All of a dim, in its natural order if the ranks' parts were in one of theirs."""
        value, order = self._sent(ops.all_gather, value, {"dim": src}), value.type.dims[src].order
        return ops.reorder(value, dim=src, was=order) if order.startswith("sections") else value

    def _sent(self, op: OpDef, value: Value, attrs: dict[str, Any]) -> Value:
        """A collective, and what it costs."""
        made = self.b.emit(op, [value], {"axis": self.split.axis, **attrs}, [value.name])[0]
        n, batched = self.split.ranks, self.tokens and value.type.shape[:2] == self.tokens
        size = token_bytes(value.type, TOKENS if batched else None) * (2 if op is ops.all_reduce else 1) * (n - 1) // n
        unit = "bytes a token" if batched else "bytes"
        self.notes.said.append(Remark("note", op.name, self.b.loc, f"{value.name}: a rank sends {size} {unit}"))
        return made


Rule = Callable[[Walk, Node], "Sequence[Value] | None"]


def placed(graph: Graph, types: Sequence[TensorType], terms: Terms, notes: Notes) -> Graph:
    """The graph over inputs of these types, once; one whose insides do not part is left whole."""
    case = graph, tuple(types)
    if case not in notes.known:
        start = len(notes.said)
        try:
            notes.known[case] = Walk(graph, types, terms, notes).run()
        except Unfit as why:
            del notes.said[start:]
            notes.said.append(Remark("missed", "columns", graph.name, f"{why}; every rank does all of it"))
            notes.known[case] = Walk(graph, types, replace(terms, plain=True), notes).run()
    return notes.known[case]
