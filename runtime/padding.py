"""Padding: taken out before a program runs, and put back after, so that it never changes a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..ir import DataError

Tensor = torch.Tensor


@dataclass(frozen=True)
class Packing:
    """The real tokens of a padded batch, one row behind the other."""

    index: Tensor  # of each real token in the flat batch
    cu: Tensor  # borders of the rows
    shape: tuple[int, int]

    def pack(self, x: Tensor) -> Tensor:
        """[b, t] -> [1, tokens]"""
        return x.flatten().to(self.index.device)[self.index][None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, tokens, ...] -> [b, t, ...], zeros where padding is."""
        flat = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return flat.index_copy(0, self.index, x[0]).unflatten(0, self.shape)


def packing(tokens: Tensor, mask: Tensor) -> Packing:
    """How to pack tokens [b, t] whose mask is 1 where they are real: one run a row, padding before or behind it."""
    if mask.shape != tokens.shape:
        raise DataError(f"mask is {list(mask.shape)}, must be as tokens are, {list(tokens.shape)}")
    real = mask.to(tokens.device) != 0
    if bool(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).any()):
        row = int(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).int().argmax())
        raise DataError(f"mask row {row} has padding between tokens; the tokens of a row must stand together")
    lengths = real.sum(1)
    if not bool(lengths.any()):
        raise DataError("mask leaves no token; at least one must be 1")
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Packing(real.flatten().nonzero()[:, 0], cu, (tokens.shape[0], tokens.shape[1]))


def rows_of(prompts: Tensor | Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """Each row's own tokens: of a batch [b, t] with its mask, or of a list of rows [t]."""
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or not len(prompts):
            raise DataError(
                f"prompts is {list(prompts.shape)}, must be [batch, length] with at least one row, or a list of rows"
            )
        if mask is None:
            return [*prompts]
        packed = packing(prompts, mask)
        return [*packed.pack(prompts)[0].split(packed.cu.diff().tolist())]
    if mask is not None:
        raise DataError("mask is for prompts in one tensor; the rows of a list have no padding")
    if not len(prompts):
        raise DataError("there are no prompts; give at least one")
    rows = [torch.as_tensor(row) for row in prompts]
    if bad := next((r for r in rows if r.dim() != 1), None):
        raise DataError(f"a row of the prompts is {list(bad.shape)}, must be [length]")
    return [row.long() if not len(row) else row for row in rows]
