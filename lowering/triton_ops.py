"""Row kernels as torch ops: per kernel graph a forward and a backward op, registered when they are first needed."""

from __future__ import annotations

import hashlib
import inspect
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import fx

from ..ir import DTYPES, Graph, PlaitError
from .gpu import run as interpret
from .gpu.machine import target_of
from .gpu.sources import load
from .gpu.tuned import row_warps
from .kernels import NAMES, Gradient, fitted, gradient, layout, retyped, room, run
from .program import fingerprint
from .rows import Declined, RowKernel, row_kernel
from .rows.launch import launch

Tensor = torch.Tensor
Maybe = Tensor | None
Compute = Callable[[Graph, Sequence[Tensor]], tuple[Tensor, ...]]
_LOCK = threading.RLock()
_KNOWN = dict[tuple[Graph, str], "KernelOp"]()


@dataclass(frozen=True)
class Way:
    """How a kernel's ops run: what computes its graphs, which of them it takes, and whether torch.compile sees their bodies."""

    suffix: str  # of the ops' names
    compute: Compute
    check: Callable[[Graph], object]  # raises Declined, with the reason
    seen: bool


@dataclass(frozen=True)
class KernelOp:
    """The torch ops of a kernel graph.

    `call` takes the operands and gives the distinct results, bare where there is one; `order` says which of these each
    result of the graph is. What is a view of an operand is one here too, and costs autograd no pass of its own.
    """

    kernel: Graph  # its results distinct
    forward: Any  # operands -> the computed results
    backward: Any  # operands, results, cotangents, which operands' are wanted, operands' dtypes, apart? -> cotangents
    call: Callable[..., Any]
    order: tuple[int, ...]


def kernel_op(kernel: Graph, *, interpreted: bool = False) -> KernelOp:
    """The ops of a kernel; equal kernels share them. Raises Declined, with the reason, for a graph without a row kernel.

    On a CUDA device they launch Triton, elsewhere they are the ops' torch code, which torch.compile fuses; `interpreted`
    ones run the Triton source on the CPU, slowly.
    """
    return registered(kernel, INTERPRETED if interpreted else TRITON)


def registered(kernel: Graph, way: Way) -> KernelOp:
    """The ops of a kernel that run one way."""
    with _LOCK:
        if (kernel, way.suffix) not in _KNOWN:
            _KNOWN[kernel, way.suffix] = _register(kernel, way)
        return _KNOWN[kernel, way.suffix]


def backward_declined(kernel: Graph, check: Callable[[Graph], object] = row_kernel) -> str:
    """Why the gradient of all results, for all operands, has no row kernel; empty where it has one."""
    made = gradient(kernel, (True,) * len(kernel.outputs), (True,) * len(kernel.inputs))
    try:
        if made is not None and made.layout.computed.outputs:
            check(made.layout.computed)
    except Declined as declined:
        return str(declined)
    return ""


def _register(kernel: Graph, way: Way) -> KernelOp:
    distinct = tuple(dict.fromkeys(kernel.outputs))
    order = tuple(distinct.index(v) for v in kernel.outputs)
    kernel = replace(kernel, outputs=distinct)
    way.check(layout(kernel).computed)
    if layout(kernel).views and not all(v.type.is_float for v in distinct):
        raise Declined("a result is a view of an operand and another is no float")
    digest = hashlib.sha256(f"{kernel.key}{fingerprint()}".encode()).hexdigest()[:12]
    name = f"plait::{kernel.name}_{digest}{way.suffix}"
    forward = _define(name, _forward(kernel, way.compute), _forward(kernel, room), way.seen)
    backward = _define(f"{name}_backward", _backward(kernel, way.compute), _backward(kernel, room), way.seen)
    forward.register_autograd(partial(_pull, kernel, backward), setup_context=partial(_keep, kernel))
    backward.register_autograd(partial(_no_second, kernel.name))
    space, _, bare = name.partition("::")
    op, op_backward = (getattr(getattr(torch.ops, space), n).default for n in (bare, f"{bare}_backward"))
    call = _viewing(kernel, op, op_backward) if layout(kernel).views else op
    return KernelOp(kernel, op, op_backward, call, order)


def _define(name: str, body: Callable[..., Any], fake: Callable[..., Any], seen: bool) -> Any:
    """A torch op. Its body is seen through by torch.compile where it is `seen`; `fake` gives shapes alone."""
    made: Any = (torch.library.triton_op if seen else torch.library.custom_op)(name, body, mutates_args=())
    made.register_fake(fake)
    return made


# -- what runs ----------------------------------------------------------------------------


def _compiled(graph: Graph, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Triton on a CUDA device, torch code elsewhere and for what has no row kernel in these dtypes."""
    made = _kernel_of(graph) if operands[0].device.type == "cuda" else None
    return run(graph, operands) if made is None else _launched(made, operands, _launch_compiled)


def _interpreted(graph: Graph, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    made = _kernel_of(graph)
    return run(graph, operands) if made is None else _launched(made, operands, _launch_interpreted)


def _kernel_of(graph: Graph) -> RowKernel | None:
    try:
        return row_kernel(graph)
    except Declined:  # in other dtypes, or for the cotangents that are given; lowering reports the usual case
        return None


def _launched(kernel: RowKernel, operands: Sequence[Tensor], how: Callable[..., None]) -> tuple[Tensor, ...]:
    return launch(kernel, operands, partial(how, load(kernel.source, kernel.name), kernel.source))


def _launch_compiled(module: Any, source: str, function: str, programs: int, arguments: Mapping[str, Any], warps: int) -> None:
    grid = torch.library.wrap_triton(getattr(module, function))
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    warps = row_warps(target_of(device), function, source, warps)
    # Warps are counted in 32 threads; AMD's have 64.
    grid[(programs,)](**arguments, num_warps=warps if torch.version.hip is None else max(1, warps // 2))


def _launch_interpreted(
    module: Any, source: str, function: str, programs: int, arguments: Mapping[str, Any], warps: int
) -> None:  # fmt: skip
    interpret(getattr(module, function), (programs,), **arguments, num_warps=warps)


TRITON = Way("", _compiled, row_kernel, seen=True)
INTERPRETED = Way("_interpreted", _interpreted, row_kernel, seen=False)

# -- the ops' bodies ----------------------------------------------------------------------


def _forward(kernel: Graph, compute: Compute) -> Callable[..., Any]:
    def forward(*operands: Tensor) -> Any:
        made = compute(layout(fitted(kernel, operands)).computed, operands)
        return made[0] if count == 1 else made

    count = len(layout(kernel).computed.outputs)
    given = {f"x{i}": Tensor for i in range(len(kernel.inputs))}
    many: Any = (Tensor,) * count
    return _signed(forward, given, Tensor if count == 1 else tuple[many])


def _backward(kernel: Graph, compute: Compute) -> Callable[..., Any]:
    """With `apart` one tensor for each wanted cotangent; else every computed one once, as `gradient` lays them out."""
    operands, cotangents = len(kernel.inputs), len(kernel.outputs)
    before = operands + cotangents  # results stand behind operands, then cotangents

    def backward(*values: Any) -> list[Tensor]:
        xs, ds, (wanted, dtypes, apart) = values[:before], values[before:-3], values[-3:]
        made = _gradient(kernel, ds, wanted, dtypes)
        if made is None:
            return []
        read = _read(made, xs, ds)
        found = compute(made.layout.computed, read) if made.layout.computed.outputs else ()
        if not apart:
            return list(found)
        every, seen = made.layout.results(found, read), set[int]()
        return [_fresh(d, place, seen) for d, place in zip(every, made.layout.places, strict=True)]

    named = {f"x{i}": Maybe for i in range(operands)}
    named |= {f"{kind}{i}": Maybe for kind in "yd" for i in range(cotangents)}
    return _signed(backward, {**named, "wanted": list[bool], "dtypes": str, "apart": bool}, list[Tensor])


def _fresh(made: Tensor, place: Any, seen: set[int]) -> Tensor:
    """A result that shares memory with no other and no operand."""
    if isinstance(place, int) and place not in seen:
        seen.add(place)
        return made
    return made.clone(memory_format=torch.contiguous_format)


def _signed(body: Callable[..., Any], parameters: Mapping[str, Any], result: Any) -> Callable[..., Any]:
    """The body with the signature that its schema is read from."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    given = [inspect.Parameter(name, kind, annotation=type_) for name, type_ in parameters.items()]
    cast("Any", body).__signature__ = inspect.Signature(given, return_annotation=result)
    return body


def _gradient(kernel: Graph, cotangents: Sequence[Maybe], wanted: Sequence[bool], dtypes: str) -> Gradient | None:
    given = tuple(d is not None for d in cotangents)
    return gradient(retyped(kernel, tuple(dtypes.split())), given, tuple(wanted))


def _read(made: Gradient, kept: Sequence[Maybe], cotangents: Sequence[Maybe]) -> list[Tensor]:
    """What a backward kernel reads, cotangents in the dtypes of what they are cotangents of."""
    values = [*(kept[i] for i in made.reads), *(cotangents[i] for i in made.given)]
    assert all(x is not None for x in values)
    return _cast(made.layout.computed, cast("list[Tensor]", values))


def _cast(graph: Graph, values: Sequence[Tensor]) -> list[Tensor]:
    return [x.to(DTYPES[v.type.dtype]) for v, x in zip(graph.inputs, values, strict=True)]


# -- autograd -----------------------------------------------------------------------------


def _kept(kernel: Graph) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The operands, and results behind them, that a backward kernel may read; the operands that it has cotangents of."""
    made = gradient(kernel, (True,) * len(kernel.outputs), (True,) * len(kernel.inputs))
    return (made.reads, made.of) if made is not None else ((), ())


def _keep(kernel: Graph, ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    kept, _ = _kept(kernel)
    found = output if isinstance(output, tuple) else (output,)
    results = [found[place] if isinstance(place, int) else None for place in layout(kernel).places]
    ctx.save_for_backward(*(x if i in kept else None for i, x in enumerate((*inputs, *results))))
    ctx.dtypes = " ".join(NAMES[x.dtype] for x in inputs)
    ctx.set_materialize_grads(False)


def _pull(kernel: Graph, backward: Any, ctx: Any, *cotangents: Maybe) -> tuple[Maybe, ...]:
    """The cotangents of the operands, for those of the computed results; what passes through unchanged is not copied."""
    wanted, xs, out = list(ctx.needs_input_grad), ctx.saved_tensors, [cast("Maybe", None)] * len(kernel.inputs)
    ds = [cotangents[place] if isinstance(place, int) else None for place in layout(kernel).places]
    made = _gradient(kernel, ds, wanted, ctx.dtypes)
    if made is None:
        return tuple(out)
    found = backward(*xs, *ds, wanted, ctx.dtypes, False) if made.layout.computed.outputs else ()
    for i, d in zip(made.of, made.layout.results(found, _read(made, xs, ds)), strict=True):
        out[i] = d
    return tuple(out)


def _no_second(name: str, ctx: Any, *cotangents: Maybe) -> None:
    raise PlaitError(f"{name} has no second derivative as a kernel; compile with target='reference' to differentiate twice")


def _viewing(kernel: Graph, op: Any, backward: Any) -> Callable[..., Any]:
    """The op with views of its operands among the results: their cotangents go through the backward kernel with the others.

    Dynamo traces this, and takes numbers that a function closes over for sizes that vary: all numbers are in `parts`' text.
    """
    parts, (kept, flows) = _parts(kernel, op), _kept(kernel)
    count = len(kernel.inputs)
    keeps, flowing = [i in kept for i in range(count + len(kernel.outputs))], [i in flows for i in range(count)]

    class Viewing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *operands: Tensor) -> Any:
            found = parts(*operands)
            ctx.save_for_backward(*(x if keep else None for x, keep in zip((*operands, *found), keeps, strict=True)))
            ctx.dtypes = " ".join(NAMES[x.dtype] for x in operands)
            return found

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            wanted = [asked and flows for asked, flows in zip(ctx.needs_input_grad, flowing, strict=True)]
            if not any(wanted):
                return tuple(None for _ in wanted)
            found = list(backward(*ctx.saved_tensors, *cotangents, wanted, ctx.dtypes, True))
            return tuple(found.pop(0) if asked else None for asked in wanted)

    def call(*operands: Tensor) -> Any:
        return Viewing.apply(*operands)

    call.__name__ = kernel.name
    return call


def _parts(kernel: Graph, op: Any) -> fx.GraphModule:
    """Every distinct result of a kernel: what the op computes, and views of operands."""
    graph, made = fx.Graph(), layout(kernel)
    operands = tuple(graph.placeholder(f"x{i}") for i in range(len(kernel.inputs)))
    found, bare = graph.call_function(op, operands), len(made.computed.outputs) == 1
    results = list[fx.Node]()
    for place in made.places:
        if isinstance(place, int):
            results.append(found if bare else graph.call_function(operator.getitem, (found, place)))
            continue
        part = operands[place.operand]
        for method, arguments in place.steps or (("view_as", (part,)),):
            part = graph.call_method(method, (part, *arguments))
        results.append(part)
    graph.output(tuple(results))
    return fx.GraphModule(torch.nn.Module(), graph, "Parts")
