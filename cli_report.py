"""The compile report: layer by layer, what was fused, what moves, what it costs, and what runs it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plait.cli_output import Table, count, size

if TYPE_CHECKING:
    from plait.ir import Graph, Node
    from plait.lowering import Program


@dataclass(frozen=True)
class Work:
    """Equations of a graph, the bytes that cross their borders, and their arithmetic, for all tokens together."""

    ops: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Kernel:
    """A fused region: how often its layer calls it, and the ops inside."""

    name: str
    calls: int
    inside: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """The entry, or one distinct layer with the prefixes it is called under."""

    name: str
    prefixes: tuple[str, ...]
    parameters: int  # of one call
    before: Work
    after: Work
    kernels: tuple[Kernel, ...]

    @property
    def times(self) -> int:
        return len(self.prefixes)


@dataclass(frozen=True)
class Report:
    """What compiling a program came to; `choices` counts each (graph, op, what runs it, why)."""

    name: str
    target: str
    tokens: int
    parameters: int
    weights: int  # bytes
    parts: tuple[Part, ...]
    choices: Mapping[tuple[str, str, str, str], int]


def report(before: Graph, program: Program, tokens: int) -> Report:
    """Compare a program before its passes with what they and the lowering made of it, for one row of `tokens` tokens."""
    from plait.ir import parameters

    after = program.graph
    types = [t for t, _ in parameters(after).values()]
    parts = [_part(before, after, ("",), tokens)]
    parts += [_part(old, new, prefixes, tokens) for (old, new), prefixes in _pairs(before, after).items()]
    return Report(
        after.name,
        program.target,
        tokens,
        sum(t.count({}) for t in types),
        sum(t.bytes({}) for t in types),
        tuple(parts),
        Counter((c.graph, c.op, c.runs, c.why) for c in program.choices),
    )


def _pairs(before: Graph, after: Graph) -> dict[tuple[Graph, Graph], tuple[str, ...]]:
    """Each layer before and after the passes, with the parameter prefixes it is called under: passes keep those."""
    was, pairs = _called(before), dict[tuple["Graph", "Graph"], tuple[str, ...]]()
    for prefix, layer in _called(after).items():
        pair = (was.get(prefix, layer), layer)
        pairs[pair] = (*pairs.get(pair, ()), prefix)
    return pairs


def _called(graph: Graph) -> dict[str, Graph]:
    return {n.attrs["params"]: n.callee for n in graph.nodes if n.callee is not None and n.callee.role == "layer"}


def _part(before: Graph, after: Graph, prefixes: tuple[str, ...], tokens: int) -> Part:
    numbers = sum(v.type.count({}) for v in after.params)
    return Part(after.name, prefixes, numbers, work(before, tokens), work(after, tokens), _kernels(after))


def _kernels(graph: Graph) -> tuple[Kernel, ...]:
    calls = Counter(n.callee for n in graph.nodes if n.callee is not None and n.callee.role == "kernel")
    return tuple(Kernel(kernel.name, n, tuple(_names(kernel))) for kernel, n in calls.items())


def _names(graph: Graph) -> Iterable[str]:
    for node in graph.nodes:
        yield from _names(node.callee) if node.callee is not None else [node.op.name]


def work(graph: Graph, tokens: int) -> Work:
    """What one call of a graph does; the layers it calls count for themselves."""
    nodes = [n for n in graph.nodes if n.callee is None or n.callee.role == "kernel"]
    return Work(len(nodes), sum(traffic(n, tokens) for n in nodes), sum(arithmetic(n, tokens) for n in nodes))


def bindings(symbols: Iterable[str], tokens: int) -> dict[str, int]:
    """One row, `s` tokens, a cache that holds them, and everything else once."""
    return {name: {"s": tokens, "m": tokens}.get(name, 1) for name in symbols}


def traffic(node: Node, tokens: int) -> int:
    """Bytes that a node or kernel reads and writes."""
    from plait.lowering.gpu.report import moved

    return moved(node, bindings(_symbols(node), tokens))


def arithmetic(node: Node, tokens: int) -> int:
    """Floating-point operations of a node, or of all nodes in the kernel it calls."""
    from plait.lowering.gpu.report import flops

    return flops(node, bindings(_symbols(node), tokens))


def _symbols(node: Node) -> set[str]:
    return {s for v in (*node.operands, *node.outputs) for s in v.type.symbols}


def facts(made: Report) -> dict[str, Any]:
    """The report for scripts; bytes and flops are per token."""
    return {
        "name": made.name,
        "target": made.target,
        "tokens": made.tokens,
        "parameters": made.parameters,
        "weight_bytes": made.weights,
        "parts": [_part_facts(p, made.tokens) for p in made.parts],
        "choices": [
            {"graph": graph, "op": op, "runs": runs, "why": why, "times": n}
            for (graph, op, runs, why), n in made.choices.items()
        ],
    }


def _part_facts(part: Part, tokens: int) -> dict[str, Any]:
    return {
        "name": part.name,
        "prefixes": part.prefixes,
        "parameters": part.parameters,
        "ops_before": part.before.ops,
        "ops_after": part.after.ops,
        "bytes_before": part.before.bytes / tokens,
        "bytes_after": part.after.bytes / tokens,
        "flops": part.before.flops / tokens,
        "kernels": [{"name": k.name, "calls": k.calls, "ops": k.inside} for k in part.kernels],
    }


def tables(made: Report) -> list[Table]:
    """The report for people."""
    title = f"{made.name} for {made.target}: {count(made.parameters)} parameters, {size(made.weights)} of weights"
    layers = Table(
        ("layer", "times", "params", "ops", "fused ops", "kernels", "bytes/token", "fused", "saved", "FLOPs/token"),
        [*(_row(p, made.tokens) for p in made.parts), _total(made)],
        f"{title}; traffic and FLOPs for {made.tokens} tokens",
    )
    kernels = [(p.name, k.name, str(k.calls), str(len(k.inside)), " ".join(k.inside)) for p in made.parts for k in p.kernels]
    return [
        layers,
        Table(("layer", "kernel", "calls", "ops", "inside"), kernels, "kernels" if kernels else "kernels: none"),
        Table(("graph", "ops", "runs", "why"), _choice_rows(made), "what runs each op"),
    ]


def _choice_rows(made: Report) -> list[tuple[str, str, str, str]]:
    """A row per form; the ops of a graph that share a reason to run as their reference share a row."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for (graph, op, runs, why), n in made.choices.items():
        runs = "reference" if runs.endswith("(reference)") else runs
        found.setdefault((graph, runs, why), []).append(f"{op} x{n}" if n > 1 else op)
    return [(graph, ", ".join(ops), runs, why) for (graph, runs, why), ops in found.items()]


def _row(part: Part, tokens: int) -> tuple[str, ...]:
    kernels = str(sum(k.calls for k in part.kernels))
    counted = (str(part.times), count(part.parameters), str(part.before.ops), str(part.after.ops), kernels)
    return (part.name, *counted, *_costs(part.before, part.after, tokens))


def _costs(before: Work, after: Work, tokens: int) -> tuple[str, ...]:
    saved = f"{1 - after.bytes / before.bytes:.0%}" if before.bytes else "-"
    return size(before.bytes / tokens), size(after.bytes / tokens), saved, count(before.flops / tokens)


def _total(made: Report) -> tuple[str, ...]:
    """All calls of all parts."""

    def whole(side: str) -> Work:
        works: list[tuple[Work, int]] = [(getattr(p, side), p.times) for p in made.parts]
        return Work(*(sum(getattr(w, f) * n for w, n in works) for f in ("ops", "bytes", "flops")))

    before, after = whole("before"), whole("after")
    kernels = sum(k.calls * p.times for p in made.parts for k in p.kernels)
    calls = math.fsum(p.times for p in made.parts[1:])
    counted = (f"{calls:.0f}", count(made.parameters), str(before.ops), str(after.ops), str(kernels))
    return ("total", *counted, *_costs(before, after, made.tokens))
