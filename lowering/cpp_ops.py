"""Row kernels in C++ as torch ops for the CPU: which kernel graphs they are for, and how one is launched."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ..ir import Graph, PlaitError
from .cpp.build import addressable, compiler, library
from .cpp.rows import CppKernel, cpp_kernel
from .kernels import bound, room, run
from .rows import Declined
from .triton_ops import KernelOp, Way, backward_declined, registered

Tensor = torch.Tensor
SMALL = 1 << 15  # numbers of all results that one thread makes sooner than it wakes another
SUMS = ("rms_norm", "layer_norm", "l2_norm", "row_sum", "row_mean")  # along a row, which Inductor reads anew behind each
TURNS = ("rope",)


def cpp_op(kernel: Graph) -> tuple[KernelOp, str]:
    """The ops of a kernel that C++ is for, and why it is. Raises Declined, with the reason, for any other."""
    why = _reason(kernel)
    if compiler() is None:
        raise Declined("there is no C++ compiler")
    made = registered(kernel, CPP)
    if back := backward_declined(made.kernel, cpp_kernel):
        raise Declined(f"backward: {back}")
    return made, why


def _reason(kernel: Graph) -> str:
    """Why a kernel is faster in C++. Raises Declined where it is not: what is pointwise, Inductor fuses with its neighbours."""
    names = {node.op.name for node in kernel.nodes}
    if names & {*SUMS}:
        return "sums along rows, and over rows backward, in one pass"
    if names & {*TURNS}:
        return "angles turned once for all heads"
    raise Declined("pointwise, which torch.compile fuses with its neighbours")


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


# -- what runs ----------------------------------------------------------------------------


def _computed(graph: Graph, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A kernel's results by C++, or by torch code where there is none for such operands."""
    made = _built(graph) if addressable(*operands) else None
    return run(graph, operands) if made is None else _launched(graph, *made, operands)


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
    made.run.argtypes, made.run.restype = (ctypes.POINTER(ctypes.c_int64),), ctypes.c_int
    return kernel, made.run


def _launched(graph: Graph, kernel: CppKernel, call: Any, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    env, results = bound(graph, operands), room(graph, operands)
    xs = [x if x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous() for x in operands]
    threads = torch.get_num_threads() if sum(y.numel() for y in results) > SMALL else 1
    numbers = [*(x.data_ptr() for x in (*xs, *results)), *(xs[i].stride(d) for i, d in kernel.strides)]
    numbers += [*(env[size] for size in kernel.sizes), threads]
    if call((ctypes.c_int64 * len(numbers))(*numbers)):
        raise PlaitError(f"{graph.name}: no memory for its sums over rows; make the batch smaller")
    return results
