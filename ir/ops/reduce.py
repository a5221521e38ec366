"""Sums over rows and columns, and what undoes their shape."""

from __future__ import annotations

import torch

from ..errors import PlacementError
from ..op import op
from ..types import TensorType
from .pointwise import wide

Tensor = torch.Tensor


@op("x[... d] -> y:acc[...]", map="...", sum="d", flops="rest*d", row=True, linear="x")
def row_sum(x: Tensor) -> Tensor:
    """y = the sum of each row"""
    return wide(x).sum(-1)


@op("x[... d] -> y:acc[...]", map="...", whole="d", flops="rest*d", row=True, linear="x")
def row_mean(x: Tensor) -> Tensor:
    """y = the mean of each row"""
    return wide(x).mean(-1)


@op("w[...], x[... d] -> y[... d]", map="... d", flops="rest*d", row=True, linear="w", shape="x")
def spread_rows(w: Tensor, x: Tensor, *, mean: bool = False) -> Tensor:
    """y = w in every column of x, which gives its shape alone; mean: divided by how many columns there are"""
    y = w.unsqueeze(-1).expand(*w.shape, x.shape[-1])
    return y / x.shape[-1] if mean else y.clone()


@spread_rows.infers
def _(w: TensorType, x: TensorType, *, mean: bool) -> tuple[TensorType, ...]:
    """A mean must see all columns, and whether it is one is an attribute."""
    bound, types, partial = spread_rows.placed((w, x), {})
    if mean and bound.dim("d").axes:
        raise PlacementError(f"spread_rows: x is {x}; with mean=True its last dim must be whole")
    return spread_rows.result_types(bound, types, partial)


@op("x[... d] -> y:acc[d]", map="d", sum="...", flops="rest*d", linear="x")
def column_sum(x: Tensor) -> Tensor:
    """y = the sum of each column, over all rows"""
    return wide(x).reshape(-1, x.shape[-1]).sum(0)


@op("w[d], x[... d] -> y[... d]", map="... d", row=True, linear="w", shape="x")
def spread_columns(w: Tensor, x: Tensor) -> Tensor:
    """y = w in every row of x, which gives its shape alone"""
    return w.expand(x.shape).clone()


row_sum.vjp("d_x = spread_rows(d_y, x)")
row_mean.vjp("d_x = spread_rows(d_y, x, mean=True)")
spread_rows.vjp("""
    if mean:
        d_w = row_mean(d_y)
    else:
        d_w = row_sum(d_y)
""")
column_sum.vjp("d_x = spread_columns(d_y, x)")
spread_columns.vjp("d_w = column_sum(d_y)")
