"""Randomness that depends on a seed and an element's place alone, so that every run and every rank agrees."""

from __future__ import annotations

from typing import Any

import torch

from ..op import op

Tensor = torch.Tensor


def scramble(h: Tensor) -> Tensor:
    """31 bits in which every bit of h has a say (the finalizer of a hash)."""
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        h = ((h ^ (h >> shift)) & 0x7FFFFFFF) * factor & 0xFFFFFFFF
    return h & 0x7FFFFFFF


@op("x[...], seed:i64[] -> y[...]", scan="...", flops="4*rest", linear="x", over="...")
def dropout(x: Tensor, seed: Tensor, *, p: float) -> Tensor:
    """x / (1 - p) where an element is kept, else 0; which ones depends on the seed and their places alone"""
    return dropped(x, torch.arange(x.numel(), device=x.device).reshape(x.shape), seed, p)


def dropped(x: Tensor, index: Tensor, seed: Tensor, p: float) -> Tensor:
    """Dropout of elements whose places in the whole are `index`."""
    kept = scramble(index * 0x9E3779B1 + seed * 0x85EBCA77) >= int(p * 2**31)
    return torch.where(kept, x / (1 - p), torch.zeros_like(x))


@op("seed:i64[] -> y:i64[]")
def fork_seed(seed: Tensor, *, stream: int) -> Tensor:
    """A seed of its own for each stream: layers that share one graph drop different elements"""
    return scramble(seed * 0x632BE5AB + stream * 0x9E3779B1)


dropout.vjp("d_x = dropout(d_y, seed, p=p, over=over, by=by, order=order)")
fork_seed.no_gradient("its result is an integer")


@dropout.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(3, 5), torch.tensor(7), {"p": 0.3}]


@fork_seed.samples
def _(sample: Any) -> list[Any]:
    return [torch.tensor(7), {"stream": 3}]
