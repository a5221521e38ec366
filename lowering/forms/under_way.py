"""An exchange begun and ended apart: what is sent and what arrives share one buffer, which lives until the end.

    h = begin(x)     [2, ranks, ...]: place 1 holds x cut into slices, place 0 is being filled by the other ranks
    y = end(h)       waits, and lays the slices side by side

The cotangent of h is what the end's backward began, with the dims exchanged: it is under way until the begin's backward
ends it, so that a backward has other work in between, too.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist

from ...ir import PlacementError, TypeMismatch
from .traffic import axis_group, behind, guarded, process_group, tally

Tensor = torch.Tensor
_WORK = dict[int, Any]()  # what is under way, by the address of its buffer


@torch.library.custom_op("plait::begun", mutates_args=(), schema="(Tensor x, int ranks, int dim, str axis, str at) -> Tensor")
def _begun(x: Tensor, ranks: int, dim: int, axis: str, at: str) -> Tensor:
    slices = x.unflatten(dim, (ranks, x.shape[dim] // ranks)).movedim(dim, 0)
    buffer = x.new_empty(2, *slices.shape)
    buffer[1].copy_(slices)
    group = process_group(axis_group(axis))

    def begin() -> Any:
        return dist.all_to_all_single(buffer[0], buffer[1], group=group, async_op=True)

    _WORK[buffer.data_ptr()] = guarded("all_to_all", axis, at, begin)
    tally(axis, (ranks - 1) * (x.numel() * x.element_size() // ranks))
    return buffer


@_begun.register_fake
def _(x: Tensor, ranks: int, dim: int, axis: str, at: str) -> Tensor:
    shape = [*x.shape[:dim], x.shape[dim] // ranks, *x.shape[dim + 1 :]]
    return x.new_empty((2, ranks, *shape))


@torch.library.custom_op("plait::ended", mutates_args=(), schema="(Tensor buffer, int dim, str axis, str at) -> Tensor")
def _ended(buffer: Tensor, dim: int, axis: str, at: str) -> Tensor:
    work = _WORK.pop(buffer.data_ptr(), None)
    if work is None:
        raise PlacementError(f"an all_to_all over {axis}{f' at {at}' if at else ''} is ended that was not begun here")
    guarded("all_to_all", axis, at, work.wait)
    laid = buffer[0].movedim(0, dim)
    return laid.flatten(dim, dim + 1) if not laid.is_contiguous() else laid.flatten(dim, dim + 1).clone()


@_ended.register_fake
def _(buffer: Tensor, dim: int, axis: str, at: str) -> Tensor:
    _, ranks, *rest = buffer.shape
    return buffer.new_empty([n * ranks if i == dim else n for i, n in enumerate(rest)])


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, src: int, dst: int, at: str) -> Tensor:
        ctx.attrs = axis, dst, at
        return _begun(x, _ranks(x, dst, axis), dst, axis, at)

    @staticmethod
    def backward(ctx: Any, d_buffer: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        axis, dst, at = ctx.attrs
        return _ended(d_buffer, dst, axis, behind(at)), None, None, None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, axis: str, src: int, dst: int, at: str) -> Tensor:
        ctx.attrs = axis, src, at
        return _ended(buffer, src, axis, at)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        axis, src, at = ctx.attrs
        return _begun(d_y, _ranks(d_y, src, axis), src, axis, behind(at)), None, None, None, None


def _ranks(x: Tensor, dim: int, axis: str) -> int:
    size = axis_group(axis).size
    if x.shape[dim] % size:
        raise TypeMismatch(f"dim {dim} is {x.shape[dim]} long, which {axis}={size} ranks do not divide; pad it")
    return size


def begin_all_to_all(x: Tensor, *, axis: str, src: int, dst: int, at: str = "") -> Tensor:
    """Send every rank its slice of `dst`, and go on."""
    return cast(Tensor, _Begin.apply(x, axis, src, dst, at))


def end_all_to_all(buffer: Tensor, *, axis: str, src: int, dst: int, at: str = "") -> Tensor:
    """What has arrived, whole along `src`."""
    return cast(Tensor, _End.apply(buffer, axis, src, dst, at))


UNDER_WAY_FORMS = {"begin_all_to_all": begin_all_to_all, "end_all_to_all": end_all_to_all}
