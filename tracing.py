"""An eager module in, a graph out: traced, raised to ops that passes know, each raise proved on the user's own example."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from plait.frontends.fx import Built, Exported, build_graph, export
from plait.ir import Graph, PassError, PlaitError, Value, evaluate, parameters
from plait.lowering import lower
from plait.passes import DEFAULT, Pipeline, Remark, flat_name, outline_layers, raise_families, raise_family
from plait.passes.fusions import GLU, PATTERNS
from plait.runtime.traced import TracedModel
from torch.utils import _pytree as pytree

Tensor = torch.Tensor
SEMANTIC = (
    "rms_norm", "layer_norm", "l2_norm", "rope", "attention", "route", "dispatch", "grouped_linear", "combine",
    "causal_conv1d", "gated_delta_rule", "delta_rule", "kimi_delta_attention", "ssd", "gated_linear_attention",
    "selective_scan", "rg_lru", "softcap",
)  # fmt: skip
# How close a raise must be, by the shortest float of the trace, for values and for gradients: of the largest number there.
WITHIN = {torch.float64: (1e-9, 1e-8), torch.float32: (1e-5, 1e-4), torch.bfloat16: (4e-2, 8e-2), torch.float16: (1e-2, 4e-2)}


@dataclass(frozen=True)
class Line:
    """So many of an op, and where."""

    what: str
    count: int
    where: str


@dataclass(frozen=True)
class TraceReport:
    """What a trace was raised to, what stays torch's own, which layers repeat, what was held back and why."""

    raised: tuple[Line, ...]
    aten: tuple[Line, ...]
    layers: tuple[Line, ...]
    held: tuple[str, ...]
    symbolic: bool
    nodes: int

    def __str__(self) -> str:
        parts = ["raised:", *_table(self.raised), "torch's own:", *_table(self.aten)]
        parts += ["layers:", *_table(self.layers)] if self.layers else []
        parts += [f"held back: {h}" for h in self.held]
        return "\n".join([*parts, f"{self.nodes} ops, sizes {'symbolic' if self.symbolic else 'as in the example'}"])


def _table(lines: tuple[Line, ...]) -> list[str]:
    return [f"  {line.what:<24} {line.count:>4}  {line.where}" for line in lines] or ["  nothing"]


@dataclass(frozen=True, eq=False)
class Traced:
    """A module's graph, without a spec; `plait.compile` makes a module of it again."""

    graph: Graph
    report: TraceReport
    module: torch.nn.Module
    exported: Exported
    built: Built

    @property
    def params(self) -> dict[str, Tensor]:
        """Every parameter of the graph, as the module has it."""
        found = finders(self.exported, self.built)
        return {name: found[flat_name(name)](self.module) for name in parameters(self.graph)}


def trace_module(
    module: torch.nn.Module, example: Any, *, gradients: bool = True, symbolic: bool = True, raising: bool = True,
    layers: bool = True,
) -> Traced:  # fmt: skip
    """Trace an eager module on an example (a tensor, a tuple of arguments, or a dict of named ones) into a graph.

    Norms, rotations, attention and recurrences that it writes out become ops that passes know; each such step is taken only
    where values, and with `gradients` gradients too, stay those of the module. Batch and length stay symbols where they can:
    without `symbolic`, or where the module needs its sizes as numbers, the graph is for the example's sizes alone. What
    repeats, `layers.0`, `layers.1`, is a layer that the graph calls; without `layers` the graph is flat.
    """
    exported, built, held = _exported(module, example, symbolic)
    proof = Proof.of(exported, built, gradients)
    if (why := proof.differs(built.graph)) and exported.found:
        held = [*held, f"{', '.join(dict.fromkeys(w for _, w in exported.found))} met as one op: {why}"]
        exported = export(module, example, symbolic=symbolic, known=False)
        built = build_graph(exported)
        proof = Proof.of(exported, built, gradients)
        why = proof.differs(built.graph)
    if why:
        raise PassError(f"the trace of {type(module).__name__} is not what the module computes: {why}; is it random?")
    graph, more = _raised(built.graph, proof) if raising else (built.graph, [])
    made = outline_layers(graph)[0] if layers else graph
    return Traced(made, _report(graph, made, exported, [*held, *more]), module, exported, built)


def _exported(module: torch.nn.Module, example: Any, symbolic: bool) -> tuple[Exported, Built, list[str]]:
    """As widely as it goes: symbolic sizes, known functions as one op; what was given up, and why."""
    held, first = list[str](), None
    for sizes, known in ((True, True), (False, True), (False, False)):
        if sizes and not symbolic:
            continue
        try:
            exported = export(module, example, symbolic=sizes, known=known)
            return exported, build_graph(exported), held
        except PlaitError as error:
            first = first or error
            held.append(f"{'symbolic sizes' if sizes else 'known functions as one op'}: {error}")
    assert first is not None
    raise first


def finders(exported: Exported, built: Built) -> dict[str, Callable[[torch.nn.Module], Tensor]]:
    """How to find each parameter of the graph in a module that has the traced one's names."""
    constants = exported.program.constants
    held = {
        n
        for n, _ in (
            *exported.module.named_parameters(remove_duplicate=False),
            *exported.module.named_buffers(remove_duplicate=False),
        )
    }

    def find(name: str) -> Callable[[torch.nn.Module], Tensor]:
        if name not in held:
            return lambda module: _real(constants[name if name in constants else f"module.{name}"])
        path, _, last = name.rpartition(".")
        return lambda module: _real(getattr(module.get_submodule(path), last))

    return {inner: find(name) for inner, name in built.weights.items()}


def _real(x: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, as a graph has them."""
    return torch.view_as_real(x) if x.is_complex() else x


# -- proof ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Proof:
    """What the module gives on the example, and its gradients of one weighted sum."""

    inputs: tuple[Tensor, ...]
    params: Mapping[str, Tensor]
    values: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]
    wanted: Sequence[Tensor]  # of what
    within: tuple[float, float]

    @staticmethod
    def of(exported: Exported, built: Built, gradients: bool) -> Proof:
        """Run the module itself once."""
        found = {n: f(exported.module) for n, f in finders(exported, built).items()}
        leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in exported.leaves]
        inputs = [leaves[i] for i in built.inputs]
        wanted = [x for x in dict.fromkeys(found.values()) if gradients and x.requires_grad]
        wanted += [x.requires_grad_() for x in inputs if gradients and x.is_floating_point()]
        args, kwargs = pytree.tree_unflatten(leaves, pytree.tree_structure((exported.args, dict(exported.kwargs))))
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
            made = [x for x in pytree.tree_leaves(exported.module(*args, **kwargs)) if isinstance(x, Tensor)]
        values = tuple(x.detach().clone() for x in made)
        return Proof(tuple(inputs), found, values, _gradients(made, wanted), wanted, _within(exported))

    def run(self, graph: Graph) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Values, and gradients of all that the module has gradients of."""
        with torch.set_grad_enabled(bool(self.wanted)):
            out = evaluate(graph, *self.inputs, params=self.params)
        outs = out if isinstance(out, tuple) else (out,)
        try:
            return tuple(y.detach() for y in outs), _gradients(outs, self.wanted)
        except RuntimeError as error:
            why = f"{str(error).splitlines()[0][:200]}; trace it with gradients=False if it need not train"
            raise PassError(f"the trace of the module has no gradients as the module has them: {why}") from error

    def differs(self, graph: Graph) -> str:
        """Why a graph is not what the module computes; empty where it is."""
        values, made = self.run(graph)
        if len(values) != len(self.values):
            return f"{len(values)} results, the module has {len(self.values)}"
        far = max((_far(a, b) for a, b in zip(values, self.values, strict=True)), default=0.0)
        if not far <= self.within[0]:
            return f"values differ by {far:.1e} of the largest"
        # where nothing flows there is rounding: it is small beside the largest gradient, not beside itself
        least = 1e-5 * max((_top(d) for d in self.gradients), default=0.0)
        off = max((_far(a, b, least) for a, b in zip(made, self.gradients, strict=True)), default=0.0)
        return "" if off <= self.within[1] else f"gradients differ by {off:.1e} of the largest"


def _gradients(outs: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Of one weighted sum of the float results."""
    terms = [(y.double() * _weights(y)).sum() for y in outs if y.requires_grad]
    if not terms or not wanted:
        return tuple(None for _ in wanted)
    return tuple(torch.autograd.grad(sum(terms[1:], terms[0]), list(wanted), allow_unused=True))


def _weights(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def _far(a: Tensor | None, b: Tensor | None, least: float = 1e-30) -> float:
    """The largest difference, of the largest number; what is absent is 0, what is no number on one side is far."""
    if a is None or b is None:
        there = _top(a if b is None else b)
        return there / max(there, least) if there > least else 0.0
    if a.shape != b.shape or not a.numel():
        return 0.0 if a.shape == b.shape else math.inf
    apart = (a.double() - b.double()).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0)
    return float(apart.max()) / max(_top(b), least) if not bool(apart.isnan().any()) else math.inf


def _top(x: Tensor | None) -> float:
    """The largest finite number."""
    return float(x.detach().double().masked_fill(~x.isfinite(), 0).abs().max()) if x is not None and x.numel() else 0.0


def _within(exported: Exported) -> tuple[float, float]:
    """By the shortest float that the module's own arithmetic goes through; known functions go through float32."""
    values = [n.meta.get("val") for n in exported.program.graph.nodes]
    found = {v.dtype for v in values if isinstance(v, Tensor) and v.dtype in WITHIN} or {torch.float64}
    found |= {torch.float32} if exported.found else set[torch.dtype]()
    return max(WITHIN[d] for d in found)


# -- raising ----------------------------------------------------------------------------------


def _raised(graph: Graph, proof: Proof) -> tuple[Graph, list[str]]:
    """All at once; where that is not equal family by family, then rule by rule, and a rule that is not is left out."""
    held, graph = list[str](), Pipeline.parse("canonicalize").run(graph)
    whole = graph
    for family in raise_families():
        whole, _ = raise_family(whole, family)
    if not proof.differs(whole):
        return whole, held
    for family in raise_families():
        made, said = raise_family(graph, family)
        if not said:
            continue
        if not (why := proof.differs(made)):
            graph = made
            continue
        for name in dict.fromkeys(r.what for r in said):
            alone, there = raise_family(graph, family, only=(name,))
            why = proof.differs(alone) if there else ""
            if why:
                held.append(f"{name} at {_places(r.where for r in there)}: {why}")
            else:
                graph = alone
    return graph, held


def _report(graph: Graph, made: Graph, exported: Exported, held: list[str]) -> TraceReport:
    """Of the flat graph, and of the layers that were made of it."""
    found, own = dict[str, list[str]](), dict[str, list[str]]()
    for node in graph.nodes:
        if node.is_op("aten"):
            own.setdefault(str(node.attrs["target"]), []).append(node.loc)
        elif node.op.name in SEMANTIC:
            found.setdefault(node.op.name, []).append(node.loc)
    for text in GLU.texts:
        roots = [n for n in graph.nodes for _ in PATTERNS[text].find(n, graph.makers)]
        two = [n.loc for n in dict.fromkeys(roots) if _is_gated(graph, n.operands)]
        if two:
            found.setdefault("gated mlp", []).extend(two)
    for where, what in exported.found:
        found.setdefault(f"{what} (function)", []).append(where)
    raised, aten = (tuple(Line(k, len(v), _places(v)) for k, v in sorted(x.items())) for x in (found, own))
    return TraceReport(raised, aten, _layers(made), tuple(held), bool(graph.symbols), len(graph.nodes))


def _layers(graph: Graph) -> tuple[Line, ...]:
    calls = {layer: [n.loc for n in graph.nodes if n.callee == layer] for layer in graph.layers}
    return tuple(Line(layer.name, len(locs), f"{_places(locs)}, {len(layer.nodes)} ops") for layer, locs in calls.items())


def _is_gated(graph: Graph, operands: Iterable[Value]) -> bool:
    makers = [graph.makers.get(v) for v in operands]
    return all(m is not None and m.is_op("linear", "split", "silu", "gelu", "relu", "relu2", "sigmoid") for m in makers)


def _places(locs: Iterable[str]) -> str:
    """Where, with the numbers of layers left out."""
    found = Counter(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", loc) for loc in locs)
    return ", ".join(list(found)[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")


# -- running ----------------------------------------------------------------------------------


def compile_traced(traced: Traced, *, target: str = "cpu", passes: str = DEFAULT, jit: bool = True) -> TracedModel:
    """A module that runs and trains with the traced module's own weights."""
    program = lower(Pipeline.parse(passes).run(traced.graph), target=target, eager=not jit)
    find = finders(traced.exported, traced.built)
    order = [find[flat_name(name)] for name in program.parameters]
    exported, built = traced.exported, traced.built
    example = (exported.args, dict(exported.kwargs))
    out = exported.program.call_spec.out_spec
    return TracedModel(program, traced.module, order, example, built.inputs, built.outputs, out, compiled=jit)


__all__ = ["Remark", "TraceReport", "Traced", "compile_traced", "finders", "trace_module"]
