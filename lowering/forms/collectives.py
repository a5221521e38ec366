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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from ...ir import PlacementError, TypeMismatch
from ...ir.ops import order_parts

Tensor = torch.Tensor
_C10D: Any = torch.ops._c10d_functional  # its functions are found by name when called


@dataclass(frozen=True)
class AxisGroup:
    """The ranks that differ in one mesh axis alone, and where this rank stands among them."""

    name: str  # of the process group
    size: int
    rank: int


_AXES = dict[str, AxisGroup]()


def use_axes(axes: Mapping[str, AxisGroup]) -> None:
    """Say which process group each mesh axis is, from here on."""
    _AXES.clear()
    _AXES.update(axes)


def axis_group(axis: str) -> AxisGroup:
    """This rank's group along a mesh axis."""
    if axis not in _AXES:
        known = ", ".join(_AXES) or "none, as no mesh is in use"
        raise PlacementError(f"a collective runs over mesh axis {axis}; this process has axes: {known}; init a mesh with it")
    return _AXES[axis]


def _cut(x: Tensor, dim: int, group: AxisGroup, axis: str) -> Tensor:
    """x with `dim` in one slice per rank, and the slices first."""
    if x.shape[dim] % group.size:
        raise TypeMismatch(f"dim {dim} is {x.shape[dim]} long, which {axis}={group.size} ranks do not divide; pad it")
    return x.unflatten(dim, (group.size, x.shape[dim] // group.size)).movedim(dim, 0).contiguous()


def _laid(x: Tensor, dim: int) -> Tensor:
    """Slices that stand first, put side by side along `dim`."""
    return x.movedim(0, dim).flatten(dim, dim + 1)


def _done(x: Tensor) -> Tensor:
    return cast(Tensor, _C10D.wait_tensor(x))


def _swap(x: Tensor, axis: str, src: int, dst: int) -> Tensor:
    group = axis_group(axis)
    slices, ones = _cut(x, dst, group, axis), [1] * group.size
    return _laid(_done(_C10D.all_to_all_single(slices, ones, ones, group.name)), src)


def _gathered(x: Tensor, axis: str, dim: int) -> Tensor:
    group = axis_group(axis)
    stacked = _done(_C10D.all_gather_into_tensor(x[None].contiguous(), group.size, group.name))
    return _laid(stacked, dim)


def _scattered(x: Tensor, axis: str, dim: int) -> Tensor:
    group = axis_group(axis)
    slices = _cut(x, dim, group, axis)
    return _done(_C10D.reduce_scatter_tensor(slices, "sum", group.size, group.name))[0]


def _summed(x: Tensor, axis: str) -> Tensor:
    return _done(_C10D.all_reduce(x.contiguous(), "sum", axis_group(axis).name))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, src: int, dst: int) -> Tensor:
        ctx.attrs = axis, src, dst
        return _swap(x, axis, src, dst)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        axis, src, dst = ctx.attrs
        return _swap(d_y, axis, dst, src), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, dim: int) -> Tensor:
        ctx.attrs = axis, dim
        return _gathered(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        return _scattered(d_y, *ctx.attrs), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str, dim: int) -> Tensor:
        ctx.attrs = axis, dim
        return _scattered(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        return _gathered(d_y, *ctx.attrs), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: str) -> Tensor:
        ctx.axis = axis
        return _summed(x, axis)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        return _summed(d_y, ctx.axis), None


def all_to_all(x: Tensor, *, axis: str, src: int, dst: int) -> Tensor:
    """Whole along `src`, one slice of `dst`: slice r of every rank goes to rank r, which lays them side by side."""
    return cast(Tensor, _AllToAll.apply(x, axis, src, dst))


def all_gather(x: Tensor, *, axis: str, dim: int) -> Tensor:
    """The ranks' slices of `dim`, side by side in rank order."""
    return cast(Tensor, _AllGather.apply(x, axis, dim))


def reduce_scatter(x: Tensor, *, axis: str, dim: int) -> Tensor:
    """This rank's slice of `dim` of the ranks' sum."""
    return cast(Tensor, _ReduceScatter.apply(x, axis, dim))


def all_reduce(x: Tensor, *, axis: str) -> Tensor:
    """The ranks' sum."""
    return cast(Tensor, _AllReduce.apply(x, axis))


def shard(x: Tensor, *, axis: str, dim: int) -> Tensor:
    """This rank's slice of `dim`."""
    group = axis_group(axis)
    if x.shape[dim] % group.size:
        raise TypeMismatch(f"dim {dim} is {x.shape[dim]} long, which {axis}={group.size} ranks do not divide; pad it")
    size = x.shape[dim] // group.size
    return x.narrow(dim, group.rank * size, size)


def reorder(x: Tensor, *, dim: int = 1, order: str = "", was: str = "") -> Tensor:
    """Tokens of a dim that is whole from one order to another, as slices that swap places: no index to make or to send.

    Types refuse it where the dim is split, so every rank permutes all of it alike.
    """
    if parts := order_parts(was):
        chunks = x.unflatten(dim, (parts, 2, _chunk(x, dim, parts)))
        early, late = chunks.select(dim + 1, 0), chunks.select(dim + 1, 1).flip(dim)
        x = torch.stack([early, late], dim).flatten(dim, dim + 2)
    if parts := order_parts(order):
        chunks = x.unflatten(dim, (2, parts, _chunk(x, dim, parts)))
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
