"""Collectives on the local tensors of one rank, through torch.distributed's functional ops, differentiable.

What a rank's cotangent means follows from the type of its value, by duality. Where a value is split, so is its cotangent.
Where it is *partial* over an axis (ranks hold parts of a sum), its cotangent is *whole*: a part counts as much as the sum.
Where it is *whole*, each rank holds what its own use of the value contributes, so its cotangent is *partial*: the ranks'
add up to that of the global program. Every collective is a linear map between the ranks' tensors, and its adjoint is the
transpose of that map, whatever stands around it:

    y = all_to_all(x, src, dst)     d_x = all_to_all(d_y, dst, src)
    y = all_gather(x)               d_x = reduce_scatter(d_y)       the ranks' cotangents of the whole, added up
    y = reduce_scatter(x)           d_x = all_gather(d_y)           every part has the sum's cotangent
    y = all_reduce(x)               d_x = all_reduce(d_y)           both at once
    y = shard(x)                    d_x = d_y in its place, 0 elsewhere; nothing moves

No op needs to know how its result is used, so a rank can differentiate what it runs with autograd alone. Two things are
due at the borders: a whole result takes its cotangent on the first rank of an axis and 0 elsewhere, and the gradient of a
whole parameter is added up over that axis. A program whose gradients are IR has types that say more (a cotangent that
all ranks have alike is whole there, and moves less); it runs these same forms, forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from ...ir import TypeMismatch
from ...ir.ops import reorder as REORDER  # the op, beside the form of the same name
from ...ir.orders import Sections, parse_order
from .traffic import AxisGroup, axis_group, behind, collected, exchanged, scattered, summed, use_axes

__all__ = [
    "COLLECTIVE_FORMS", "MOVING", "AxisGroup", "all_gather", "all_reduce", "all_to_all", "axis_group", "reduce_scatter",
    "reorder", "shard", "use_axes",
]  # fmt: skip
Tensor = torch.Tensor


def _cut(x: Tensor, dim: int, group: AxisGroup, axis: str) -> Tensor:
    """x with `dim` in one slice per rank, and the slices first."""
    if x.shape[dim] % group.size:
        raise TypeMismatch(f"dim {dim} is {x.shape[dim]} long, which {axis}={group.size} ranks do not divide; pad it")
    return x.unflatten(dim, (group.size, x.shape[dim] // group.size)).movedim(dim, 0).contiguous()


def _laid(x: Tensor, dim: int) -> Tensor:
    """Slices that stand first, put side by side along `dim`."""
    return x.movedim(0, dim).flatten(dim, dim + 1)


def _swap(x: Tensor, axis: str, src: int, dst: int, at: str) -> Tensor:
    return _laid(exchanged(_cut(x, dst, axis_group(axis), axis), axis, at), src)


def _gathered(x: Tensor, axis: str, dim: int, at: str) -> Tensor:
    return _laid(collected(x[None].contiguous(), axis, at), dim)


def _scattered(x: Tensor, axis: str, dim: int, at: str) -> Tensor:
    return scattered(_cut(x, dim, axis_group(axis), axis), axis, at)[0]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, src: int, dst: int, at: str) -> Tensor:
        ctx.attrs = axis, src, dst, at
        return _swap(x, axis, src, dst, at)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        axis, src, dst, at = ctx.attrs
        return _swap(d_y, axis, dst, src, behind(at)), None, None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, dim: int, at: str) -> Tensor:
        ctx.attrs = axis, dim, at
        return _gathered(x, axis, dim, at)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        axis, dim, at = ctx.attrs
        return _scattered(d_y, axis, dim, behind(at)), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, dim: int, at: str) -> Tensor:
        ctx.attrs = axis, dim, at
        return _scattered(x, axis, dim, at)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        axis, dim, at = ctx.attrs
        return _gathered(d_y, axis, dim, behind(at)), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, at: str) -> Tensor:
        ctx.attrs = axis, at
        return summed(x.contiguous(), axis, at)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        axis, at = ctx.attrs
        return summed(d_y.contiguous(), axis, behind(at)), None, None


def all_to_all(x: Tensor, *, axis: str, src: int, dst: int, at: str = "") -> Tensor:
    """Whole along `src`, one slice of `dst`: slice r of every rank goes to rank r, which lays them side by side."""
    return cast(Tensor, _AllToAll.apply(x, axis, src, dst, at))


def all_gather(x: Tensor, *, axis: str, dim: int, at: str = "") -> Tensor:
    """The ranks' slices of `dim`, side by side in rank order."""
    return cast(Tensor, _AllGather.apply(x, axis, dim, at))


def reduce_scatter(x: Tensor, *, axis: str, dim: int, at: str = "") -> Tensor:
    """This rank's slice of `dim` of the ranks' sum."""
    return cast(Tensor, _ReduceScatter.apply(x, axis, dim, at))


def all_reduce(x: Tensor, *, axis: str, at: str = "") -> Tensor:
    """The ranks' sum."""
    return cast(Tensor, _AllReduce.apply(x, axis, at))


def shard(x: Tensor, *, axis: str, dim: int) -> Tensor:
    """This rank's slice of `dim`."""
    group = axis_group(axis)
    if x.shape[dim] % group.size:
        raise TypeMismatch(f"dim {dim} is {x.shape[dim]} long, which {axis}={group.size} ranks do not divide; pad it")
    size = x.shape[dim] // group.size
    return x.narrow(dim, group.rank * size, size)


def reorder(x: Tensor, cu: Tensor | None = None, *, dim: int = 1, order: str = "", was: str = "") -> Tensor:
    """A dim that is whole from one order to another; chunks swap places, so that no index is made or sent.

    Types refuse it where the dim is split, so every rank permutes all of it alike.
    """
    if any(isinstance(parse_order(o), Sections) for o in (order, was)) or cu is not None:
        return REORDER.reference(x, cu, dim=dim, order=order, was=was)
    if old := parse_order(was):
        chunks = x.unflatten(dim, (old.parts, 2, _chunk(x, dim, old.parts)))
        early, late = chunks.select(dim + 1, 0), chunks.select(dim + 1, 1).flip(dim)
        x = torch.stack([early, late], dim).flatten(dim, dim + 2)
    if new := parse_order(order):
        chunks = x.unflatten(dim, (2, new.parts, _chunk(x, dim, new.parts)))
        early, late = chunks.select(dim, 0), chunks.select(dim, 1).flip(dim)
        x = torch.stack([early, late], dim + 1).flatten(dim, dim + 2)
    return x


def _chunk(x: Tensor, dim: int, parts: int) -> int:
    if x.shape[dim] % (2 * parts):
        wanted = f"{2 * parts} chunks; pad to a multiple of {2 * parts}"
        raise TypeMismatch(f"zigzag({parts}): {x.shape[dim]} tokens do not divide into {wanted}")
    return x.shape[dim] // (2 * parts)


COLLECTIVE_FORMS: dict[str, Callable[..., Tensor]] = {
    "all_to_all": all_to_all,
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
    "all_reduce": all_reduce,
    "shard": shard,
    "reorder": reorder,
}
MOVING = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")  # these are told where they stand, `at`
