"""Exchanges that are begun and ended apart, so that other work is done while they are under way."""

from __future__ import annotations

import torch

from ..errors import PlacementError
from ..op import op
from ..types import TensorType
from .collective import Shards, all_to_all

Tensor = torch.Tensor


@op("x[...] -> y[...]", map="...", linear="x")
def begin_all_to_all(x: Tensor, *, axis: str, src: int, dst: int) -> Tensor:
    """Send what an all_to_all sends, and go on; what it gives is there when it is ended, and only its end may read it"""
    return x


@begin_all_to_all.infers
def _(x: TensorType, *, axis: str, src: int, dst: int) -> TensorType:
    """Which dims change is an attribute, which letters cannot say."""
    return all_to_all.infer([x], {"axis": axis, "src": src, "dst": dst})[0]


@begin_all_to_all.ranks
def _(x: Shards, *, axis: str, src: int, dst: int) -> Shards:
    assert all_to_all.rank_rule is not None
    return all_to_all.rank_rule(x, axis=axis, src=src, dst=dst)


@op("x[...] -> y[...]", map="...", linear="x")
def end_all_to_all(x: Tensor, *, axis: str, src: int, dst: int) -> Tensor:
    """Wait for what was begun: its result"""
    return x


@end_all_to_all.infers
def _(x: TensorType, *, axis: str, src: int, dst: int) -> TensorType:
    """Nothing changes; the dims are those of the beginning, which letters cannot say."""
    if not (-1 < src < len(x.dims) and -1 < dst < len(x.dims)) or x.dims[dst].axes[-1:] != (axis,):
        must = f"what begin_all_to_all gives for axis={axis!r}, src={src}, dst={dst}"
        raise PlacementError(f"end_all_to_all: x is {x}, must be {must}")
    return x


@end_all_to_all.ranks
def _(x: Shards, *, axis: str, src: int, dst: int) -> Shards:
    return x


begin_all_to_all.begins = end_all_to_all.ends = True
begin_all_to_all.vjp("d_x = all_to_all(d_y, axis=axis, src=dst, dst=src)")
end_all_to_all.vjp("d_x = d_y")

UNDER_WAY = (begin_all_to_all, end_all_to_all)
