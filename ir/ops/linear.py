"""Projections and the embedding. A split of a summed dim leaves a partial result."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..op import op

Tensor = torch.Tensor


@op("x[... i], w[o i], bias[o]? -> y[... o]", map="... o", sum="i", flops="2*rest*i*o", linear="x bias, w bias")
def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x w^T + bias"""
    return F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))


@op("w[v d], tokens:i64[...] -> y[... d]", map="... d", whole="v", linear="w")
def embedding(w: Tensor, tokens: Tensor) -> Tensor:
    """y = the rows of w that the tokens name"""
    return F.embedding(tokens, w)


@embedding.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(7, 3), sample.integers(7, 3, 5)]
