"""Ways across split tokens, run by one process: torch.distributed answers what the generator asks (see ir/crossing.py).

Differentiable as one autograd.Function. The forward keeps a tape of requests; each answer starts a new graph. The backward
takes them in exact reverse order and asks for the transposed request of every one, whatever this rank's own numbers need,
so that no rank waits for a request that another does not make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, cast

import torch
import torch.distributed as dist

from ...ir import OpDef, PlacementError
from ...ir.crossing import (
    Cut,
    Exchange,
    Gather,
    Here,
    Hop,
    Keep,
    Moving,
    OneWay,
    Request,
    ScatterSum,
    Shift,
    Sum,
    Swap,
    Way,
    sent,
    transposed,
)
from ...ir.op import seeds
from .traffic import AxisGroup, axis_group, behind, moved, process_group

Tensor = torch.Tensor
# Torch 2.13 has new names for them and warns of the old ones.
_GATHER: Any = getattr(dist, "all_gather_single", None) or vars(dist)["all_gather_into_tensor"]
_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or vars(dist)["reduce_scatter_tensor"]
Run = Callable[..., Any]
Counter = Callable[[str, Request, int], None]
_COUNTERS = list[Counter]()


def watch(counter: Counter) -> Callable[[], None]:
    """Have every request told as (axis, request, bytes that this rank sends) from here on; the result ends it."""
    _COUNTERS.append(counter)
    return lambda: _COUNTERS.remove(counter)


# -- one request ------------------------------------------------------------------------------


def answer(request: Moving, axis: str, at: str = "") -> Tensor:
    """What the ranks of the axis make of a request; `at` says where in the program it stands."""
    group = axis_group(axis)
    size = sent(request, group.size, group.rank)
    for counter in _COUNTERS:
        counter(axis, request, size)
    return moved(type(request).__name__, axis, at, size, lambda: _answer(request, group))


def _answer(request: Moving, group: AxisGroup) -> Tensor:
    x, ranks, members = request.x.detach().contiguous(), group.size, process_group(group)
    match request:
        case Shift(by=by, ring=ring):
            return _passed(x, *_neighbours(by, ring, group), members)
        case Hop(source=source, target=target):
            to, of = (target if group.rank == source else None), (source if group.rank == target else None)
            return x if source == target else _passed(x, to, of, members)
        case Sum():
            total = x.clone()
            dist.all_reduce(total, group=members)
            return total
        case Gather():
            whole = x.new_empty(ranks * x.numel())
            _GATHER(whole, x.flatten(), group=members)
            return whole.reshape(ranks, *x.shape)
        case ScatterSum():
            part = x.new_empty(x[0].numel())
            _SCATTER(part, x.flatten(), group=members)
            return part.reshape(x.shape[1:])
        case Swap():
            swapped = torch.empty_like(x)
            dist.all_to_all_single(swapped, x, group=members)
            return swapped
        case Exchange(sizes=sizes, expected=expected):
            rows = x.new_empty(sum(expected), *x.shape[1:])
            dist.all_to_all_single(rows, x, [*expected], [*sizes], group=members)
            return rows


def _neighbours(by: int, ring: bool, group: AxisGroup) -> tuple[int | None, int | None]:
    """Whom a rank sends to and hears from."""
    to, of = group.rank + by, group.rank - by
    if ring:
        return to % group.size, of % group.size
    return (to if 0 <= to < group.size else None), (of if 0 <= of < group.size else None)


def _passed(x: Tensor, to: int | None, of: int | None, members: Any) -> Tensor:
    """x sent to one rank, what another sent, or zeros."""
    if to is not None and to == of == dist.get_rank(members):
        return x
    got, moves = torch.zeros_like(x), list[Any]()
    if to is not None:
        moves.append(dist.P2POp(dist.isend, x, dist.get_global_rank(members, to), members))
    if of is not None:
        moves.append(dist.P2POp(dist.irecv, got, dist.get_global_rank(members, of), members))
    for work in dist.batch_isend_irecv(moves) if moves else ():
        work.wait()
    return got


# -- a way, and back --------------------------------------------------------------------------


@dataclass
class Tape:
    """What a rank asked for, in order, and the answers, each the start of a new graph."""

    axis: str
    at: str
    steps: list[tuple[Moving | Cut, tuple[Tensor, ...]]] = field(
        default_factory=list[tuple[Moving | Cut, "tuple[Tensor, ...]"]]
    )

    def put(self, request: Request) -> Any:
        """Answer a request, and remember it."""
        if isinstance(request, Keep):
            return request.xs
        made = [x.detach() for x in request.xs] if isinstance(request, Cut) else [answer(request, self.axis, self.at)]
        leaves = tuple(y.requires_grad_(y.is_floating_point()) for y in made)
        self.steps.append((request, leaves))
        return leaves if isinstance(request, Cut) else leaves[0]

    def back(self) -> None:
        """From the cotangents that stand at the answers to those at what was asked, last request first."""
        while self.steps:
            request, leaves = self.steps.pop()
            if not leaves[0].is_floating_point():
                continue
            found = [torch.zeros_like(y) if y.grad is None else y.grad for y in leaves]
            xs = request.xs if isinstance(request, Cut) else (request.x,)
            made = found if isinstance(request, Cut) else [answer(transposed(request, found[0]), self.axis, behind(self.at))]
            flow(xs, made)


def flow(ends: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
    """Cotangents of some values to the starts of their graphs."""
    pairs = [(y, d.to(y.dtype)) for y, d in zip(ends, cotangents, strict=True) if y.requires_grad]
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [d for _, d in pairs], retain_graph=True)


def _forward(way: OneWay, here: Here, at: str, operands: Sequence[Any]) -> tuple[Tape, list[Any], tuple[Tensor, ...]]:
    """The tape, the leaves that stand for the operands, and the results with their graphs."""
    tape = Tape(here.axis, at)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(x.is_floating_point()) if x is not None else None for x in operands]
        made = _driven(way.run(here, *leaves), tape.put)
    return tape, leaves, made if isinstance(made, tuple) else (made,)


def _driven(steps: Way, reply: Callable[[Any], Any]) -> Any:
    """Run a way, every request answered; what it returns."""
    said = None
    while True:
        try:
            request = steps.send(said)
        except StopIteration as end:
            return end.value
        said = reply(request)


@dataclass
class Kept:
    """Answers without a graph, and what a way keeps for its own gradient."""

    axis: str
    at: str
    kept: tuple[Tensor, ...] = ()

    def put(self, request: Request) -> Any:
        if isinstance(request, Keep):
            self.kept = request.xs
        return request.xs if isinstance(request, Keep | Cut) else answer(request, self.axis, self.at)


class _Again(torch.autograd.Function):
    """A way that has a gradient of its own: only what it keeps lives until then."""

    @staticmethod
    def forward(ctx: Any, way: OneWay, here: Here, at: str, *operands: Any) -> Any:
        driver = Kept(here.axis, at)
        made = _driven(way.run(here, *operands), driver.put)
        ctx.way, ctx.here, ctx.at, ctx.count = way, here, at, len(operands)
        ctx.save_for_backward(*operands, *driver.kept)
        return made

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        operands, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        return None, None, None, *_gone_back(ctx.way, ctx.here, behind(ctx.at), operands, kept, cotangents)


def _gone_back(way: OneWay, here: Here, at: str, operands: Any, kept: Any, cotangents: Any) -> tuple[Tensor | None, ...]:
    assert way.back is not None
    return _driven(way.back(here, operands, kept, cotangents), Kept(here.axis, at).put)


class _Crossed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: OneWay, here: Here, at: str, *operands: Any) -> Any:
        tape, leaves, results = _forward(way, here, at, operands)
        ctx.tape, ctx.leaves, ctx.results = tape, leaves, results
        made = tuple(y.detach() for y in results)
        ctx.mark_non_differentiable(*(y for y in made if not y.is_floating_point()))
        ctx.set_materialize_grads(False)
        return made

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        given = [(y, d) for y, d in zip(ctx.results, cotangents, strict=True) if d is not None]
        flow([y for y, _ in given], [d for _, d in given])
        ctx.tape.back()
        found = [x.grad if x is not None else None for x in ctx.leaves]
        ctx.tape = ctx.leaves = ctx.results = None
        return None, None, None, *found


def crossing_form(op: OpDef, run: Run) -> Run:
    """A form of an op that runs over a mesh axis; `run(op, *operands, **attrs)` runs ops on this rank's own tensors.

    The form is told where it stands, `at`, besides the op's attributes.
    """
    crossing = op.crossing
    if crossing is None:
        raise PlacementError(f"{op.name} has no way across a split; it cannot run over an axis")

    @wraps(op.reference)
    def form(*operands: Any, at: str = "", **named: Any) -> Any:
        attrs = {**op.attrs, **{k: v for k, v in named.items() if k in op.attrs}}
        values = op.arrange(operands, {k: v for k, v in named.items() if k not in op.attrs})
        group = axis_group(attrs["over"])
        here, way = Here.of(attrs, group.size, group.rank, run), crossing.ways[attrs["by"]]
        made = (
            _backward(op, way, here, at, values)
            if op.gradient_of
            else cast(Any, (_Again if way.back else _Crossed).apply(way, here, at, *values))
        )
        return made[0] if isinstance(made, tuple) and len(made) == 1 else made

    return cast(Run, torch._dynamo.disable(form))  # type: ignore[reportPrivateUsage] # generators and sends are not traced


def _backward(op: OpDef, way: OneWay, here: Here, at: str, values: Sequence[Any]) -> tuple[Tensor, ...]:
    """A gradient's op: its forward's way again, and back."""
    assert op.gradient_of is not None
    count, given = len(op.gradient_of.inputs), seeds(op.gradient_of, values[len(op.gradient_of.inputs) :], here.rank)
    if way.back:
        driver = Kept(here.axis, at)
        _driven(way.run(here, *values[:count]), driver.put)
        return tuple(d for d in _gone_back(way, here, behind(at), values[:count], driver.kept, given) if d is not None)
    tape, leaves, results = _forward(way, here, at, values[:count])
    pairs = [(y, d) for y, d in zip(results, given, strict=True) if d is not None]
    flow([y for y, _ in pairs], [d for _, d in pairs])
    tape.back()
    floats = [x for x in leaves if x is not None and x.is_floating_point()]
    return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in floats)
