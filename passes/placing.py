"""Placing one graph: its nodes replayed over tokens that are split, each value moved where it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from ..ir import Graph, Node, OpDef, PlacementError, Replay, TensorType, Value, ops
from .outline import inline
from .remarks import Remark
from .remedies import MIXING, REMEDIES, Remedy, Site, Wanted, across, choices, of_keys, repeats, section_groups, sections_of
from .splitting import Split, aligned, inferred, local_reshape, result_letters, token_bytes, token_letters
from .tokens import tokens_of


@dataclass(frozen=True)
class Plan:
    """What is split, and what is tried first where an op must see whole sequences: everywhere, and by name of a layer."""

    split: Split
    wanted: Wanted
    forced: Mapping[str, Wanted]
    orders: Mapping[str, str] = field(default_factory=dict[str, str])  # of layers whose tokens are in another order

    def of(self, graph: Graph) -> Wanted:
        return self.forced.get(graph.name, self.wanted)

    def within(self, layer: Graph, lead: TensorType) -> Plan:
        """The plan inside a layer: its own order; that of its first operand where it takes and gives tokens in any."""
        order, index = self.orders.get(layer.name, self.split.order), self.split.dim(lead)
        free = layer.outputs[0].type.shape == lead.shape and not any(n.is_op(*MIXING) for n in layer.nodes)
        if free and index is not None and layer.name not in self.orders:
            order = lead.dims[index].order
        return replace(self, split=replace(self.split, order=order))


@dataclass(frozen=True)
class Pack:
    """Channels in sections, packed so that each of `shares` ranks finds its part of every section together."""

    split: Mapping[str, Any]  # attributes of the split that parts them
    groups: Sequence[tuple[int, int]]  # for each section: key heads, and how often they are repeated
    shares: int

    @property
    def sizes(self) -> list[int]:
        """A rank's channels of every section."""
        return [n * m // self.shares for n, (_, m) in zip(self.split["sizes"], self.groups, strict=True)]

    def packed(self, x: Value) -> Value:
        """`[..., c]` as `[..., shares, c / shares]`."""
        parts = x.builder.emit(ops.split, [x], self.split)
        joined, *rest = (self._section(p, n, g) for p, n, g in zip(parts, self.sizes, self.groups, strict=True))
        for part in rest:
            joined = ops.concat(joined, part)
        return joined

    def _section(self, part: Value, size: int, group: tuple[int, int]) -> Value:
        heads, times = group
        if times > 1:
            lead, four = ("x y", "x y") if len(part.type.dims) == 3 else ("x", "u=1 x")
            width = int(part.type.dims[-1].size) // heads
            many = ops.repeat_heads(ops.reshape(part, pattern=f"{lead} (g e={width}) -> {four} g e"), r=times)
            part = ops.reshape(many, pattern=f"{four} g e -> {lead} (g e)")
        return ops.reshape(part, pattern=f"... (g e={size}) -> ... g e")

    def parted(self, y: Value) -> list[Value]:
        """The sections of `[..., c]` again, each split over ranks."""
        rows = ops.reshape(y, pattern=f"... (g e={sum(self.sizes)}) -> ... g e")
        pieces = y.builder.emit(ops.split, [rows], {"sizes": tuple(self.sizes)})
        return [ops.reshape(piece, pattern="... g e -> ... (g e)") for piece in pieces]


Known = dict[tuple[Graph, tuple[TensorType, ...]], Graph]


class Placing:
    """A graph being replayed over split inputs: where each value is at home, and where it lives too."""

    def __init__(self, graph: Graph, types: Sequence[TensorType], plan: Plan, known: Known, said: list[Remark]) -> None:
        self.graph = graph = inline(graph) if any(g.role == "kernel" for g in graph.callees) else graph
        self.plan, self.split, self.known, self.said = plan, plan.split, known, said
        replay = Replay(graph, types=types)
        self.b, self.env = replay.builder, replay.env  # each value as it was made
        self.home = {v: new.type for v, new in self.env.items()}
        self.borders = next((new for v, new in self.env.items() if v.name == "cu"), None)
        self.copies = dict[tuple[Value, TensorType], Value]()
        self.carried, self.done = set[Value](), set[Node]()  # values that a conv brought away from home; what is emitted

    def run(self) -> Graph:
        for node in self.graph.nodes:
            if node not in self.done:
                self.b.loc = node.loc
                self._layer(node) if isinstance(node.op, Graph) else self._op(node, node.op)
        self.b.loc = ""
        return self.b.finish([self._result(v) for v in self.graph.outputs])

    def _result(self, value: Value) -> Value:
        """Results are at home; a sum over ranks is added up."""
        home = self.home[value]
        return self._at(value, replace(home, partial=home.partial - {self.split.axis}), f"the results of {self.graph.name}")

    # -- nodes ----------------------------------------------------------------------------

    def _layer(self, node: Node) -> None:
        """A layer's borders are at home, tokens in the order that the layer runs in."""
        assert node.callee is not None
        inner = self.plan.within(node.callee, self.home[node.operands[0]])
        types = [inner.split.ordered(self.home[v]) for v in node.operands]
        case = node.callee, tuple(types)
        if case not in self.known:
            self.known[case] = Placing(*case, inner, self.known, self.said).run()
        given = zip(node.operands, types, case[0].inputs, strict=True)
        inputs = [self._at(v, t, f"{i.name} of {node.op.name}") for v, t, i in given]
        self._emit(node, self.known[case], inputs, node.attrs)
        self.home |= {v: self.env[v].type for v in node.outputs}

    def _op(self, node: Node, op: OpDef) -> None:
        """As it is where its operands are at home, or all away; else by a remedy."""
        homes = [self.home[v] if v is not None else None for v in node.inputs]
        types = aligned(op, homes, node.attrs, self.split)
        results = inferred(op, types, node.attrs, self.split)
        if results is None:
            return self._remedy(node, op, homes)
        self._settle(node, results)
        if away := self._away(node, op):
            self.carried.update(node.outputs)
        types, attrs = away or (types, node.attrs)
        return self._emit(node, op, self._all_at(node, types), attrs)

    def _settle(self, node: Node, results: Sequence[TensorType]) -> None:
        self.home.update(zip(node.outputs, results, strict=True))

    def _whole_results(self, node: Node, op: OpDef, homes: Sequence[TensorType | None]) -> list[TensorType]:
        """Where results of an op that sees whole sequences are at home: split along the letters that operands are."""
        bare = [self.split.whole(t) if t is not None else None for t in homes]
        made = op.infer(bare, node.attrs)
        if op.type_rule:
            return [*made]
        bound, letters = op.bind(bare, node.attrs), token_letters(op, homes, node.attrs, self.split)
        found = [[i for i, a in enumerate(result_letters(op, k, bound.rest)) if a in letters] for k in range(len(made))]
        return [self.split.tokens(t, at[0]) if at else t for t, at in zip(made, found, strict=True)]

    def _remedy(self, node: Node, op: OpDef, homes: Sequence[TensorType | None]) -> None:
        """Emit an op so that it sees whole sequences, or runs across their split."""
        site = Site(self.graph, node, self.split, tuple(homes), self.plan.of(self.graph))
        remedy = self._chosen(site)
        self.said.append(Remark("passed", remedy.name, node.loc, f"{op.name}: {remedy.about}"))
        if remedy.by:
            return self._across(node, op, homes, remedy.by)
        self._settle(node, self._whole_results(node, op, homes))
        if remedy.name == "sections":
            return self._sections(site)
        targets = remedy.targets(op, homes, node.attrs, self.split)
        given = self._all_at(node, targets) if remedy.name != "heads" else self._heads_at(site, targets)
        self._emit(node, op, given, node.attrs)
        if node.is_op("causal_conv1d"):
            self.carried.update(node.outputs)

    def _across(self, node: Node, op: OpDef, homes: Sequence[TensorType | None], by: str) -> None:
        """Nothing moves here: the op itself says what does."""
        types, attrs = across(op, homes, node.attrs, self.split, by)
        self._emit(node, op, self._all_at(node, types), attrs)
        self._settle(node, [self.env[v].type for v in node.outputs])
        assert op.crossing is not None
        there = tokens_of(self.b.finish(()))
        sent = op.crossing.ways[by].sent(types, attrs, self.split.ranks, {**there.sizes})
        self.said.append(Remark("note", by, node.loc, f"{op.name}: {sent} bytes a rank of {there.count} tokens"))

    def _chosen(self, site: Site) -> Remedy:
        """The first remedy that is legal; why others are not is said."""
        why = dict[str, str]()
        for remedy in choices(site.op, site.wanted):
            why[remedy.name] = remedy.refuses(site, remedy.letter)
            if not why[remedy.name]:
                return remedy
            self.said.append(Remark("missed", remedy.name, site.node.loc, f"{site.op.name}: {why[remedy.name]}"))
        left = [r.name for r in REMEDIES if r.serves(site.op) and not r.refuses(site, r.letter)]
        told = "; ".join(f"{k}: {v}" for k, v in why.items()) or f"{site.wanted.attention} is no way of it"
        raise PlacementError(f"{site.node.loc}: {site.op.name} cannot go as told, {told}; what remains: {', '.join(left)}")

    def _away(self, node: Node, op: OpDef) -> tuple[Sequence[TensorType | None], Mapping[str, Any]] | None:
        """How a row-wise op works away from home: all its tokens are, some by a conv, and no result is a sum over ranks."""
        tokens = [v for v in node.operands if self.split.lives(self.home[v])]
        if not op.row or self.carried.isdisjoint(tokens) or any(self.env[v].type == self.home[v] for v in tokens):
            return None
        attrs = dict(node.attrs)
        if node.is_op("reshape"):
            attrs["pattern"] = local_reshape(self.env[tokens[0]].type, attrs["pattern"], self.split, self.home[tokens[0]])
        given = [self.env[v].type if v is not None else None for v in node.inputs]
        types = aligned(op, given, attrs, self.split)
        made = inferred(op, types, attrs, self.split)
        if made is None or not all(self.split.even(t) and self.split.axis not in t.partial for t in made):
            return None
        return types, attrs

    def _emit(self, node: Node, op: OpDef | Graph, inputs: Sequence[Value | None], attrs: Mapping[str, Any]) -> None:
        made = self.b.emit(op, inputs, attrs, [v.name for v in node.outputs], node.loc)
        self.env.update(zip(node.outputs, made, strict=True))

    # -- a conv and the sections behind it ------------------------------------------------

    def _heads_at(self, site: Site, targets: Sequence[TensorType | None]) -> list[Value | None]:
        """Operands split over heads; key heads fewer than ranks stand there several times."""
        times, node, made = repeats(site), site.node, [*targets]
        if times == 1:
            return self._all_at(node, targets)
        for i in of_keys(site.op):
            value, type_ = node.inputs[i], targets[i]
            assert value is not None and type_ is not None
            many = replace(type_.dims[2], size=int(type_.dims[2].size) * times)
            made[i] = type_.with_dim(2, many)
            if self.env[value].type != made[i] and (value, made[i]) not in self.copies:
                near = self._at(value, self.home[value], "repeat_heads")
                again = ops.repeat_heads(near, r=times)
                self.copies[value, made[i]] = self._moved(again, made[i], 1, self._path(value, f"{i} of {site.op.name}"))  # type: ignore[index] # set above
        self.said.append(Remark("note", "heads", node.loc, f"{site.op.name}: key heads stand {times} times, for as many ranks"))
        return self._all_at(node, made)

    def _sections(self, site: Site) -> None:
        """Each rank's share of every section stands together, so that one exchange moves all of them."""
        node, behind = site.node, sections_of(self.graph, site.node)
        x, w, bias, _, cu = node.inputs
        groups = section_groups(site, behind) if behind is not None else None
        assert x is not None and w is not None and behind is not None and groups is not None
        pack, what = Pack(behind.attrs, groups, self._shares(x)), "x of causal_conv1d"
        packed = pack.packed(self._at(x, self.home[x], what))
        moved = self._moved(packed, self.split.over(self.split.whole(packed.type), 2), 1, self._path(x, what))
        taps = self._share(ops.reshape(pack.packed(ops.reshape(self.env[w], pattern="c k -> k c")), pattern="k g e -> (g e) k"))
        row = None if bias is None else pack.packed(ops.reshape(self.env[bias], pattern="c -> u=1 c"))
        given = None if row is None else self._share(ops.reshape(row, pattern="u=1 g e -> (g e)"))
        borders = self.env[cu] if cu is not None else None
        self._emit(node, node.op, [ops.reshape(moved, pattern="b t g e -> b t (g e)"), taps, given, None, borders], node.attrs)
        self.b.loc = behind.loc
        self.env.update(zip(behind.outputs, pack.parted(self.env[node.outputs[0]]), strict=True))
        self.carried.update(behind.outputs)
        self.done.add(behind)
        self._settle(behind, ops.split.infer([self.home[node.outputs[0]]], behind.attrs))

    def _shares(self, x: Value) -> int:
        """How many ranks a value's channels are shared out to, those of other axes included."""
        return self.split.ranks * prod(self.split.mesh[a] for a in self.home[x].dims[-1].axes if a in self.split.mesh)

    def _share(self, x: Value) -> Value:
        return ops.shard(x, axis=self.split.axis, dim=0)

    # -- values ---------------------------------------------------------------------------

    def _all_at(self, node: Node, types: Sequence[TensorType | None]) -> list[Value | None]:
        given = zip(node.inputs, types, node.op.inputs, strict=True)
        wanted = [(v, t, f"{o.name} of {node.op.name}") for v, t, o in given]
        return [self._at(v, t, what) if v is not None and t is not None else None for v, t, what in wanted]

    def _at(self, value: Value, wanted: TensorType, reader: str) -> Value:
        """A value where it is wanted, moved there once."""
        if self.env[value].type == wanted:
            return self.env[value]
        if (value, wanted) not in self.copies:
            tokens = self.split.dim(self.home[value])
            near = self.copies.get((value, self.split.whole(wanted)), self.env[value])  # of a whole copy, nothing moves
            self.copies[value, wanted] = self._moved(near, wanted, tokens, self._path(value, reader))
        return self.copies[value, wanted]

    def _path(self, value: Value, reader: str) -> str:
        maker = self.graph.makers.get(value)
        return f"{maker.op.name if maker else value.name} to {reader}"

    def _moved(self, value: Value, wanted: TensorType, tokens: int | None, what: str) -> Value:
        """The collective between two placements, and what it costs; tokens are put in order where they are whole."""
        axis, src, dst = self.split.axis, self.split.dim(value.type), self.split.dim(wanted)
        if src is not None and src == dst:
            return self._exchanged(value, src, value.type.dims[src].order, wanted.dims[src].order, what)
        if dst is not None and wanted.dims[dst].order != value.type.dims[dst].order:
            value = self._reordered(value, dst, value.type.dims[dst].order, wanted.dims[dst].order)
        op, attrs, share = _collective(src, dst, axis in value.type.partial, self.split.ranks)
        made = self.b.emit(op, [value], {"axis": axis, **attrs}, [value.name])[0]
        if share:
            size = -(-token_bytes(value.type, tokens) * share // self.split.ranks**2)
            self.said.append(Remark("note", op.name, self.b.loc, f"{what}: {size} bytes a token and rank"))
        if src is not None and made.type.dims[src].order != wanted.dims[src].order:
            made = self._reordered(made, src, made.type.dims[src].order, wanted.dims[src].order)
        assert made.type == wanted
        return made

    def _exchanged(self, value: Value, dim: int, was: str, order: str, what: str) -> Value:
        """Tokens that are split, in another order: they move between ranks."""
        borders = self.borders if "packed" in was + order else None
        attrs = {"dim": dim, "was": was, "order": order, "over": self.split.axis, "by": "exchange"}
        self.said.append(Remark("note", "reorder", self.b.loc, f"{what}: tokens from order {was or 'natural'!r} to {order!r}"))
        return self.b.emit(ops.reorder, [value, borders], attrs, [value.name])[0]

    def _reordered(self, value: Value, dim: int, was: str, order: str) -> Value:
        """Tokens of a whole dim in another order."""
        borders = self.borders if "packed" in was + order else None
        return self.b.emit(ops.reorder, [value, borders], {"dim": dim, "was": was, "order": order}, [value.name])[0]


def _collective(src: int | None, dst: int | None, partial: bool, ranks: int) -> tuple[OpDef, dict[str, int], int]:
    """The op from one placement to another, its dims, and what a rank receives in parts of 1 / ranks^2 of the value."""
    if partial:
        return (ops.all_reduce, {}, 2 * ranks * (ranks - 1)) if dst is None else (ops.reduce_scatter, {"dim": dst}, ranks - 1)
    if src is None:
        assert dst is not None
        return ops.shard, {"dim": dst}, 0
    if dst is None:
        return ops.all_gather, {"dim": src}, ranks * (ranks - 1)
    return ops.all_to_all, {"src": src, "dst": dst}, ranks - 1
