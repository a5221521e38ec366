"""Exchanges that travel together become one, packed by the projection whose sections they move where that can be."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

from ..ir import Graph, Mesh, Node, Replay, TensorType, Value, ops, parse_mesh
from .exchanges import Move, token_bytes
from .packing import Packing, by_root, packing, sections_of, unread
from .registry import Outcome, register
from .remarks import Remark
from .structure import copy_node

Group = tuple[Node, ...]


@register(numerics="exact")
def merge_exchanges(graph: Graph, *, mesh: str = "cp=2") -> Outcome:
    """Exchanges of the same dims become one, features packed so that each rank's share of all of them is one slice.

    Where what travels are sections of a projection, its weight takes its rows in that order, and packing costs nothing
    (`fold-orders` then has the weight kept so); else it is one copy. An exchange that needs another's result stays its own.
    """
    made, said, ranks = graph, list[Remark](), parse_mesh(mesh)
    groups = _groups(graph, ranks, said)
    while groups and _schedule(graph, groups) is None:
        said.append(Remark("missed", "merge-exchanges", groups[-1][0].loc, "two of them wait for each other's results"))
        groups = groups[:-1]
    if groups:
        made = _Merging(graph, groups, ranks, said).run()
    return made, tuple(said)


# -- which ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flat:
    """How the features of an exchanged value, all dims from `lead` on, are [groups, share]; groups are split over ranks."""

    lead: int
    groups: int
    share: int
    parts: tuple[int, ...]  # the sizes in a share, the first being a part of the first dim of features

    @staticmethod
    def of(node: Node, mesh: Mesh) -> Flat | None:
        """None where features are not numbers, or ranks do not divide them."""
        type_, move = node.operands[0].type, Move.of(node)
        lead = max(move.src, move.dst)
        first, *rest = type_.dims[lead:]
        if any(d.axes or d.order for d in rest) or first.order or not all(isinstance(d.size, int) for d in (first, *rest)):
            return None
        groups = prod(mesh[a] for a in {*first.axes, move.axis})
        if int(first.size) % groups:
            return None
        parts = (int(first.size) // groups, *(int(d.size) for d in rest))
        return Flat(lead, groups, prod(parts), parts)

    @property
    def to(self) -> str:
        """The reshape from the value to [groups, share]."""
        names = [f"a{i}" for i in range(len(self.parts))]
        return f"... (g {names[0]}={self.parts[0]}) {' '.join(names[1:])} -> ... g ({' '.join(names)})"

    @property
    def back(self) -> str:
        names = [f"a{i}" for i in range(len(self.parts))]
        sizes = [f"{n}={size}" for n, size in zip(names, self.parts, strict=True)]
        return f"... g ({' '.join(sizes)}) -> ... (g {names[0]}) {' '.join(names[1:])}"


def _groups(graph: Graph, mesh: Mesh, said: list[Remark]) -> list[Group]:
    """Exchanges alike that do not need each other's results, two or more."""
    made, needs = dict[Any, list[list[Node]]](), _needs(graph)
    for node in graph.nodes:
        if not node.is_op("all_to_all"):
            continue
        if Flat.of(node, mesh) is None:
            said.append(Remark("missed", "merge-exchanges", node.loc, f"the features of {node.operands[0].type} are not even"))
            continue
        open_ = made.setdefault(_key(node), [])
        if open_ and needs[node].isdisjoint(open_[-1]):
            open_[-1].append(node)
        else:
            open_.append([node])
    return [tuple(g) for runs in made.values() for g in runs if len(g) > 1]


def _key(node: Node) -> Any:
    """Equal for exchanges that can be one."""
    type_, move = node.operands[0].type, Move.of(node)
    lead = max(move.src, move.dst)
    return move, type_.dtype, type_.partial, type_.dims[:lead], type_.dims[lead].axes


def _needs(graph: Graph) -> dict[Node, set[Node]]:
    """The exchanges that each node waits for."""
    found = dict[Node, set[Node]]()
    for node in graph.nodes:
        before = [graph.makers[v] for v in node.operands if v in graph.makers]
        found[node] = {n for n in before if n.is_op("all_to_all")}.union(*(found[n] for n in before))
    return found


Unit = Node | Group


def _schedule(graph: Graph, groups: Sequence[Group]) -> list[Unit] | None:
    """Nodes and groups, each after what it needs and otherwise in the graph's order; None where that cannot be."""
    unit_of: dict[Node, Unit] = {n: g for g in groups for n in g}
    place = {n: i for i, n in enumerate(graph.nodes)}
    units = list(dict.fromkeys(unit_of.get(n, n) for n in graph.nodes))
    waiting, users = dict[Unit, set[Unit]](), dict[Unit, list[Unit]]()
    for unit in units:
        members = unit if isinstance(unit, tuple) else (unit,)
        makers = [graph.makers[v] for n in members for v in n.operands if v in graph.makers]
        waiting[unit] = {unit_of.get(n, n) for n in makers}
        for other in waiting[unit]:
            users.setdefault(other, []).append(unit)
    key = {u: place[u[-1]] if isinstance(u, tuple) else place[u] for u in units}
    return _ordered(units, key, waiting, users)


def _ordered(
    units: Sequence[Unit], key: Mapping[Unit, int], waiting: dict[Unit, set[Unit]], users: Mapping[Unit, list[Unit]]
) -> list[Unit] | None:
    by_key = {key[u]: u for u in units}
    ready, done = [key[u] for u in units if not waiting[u]], list[Unit]()
    heapq.heapify(ready)
    while ready:
        unit = by_key[heapq.heappop(ready)]
        done.append(unit)
        for user in users.get(unit, ()):
            waiting[user].discard(unit)
            if not waiting[user]:
                heapq.heappush(ready, key[user])
    return done if len(done) == len(units) else None


# -- how --------------------------------------------------------------------------------------


class _Merging:
    """A graph being replayed with its groups of exchanges merged."""

    def __init__(self, graph: Graph, groups: Sequence[Group], mesh: Mesh, said: list[Remark]) -> None:
        self.graph, self.groups, self.mesh, self.said = graph, groups, mesh, said
        self.replay = Replay(graph)
        self.packed = dict[Group, list[tuple[Packing, list[Node]]]]()
        self.gone = set[Node]()
        for group in groups:
            self._plan(group)
        self.roots = {p.linear: p for found in self.packed.values() for p, _ in found}
        self.made = dict[Node, Value]()

    def _plan(self, group: Group) -> None:
        """Which projections write what they give to this exchange packed."""
        flat = Flat.of(group[0], self.mesh)
        outward = Move.of(group[0]).dst == (flat.lead if flat else -1)
        plain = outward and not group[0].operands[0].type.dims[flat.lead if flat else 0].axes
        found = {n: sections_of(self.graph, n.operands[0], flat.lead) if flat and plain else None for n in group}
        taken, self.packed[group] = list[Node](), []
        for root, nodes in by_root(found).items():
            dead = unread(self.graph, nodes, [root])
            made = packing(self.graph, [s for n in nodes for s in found[n] or ()], dead)
            if made is not None:
                self.packed[group].append((made, nodes))
                taken += nodes
        self.gone |= unread(self.graph, taken, [p.linear.outputs[0] for p, _ in self.packed[group]]) - {*group}
        self.gone |= {n for p, _ in self.packed[group] for n in _splits(self.graph, p)}

    def run(self) -> Graph:
        for unit in _schedule(self.graph, self.groups) or ():
            if isinstance(unit, tuple):
                self._merge(unit)
            elif unit in self.roots:
                self.made[unit] = self.roots[unit].emit(self.replay, self._ranks(unit))
            elif unit not in self.gone:
                copy_node(self.replay.builder, unit, self.replay.env)
        self.replay.builder.loc = ""
        return self.replay.builder.finish(self.replay.env[v] for v in self.graph.outputs)

    def _ranks(self, linear: Node) -> int:
        group = next(g for g, found in self.packed.items() for p, _ in found if p.linear is linear)
        return self.mesh[group[0].attrs["axis"]]

    def _merge(self, group: Group) -> None:
        """One exchange of everything side by side, and each result again."""
        b, move = self.replay.builder, Move.of(group[0])
        b.loc = group[0].loc
        parts = [(self.made[p.linear], nodes) for p, nodes in self.packed[group]]
        packed = {n for _, nodes in parts for n in nodes}
        parts += [(self._flattened(n), [n]) for n in group if n not in packed]
        whole = reduce(ops.concat, [value for value, _ in parts])
        flats = [(n, self._flat(n)) for _, nodes in parts for n in nodes]
        moved = b.emit(ops.all_to_all, [whole], move.attrs, [group[0].outputs[0].name])[0]
        shares = b.emit(ops.split, [moved], {"sizes": tuple(f.share for _, f in flats)})
        for (node, flat), share in zip(flats, shares, strict=True):
            self.replay.env[node.outputs[0]] = self._shaped(share, flat, node.outputs[0].type)
        self.said.append(Remark("passed", "merge-exchanges", b.loc, self._told(group, len(packed), len(parts))))

    def _flat(self, node: Node) -> Flat:
        flat = Flat.of(node, self.mesh)
        assert flat is not None
        return flat

    def _flattened(self, node: Node) -> Value:
        """A value's features as [groups, share]."""
        value, flat = self.replay.env[node.operands[0]], self._flat(node)
        return value if flat.parts[0] == 1 and len(flat.parts) == 2 else ops.reshape(value, pattern=flat.to)

    def _shaped(self, share: Value, flat: Flat, wanted: TensorType) -> Value:
        made = share if flat.parts[0] == 1 and len(flat.parts) == 2 else ops.reshape(share, pattern=flat.back)
        assert made.type == wanted
        return made

    def _told(self, group: Group, packed: int, parts: int) -> str:
        sizes = [token_bytes(n.operands[0]) for n in group]
        how = "the projection writes them packed" if parts == 1 and packed else "packed by one copy"
        return f"{len(group)} exchanges become one of {sum(sizes)} bytes a token ({' + '.join(map(str, sizes))}); {how}"


def _splits(graph: Graph, made: Packing) -> list[Node]:
    """The splits that part a projection into its sections."""
    parts = {s.value for s in (*made.away, *made.home)}
    found, waiting = list[Node](), [made.linear.outputs[0]]
    while waiting:
        value = waiting.pop()
        if value not in parts:
            (split,) = graph.uses[value]
            found.append(split)
            waiting += split.outputs
    return found
