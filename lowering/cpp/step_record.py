"""A decode step being written down: instructions over values that are only shapes until the tape runs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int32, c_int64
from dataclasses import dataclass, field
from typing import Any

import torch

from .step_text import KINDS

Tensor = torch.Tensor
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int64: 2}
OPERANDS, DIMS, ALIGN = 10, 4, 64
NUMBER = {name: i for i, name in enumerate(KINDS)}


class Declined(Exception):
    """No instruction says what a node does."""


class Arg(ctypes.Structure):
    """An operand: which tensor of the table, where in it, and the strides of its last dims."""

    _fields_ = (("slot", c_int32), ("type", c_int32), ("offset", c_int64), ("stride", c_int64 * DIMS))


class Ins(ctypes.Structure):
    """One instruction, as C++ reads it."""

    _fields_ = (
        ("kind", c_int64), ("units", c_int64), ("wait", c_int64), ("size", c_int64 * DIMS), ("whole", c_int64 * 6),
        ("num", c_double * 4), ("arg", Arg * OPERANDS),
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One thing to do: an instruction, or a call of torch code where `kind` is empty."""

    kind: str
    operands: tuple[Tensor | None, ...]  # shapes, on the device meta
    results: tuple[Tensor, ...]
    size: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()
    num: tuple[float, ...] = ()
    call: Any = None  # of torch code: the callable, with what it is told by name
    attrs: Any = None


def key(x: Tensor) -> int:
    """What values that share numbers share."""
    return x.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage] # it has no public name


@dataclass
class Tape:
    """What is written so far; every value is a tensor without numbers, and views of it are views."""

    given: set[int]  # inputs, by key: caches among them may be of any length
    steps: list[Step] = field(default_factory=list[Step])
    constants: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])  # shape, numbers
    frequencies: dict[tuple[Any, ...], Tensor] = field(default_factory=dict[tuple[Any, ...], Tensor])
    turned: dict[tuple[Any, ...], Tensor] = field(default_factory=dict[tuple[Any, ...], Tensor])  # by frequencies and place

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A result that is still to be filled."""
        if dtype not in TYPES:
            raise Declined
        return torch.empty(shape, dtype=dtype, device="meta")

    def constant(self, numbers: Tensor) -> Tensor:
        """Numbers that are the same in every step."""
        shape = numbers.to("meta")
        self.constants.append((shape, numbers))
        return shape

    def say(
        self, kind: str, operands: Sequence[Tensor | None], results: Sequence[Tensor], size: Sequence[int],
        whole: Sequence[int] = (), num: Sequence[float] = (),
    ) -> None:  # fmt: skip
        """Write an instruction; its arguments are the operands and then the results."""
        for x in (*operands, *results):
            if x is not None and (x.dtype not in TYPES or x.dim() > DIMS):
                raise Declined
        self.steps.append(Step(kind, tuple(operands), tuple(results), tuple(size), tuple(whole), tuple(num)))

    def pointwise(self, kind: str, operands: Sequence[Tensor], dtype: torch.dtype, num: Sequence[float] = ()) -> Tensor:
        """An instruction over rows of any shape that the operands share."""
        y = self.new(*operands[0].shape, dtype=dtype)
        self.say(kind, *together(operands, [y]), num=num)
        return y

    def dense(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The value side by side, in this dtype; itself if it is so already."""
        dtype = dtype or x.dtype
        return x if x.is_contiguous() and x.dtype == dtype else self.pointwise("COPY", [x], dtype)

    def view(self, x: Tensor, method: str, *args: Any) -> Tensor:
        """A view of the value; where torch would copy, so does the tape."""
        made = getattr(x, method)(*args)
        return made if key(made) == key(x) else getattr(self.dense(x), method)(*args)


def together(
    operands: Sequence[Tensor | None], results: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor], list[int]]:
    """Operands and results of one shape as four dims; those of one element are left out."""
    shape = results[0].shape
    kept = [i for i, n in enumerate(shape) if n != 1][-DIMS:]
    if sum(n != 1 for n in shape) > DIMS:
        raise Declined
    inner = kept or [len(shape) - 1]
    size = [1] * (DIMS - len(inner)) + [shape[i] for i in inner]

    def shown(x: Tensor) -> Tensor:
        stride = [0] * (DIMS - len(inner)) + [x.stride(i) for i in inner]
        return x.as_strided(size, stride)

    return [None if x is None else shown(x) for x in operands], [shown(y) for y in results], size


def argument(x: Tensor | None, slots: dict[int, int], moved: dict[int, int]) -> Arg:
    """An operand by its slot; values of the arena also by their place in it."""
    if x is None:
        return Arg(-1, 0, 0)
    made = Arg(slots[key(x)], TYPES[x.dtype], x.storage_offset() * x.itemsize + moved.get(key(x), 0))
    for i, n in enumerate(reversed(x.stride())):
        made.stride[DIMS - 1 - i] = n
    return made


def instruction(step: Step, units: int, wait: bool, slots: dict[int, int], moved: dict[int, int]) -> Ins:
    """A step as C++ reads it."""
    made = Ins(NUMBER[step.kind], units, wait)
    made.size[:] = [1] * (DIMS - len(step.size)) + list(step.size)
    made.whole[: len(step.whole)] = list(step.whole)
    made.num[: len(step.num)] = list(step.num)
    for i, x in enumerate((*step.operands, *step.results)):
        made.arg[i] = argument(x, slots, moved)
    for i in range(len(step.operands) + len(step.results), OPERANDS):
        made.arg[i] = argument(None, slots, moved)
    return made


def arranged(steps: Sequence[Step], known: set[int]) -> tuple[dict[int, int], int]:
    """Where in one arena each value that is not known stands, and how long the arena is; room is used again after last use."""
    last = {key(x): i for i, s in enumerate(steps) for x in (*s.operands, *s.results) if x is not None}
    places, free, end = dict[int, int](), list[tuple[int, int]](), 0
    for i, step in enumerate(steps):
        touched = {key(x): x for x in (*step.operands, *step.results) if x is not None and key(x) not in known}
        for k, x in touched.items():
            if k not in places:
                size = -(-x.untyped_storage().nbytes() // ALIGN) * ALIGN
                fit = next((f for f in sorted(free) if f[0] >= size), None)
                places[k] = fit[1] if fit else end
                free = [f for f in free if f is not fit] + ([(fit[0] - size, fit[1] + size)] if fit and fit[0] > size else [])
                end += 0 if fit else size
        for k, x in touched.items():
            if last[k] == i:
                free.append((-(-x.untyped_storage().nbytes() // ALIGN) * ALIGN, places[k]))
    return places, end
