"""Init recipes: how a parameter gets its first numbers, as text that a graph carries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import ParseError

Fill = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Init:
    """`normal(0.02)`: a recipe's name and numbers."""

    name: str
    args: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(repr(a) for a in self.args)})"


def normal(shape: tuple[int, ...], rng: torch.Generator, std: float) -> torch.Tensor:
    """N(0, std)."""
    return torch.randn(shape, generator=rng) * std


def uniform(shape: tuple[int, ...], rng: torch.Generator, low: float, high: float) -> torch.Tensor:
    """U(low, high)."""
    return torch.rand(shape, generator=rng) * (high - low) + low


def constant(shape: tuple[int, ...], rng: torch.Generator, value: float) -> torch.Tensor:
    """One number everywhere."""
    return torch.full(shape, float(value))


def log_uniform(shape: tuple[int, ...], rng: torch.Generator, low: float, high: float) -> torch.Tensor:
    """log of U(low, high): A_log of Mamba-2 and gated delta nets."""
    return uniform(shape, rng, low, high).clamp_min(1e-4).log()


def step_bias(shape: tuple[int, ...], rng: torch.Generator, low: float, high: float, floor: float) -> torch.Tensor:
    """The inverse softplus of a step drawn log-uniformly from [low, high]: dt_bias of Mamba-2."""
    step = uniform(shape, rng, math.log(low), math.log(high)).exp().clamp_min(floor)
    return step + torch.log(-torch.expm1(-step))


def slopes(shape: tuple[int, ...], rng: torch.Generator, scale: float) -> torch.Tensor:
    """Log decays of heads that fall off geometrically, halved eight times from first to last: linear attention's constants."""
    n = shape[-1]
    return (-scale * 2.0 ** (-8.0 * (torch.arange(n) + 1) / n)).expand(shape).clone()


RECIPES: dict[str, tuple[Fill, int]] = {  # name -> how it fills, how many numbers it takes
    "normal": (normal, 1),
    "uniform": (uniform, 2),
    "constant": (constant, 1),
    "log_uniform": (log_uniform, 2),
    "step_bias": (step_bias, 3),
    "slopes": (slopes, 1),
}
ONES, ZEROS = Init("constant", (1.0,)), Init("constant", (0.0,))


def checked(init: Init) -> Init:
    """Refuse a recipe nobody knows."""
    if init.name not in RECIPES:
        raise ParseError(f"no init recipe called {init.name}; there are {', '.join(RECIPES)}")
    if len(init.args) != RECIPES[init.name][1]:
        raise ParseError(f"init recipe {init.name} takes {RECIPES[init.name][1]} numbers, got {len(init.args)}")
    return init


def fill(init: Init, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Fresh float32 numbers by this recipe."""
    return RECIPES[init.name][0](shape, rng, *init.args)
