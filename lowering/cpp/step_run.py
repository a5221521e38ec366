"""Running a decode step: tables of tensors for a tape, filled anew for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_int64
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from ...ir import DataError, Graph
from .build import addressable
from .step import Calls, Plan, machine, plan
from .step_record import NUMBER, Step, Tensor, key

BATCH = 32  # rows up to which reading weights once for a few of them is better than a library's product
PLANS = 64  # kept at a time; a plan is made anew in milliseconds
DTYPE = attrgetter("dtype")


def step_of(graph: Graph, target: str) -> Callable[[Calls], Stepper] | None:
    """What makes the step of a cached program, told what runs its layers; None for any other program, or another target."""
    return partial(Stepper, graph, target) if target == "cpu" and any(v.name == "at" for v in graph.inputs) else None


class Stepper:
    """The decode step of one program: asked before its compiled layers, it answers where a tape can."""

    def __init__(self, graph: Graph, target: str, calls: Calls) -> None:
        self.graph, self.target, self.calls = graph, target, calls
        self.known: tuple[Any, dict[Any, Ready | None]] = ((), {})  # plans for parameters that are where they are
        # A cache's room may change from call to call; every other size makes a plan of its own.
        self.roomy = [len(v.type.dims) == 4 and isinstance(v.type.dims[1].size, str) for v in graph.inputs]

    def takes(self, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
        """Whether this call is one token a row, of a few rows, without gradients, on the CPU."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or _watched():
            return False
        tokens = inputs[0]
        if tokens.dim() != 2 or tokens.shape[1] != 1 or not 0 < tokens.shape[0] <= BATCH or tokens.device.type != "cpu":
            return False
        return not torch.is_grad_enabled() or not any(p.requires_grad for p in params)

    def __call__(self, inputs: Sequence[Tensor], params: Sequence[Tensor], in_place: bool) -> tuple[Tensor, ...] | None:
        """The program's results; None where it has no tape. In place, states are written where they are."""
        if not self.takes(inputs, params):
            return None
        inputs = [x if x.is_floating_point() else x.contiguous() for x in inputs]
        if not addressable(*inputs) or not all(x.is_contiguous() for x in inputs):
            return None
        where = [*map(Tensor.data_ptr, params)]
        made = self._ready(inputs, params, where)
        return None if made is None else made.run(inputs, params, where, in_place)

    def _ready(self, inputs: Sequence[Tensor], params: Sequence[Tensor], where: list[int]) -> Ready | None:
        """The plan for tensors like these; parameters are looked at again when they have moved."""
        weights = (where, [*map(DTYPE, params)], [*map(Tensor.stride, params)])
        if weights != self.known[0]:
            self.known = (weights, {})
        plans = self.known[1]
        if len(plans) > PLANS:
            plans.clear()
        rooms = [(*x.shape[:1], *x.shape[2:]) if roomy else x.shape for x, roomy in zip(inputs, self.roomy, strict=True)]
        known = tuple((x.dtype, shape) for x, shape in zip(inputs, rooms, strict=True))
        if known not in plans:
            sizes = _sizes(self.graph, inputs)
            able = machine() is not None and sizes is not None
            made = plan(self.graph, self.target, self.calls, inputs, params, sizes or {}) if able else None
            plans[known] = made and Ready(made)
        return plans[known]


def _watched() -> bool:
    """Whether a mode of torch wants to see every op."""
    return bool(torch._C._len_torch_dispatch_stack())  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def _sizes(graph: Graph, inputs: Sequence[Tensor]) -> dict[str, int] | None:
    """What symbols of the inputs' types stand for; None where they disagree."""
    found = dict[str, int]()
    for value, x in zip(graph.inputs, inputs, strict=True):
        if x.dim() != len(value.type.dims):
            return None
        for dim, n in zip(value.type.dims, x.shape, strict=True):
            if isinstance(dim.size, str) and found.setdefault(dim.size, n) != n:
                return None
            if isinstance(dim.size, int) and dim.size != n:
                return None
    return found


@dataclass(frozen=True)
class Frame:
    """The tables of a run, in which parameters, constants and the arena stand already; one run at a time has it."""

    arena: Tensor
    base: Any
    rooms: Any


def _frame(made: Plan, where: Sequence[int], inputs: Sequence[Tensor]) -> Frame:
    arena, later = torch.empty(made.arena, dtype=torch.uint8), [0] * (len(inputs) + made.calls)
    known = [*where, *later, *map(Tensor.data_ptr, made.constants), *([0] * len(made.fresh)), arena.data_ptr()]
    return Frame(arena, (c_int64 * len(known))(*known), (c_int64 * len(known))())


@dataclass(frozen=True)
class Ready:
    """A plan with the frames that no run has at the moment, so that a steady step makes none."""

    plan: Plan
    spare: list[Frame] = field(default_factory=list[Frame])

    def run(self, inputs: Sequence[Tensor], params: Sequence[Tensor], where: list[int], in_place: bool) -> tuple[Tensor, ...]:
        frame = self.spare.pop() if self.spare else _frame(self.plan, where, inputs)
        results = _run(self.plan, frame, inputs, params, in_place)
        self.spare.append(frame)
        return results


def _run(
    made: Plan, frame: Frame, inputs: Sequence[Tensor], params: Sequence[Tensor], in_place: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    base, rooms, first = frame.base, frame.rooms, len(params)
    over = made.over if in_place else {}
    fresh = [inputs[over[i]] if i in over else torch.empty(x.shape, dtype=x.dtype) for i, x in enumerate(made.fresh)]
    for i, x in enumerate(inputs, first):
        base[i] = x.data_ptr()
        rooms[i] = x.shape[1] if x.dim() == 4 else 0
    for i, x in enumerate(fresh, len(base) - 1 - len(fresh)):
        base[i] = x.data_ptr()
    more: list[Tensor | None] = [*inputs, *([None] * made.calls), *made.constants, *fresh, frame.arena]
    table: list[Tensor | None] = [*params, *more] if made.calls else more
    run, threads = machine(), torch.get_num_threads()
    for part in made.parts:
        if isinstance(part, Step):
            _call(made, part, table, base)
        elif stopped := run(part, len(part), base, rooms, threads):
            raise _outside(part[stopped - 1])
    given = {"input": inputs, "fresh": fresh, "call": table[first + len(inputs) :]}
    return tuple(given[kind][i] for kind, i in made.results)  # type: ignore[misc] # what torch code fills is filled


def _call(made: Plan, step: Step, table: list[Tensor | None], base: Any) -> None:
    """Torch code between two parts of the tape."""
    results = step.call(*(None if x is None else _real(made, x, table) for x in step.operands), **step.attrs)
    for shape, result in zip(step.results, results if isinstance(results, (tuple, list)) else (results,), strict=True):
        slot, result = made.slots[key(shape)], result.contiguous()
        assert result.dtype == shape.dtype
        table[slot], base[slot] = result, result.data_ptr()


def _real(made: Plan, x: Tensor, table: list[Tensor | None]) -> Tensor:
    """What a shape stands for in this step."""
    whole = table[made.slots[key(x)]]
    assert whole is not None
    if key(x) in made.places:
        first = made.places[key(x)] // x.itemsize
        return whole.view(x.dtype).as_strided(x.shape, x.stride(), first + x.storage_offset())
    # A cache has its own room: that of the step which was planned says nothing.
    alike = x.dim() == whole.dim() and all(m == n or i == 1 for i, (m, n) in enumerate(zip(x.shape, whole.shape, strict=True)))
    if alike and x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes():
        return whole
    return whole.as_strided(x.shape, x.stride(), whole.storage_offset() + x.storage_offset())


def _outside(found: Any) -> DataError:
    """What was wrong with the numbers that an instruction met."""
    if found.kind == NUMBER["EMBEDDING"]:
        return DataError(f"a token is outside of the vocabulary; tokens are from 0 to {found.whole[0] - 1}")
    return DataError("a cache has no room for the next token; make states for more tokens, or decode fewer")
