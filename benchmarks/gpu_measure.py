"""Measuring kernels on a GPU: results held against float64 first, then device time with a cold L2, in turns."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from gpu_cases import Case, Function, Layer, Problem, Results, Row, gradient_of, problem, random_tensor, traffic
from gpu_rules import Rule
from plait.ir import Graph, TensorType, evaluate, retype
from plait.lowering.gpu import load, run
from plait.lowering.rows import row_kernel
from plait.lowering.rows.launch import launch
from torch import Tensor

Thunk = Callable[[], Sequence[Tensor]]
Setup = Callable[[], Thunk]  # what is not timed, then what is
Clock = Callable[[Setup], "Sample"]
Record = dict[str, Any]

FLUSH = 256 << 20  # bytes written between calls: several times any L2
FEWEST, MOST = 1 << 20, 1 << 26  # device cycles of the pause in which the host asks for a call: from 0.5 to 35 ms
WARMUP = 3
LIMIT, PEAK = 2e-2, 6e-2  # relative error of bf16 results: in the norm; of the worst element, over the largest one
LAYER_LIMIT = 5e-2  # of a whole layer in bf16, against float32
FEW = 130  # tokens of the check where the device has no room for all of them in float64
LAYER_TOKENS = 1024  # of a layer's check


# -- the clock ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Device seconds of one call; `ahead` if the whole call was asked for before the device began it."""

    seconds: float
    ahead: bool


class Stopwatch:
    """Times one call on the device between two events.

    The L2 holds other data that must still be written, as in the middle of a training step. The device pauses before the
    call, longer and longer until the host has asked for all of it: gaps are the device's own.
    """

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
        self.pause = FEWEST

    def __call__(self, setup: Setup) -> Sample:
        while True:
            sample = self._once(setup())
            if sample.ahead or self.pause >= MOST:
                return sample
            self.pause *= 2

    def _once(self, call: Thunk) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flush.zero_()
        torch.cuda._sleep(self.pause)  # pyright: ignore[reportPrivateUsage] # the one way to keep a device busy
        start.record()
        made = call()
        end.record()
        ahead = not start.query()
        end.synchronize()
        del made  # freeing is no part of the call
        return Sample(start.elapsed_time(end) / 1e3, ahead)


@dataclass(frozen=True)
class Timing:
    """What the samples of one variant say, in seconds; `host` is what asking for one call takes."""

    median: float
    low: float
    high: float
    samples: int
    ahead: bool
    host: float


def interleave(setups: Mapping[str, Setup], samples: int, clock: Clock) -> dict[str, Timing]:
    """Lets the variants take turns, the first one another in every round."""
    names, taken = [*setups], {name: list[Sample]() for name in setups}
    hosts = {name: min(_host_seconds(setups[name]) for _ in range(WARMUP)) for name in names}
    for i in range(samples + 2):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken[name].append(clock(setups[name]))
    return {name: _timing(each[2:], hosts[name]) for name, each in taken.items()}


def _host_seconds(setup: Setup) -> float:
    call, start = setup(), time.perf_counter()
    call()
    return time.perf_counter() - start


def _timing(taken: Sequence[Sample], host: float) -> Timing:
    seconds = sorted(s.seconds for s in taken)
    tenth = len(seconds) // 10
    return Timing(
        statistics.median(seconds), seconds[tenth], seconds[-1 - tenth], len(seconds), all(s.ahead for s in taken), host
    )


def copy_bandwidth(clock: Clock, samples: int) -> float:
    """Bytes a second, read and written, of the faster of two plain copies of 1 GiB."""
    a = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    b = torch.empty_like(a)
    copies: dict[str, Setup] = {
        "copy": lambda: lambda: [b.copy_(a)],
        "pointwise": lambda: lambda: [torch.neg(a, out=b)],
    }
    return 2 * a.nbytes / min(t.median for t in interleave(copies, samples, clock).values())


# -- what is computed ---------------------------------------------------------------------


def truth(p: Problem, mode: str) -> list[Tensor]:
    """The graph's own meaning in float64: its results, or through autograd the cotangents of its operands."""
    exact = retype(p.graph, [TensorType("f64", v.type.dims) if v.type.is_float else v.type for v in p.graph.inputs])
    xs = [x.double() if x.is_floating_point() else x for x in p.xs]
    setup = forward_of(lambda *given: evaluate(exact, *given), xs)
    if mode == "bwd":
        setup = backward_of(lambda *given: evaluate(exact, *given), xs, gradient_of(p.graph).of, [d.double() for d in p.dys])
    return [*setup()()]


def forward_of(function: Function, xs: Sequence[Tensor]) -> Setup:
    """A call without gradients."""

    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            return several(function(*xs))

    return lambda: call


def backward_of(function: Function, xs: Sequence[Tensor], of: Sequence[int], dys: Sequence[Tensor]) -> Setup:
    """The backward pass alone, behind a forward pass that is not timed; over copies, since Liger writes over its operands."""

    def setup() -> Thunk:
        leaves = [x.detach().clone().requires_grad_(i in of) for i, x in enumerate(xs)]
        results, heads = several(function(*leaves)), [d.clone() for d in dys]
        return lambda: torch.autograd.grad(results, [leaves[i] for i in of], heads)

    return setup


def several(made: Results) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


# -- the variants -------------------------------------------------------------------------


def launched(graph: Graph, xs: Sequence[Tensor], poison: bool = False) -> Thunk:
    """The generated kernel, launched as it is; interpreted for operands on the CPU. Poisoned room tells what is not written."""
    kernel = row_kernel(graph)
    functions, on_device = load(kernel.source, kernel.name), xs[0].device.type == "cuda"

    def call() -> Sequence[Tensor]:
        seen = set[int]()

        def step(name: str, programs: int, arguments: Mapping[str, Any], warps: int) -> None:
            if poison:
                _poison(arguments, seen)
            function = getattr(functions, name)
            if on_device:
                function[(programs,)](**arguments, num_warps=warps)
            else:
                run(function, programs, **arguments, num_warps=warps)

        return launch(kernel, xs, step)

    return call


def _poison(arguments: Mapping[str, Any], seen: set[int]) -> None:
    for name, room in arguments.items():
        if name.startswith(("p_y", "p_s")) and room.data_ptr() not in seen:
            seen.add(room.data_ptr())
            room.fill_(float("nan"))


def ours(p: Problem, mode: str, poison: bool = False) -> Setup:
    """Our kernel of a row."""
    if mode == "fwd":
        call = launched(p.graph, p.xs, poison)
        return lambda: call
    made = gradient_of(p.graph)
    again = any(i >= len(p.xs) for i in made.reads)  # it reads results of the forward
    values = [*p.xs, *(launched(p.graph, p.xs)() if again else ())]
    back = launched(made.graph, [*(values[i] for i in made.reads), *p.dys], poison)
    return lambda: back


def as_op(graph: Graph) -> Function:
    """Our torch op of a kernel."""
    from plait.lowering.triton_ops import kernel_op

    op = kernel_op(graph)

    def call(*xs: Tensor) -> Results:
        made = several(op.call(*xs))
        return tuple(made[i] for i in op.order)

    return call


def functions(case: Case) -> dict[str, Callable[[], Function]]:
    """The torch functions of a case's variants, each to be made when it is its turn: any may fail."""
    made: dict[str, Callable[[], Function]] = {"compile": lambda: torch.compile(case.plain, dynamic=False)}
    if case.liger is not None:
        made["liger"] = case.liger
    if case.as_op:
        made["ours"] = lambda: torch.compile(as_op(case.graph), dynamic=False)
    return made


def setup_of(case: Case, function: Function, p: Problem, mode: str) -> Setup:
    """A torch function's call for a row."""
    given = case.given(p.xs)
    return forward_of(function, given) if mode == "fwd" else backward_of(function, given, gradient_of(p.graph).of, p.dys)


# -- checking -----------------------------------------------------------------------------


def error(got: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[float, float]:
    """The relative error of the worst result in the norm of all its elements, and of the worst element over the largest."""
    pairs = [(g.double() - w.double(), w.double()) for g, w in zip(got, want, strict=True)]
    norms = [float(d.norm() / w.norm().clamp_min(1e-30)) for d, w in pairs]
    peaks = [float(d.abs().max() / w.abs().max().clamp_min(1e-30)) for d, w in pairs]
    return worst(norms), worst(peaks)


def worst(values: Sequence[float]) -> float:
    """The largest; what is not a number is worse than any."""
    return next((v for v in values if v != v), max(values))


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def wrong(found: tuple[float, float], limit: float = LIMIT) -> str:
    """Why a variant is not timed; empty for one that is right."""
    fits = found[0] <= limit and found[1] <= limit * PEAK / LIMIT
    return "" if fits else f"wrong: error {found[0]:.1e} in the norm, {found[1]:.1e} at worst"


def reason(failed: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(failed).split())
    return f"{type(failed).__name__}: {text[:200]}" if text else type(failed).__name__


def check(case: Case, mode: str, p: Problem, given: Mapping[str, Function]) -> dict[str, tuple[float, float] | str]:
    """Every variant's error against float64, or why it has none."""
    want, found = truth(p, mode), dict[str, tuple[float, float] | str]()
    for name in dict.fromkeys((*given, "ours")):
        try:
            setup = setup_of(case, given[name], p, mode) if name in given else ours(p, mode, poison=True)
            found[name] = error(setup()(), want)
        except Exception as failed:  # whatever a compiler or a launch may raise: the others go on
            found[name] = reason(failed)
    return found


# -- rows ---------------------------------------------------------------------------------


def measure(row: Row, tokens: int, samples: int, clock: Clock, device: str = "cuda") -> Record:
    """A row: every variant's error, then the time of those that are right."""
    torch.compiler.reset()
    gc.collect()
    target, mode = row
    record: Record = {"case": target.id, "shape": target.shape, "mode": mode, "tokens": tokens, "failures": {}, "variants": {}}
    if isinstance(target, Rule):
        from gpu_rule_rows import measure_rule

        measure_rule(target, tokens, samples, clock, device, record)
        return record
    take = _measure_layer if isinstance(target, Layer) else _measure_case
    take(target, mode, tokens, samples, clock, device, record)  # type: ignore[arg-type] # by its class
    return record


def _measure_case(case: Case, mode: str, tokens: int, samples: int, clock: Clock, device: str, record: Record) -> None:
    record |= {"bytes": traffic(case.graph, mode, tokens), "target": case.target[mode == "bwd"]}
    given, failures = dict[str, Function](), record["failures"]
    for name, make in functions(case).items():
        try:
            given[name] = make()
        except Exception as failed:  # not installed, or not for this version of torch
            failures[name] = reason(failed)
    p = problem(case.graph, tokens, device)
    try:
        found = check(case, mode, p, given)
    except torch.OutOfMemoryError:
        record["checked"] = FEW
        found = check(case, mode, problem(case.graph, FEW, device), given)
    failures |= {name: each for name, each in found.items() if isinstance(each, str)}
    errors = {name: each for name, each in found.items() if not isinstance(each, str)}
    failures |= {name: why for name, each in errors.items() if (why := wrong(each))}
    right = [name for name in ("ours", "compile", "liger") if name in errors and name not in failures]
    setups = {name: setup_of(case, given[name], p, mode) if name in given else ours(p, mode) for name in right}
    time_all(setups, errors, samples, clock, record)


def time_all(
    setups: Mapping[str, Setup], errors: Mapping[str, tuple[float, float]], samples: int, clock: Clock, record: Record
) -> None:
    ready = dict[str, Setup]()
    for name, setup in setups.items():
        try:
            setup()()
            ready[name] = setup
        except Exception as failed:  # at full size alone: no room, say
            record["failures"][name] = reason(failed)
    times = interleave(ready, samples, clock) if ready else {}
    record["errors"] = {name: dict(zip(("norm", "worst"), map(finite, each), strict=True)) for name, each in errors.items()}
    record["variants"] = {name: asdict(each) for name, each in times.items()}


# -- whole layers -------------------------------------------------------------------------

PIPELINES = {"compile": "canonicalize,dce"}  # of ours it is the usual one


def layer_of(graph: Graph, name: str) -> Function:
    """A layer as the runtime runs it: with row kernels, or op by op, so that Inductor fuses what it can."""
    from plait.lowering import lower
    from plait.passes import DEFAULT, Pipeline
    from plait.runtime.runner import CompiledLayer

    made = Pipeline.parse(PIPELINES.get(name, DEFAULT)).run(graph)
    program = lower(made, target="cuda")
    return CompiledLayer(program.entry, made, program.fingerprint)


def _layer_setup(function: Function, values: Sequence[Tensor], dys: Sequence[Tensor], mode: str) -> Setup:
    if mode == "fwd":
        return forward_of(function, values)
    leaves = [x.detach().requires_grad_() for x in values]
    return lambda: lambda: torch.autograd.grad(several(function(*leaves)), leaves, dys)


def _layer_values(graph: Graph, tokens: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Operands and weights of about their usual sizes, and cotangents."""
    p, rng = problem(graph, tokens, device), torch.Generator(device).manual_seed(1)
    weights = [random_tensor(v.type, tokens, rng) for v in graph.params]
    return [*p.xs, *(w * (0.02 if w.dim() > 1 and w.shape[-1] > 8 else 0.3) for w in weights)], [*p.dys]


def _measure_layer(layer: Layer, mode: str, tokens: int, samples: int, clock: Clock, device: str, record: Record) -> None:
    record |= {"bytes": None, "target": layer.target, "checked": min(LAYER_TOKENS, tokens)}
    values, dys = _layer_values(layer.graph, record["checked"], device)
    want = _layer_truth(layer.graph, values, dys, mode)
    made, errors, failures = dict[str, Function](), dict[str, tuple[float, float]](), record["failures"]
    for name in ("ours", "compile"):
        try:
            made[name] = layer_of(layer.graph, name)
            errors[name] = error(_layer_setup(made[name], values, dys, mode)()(), want)
        except Exception as failed:  # whatever a compiler or a launch may raise: the other goes on
            failures[name] = reason(failed)
    failures |= {name: why for name, each in errors.items() if (why := wrong(each, LAYER_LIMIT))}
    values, dys = _layer_values(layer.graph, tokens, device)
    setups = {name: _layer_setup(made[name], values, dys, mode) for name in errors if name not in failures}
    time_all(setups, errors, samples, clock, record)


def _layer_truth(graph: Graph, values: Sequence[Tensor], dys: Sequence[Tensor], mode: str) -> list[Tensor]:
    """The layer in float32, op by op and eagerly: its recurrence token by token would take minutes."""
    from plait.lowering import lower

    wide = [replace(v.type, dtype="f32") for v in (*graph.inputs, *graph.params)]
    exact = lower(retype(graph, wide[: len(graph.inputs)], wide[len(graph.inputs) :]), target="cuda").entry
    return [*_layer_setup(exact, [x.float() for x in values], [d.float() for d in dys], mode)()()]
