"""What an exchange packs: sections of projections whose weights can have their rows in the order in which columns travel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..ir import Graph, Node, Replay, Value, ops
from ..ir.orders import Sections
from .structure import orderly


@dataclass(frozen=True)
class Section:
    """Columns of a projection: its result, where they start, how many they are, and the value that they are."""

    root: Value
    start: int
    size: int
    value: Value


@dataclass(frozen=True)
class Packing:
    """A projection whose travelling sections stand in front, every rank's share of each together."""

    linear: Node
    away: tuple[Section, ...]
    home: tuple[Section, ...]

    def order(self, ranks: int) -> str:
        parts = sorted((*self.away, *self.home), key=lambda s: s.start)
        return str(Sections(ranks, tuple(s.size if s in self.away else -s.size for s in parts)))

    def emit(self, replay: Replay, ranks: int) -> Value:
        """The projection again; what stays is entered as it was, and what travels is [..., ranks, share]."""
        x, *weights = self.linear.inputs
        assert x is not None
        b, order = replay.builder, self.order(ranks)
        b.loc = self.linear.loc
        rows = [
            ops.relabel(ops.reorder(replay.env[w], dim=0, order=order), dim=0, was=order) if w is not None else None
            for w in weights
        ]
        name = self.linear.outputs[0].name
        y = b.emit(self.linear.op, [replay.env[x], *rows], self.linear.attrs, [name], self.linear.loc)[0]
        if self.home:
            sizes = (sum(s.size for s in self.away), *(s.size for s in self.home))
            y, *kept = b.emit(ops.split, [y], {"sizes": sizes}, [name, *(s.value.name for s in self.home)], self.linear.loc)
            replay.env.update((s.value, k) for s, k in zip(self.home, kept, strict=True))
        return ops.reshape(y, pattern=f"... (g={ranks} e) -> ... g e")


def sections_of(graph: Graph, value: Value, lead: int) -> list[Section] | None:
    """The columns, in order of each rank's share, that a value of `lead` dims and features is made of; None if it is no view.

    Its features are one dim, heads and what is in a head, or shares of several sections that were laid side by side.
    """
    maker = graph.makers.get(value)
    if len(value.type.dims) == lead + 1:
        found = _columns(graph, value)
        return None if found is None else [found]
    if maker is None:
        return None
    if maker.is_op("concat") and len(value.type.dims) == lead + 2:
        parts = [sections_of(graph, v, lead) for v in maker.operands]
        return None if any(p is None for p in parts) else [s for p in parts for s in p or ()]
    if maker.is_op("reshape") and orderly(maker.attrs["pattern"]) and _parts_features(maker, lead):
        return sections_of(graph, maker.operands[0], lead)
    return None


def _parts_features(node: Node, lead: int) -> bool:
    """Whether a reshape parts one dim of features, and leaves the dims before as they are."""
    was, now = node.operands[0].type.dims, node.outputs[0].type.dims
    return len(was) == lead + 1 and was[:lead] == now[:lead]


def _columns(graph: Graph, value: Value) -> Section | None:
    """Where the columns of a value start in the projection that it is split from."""
    maker = graph.makers.get(value)
    if maker is None:
        return None
    if maker.is_op("linear"):
        return Section(value, 0, int(value.type.dims[-1].size), value)
    if not maker.is_op("split") or maker.attrs["parts"] > 1:
        return None
    whole = _columns(graph, maker.operands[0])
    if whole is None:
        return None
    before = sum(maker.attrs["sizes"][: maker.outputs.index(value)])
    return Section(whole.root, whole.start + before, int(value.type.dims[-1].size), value)


def ends(graph: Graph, value: Value, root: Value, start: int = 0) -> Iterator[Section]:
    """The sections that a projection's columns are split into in the end."""
    users = graph.uses.get(value, ())
    if value in graph.outputs or len(users) != 1 or not users[0].is_op("split") or users[0].attrs["parts"] > 1:
        yield Section(root, start, int(value.type.dims[-1].size), value)
        return
    for part in users[0].outputs:
        yield from ends(graph, part, root, start)
        start += int(part.type.dims[-1].size)


def packing(graph: Graph, travelling: Sequence[Section], dead: Iterable[Node]) -> Packing | None:
    """How the projection of these sections may write them packed; None where its weights or they have other readers."""
    root, gone = travelling[0].root, set(dead)
    linear = graph.makers[root]
    weights = [v for v in linear.inputs[1:] if v is not None]
    if not all(w in graph.params and graph.uses[w] == (linear,) for w in weights):
        return None
    parts, away = [*ends(graph, root, root)], {s.value for s in travelling}
    moved = tuple(s for s in parts if s.value in away)
    elsewhere = any(s.value in graph.outputs or not gone.issuperset(graph.uses.get(s.value, ())) for s in moved)
    if len(moved) < len(away) or elsewhere:
        return None
    return Packing(linear, moved, tuple(s for s in parts if s.value not in away))


def unread(graph: Graph, exchanges: Iterable[Node], roots: Iterable[Value]) -> set[Node]:
    """The exchanges, and what only they read up to the projections."""
    gone, kept = set(exchanges), {graph.makers[v] for v in roots}
    for node in reversed(graph.nodes):
        readers = [n for v in node.outputs for n in graph.uses.get(v, ())]
        if readers and gone.issuperset(readers) and node not in kept and not any(v in graph.outputs for v in node.outputs):
            gone.add(node)
    return gone


def by_root(found: Mapping[Node, Sequence[Section] | None]) -> dict[Value, list[Node]]:
    """The exchanges that move sections of one projection alone, in the order of its columns, by projection."""
    made = dict[Value, list[Node]]()
    for node, sections in sorted(found.items(), key=lambda pair: pair[1][0].start if pair[1] else 0):
        roots = {s.root for s in sections or ()}
        starts = [s.start for s in sections or ()]
        if len(roots) == 1 and starts == sorted(starts):
            made.setdefault(roots.pop(), []).append(node)
    return {root: nodes for root, nodes in made.items() if _one_after_another(found, nodes)}


def _one_after_another(found: Mapping[Node, Sequence[Section] | None], nodes: Sequence[Node]) -> bool:
    starts = [s.start for n in nodes for s in found[n] or ()]
    return len(starts) > 1 and starts == sorted(set(starts))
