"""Dropout in parts: where rows and tokens stand, and what is dropped there. Each part may be split over an axis of its own."""

from __future__ import annotations

from typing import Any

import torch

from ..op import op
from .random import dropped

Tensor = torch.Tensor


@op("x[b t d] -> p:i64[b]", map="t d", scan="b", shape="x", over="b")
def rows_of(x: Tensor) -> Tensor:
    """0, 1, 2, ... for the rows of the batch; x gives its shape alone"""
    return torch.arange(x.shape[0], device=x.device)


@op("x[b t d] -> p:i64[t], count:i64[]", map="b d", scan="t", shape="x", over="t", summed=True)
def tokens_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """0, 1, 2, ... for the tokens of a row, and how many they are; x gives its shape alone"""
    return torch.arange(x.shape[1], device=x.device), torch.tensor(x.shape[1], device=x.device)


@op(
    "x[b t d], seed:i64[], rows:i64[b], tokens:i64[t], count:i64[] -> y[b t d]",
    map="b t", whole="d", flops="4*b*t*d", linear="x",
)  # fmt: skip
def drop_at(x: Tensor, seed: Tensor, rows: Tensor, tokens: Tensor, count: Tensor, *, p: float) -> Tensor:
    """Dropout of the elements of these rows and tokens, as one rank with all of them would drop"""
    places = rows[:, None] * count + tokens
    return dropped(x, places[..., None] * x.shape[-1] + torch.arange(x.shape[-1], device=x.device), seed, p)


@drop_at.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 5), torch.tensor(7), torch.arange(2), torch.arange(3), torch.tensor(3), {"p": 0.3}]


rows_of.no_gradient("its result is integers")
tokens_of.no_gradient("its results are integers")
drop_at.vjp("d_x = drop_at(d_y, seed, rows, tokens, count, p=p)")
