"""Random operands of an op: what its laws are tried on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .attributes import attr_kind
from .op import REQUIRED, OpDef
from .signature import Axis, Operand

Tensor = torch.Tensor
SIZES = (1, 3, 5, 7)  # odd, so that an even tile never fits by chance
REST = 2  # dims an ellipsis stands for


@dataclass(frozen=True)
class Sampler:
    """What a sample rule draws from: one generator, so that a seed gives one sample."""

    rng: torch.Generator

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.rng)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.rng)

    def coin(self) -> bool:
        return bool(self.integers(2))

    def size(self) -> int:
        return SIZES[int(self.integers(len(SIZES)))]

    def attr(self) -> float:
        """A float that is neither 0 nor 1."""
        return 0.25 + float(torch.rand((), generator=self.rng, dtype=torch.float64)) / 2


def sample(op: OpDef, rng: torch.Generator) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Float64 operands that fit together, None for the optional ones left out, and the attributes they go with."""
    sampler = Sampler(rng)
    if op.sample_rule is None:
        return _operands(op, sampler), _attrs(op, sampler)
    drawn = list(op.sample_rule(sampler))
    attrs: dict[str, Any] = drawn.pop() if drawn and isinstance(drawn[-1], dict) else {}
    return [*drawn, *[None] * (len(op.inputs) - len(drawn))], attrs


def _operands(op: OpDef, sampler: Sampler) -> list[Tensor | None]:
    """Numbers from the signature alone; every letter has one size."""
    letters = dict.fromkeys(x for o in op.inputs for a in o.axes for x in _letters(a))
    sizes = {x: int(x) if x.isdigit() else sampler.size() for x in letters}
    absent = {o.name for o in op.inputs if o.optional and sampler.coin()}
    return [None if o.name in absent else _draw(op, o, sizes, sampler) for o in op.inputs]


def _draw(op: OpDef, operand: Operand, sizes: dict[str, int], sampler: Sampler) -> Tensor:
    if operand.dtype:
        raise ValueError(
            f"{op.name}: random {operand.dtype} numbers mean nothing for {operand.name}; give the op a sample rule"
        )
    return sampler.randn(*(n for axis in operand.axes for n in _extent(axis, sizes)))


def _extent(axis: Axis, sizes: dict[str, int]) -> Iterable[int]:
    """The size of an axis, or the sizes of an ellipsis."""
    if axis.letters == ("...",):
        return [sizes[x] for x in _letters(axis)]
    total = 1
    for letter in _letters(axis):
        total *= sizes[letter]
    return [total + axis.offset]


def _letters(axis: Axis) -> list[str]:
    """The letters of an axis, an ellipsis spelled out."""
    return [y for x in axis.letters for y in ([f"...{i}" for i in range(REST)] if x == "..." else [x])]


def _attrs(op: OpDef, sampler: Sampler) -> dict[str, Any]:
    drawn = dict[str, Any]()
    for name in (name for name, default in op.attrs.items() if default is REQUIRED):
        if attr_kind(op, name) != "float":
            raise ValueError(f"{op.name}: no random {attr_kind(op, name)} for attribute {name}; give the op a sample rule")
        drawn[name] = sampler.attr()
    return drawn
