"""What a backward layer takes from its forward half, and what it runs again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from ..ir import Builder, Graph, Node, PassError, Replay, Value
from .outline import communicates
from .registry import Outcome, register
from .remarks import Remark
from .structure import copy_node, row_wise
from .tokens import Tokens, tokens_of

POLICIES = ("none", "boundary", "full", "bytes")


@dataclass(frozen=True)
class Wire:
    """Where an operand of a backward call comes from."""

    kind: str  # a result of the forward call, an input of it, or an other operand of the call as it was
    index: int


Pair = tuple[Graph, Graph, tuple[Wire, ...]]  # a forward layer, its backward, and how they are joined


@dataclass(frozen=True)
class Plan:
    """A pair with other saved values."""

    forward: Graph
    backward: Graph
    taken: tuple[Wire, ...]  # the operands of the new backward; results are those of the new forward
    results: tuple[int, ...]  # which results of the old forward the first of the new one are
    remark: Remark


@register(numerics="exact", model=True, choices={"policy": POLICIES})
def recompute(graph: Graph, *, policy: str = "boundary", budget: int = 0) -> Outcome:
    """Choose what the forward half of each layer saves; the backward half runs the rest again.

    boundary: row-wise ops and kernels run again, from saved results of the others. full: everything runs again, from the
    layer's inputs. bytes: everything, less what saves most FLOPs a byte while at most `budget` bytes a token are saved.
    What ranks exchanged is always saved, and what is a result of the layer anyway is taken from there.
    """
    if budget < 0 or (budget and policy != "bytes"):
        raise PassError(f"recompute: budget is {budget} with policy={policy}; it is a number of bytes a token for policy=bytes")
    joined = _pairs(graph)
    if not joined:
        why = "no layer is called forward and backward; run differentiate first"
        return graph, (Remark("missed", "recompute", graph.name, why),)
    if policy == "none":
        return graph, (Remark("note", "recompute", graph.name, "every layer saves what it did"),)
    proper = _proper(graph, joined)
    plans = {pair: _plan(pair, proper[pair], policy, budget) for pair in dict.fromkeys(pair for _, pair in joined.values())}
    return _replaced(graph, joined, plans), tuple(p.remark for p in plans.values())


# -- which calls belong together ----------------------------------------------------------------


Joined = dict[Node, tuple[Node, Pair]]  # a backward call: its forward call, and what kind of pair they are


def _pairs(graph: Graph) -> Joined:
    """Every backward call with the forward call under its prefix whose results it takes: the latest, others made its inputs."""
    found, taken = Joined(), set[Node]()
    for node in graph.nodes:
        if not _is(node, "_backward"):
            continue
        read = {graph.makers[v] for v in node.operands if v in graph.makers}
        near = [n for n in graph.nodes if n in read - taken and _is(n, "_forward") and n.attrs == node.attrs]
        if near and near[-1].callee is not None and node.callee is not None:
            wires = tuple(_wire(near[-1], v, i) for i, v in enumerate(node.operands))
            found[node] = near[-1], (near[-1].callee, node.callee, wires)
            taken.add(near[-1])
    return found


def _is(node: Node, half: str) -> bool:
    return node.callee is not None and node.callee.role == "layer" and half in node.callee.name


def _wire(ahead: Node, value: Value, place: int) -> Wire:
    if value in ahead.outputs:
        return Wire("result", ahead.outputs.index(value))
    return Wire("input", ahead.operands.index(value)) if value in ahead.operands else Wire("other", place)


def _proper(graph: Graph, joined: Joined) -> dict[Pair, frozenset[int]]:
    """The results of a forward layer that something other than its backward reads, in any call."""
    found = dict[Pair, frozenset[int]]()
    for node, (ahead, pair) in joined.items():
        read = (i for i, v in enumerate(ahead.outputs) if v in graph.outputs or {*graph.uses.get(v, ())} - {node})
        found[pair] = found.get(pair, frozenset()) | frozenset(read)
    return found


# -- what to save ---------------------------------------------------------------------------------


Values = Set[Value]
AGAIN: Mapping[str, Callable[[Node], bool]] = {  # what may run again, if ranks do not talk in it
    "boundary": lambda node: row_wise(node) or (node.callee is not None and node.callee.role == "kernel"),
    "full": lambda node: True,
    "bytes": lambda node: True,
}


def _plan(pair: Pair, proper: frozenset[int], policy: str, budget: int) -> Plan:
    """Choose what is saved between two halves, and make them anew."""
    forward, _, wires = pair
    wanted = {forward.outputs[w.index] for w in wires if w.kind == "result"}
    free = {*forward.inputs, *forward.params, *(forward.outputs[i] for i in proper)}
    tokens, saved = tokens_of(forward), _must_save(forward, wanted - free, free, AGAIN[policy])
    if policy == "bytes":
        saved = _within(forward, wanted, free, saved, tokens, budget)
    again = _again(forward, wanted, free | saved)
    kept = [v for n in forward.nodes for v in n.outputs if v in saved]
    why = f"{tokens.bytes(kept)} bytes a token are saved, {tokens.flops(again)} FLOPs a token are run again"
    results = sorted(proper) or ([] if kept else [0])  # a graph has a result
    ahead = replace(forward, outputs=(*(forward.outputs[i] for i in results), *kept))
    remark = Remark("passed", "recompute", forward.name.removesuffix("_forward"), why)
    return Plan(ahead, *_behind(pair, ahead, again), tuple(results), remark)


def _must_save(graph: Graph, wanted: Values, free: Values, may: Callable[[Node], bool]) -> frozenset[Value]:
    """What is wanted, or read to make what is wanted, and comes from a node that may not run again."""
    needed, saved = set(wanted), set[Value]()
    for node in reversed(graph.nodes):
        hit = needed.intersection(node.outputs)
        if hit and may(node) and not communicates(node):
            needed.update(v for v in node.operands if v not in free)
        else:
            saved |= hit
    return frozenset(saved)


def _again(graph: Graph, wanted: Values, kept: Values) -> tuple[Node, ...]:
    """The nodes to run again for what is wanted."""
    needed, found = wanted - kept, list[Node]()
    for node in reversed(graph.nodes):
        if not needed.isdisjoint(node.outputs):
            found.append(node)
            needed |= {*node.operands} - kept
    return tuple(reversed(found))


def _within(
    graph: Graph, wanted: Values, free: Values, saved: frozenset[Value], tokens: Tokens, budget: int
) -> frozenset[Value]:
    """Save the results of one node after another, most FLOPs a byte first, the earlier node among equals."""
    while True:
        again = _again(graph, wanted, free | saved)
        read = wanted | {v for n in again for v in n.operands}
        best, score = saved, 0.0
        for node in again:
            more = saved | (read & {*node.outputs})
            gain = tokens.flops(again) - tokens.flops(_again(graph, wanted, free | more))
            cost = tokens.bytes(more) - tokens.bytes(saved)
            if tokens.bytes(more) <= budget and gain > score * max(cost, 1):
                best, score = more, gain / max(cost, 1)
        if best == saved:
            return saved
        saved = best


# -- the new halves -------------------------------------------------------------------------------


def _behind(pair: Pair, ahead: Graph, again: Sequence[Node]) -> tuple[Graph, tuple[Wire, ...]]:
    """The backward layer that runs these nodes again first, and where its operands come from."""
    forward, backward, wires = pair
    b, env, taken = Builder(backward.name, backward.role), dict[Value, Value](), list[Wire]()
    there = {"input": forward.inputs, "result": forward.outputs}
    same = {v: there[w.kind][w.index] for v, w in zip(backward.inputs, wires, strict=True) if w.kind in there}
    read = {*same.values(), *(v for n in again for v in n.operands)}
    sources = [(v, Wire("input", i)) for i, v in enumerate(ahead.inputs)]
    sources += [(v, Wire("result", i)) for i, v in enumerate(ahead.outputs)]
    sources += [(v, w) for v, w in zip(backward.inputs, wires, strict=True) if v not in same]
    for value, wire in sources:
        if (value in read or wire.kind == "other") and value not in env:
            env[value] = b.input(value.name, value.type)
            taken.append(wire)
    given = dict(env)
    _take_params(b, env, pair, read)
    for node in again:
        copy_node(b, node, env)
    env |= given  # what is saved is not taken from a node that runs again for another result
    env |= {v: env[w] for v, w in same.items()}
    for node in backward.nodes:
        copy_node(b, node, env)
    return b.finish(env[v] for v in backward.outputs), tuple(taken)


def _take_params(b: Builder, env: dict[Value, Value], pair: Pair, read: Values) -> None:
    """The parameters that the backward layer has, and those of the forward that are read; by name they are the same."""
    forward, backward, _ = pair
    names = {v.name for v in backward.params}
    of = [(v, init) for g in (forward, backward) for v, init in zip(g.params, g.inits, strict=True)]
    found = dict[str, Value]()
    for value, init in of:
        if value in read or value.name in names:
            env[value] = found.get(value.name) or b.param(value.name, value.type, init)
            found[value.name] = env[value]


def _replaced(graph: Graph, joined: Joined, plans: Mapping[Pair, Plan]) -> Graph:
    """The entry, calling the new halves."""
    replay, ahead_of = Replay(graph), {ahead: plans[pair] for ahead, pair in joined.values()}
    b, env, made = replay.builder, replay.env, dict[Node, tuple[Value, ...]]()
    for node in graph.nodes:
        if node in ahead_of:
            plan = ahead_of[node]
            names = [node.outputs[i].name for i in plan.results]
            names += [v.name for v in plan.forward.outputs[len(names) :]]
            made[node] = b.emit(plan.forward, [env[v] for v in node.operands], node.attrs, names, node.loc)
            env.update((node.outputs[i], v) for i, v in zip(plan.results, made[node], strict=False))
        elif node in joined:
            ahead, pair = joined[node]
            there = {"input": [env[v] for v in ahead.operands], "result": made[ahead]}
            inputs = [there[w.kind][w.index] if w.kind in there else env[node.operands[w.index]] for w in plans[pair].taken]
            results = b.emit(plans[pair].backward, inputs, node.attrs, [v.name for v in node.outputs], node.loc)
            env.update(zip(node.outputs, results, strict=True))
        else:
            copy_node(b, node, env)
    return b.finish(env[v] for v in graph.outputs)
