"""Rows that experts share: one of each expert's own for all of its rows, and back."""

from __future__ import annotations

from typing import Any

import torch

from ..op import op
from .pointwise import wide
from .token_wise import token_wise

Tensor = torch.Tensor


@op("w[e d], counts:i64[e], x[n d] -> y[n d]", map="d", whole="n e", linear="w", shape="x")
def spread_experts(w: Tensor, counts: Tensor, x: Tensor) -> Tensor:
    """Each expert's row of w for every one of its rows, which stand together in order of expert; x gives its shape alone"""
    return w.repeat_interleave(counts, 0, output_size=x.shape[0])


@op("x[n d], counts:i64[e] -> w[e d]", map="d", whole="n e", flops="n*d", linear="x")
def sum_experts(x: Tensor, counts: Tensor) -> Tensor:
    """The sum of each expert's rows, which stand together in order of expert"""
    expert = torch.arange(len(counts), device=x.device).repeat_interleave(counts, output_size=x.shape[0])
    return wide(x.new_zeros(len(counts), x.shape[1])).index_add(0, expert, wide(x)).to(x.dtype)


@spread_experts.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(3, 4), torch.tensor([3, 0, 4]), sample.randn(7, 4)]


@sum_experts.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(7, 4), torch.tensor([3, 0, 4])]


for _op in (spread_experts, sum_experts):
    token_wise(_op)

spread_experts.vjp("d_w = sum_experts(d_y, counts)")
sum_experts.vjp("d_x = spread_experts(d_w, counts, x)")
