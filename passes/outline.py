"""Fused regions: a convex set of nodes becomes a `@kernel` graph called once, and back."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

from ..ir import Builder, Graph, Node, PassError, Replay, Value, ops
from .registry import register
from .structure import copy_node


@dataclass(frozen=True)
class Region:
    """Nodes to become one kernel, and its name."""

    name: str
    nodes: tuple[Node, ...]  # in the graph's order

    @property
    def made(self) -> frozenset[Value]:
        return frozenset(v for n in self.nodes for v in n.outputs)

    @property
    def operands(self) -> tuple[Value, ...]:
        """What comes from outside, in order of first use."""
        made = self.made
        return tuple(dict.fromkeys(v for n in self.nodes for v in n.operands if v not in made))

    def results(self, graph: Graph) -> tuple[Value, ...]:
        """What is read outside or returned, in order of making."""
        inside, returned = set(self.nodes), set(graph.outputs)
        made = (v for n in self.nodes for v in n.outputs)
        return tuple(v for v in made if v in returned or any(n not in inside for n in graph.uses.get(v, ())))

    @property
    def loc(self) -> str:
        """The part of the spec path that its nodes share."""
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(n.loc.split(".") for n in self.nodes), strict=False))
        return ".".join(parts[0] for parts in shared)


def region(graph: Graph, nodes: Iterable[Node], name: str) -> Region:
    """A region of these nodes, put in the graph's order."""
    wanted = set(nodes)
    return Region(name, tuple(n for n in graph.nodes if n in wanted))


def outline(graph: Graph, nodes: Iterable[Node], name: str) -> Graph:
    """Turn a convex set of nodes into one kernel graph, called once; PassError when the set is not convex."""
    return outline_all(graph, [region(graph, nodes, name)])


def outline_all(graph: Graph, regions: Sequence[Region]) -> Graph:
    """Outline disjoint regions; other nodes keep their order as far as data allows, collectives always."""
    _check(graph, regions)
    units = _ordered(graph, regions)
    replay = Replay(graph)
    for unit in units:
        if isinstance(unit, Node):
            copy_node(replay.builder, unit, replay.env)
            continue
        kernel, results = kernel_of(graph, unit), unit.results(graph)
        inputs = [replay.env[v] for v in unit.operands]
        made = replay.builder.emit(kernel, inputs, {}, [v.name for v in results], unit.loc)
        replay.env.update(zip(results, made, strict=True))
    return replay.builder.finish(replay.env[v] for v in graph.outputs)


def kernel_of(graph: Graph, unit: Region) -> Graph:
    """The body of a region, a graph of its own."""
    b = Builder(unit.name, "kernel")
    env = {v: b.input(v.name, v.type) for v in unit.operands}
    for node in unit.nodes:
        copy_node(b, node, env)
    return b.finish(env[v] for v in unit.results(graph))


def _check(graph: Graph, regions: Sequence[Region]) -> None:
    known, taken = set(graph.nodes), set[Node]()
    for r in regions:
        if not r.nodes or not known.issuperset(r.nodes):
            raise PassError(f"outline {r.name}: the set must have at least one node, and only nodes of {graph.name}")
        if taken.intersection(r.nodes):
            raise PassError(f"outline {r.name}: {_name(r.nodes[0])} is in two sets; a node goes into one kernel")
        if bad := next((n for n in r.nodes if n.callee is not None or communicates(n)), None):
            raise PassError(f"outline {r.name}: {_name(bad)} is a call or a collective; a kernel has local ops alone")
        if not r.results(graph):
            raise PassError(f"outline {r.name}: nothing that it makes is used; run dce first")
        taken.update(r.nodes)


def _name(node: Node) -> str:
    return f"{node.op.name} at {node.loc}" if node.loc else node.op.name


def communicates(node: Node) -> bool:
    """Whether ranks talk in it, so that its order among its like must not change."""
    if node.callee is not None:
        return _has_collective(node.callee)
    return node.op in (*ops.COLLECTIVES, *ops.UNDER_WAY) or bool(node.attrs.get("over"))


@lru_cache(maxsize=1024)
def _has_collective(graph: Graph) -> bool:
    return any(communicates(n) for n in graph.nodes)


def _ordered(graph: Graph, regions: Sequence[Region]) -> list[Node | Region]:
    """Nodes and regions, each after what it needs; a region stands where its last node stood unless a use is earlier."""
    unit_of: dict[Node, Region] = {n: r for r in regions for n in r.nodes}
    place = {n: i for i, n in enumerate(graph.nodes)}
    units = list(dict.fromkeys(unit_of.get(n, n) for n in graph.nodes))
    key = {u: max(place[n] for n in u.nodes) if isinstance(u, Region) else place[u] for u in units}
    users, waiting = _edges(graph, unit_of)
    ready = [(key[u], i) for i, u in enumerate(units) if not waiting.get(u)]
    index = {u: i for i, u in enumerate(units)}
    heapq.heapify(ready)
    done = list[Node | Region]()
    while ready:
        unit = units[heapq.heappop(ready)[1]]
        done.append(unit)
        for user in users.get(unit, ()):
            waiting[user].discard(unit)
            if not waiting[user]:
                heapq.heappush(ready, (key[user], index[user]))
    if len(done) < len(units):
        _refuse(regions, set(done))
    return done


Unit = Node | Region


def _edges(graph: Graph, unit_of: Mapping[Node, Region]) -> tuple[dict[Unit, list[Unit]], dict[Unit, set[Unit]]]:
    """Who waits for whom: makers for values, and each collective for the one before it."""
    users, waiting = dict[Unit, list[Unit]](), dict[Unit, set[Unit]]()
    last: Node | None = None
    for node in graph.nodes:
        unit: Unit = unit_of.get(node, node)
        before: list[Unit] = [unit_of.get(graph.makers[v], graph.makers[v]) for v in node.operands if v in graph.makers]
        if communicates(node):
            before += [last] if last is not None else []
            last = node
        for other in before:
            if other is not unit and other not in waiting.setdefault(unit, set()):
                waiting[unit].add(other)
                users.setdefault(other, []).append(unit)
    return users, waiting


def _refuse(regions: Sequence[Region], done: Set[Unit]) -> None:
    stuck = [r for r in regions if r not in done]
    names = ", ".join(f"{r.name} ({_name(r.nodes[0])} to {_name(r.nodes[-1])})" for r in stuck)
    raise PassError(f"outline: {names} is not convex: a value leaves it and comes back; add what is between, or leave some out")


def convex(graph: Graph, nodes: Iterable[Node], place: Mapping[Node, int] | None = None) -> bool:
    """Whether no value leaves the set and comes back, collectives counted as one chain; `place` are the nodes' indices."""
    wanted = set(nodes)
    place = place or {n: i for i, n in enumerate(graph.nodes)}
    spots = [place[n] for n in wanted]
    inside, outside, collective = set[Value](), set[Value](), False
    for node in graph.nodes[min(spots, default=0) : max(spots, default=-1) + 1]:
        reached = any(v in outside for v in node.operands) or (collective and communicates(node))
        if node in wanted:
            if reached:
                return False
            inside.update(node.outputs)
        elif reached or any(v in inside for v in node.operands):
            outside.update(node.outputs)
            collective = collective or communicates(node)
    return True


def compatible(graph: Graph, regions: Sequence[Region]) -> list[Region]:
    """As many of the regions as can be outlined together, first come first served."""
    if _fits(graph, regions):
        return [*regions]
    kept = list[Region]()
    for r in regions:
        if _fits(graph, [*kept, r]):
            kept.append(r)
    return kept


def _fits(graph: Graph, regions: Sequence[Region]) -> bool:
    try:
        _ordered(graph, regions)
    except PassError:
        return False
    return True


def inline(graph: Graph) -> Graph:
    """Every kernel call replaced by the kernel's body."""
    replay = Replay(graph)

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
        if node.callee is None or node.callee.role != "kernel":
            return None
        env = {v: replay.env[given] for v, given in zip(node.callee.inputs, node.operands, strict=True)}
        for inner in node.callee.nodes:
            copy_node(replay.builder, inner, env)
        return [env[v] for v in node.callee.outputs]

    return replay.run(visit)


@register(numerics="exact")
def inline_kernels(graph: Graph) -> Graph:
    """Kernels become the ops that they are made of again."""
    return inline(graph)
