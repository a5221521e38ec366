"""The next token of each row from its logits: penalty, temperature, top k, top p, min p, and a draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..ir import DataError

Tensor = torch.Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the likeliest at temperature 0. Options mean what transformers' processors do, in this order."""

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        must = {
            "repetition_penalty": ("above 0", 0 < self.repetition_penalty < math.inf),
            "temperature": ("0 or more", 0 <= self.temperature < math.inf),
            "top_k": ("0 or more", self.top_k >= 0),
            "top_p": ("above 0 and at most 1", 0 < self.top_p <= 1),
            "min_p": ("from 0 to 1", 0 <= self.min_p <= 1),
        }
        for name, (what, holds) in must.items():
            if not holds:
                raise DataError(f"{name} is {getattr(self, name)}, must be {what}")


class Chooser:
    """Chooses for a batch of rows, each by numbers of its own: what a row draws does not depend on the others."""

    def __init__(self, how: Sampling, seeds: Sequence[int], prompts: Sequence[Tensor], vocab: int) -> None:
        self.how, self.draws = how, [torch.Generator().manual_seed(seed) for seed in seeds]
        self.seen: Tensor | None = None
        if how.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab, dtype=torch.bool, device=prompts[0].device)
            for row, prompt in zip(self.seen, prompts, strict=True):
                row[prompt] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """The tokens [b] after logits [b, vocab]."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.seen is not None:
            logits = penalized(logits, self.seen, self.how.repetition_penalty)
        new = self._drawn(logits) if self.how.temperature > 0 else logits.argmax(-1)
        if self.seen is not None:
            self.seen.scatter_(1, new[:, None], True)
        return new

    def _drawn(self, logits: Tensor) -> Tensor:
        chances = torch.softmax(filtered(logits, self.how), -1).cpu()
        if not bool(chances.isfinite().all()):
            raise DataError("the model's logits are not finite, so that no token can be drawn; look at its weights")
        rows = [torch.multinomial(row, 1, generator=rng) for row, rng in zip(chances, self.draws, strict=True)]
        return torch.cat(rows).to(logits.device)


def penalized(logits: Tensor, seen: Tensor, by: float) -> Tensor:
    """Tokens that stand in the row already made less likely (by > 1), whatever the sign of their logit."""
    return torch.where(seen, torch.where(logits < 0, logits * by, logits / by), logits)


def filtered(logits: Tensor, how: Sampling) -> Tensor:
    """Logits at their temperature, -inf where a filter leaves a token out; the likeliest always stays."""
    logits = logits / how.temperature
    if 0 < how.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(how.top_k, -1).values[:, -1:], -torch.inf)
    if how.top_p < 1:
        logits = _nucleus(logits, how.top_p)
    if how.min_p > 0:
        chances = torch.softmax(logits, -1)
        logits = logits.masked_fill(chances < how.min_p * chances.amax(-1, keepdim=True), -torch.inf)
    return logits


def _nucleus(logits: Tensor, p: float) -> Tensor:
    """The fewest likeliest tokens whose chances make p together."""
    ordered, index = logits.sort(-1)
    below = torch.softmax(ordered, -1).cumsum(-1) <= 1 - p
    below[:, -1] = False
    return logits.masked_fill(below.scatter(1, index, below), -torch.inf)
