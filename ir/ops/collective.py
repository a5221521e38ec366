"""Ops that move data between ranks. In the global view each is the identity; types say what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..crossing import Crossing
from ..errors import PlacementError, TypeMismatch
from ..op import op
from ..orders import Sections, Zigzag, parse_order, permutation
from ..types import Dim, TensorType

Tensor = torch.Tensor
Shards = list[Tensor]


@op("x[...] -> y[...]", map="...", linear="x")
def all_to_all(x: Tensor, *, axis: str, src: int, dst: int) -> Tensor:
    """Stop splitting dim `src` over the axis; split dim `dst` instead"""
    return x


@all_to_all.infers
def _(x: TensorType, *, axis: str, src: int, dst: int) -> TensorType:
    """Which dims change is an attribute, which letters cannot say."""
    _split_over(x, src, axis, "all_to_all")
    _dim(x, dst, "all_to_all")
    if axis in x.dims[dst].axes:
        raise PlacementError(f"all_to_all: dim {dst} of {x} is already split over {axis}")
    return _join(x, src, axis).with_dim(dst, replace(x.dims[dst], axes=(*x.dims[dst].axes, axis)))


@all_to_all.ranks
def _(x: Shards, *, axis: str, src: int, dst: int) -> Shards:
    pieces = [_slices(s, len(x), dst) for s in x]
    return [torch.cat([p[r] for p in pieces], src) for r in range(len(x))]


@op("x[...] -> y[...]", map="...", linear="x")
def all_gather(x: Tensor, *, axis: str, dim: int) -> Tensor:
    """Every rank gets the whole of dim `dim`"""
    return x


@all_gather.infers
def _(x: TensorType, *, axis: str, dim: int) -> TensorType:
    """Which dim changes is an attribute, which letters cannot say."""
    _split_over(x, dim, axis, "all_gather")
    return _join(x, dim, axis)


@all_gather.ranks
def _(x: Shards, *, axis: str, dim: int) -> Shards:
    whole = torch.cat(x, dim)
    return [whole for _ in x]


@op("x[...] -> y[...]", map="...", linear="x")
def reduce_scatter(x: Tensor, *, axis: str, dim: int) -> Tensor:
    """Sum the ranks' parts and leave each rank a slice of dim `dim`"""
    return x


@reduce_scatter.infers
def _(x: TensorType, *, axis: str, dim: int) -> TensorType:
    """Which dim changes is an attribute, which letters cannot say."""
    _partial_over(x, axis, "reduce_scatter")
    _dim(x, dim, "reduce_scatter")
    d = x.dims[dim]
    return replace(x.with_dim(dim, replace(d, axes=(*d.axes, axis))), partial=x.partial - {axis})


@reduce_scatter.ranks
def _(x: Shards, *, axis: str, dim: int) -> Shards:
    return _slices(sum(x[1:], x[0]), len(x), dim)


@op("x[...] -> y[...]", map="...", linear="x")
def all_reduce(x: Tensor, *, axis: str) -> Tensor:
    """Sum the ranks' parts; every rank gets the sum"""
    return x


@all_reduce.infers
def _(x: TensorType, *, axis: str) -> TensorType:
    """It ends a partial sum, which letters cannot say."""
    _partial_over(x, axis, "all_reduce")
    return replace(x, partial=x.partial - {axis})


@all_reduce.ranks
def _(x: Shards, *, axis: str) -> Shards:
    total = sum(x[1:], x[0])
    return [total for _ in x]


@op("x[...] -> y[...]", map="...", linear="x")
def shard(x: Tensor, *, axis: str, dim: int) -> Tensor:
    """Keep this rank's slice of a replicated value; nothing moves"""
    return x


@shard.infers
def _(x: TensorType, *, axis: str, dim: int) -> TensorType:
    """Which dim changes is an attribute, which letters cannot say."""
    _dim(x, dim, "shard")
    if axis in x.partial or any(axis in d.axes for d in x.dims):
        raise PlacementError(f"shard: {x} is split or partial over {axis} already")
    return x.with_dim(dim, replace(x.dims[dim], axes=(*x.dims[dim].axes, axis)))


@shard.ranks
def _(x: Shards, *, axis: str, dim: int) -> Shards:
    return [_slices(whole, len(x), dim)[r] for r, whole in enumerate(x)]


def _slices(x: Tensor, ranks: int, dim: int) -> Shards:
    """Equal slices, one per rank."""
    if x.shape[dim] % ranks:
        raise TypeMismatch(f"dim {dim} is {x.shape[dim]} long, which {ranks} ranks do not divide; pad it")
    return list(x.chunk(ranks, dim))


@op("x[...], cu:i64[n+1]? -> y[...]", map="...", whole="n", linear="x")
def reorder(
    x: Tensor, cu: Tensor | None = None, *, dim: int = 1, order: str = "", was: str = "", over: str = "", by: str = ""
) -> Tensor:
    """Permute a dim from order `was` to `order`; '' is the natural one

    'zigzag(n)' evens causal work over n ranks, 'zigzag(n,packed)' in every segment; 'sections(n,a,b)' gives each rank its
    share of every section of features. A dim that is split changes its order by an exchange over that axis.
    """
    index = permutation(was, x.shape[dim], cu).argsort()[permutation(order, x.shape[dim], cu)]
    return x.index_select(dim, index.to(x.device))


reorder.crossing = Crossing(frozenset({"..."}), typed=True)


@reorder.infers
def _(x: TensorType, cu: TensorType | None, *, dim: int, order: str, was: str, over: str, by: str) -> TensorType:
    """The order is an attribute, which letters cannot say."""
    _dim(x, dim, "reorder")
    _suits(x.dims[dim], order, cu)
    _suits(x.dims[dim], was, cu)
    if x.dims[dim].order != was:
        raise PlacementError(f"reorder: dim {dim} of {x} must be in order {was or 'natural'!r}")
    if by != ("exchange" if over else ""):
        raise PlacementError(f"reorder: by is {by!r}, must be 'exchange' with an axis to run over, and absent without")
    if x.dims[dim].axes != ((over,) if over else ()):
        apart = "is split; permute it before it is split, or say over which axis its parts are exchanged"
        raise PlacementError(f"reorder: dim {dim} of {x} {f'must be split over {over} alone' if over else apart}")
    return x.with_dim(dim, replace(x.dims[dim], order=order))


@op("x[...] -> y[...]", map="...", linear="x")
def relabel(x: Tensor, *, dim: int, order: str = "", was: str = "") -> Tensor:
    """The same numbers, counted as standing in order `order` instead of `was`: nothing moves, places mean something else

    A projection whose weight has its rows in another order gives columns in that order, which count as natural from there on.
    """
    return x


@relabel.infers
def _(x: TensorType, *, dim: int, order: str, was: str) -> TensorType:
    """The order is an attribute, which letters cannot say."""
    _dim(x, dim, "relabel")
    if x.dims[dim].order != was:
        raise PlacementError(f"relabel: dim {dim} of {x} must be in order {was or 'natural'!r}")
    return x.with_dim(dim, replace(x.dims[dim], order=order))


def _suits(dim: Dim, order: str, cu: TensorType | None) -> None:
    """Refuse an order that a dim cannot be in."""
    made = parse_order(order)
    if isinstance(made, Sections) and made.total != dim.size:
        raise TypeMismatch(f"reorder: {order} adds up to {made.total}, the dim is {dim}")
    if isinstance(made, Zigzag) and made.packed and cu is None:
        raise TypeMismatch(f"reorder: {order} needs the borders of the segments, cu")


def _dim(x: TensorType, dim: int, name: str) -> None:
    if not -1 < dim < len(x.dims):
        raise TypeMismatch(f"{name}: dim is {dim}, must be under {len(x.dims)} for {x}")


def _split_over(x: TensorType, dim: int, axis: str, name: str) -> None:
    _dim(x, dim, name)
    if x.dims[dim].axes[-1:] != (axis,):
        raise PlacementError(f"{name}: dim {dim} of {x} is not split over {axis} (innermost)")


def _partial_over(x: TensorType, axis: str, name: str) -> None:
    if axis not in x.partial:
        raise PlacementError(f"{name}: {x} is not partial over {axis}; there is nothing to sum")


def _join(x: TensorType, dim: int, axis: str) -> TensorType:
    d = x.dims[dim]
    return x.with_dim(dim, Dim(d.size, d.axes[:-1], d.order))


COLLECTIVES = (all_to_all, all_gather, reduce_scatter, all_reduce, shard)


def _collective_sample(attrs: dict[str, Any]) -> Callable[[Any], list[Any]]:
    def rule(sample: Any) -> list[Any]:
        return [sample.randn(2, 4, 4), attrs]

    return rule


all_to_all.samples(_collective_sample({"axis": "cp", "src": 1, "dst": 2}))
all_gather.samples(_collective_sample({"axis": "cp", "dim": 1}))
reduce_scatter.samples(_collective_sample({"axis": "cp", "dim": 1}))
all_reduce.samples(_collective_sample({"axis": "cp"}))
shard.samples(_collective_sample({"axis": "cp", "dim": 1}))
reorder.samples(_collective_sample({"dim": 1, "order": "zigzag(2)"}))
relabel.samples(_collective_sample({"dim": 1}))


all_to_all.vjp("d_x = all_to_all(d_y, axis=axis, src=dst, dst=src)")
reduce_scatter.vjp("d_x = all_gather(d_y, axis=axis, dim=dim)")
shard.vjp("d_x = all_gather(d_y, axis=axis, dim=dim)")
reorder.vjp("d_x = reorder(d_y, cu, dim=dim, order=was, was=order, over=over, by=by)")
relabel.vjp("d_x = relabel(d_y, dim=dim, order=was, was=order)")


@all_gather.vjp
def _(types: Mapping[str, TensorType | None], attrs: Mapping[str, Any]) -> str:
    """Ranks that used the whole differently have partial cotangents of it; ranks that all did the same keep their slice."""
    move = "reduce_scatter" if _is_partial(types["d_y"], attrs) else "shard"
    return f"d_x = {move}(d_y, axis=axis, dim=dim)"


@all_reduce.vjp
def _(types: Mapping[str, TensorType | None], attrs: Mapping[str, Any]) -> str:
    """Every part has the sum's cotangent, which may be a sum itself."""
    return "d_x = all_reduce(d_y, axis=axis)" if _is_partial(types["d_y"], attrs) else "d_x = d_y"


def _is_partial(type_: TensorType | None, attrs: Mapping[str, Any]) -> bool:
    return type_ is not None and attrs["axis"] in type_.partial
