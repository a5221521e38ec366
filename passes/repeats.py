"""Layers found again in a flat graph: what repeats under a numbered path becomes a `@layer` graph, called once per number."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..ir import Builder, Graph, Init, Node, Replay, Value, parameters
from .outline import Region, compatible, outline_all, region
from .registry import Outcome, register
from .remarks import Remark
from .structure import copy_node

DEPTH = 4  # numbered paths that are looked for inside each other
LONG = 48  # a longer name of a layer is cut
_MIXERS = (
    "attention", "gated_delta_rule", "delta_rule", "kimi_delta_attention", "ssd", "selective_scan", "rg_lru",
    "gated_linear_attention", "causal_conv1d", "dispatch",
)  # fmt: skip


@register(numerics="exact", model=True)
def outline_layers(graph: Graph, *, min_ops: int = 4) -> Outcome:
    """Ops under one numbered path, `layers.3`, become a layer where that path repeats: equal layers are one graph."""
    if any(n.callee is not None for n in graph.nodes):
        return graph, (Remark("missed", "outline-layers", graph.name, "it calls graphs; it must be flat, before any fusing"),)
    for depth in range(DEPTH):
        found = _Places(graph, depth).regions(min_ops)
        kept = compatible(graph, found)
        made = _layered(graph, kept) if kept else graph
        if len(made.layers) < len(kept):
            lost = [r for r in found if r not in kept]
            return made, (*_passed(made), *(_missed(r) for r in lost))
    return graph, ()


def _passed(graph: Graph) -> Iterator[Remark]:
    calls = Counter(n.callee for n in graph.nodes if n.callee is not None)
    for layer, n in calls.items():
        where = next(x.loc for x in graph.nodes if x.callee == layer)
        yield Remark("passed", "outline-layers", where, f"{layer.name} is called {n} times, {len(layer.nodes)} ops each")


def _missed(unit: Region) -> Remark:
    why = "values leave it and come back through what is no part of it"
    return Remark("missed", "outline-layers", unit.loc, why)


# -- which ops ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Places:
    """The nodes under every numbered path of one depth: `layers.3` is of depth 0, `layers.3.experts.1` of depth 1."""

    graph: Graph
    depth: int

    def regions(self, min_ops: int) -> list[Region]:
        """A region for each numbered path of a stem that repeats."""
        members = defaultdict[str, list[Node]](list)
        for node, path in self.own.items():
            if path:
                members[path].append(node)
        large = {path: nodes for path, nodes in members.items() if len(nodes) >= min_ops}
        stems = Counter(path.rpartition(".")[0] for path in large)
        wanted = {path: nodes for path, nodes in large.items() if stems[path.rpartition(".")[0]] > 1}
        made = [region(self.graph, nodes, path) for path, nodes in wanted.items()]
        return [r for r in made if r.results(self.graph)]

    @cached_property
    def own(self) -> Mapping[Node, str]:
        """Each node's numbered path; empty for what several of them share."""
        paths = {n: self._path(n.loc) for n in self.graph.nodes}
        free = self._free()
        shared = set[Node]()
        for node in reversed(self.graph.nodes):
            if node not in free:
                continue
            readers = [n for v in node.outputs for n in self.graph.uses.get(v, ())]
            if any(n in shared or paths[n] != paths[node] for n in readers):
                shared.add(node)
        return {n: "" if n in shared else path for n, path in paths.items()}

    def _path(self, loc: str) -> str:
        parts = loc.split(".")
        at = [i for i, part in enumerate(parts) if part.isdecimal()]
        return ".".join(parts[: at[self.depth] + 1]) if len(at) > self.depth else ""

    def _free(self) -> set[Node]:
        """Nodes that no parameter of a numbered path reaches, such as positions: who asked first does not own them."""
        paths = {self._path(n.loc) for n in self.graph.nodes} - {""}
        starts = tuple(f"{_flat(_prefix(path))}_" for path in sorted(paths))
        reached, free = {p for p in self.graph.params if p.name.startswith(starts)}, set[Node]()
        for node in self.graph.nodes:
            if any(v in reached for v in node.operands):
                reached.update(node.outputs)
            else:
                free.add(node)
        return free


# -- into layers --------------------------------------------------------------------------------


def _layered(graph: Graph, regions: Sequence[Region]) -> Graph:
    """Each region a call of a layer with the parameters that are its own."""
    flat = outline_all(graph, regions)
    calls = {n: _Body.of(flat, n) for n in flat.nodes if n.callee is not None}
    known = _named({call.layer: None for call in calls.values()}, {c.layer: c.path for c in reversed(calls.values())})
    moved = {v for call in calls.values() for v in call.params}
    replay = _without(flat, moved)

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
        if (call := calls.get(node)) is None:
            return None
        given = [replay.env[v] for v in call.operands]
        names = [v.name for v in node.outputs]
        return replay.builder.emit(known[call.layer], given, {"params": call.prefix}, names, call.path)

    return replay.run(visit)


def _without(graph: Graph, moved: set[Value]) -> Replay:
    """A replay of a graph that has lost some parameters."""
    kept = [(p, i) for p, i in zip(graph.params, graph.inits, strict=True) if p not in moved]
    return Replay(replace(graph, params=tuple(p for p, _ in kept), inits=tuple(i for _, i in kept)))


@dataclass(frozen=True, eq=False)
class _Body:
    """A call to be: the layer's graph, what it is given, and its own parameters, under their prefix."""

    layer: Graph
    path: str
    prefix: str
    operands: tuple[Value, ...]
    params: tuple[Value, ...]

    @staticmethod
    def of(graph: Graph, node: Node) -> _Body:
        kernel = node.callee
        assert kernel is not None
        path, prefix = kernel.name, _prefix(kernel.name)
        inits, own = dict(zip(graph.params, graph.inits, strict=True)), dict[Value, Init]()
        for value in node.operands:
            alone = value in inits and graph.uses[value] == (node,) and value not in graph.outputs
            if alone and value.name.startswith(_flat(prefix) + "_"):
                own[value] = inits[value]
        made = _as_layer(kernel, dict(zip(kernel.inputs, node.operands, strict=True)), own, path, prefix)
        return _Body(made, path, prefix, tuple(v for v in node.operands if v not in own), tuple(own))


def _as_layer(kernel: Graph, given: Mapping[Value, Value], own: Mapping[Value, Init], path: str, prefix: str) -> Graph:
    """A kernel whose operands are parameters where they are the layer's own; places are said from the layer on."""
    b, env = Builder("layer", "layer"), dict[Value, Value]()
    for value in kernel.inputs:
        if given[value] not in own:
            env[value] = b.input(value.name if env else "x", value.type)
    for value in kernel.inputs:
        if given[value] in own:
            name = given[value].name.removeprefix(_flat(prefix) + "_")
            env[value] = b.param(name, value.type, own[given[value]])
    for node in kernel.nodes:
        copy_node(b, replace(node, loc=node.loc.removeprefix(path).lstrip(".")), env)
    return b.finish(env[v] for v in kernel.outputs)


def _prefix(path: str) -> str:
    """A path as a prefix of parameters, which begins as identifiers do."""
    return path if not path[0].isdigit() else f"m_{path}"


def _flat(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII)


def _named(layers: Mapping[Graph, None], paths: Mapping[Graph, str]) -> dict[Graph, Graph]:
    """Distinct layers under names: of the path that repeats, and of what they mix tokens with where there are several."""
    used, made = Counter[str](), dict[Graph, Graph]()
    for layer in layers:
        words = [w for w in paths[layer].split(".") if not w.isdecimal()]
        stem = _flat(words[-1] if words else "layer")
        stem = stem[:-1] if len(stem) > 1 and stem.endswith("s") else stem
        mixers = [m for m in _MIXERS if any(n.is_op(m) for n in layer.nodes)]
        name = "_".join([stem, *mixers])[:LONG] if len(layers) > 1 else stem
        used[name] += 1
        made[layer] = replace(layer, name=name if used[name] == 1 else f"{name}_{used[name]}")
    return made


# -- names --------------------------------------------------------------------------------------


def flat_name(name: str) -> str:
    """The name that a parameter has in the flat graph: a layer's own stand behind its prefix, `layers.3.w` was `layers_3_w`."""
    return name.replace(".", "_")


def named_alike(before: Graph, after: Graph) -> Graph:
    """A flat graph with the full names that its parameters have once they belong to layers."""
    flat = {v.name for v in before.params}
    full = {flat_name(n): n for n in parameters(after) if n not in flat and flat_name(n) in flat}
    if not full:
        return before
    replay = Replay(before)
    for old in before.params:
        new = replay.env[old]
        named = replace(new, name=full.get(old.name, old.name))
        replay.env[old] = named
        replay.builder.params[replay.builder.params.index(new)] = named
    return replay.run(lambda node, inputs: None)
