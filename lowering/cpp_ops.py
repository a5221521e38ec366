"""Row kernels in C++ as torch ops for the CPU: which kernel graphs they are for, and how one is launched."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from struct import Struct
from typing import Any

import torch
from torch import fx

from ..ir import Graph, PlaitError, Value
from .cpp.build import addressable, compiler, library
from .cpp.rows import CppKernel, cpp_kernel
from .kernels import result_shapes, run, sized
from .program import is_plain
from .rows import Declined
from .triton_ops import KernelOp, Way, backward_declined, registered

Tensor = torch.Tensor
SMALL = 1 << 15  # numbers of all results that one thread makes sooner than it wakes another
SUMS = ("rms_norm", "layer_norm", "l2_norm", "row_sum", "row_mean")  # along a row, which Inductor reads anew behind each
TURNS = ("rope",)
DEAR = ("sigmoid", "silu", "gelu", "tanh", "softplus", "softcap")  # a number; Inductor's take twice as long
WIDE = 256  # numbers a row from which on such a kernel is worth a call


def cpp_op(kernel: Graph) -> tuple[KernelOp, str]:
    """The ops of a kernel that C++ is for, and why it is. Raises Declined, with the reason, for any other."""
    why = worth(kernel)
    if compiler() is None:
        raise Declined("there is no C++ compiler")
    made = registered(kernel, CPP)
    if back := backward_declined(made.kernel, cpp_kernel):
        raise Declined(f"backward: {back}")
    return made, why


def worth(kernel: Graph) -> str:
    """Why a kernel is faster in C++. Raises Declined where it is not: what is cheap, Inductor fuses with its neighbours."""
    names = {node.op.name for node in kernel.nodes}
    if names & {*SUMS}:
        return "sums along rows, and over rows backward, in one pass"
    if names & {*TURNS}:
        return "angles turned once for all heads"
    if not names & {*DEAR}:
        raise Declined("pointwise and cheap, which torch.compile fuses with its neighbours")
    if (columns := max(_columns(v) for v in kernel.outputs)) < WIDE:
        raise Declined(f"pointwise, and with {columns} numbers a row less than a call costs")
    return "exponentials in vectors, and the backward makes them once"


def _columns(value: Value) -> int:
    return math.prod(d.size for d in value.type.dims if isinstance(d.size, int))


class Rows(torch.nn.Module):
    """A kernel in C++, and its ops one by one for operands of one token a row: a call would cost more than they."""

    def __init__(self, kernel: Graph, own: fx.GraphModule, apart: fx.GraphModule) -> None:
        super().__init__()
        self.own, self.apart = own, apart
        dims = [[d for d, dim in enumerate(v.type.dims) if isinstance(dim.size, str)] for v in kernel.inputs]
        self.operand, self.dim = next(((i, d[-1]) for i, d in enumerate(dims) if d), (0, 0))

    @property
    def code(self) -> str:
        """What is listed of it."""
        return self.own.code

    def forward(self, *operands: Tensor) -> Any:
        # A length of one is always compiled for itself, so that this is no check at run time.
        if operands[self.operand].shape[self.dim] == 1:
            return self.apart(*operands)
        return self.own(*operands)


class Waiting(torch.nn.Module):
    """A kernel of a model that is not compiled: its ops one by one, and its C++ from the first call on that wants it."""

    def __init__(self, apart: fx.GraphModule, make: Callable[[], torch.nn.Module | None]) -> None:
        super().__init__()
        self.apart, self.make = apart, make

    @cached_property
    def best(self) -> torch.nn.Module:
        return self.make() or self.apart

    def forward(self, *operands: Tensor) -> Any:
        # Who compiles around it fuses ops better than calls.
        return (self.apart if torch.compiler.is_compiling() or is_plain() else self.best)(*operands)


# -- what runs ----------------------------------------------------------------------------


def _computed(graph: Graph, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A kernel's results by C++, or by torch code where there is none for such operands."""
    made = _built(graph) if addressable(*operands) else None
    return run(graph, operands) if made is None else _launched(graph, operands)


CPP = Way("_cpp", _computed, cpp_kernel, seen=False)


@lru_cache(maxsize=1024)
def _built(graph: Graph) -> tuple[CppKernel, Any] | None:
    try:
        kernel = cpp_kernel(graph)
    except Declined:  # in other dtypes, or for the cotangents that are given; lowering reports the usual case
        return None
    made = library(kernel.source, kernel.name)
    if made is None:
        return None
    made.run.argtypes, made.run.restype = (ctypes.c_char_p,), ctypes.c_int
    return kernel, made.run


@dataclass(frozen=True)
class Call:
    """All of a launch that shapes and strides say."""

    run: Any
    scattered: tuple[int, ...]  # operands whose last numbers do not stand side by side: they are copied
    results: tuple[tuple[list[int], torch.dtype], ...]
    numbers: bytes  # strides and sizes
    large: bool  # worth more than one thread
    pack: Any  # addresses as bytes


@lru_cache(maxsize=4096)
def _call(graph: Graph, operands: tuple[tuple[Sequence[int], tuple[int, ...]], ...]) -> Call:
    """The call for operands of these shapes and strides: what no call needs to work out again."""
    built, shapes = _built(graph), [shape for shape, _ in operands]
    assert built is not None
    env, (kernel, function) = sized(graph, shapes), built
    scattered = tuple(i for i, (n, steps) in enumerate(operands) if n and n[-1] > 1 and steps[-1] != 1)
    steps = [torch.empty(n, device="meta").stride() if i in scattered else steps for i, (n, steps) in enumerate(operands)]
    numbers = [*(steps[i][d] for i, d in kernel.strides), *(env[size] for size in kernel.sizes)]
    results = tuple(result_shapes(graph, env))
    large = sum(math.prod(shape) for shape, _ in results) > SMALL
    pack = Struct(f"={len(operands) + len(results)}q").pack
    return Call(function, scattered, results, Struct(f"={len(numbers)}q").pack(*numbers), large, pack)


def _launched(graph: Graph, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    call, xs = _call(graph, tuple([(x.shape, x.stride()) for x in operands])), list(operands)
    for i in call.scattered:
        xs[i] = xs[i].contiguous()
    results = tuple([torch.empty(n, dtype=dtype) for n, dtype in call.results])
    threads = torch.get_num_threads() if call.large else 1
    addresses = call.pack(*[x.data_ptr() for x in (*xs, *results)])
    if call.run(addresses + call.numbers + threads.to_bytes(8, sys.byteorder)):
        raise PlaitError(f"{graph.name}: no memory for its sums over rows; make the batch smaller")
    return results
