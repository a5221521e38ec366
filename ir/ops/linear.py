"""Projections and the embedding. A split of a summed dim leaves a partial result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..op import op
from ..types import TensorType
from .pointwise import wide

Tensor = torch.Tensor


@op("x[... i], w[o i], bias[o]? -> y[... o]", map="... o", sum="i", flops="2*rest*i*o", linear="x bias, w bias")
def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x w^T + bias"""
    return F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))


@op("w[v d], tokens:i64[...] -> y[... d]", map="... d", whole="v", linear="w", over="v")
def embedding(w: Tensor, tokens: Tensor) -> Tensor:
    """y = the rows of w that the tokens name"""
    return F.embedding(tokens, w)


@embedding.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(7, 3), sample.integers(7, 3, 5)]


@op("a[... o], b[... i] -> y[o i]", map="o i", sum="...", flops="2*rest*i*o", linear="a, b")
def outer(a: Tensor, b: Tensor) -> Tensor:
    """y = a^T b, summed over all rows: the gradient of a projection's weight"""
    return (wide(a).reshape(-1, a.shape[-1]).T @ wide(b).reshape(-1, b.shape[-1])).to(a.dtype)


@op("x[... d], tokens:i64[...] -> y:acc[v d]", map="d", sum="...", flops="rest*d", linear="x")
def embedding_sum(x: Tensor, tokens: Tensor, *, v: int) -> Tensor:
    """y = for each of v tokens, the sum of the rows of x where it stands: the gradient of an embedding"""
    return wide(x.new_zeros(v, x.shape[-1])).index_add(0, tokens.reshape(-1), wide(x).reshape(-1, x.shape[-1]))


@embedding_sum.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(3, 5, 3), sample.integers(7, 3, 5), {"v": 7}]


linear.vjp("""
    d_x = linear(d_y, reshape(w, pattern='o i -> i o'))
    d_w = outer(d_y, x)
    d_bias = column_sum(d_y)
""")
outer.vjp("""
    d_a = linear(b, d_y)
    d_b = linear(a, reshape(d_y, pattern='o i -> i o'))
""")


@embedding.vjp
def _(types: Mapping[str, TensorType | None], attrs: Mapping[str, Any]) -> str:
    """Across a split vocabulary a rank keeps the gradient of the words that it holds."""
    across = "embedding_backward(w, tokens, d_y, over=over, by=by, order=order)"
    return f"d_w = {across if attrs['over'] else 'embedding_sum(d_y, tokens, v=v)'}"


embedding_sum.vjp("d_x = embedding(d_y, tokens)")
