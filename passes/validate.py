"""Validation: run a small instance of a program before and after a pass, forward and gradients, and hold the difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import cast

import torch

from ..ir import (
    DTYPES,
    Graph,
    Mesh,
    Node,
    PassError,
    Replay,
    TensorType,
    Value,
    arranged,
    evaluate,
    natural,
    parameters,
    simulate,
)
from ..ir.orders import parse_order
from .registry import NUMERICS
from .repeats import named_alike
from .samples import Sample, added, draw, is_borders
from .verify import reached

Tensor = torch.Tensor
MAX_ELEMENTS = 2**27  # parameters of a program that is still evaluated in float64
# Not bitwise even where nothing is recomputed: autograd adds the gradients of a shared value in the order of its uses.
BOUNDS = {"exact": 1e-12, "reassociates": 1e-9, "changes-precision": 1e-9}
PLACED_BOUND = 1e-9  # ranks add their parts in another order
FLOOR = 1e-3  # a tensor far below the largest of its kind is compared at this share of it
SLACK = 8  # a pass that changes precision may be this much worse than the program was in its own dtypes


@dataclass(frozen=True)
class Row:
    """One compared tensor: its largest difference, relative to its largest number, and what is allowed."""

    what: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.what} differs by {self.error:.2g}, at most {self.bound:.2g} is allowed"


@dataclass(frozen=True)
class Report:
    """What was compared; a note where nothing could be, a problem where the programs do not even have the same shape."""

    rows: tuple[Row, ...] = ()
    note: str = ""
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and all(r.ok for r in self.rows)

    @property
    def worst(self) -> Row | None:
        """The row furthest beyond its bound, or nearest to it."""
        return max(self.rows, key=lambda r: r.error / r.bound if math.isfinite(r.error) else math.inf, default=None)

    def __str__(self) -> str:
        if self.problem or self.note:
            return self.problem or self.note
        return f"{len(self.rows)} tensors agree; worst: {self.worst}" if self.ok else str(self.worst)


@dataclass(frozen=True)
class _Run:
    """Results and gradients of one program."""

    results: tuple[Tensor, ...]
    gradients: Mapping[str, Tensor]


def validate(before: Graph, after: Graph, numerics: str, seed: int = 0, *, gradients: bool = False) -> Report:
    """Compare two programs on one small sample: results, and gradients of every float input and parameter.

    A program after placement runs on a pretend mesh of two ranks an axis. Inputs that `after` adds are zeros: a cached
    program at its start. With `gradients`, `after` takes cotangents behind its inputs and gives gradients behind its
    results; these are held against autograd of `before`.
    """
    if numerics not in NUMERICS:
        raise PassError(f"numerics is {numerics!r}, must be one of {', '.join(NUMERICS)}")
    before = named_alike(before, after)
    if why := _mismatch(before, after) or (_lacking(before, after) if gradients else ""):
        return Report(problem=why)
    sizes = dict.fromkeys((s for g in (before, after) for s in g.symbols), 1)
    elements = sum(t.count(sizes) for t, _ in parameters(before).values())
    if elements > MAX_ELEMENTS:
        return Report(note=f"{before.name} has {elements} parameters, too many to evaluate; validate its shrunken spec instead")
    sample = draw(before, (after,), seed)
    try:
        reference, found = (_with_gradients if gradients else _pair)(in_f64(before), in_f64(after), sample)
    except (RuntimeError, IndexError, ValueError) as error:  # what torch raises for numbers that do not fit an op
        return Report(problem=f"it does not run on a small sample: {str(error).splitlines()[0]}")
    if bad := [r for r in reference.results if r.is_floating_point() and not r.isfinite().all()]:
        return Report(note=f"{before.name} gives {len(bad)} results that are not finite on the sample; nothing can be compared")
    rows = compare(before, reference, found, max(BOUNDS[numerics], PLACED_BOUND if mesh_of(after).axes else 0.0))
    if numerics == "changes-precision":
        rows += _in_own_dtypes(before, after, sample, reference)
    return Report(rows)


def _mismatch(before: Graph, after: Graph) -> str:
    """What makes the two incomparable: a lost input, result or parameter."""
    names = {v.name for v in after.inputs}
    if lost := [v.name for v in before.inputs if v.name not in names]:
        return f"input {lost[0]} is gone; a pass keeps inputs"
    if len(after.outputs) < len(before.outputs):
        return f"there are {len(after.outputs)} results, there were {len(before.outputs)}; a pass keeps results"
    was, now = parameters(before), parameters(after)
    if changed := [n for n in {**was, **now} if n not in was or n not in now or was[n][0].shape != now[n][0].shape]:
        return f"parameter {changed[0]} is lost, new or of another shape; a pass keeps parameters"
    return ""


def _lacking(before: Graph, after: Graph) -> str:
    """What keeps `after` from being `before` with its gradients: a missing cotangent or gradient."""
    cotangents = sum(v.type.is_float for v in before.outputs)
    leaves = [v.type for v in before.inputs] + [t for t, _ in parameters(before).values()]
    wanted = len(before.outputs) + sum(t.is_float for t in leaves)
    if len(after.inputs) != len(before.inputs) + cotangents:
        return (
            f"there are {len(after.inputs)} inputs, must be {len(before.inputs)} and {cotangents} cotangents of float results"
        )
    return (
        f"there are {len(after.outputs)} results, must be {wanted} with the gradients" if len(after.outputs) != wanted else ""
    )


def in_f64(graph: Graph) -> Graph:
    """The same program with every float in float64, layers included."""
    done = dict[Graph, Graph]()

    def wide(type_: TensorType) -> TensorType:
        return replace(type_, dtype="f64") if type_.is_float else type_

    def convert(part: Graph) -> Graph:
        replay = Replay(part, types=[wide(v.type) for v in part.inputs], params=[wide(v.type) for v in part.params])

        def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
            if node.callee is None:
                return None
            if node.callee not in done:
                done[node.callee] = convert(node.callee)
            return replay.builder.emit(done[node.callee], inputs, node.attrs, [v.name for v in node.outputs], node.loc)

        return replay.run(visit)

    return convert(graph)


def mesh_of(graph: Graph) -> Mesh:
    """Two ranks on every axis that a type of the program names, or as many as an order of a dim that it splits is for."""
    types = [v.type for g in reached(graph) for v in (*g.inputs, *g.params, *(o for n in g.nodes for o in n.outputs))]
    dims = [d for t in types for d in t.dims if d.axes]
    axes = dict.fromkeys([*(a for d in dims for a in d.axes), *(a for t in types for a in sorted(t.partial))], 2)
    for dim in dims:
        made = parse_order(dim.order)
        axes |= {dim.axes[-1]: made.parts // prod(axes[a] for a in dim.axes[:-1])} if made else {}
    return Mesh(tuple(axes.items()))


def _pair(before: Graph, after: Graph, sample: Sample) -> tuple[_Run, _Run]:
    """Both programs on the sample; the later one on its mesh, if it has one."""
    leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in sample.tensors.items()}
    was = _results(before, leaves, sample, Mesh(()))
    now = _results(after, leaves, sample, mesh_of(after))[: len(was)]
    was = [_last(a) if _is_last(a, b) else a for a, b in zip(was, now, strict=True)]
    if bad := next(((a, b) for a, b in zip(was, now, strict=True) if a.shape != b.shape), None):
        raise PassError(f"a result was {tuple(bad[0].shape)}, is {tuple(bad[1].shape)} on the sample")
    cotangents = _cotangents(was)
    return _gradients(was, cotangents, leaves), _gradients(now, cotangents, leaves)


def _with_gradients(before: Graph, after: Graph, sample: Sample) -> tuple[_Run, _Run]:
    """The program and autograd of it; then the program that computes its gradients itself."""
    leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in sample.tensors.items()}
    was = _results(before, leaves, sample, mesh_of(before))
    cotangents = _cotangents(was)
    given = [c for c, v in zip(cotangents, before.outputs, strict=True) if v.type.is_float]
    names = [v.name for v in after.inputs[len(before.inputs) :]]
    plain = {n: t.detach() for n, t in leaves.items()} | dict(zip(names, given, strict=True))
    now = _results(after, plain, sample, mesh_of(after))
    wanted = [n for n, t in leaves.items() if t.requires_grad]
    found = dict(zip(wanted, now[len(was) :], strict=True))
    return _gradients(was, cotangents, leaves), _Run(tuple(now[: len(was)]), found)


def _last(whole: Tensor) -> Tensor:
    return whole[:, -1:]


def _is_last(was: Tensor, now: Tensor) -> bool:
    """Whether a cached program kept the last token alone."""
    return was.dim() == now.dim() == 3 and now.shape == _last(was).shape


def _cotangents(results: Sequence[Tensor]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(r.shape, generator=rng, dtype=torch.float64) for r in results]


def _results(graph: Graph, leaves: Mapping[str, Tensor], sample: Sample, mesh: Mesh) -> list[Tensor]:
    """Results in natural token order, whatever order the types of inputs and results are in."""
    cu = next((leaves[v.name] for v in graph.inputs if is_borders(graph, v) and v.name in leaves), None)
    inputs = [arranged(leaves[v.name], v.type, cu) if v.name in leaves else added(graph, v, sample) for v in graph.inputs]
    out = simulate(graph, mesh, *inputs, params=leaves) if mesh.axes else evaluate(graph, *inputs, params=leaves)
    found: tuple[Tensor, ...] = out if isinstance(out, tuple) else (out,)
    return [natural(t, v.type, cu) for t, v in zip(found, graph.outputs, strict=True)]


def _gradients(results: Sequence[Tensor], cotangents: Sequence[Tensor], leaves: Mapping[str, Tensor]) -> _Run:
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    pairs = [(r, c.to(r.dtype)) for r, c in zip(results, cotangents, strict=True) if r.is_floating_point() and r.requires_grad]
    if not wanted or not pairs:
        return _Run(tuple(r.detach() for r in results), {})
    total = torch.autograd.grad([r for r, _ in pairs], [*wanted.values()], [c for _, c in pairs], allow_unused=True)
    made = cast("Sequence[Tensor | None]", total)  # torch's annotation leaves out the unused
    found = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(wanted.items(), made, strict=True)}
    return _Run(tuple(r.detach() for r in results), found)


def compare(graph: Graph, was: _Run, now: _Run, bound: float) -> tuple[Row, ...]:
    """One row per result and per gradient."""
    names = [f"result {i} ({v.name})" for i, v in enumerate(graph.outputs)]
    rows = _rows(dict(zip(names, was.results, strict=True)), dict(zip(names, now.results, strict=True)), bound)
    grads = [{f"gradient of {n}": g for n, g in run.gradients.items()} for run in (was, now)]
    return rows + _rows(grads[0], grads[1], bound)


def _rows(was: Mapping[str, Tensor], now: Mapping[str, Tensor], bound: float) -> tuple[Row, ...]:
    largest = max((_size(t) for t in was.values() if t.is_floating_point()), default=0.0)
    return tuple(Row(n, _error(t, now[n], FLOOR * largest), bound) for n, t in was.items())


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _error(was: Tensor, now: Tensor, floor: float) -> float:
    if not was.is_floating_point():
        return 0.0 if torch.equal(was, now) else math.inf
    return _size(now.double() - was.double()) / max(_size(was), floor, 1e-300)


def _in_own_dtypes(before: Graph, after: Graph, sample: Sample, reference: _Run) -> tuple[Row, ...]:
    """As the programs will really run: `after` may not be much further from float64 than `before` and its dtype's step."""
    was, now = (_cast(g, sample) for g in (before, after))
    values = [v for g in reached(after) for n in g.nodes for v in n.outputs if v.type.is_float]
    step = max(torch.finfo(DTYPES[v.type.dtype]).eps for v in values)
    rows = zip(compare(before, reference, was, 0.0), compare(before, reference, now, 0.0), strict=True)
    return tuple(Row(f"{b.what} in its own dtype", b.error, SLACK * (a.error + step)) for a, b in rows)


def _cast(graph: Graph, sample: Sample) -> _Run:
    """The program as it is, on the sample in the dtypes it declares."""
    types = {v.name: v.type for v in graph.inputs} | {n: t for n, (t, _) in parameters(graph).items()}
    given = {n: t.to(DTYPES[types[n].dtype]) for n, t in sample.tensors.items()}
    leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in given.items()}
    results = _results(graph, leaves, sample, Mesh(()))
    return _gradients(results, _cotangents(results), leaves)
