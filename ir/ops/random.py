"""Randomness that depends on a seed and an element's place alone, so that every run and every rank agrees."""

from __future__ import annotations

from typing import Any

import torch

from ..op import op

Tensor = torch.Tensor


@op("x[...], seed:i64[] -> y[...]", scan="...", flops="4*rest", linear="x")
def dropout(x: Tensor, seed: Tensor, *, p: float, stream: int = 0) -> Tensor:
    """x / (1 - p) where an element is kept, else 0; `stream` tells the dropouts of one step apart"""
    index = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    h = index * 0x9E3779B1 + (seed + stream * 0x632BE5AB) * 0x85EBCA77
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):  # a finalizer: every bit in reaches every bit out
        h = ((h ^ (h >> shift)) & 0x7FFFFFFF) * factor & 0xFFFFFFFF
    return torch.where(h >= int(p * 2**32), x / (1 - p), torch.zeros_like(x))


@dropout.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(3, 5), torch.tensor(7), {"p": 0.3}]
