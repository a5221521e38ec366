"""Losses of a language model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..op import op
from .pointwise import wide

Tensor = torch.Tensor


@op("logits[... v], labels:i64[...] -> loss:acc[]", whole="... v", flops="4*rest*v", over="...", summed=True)
def cross_entropy(logits: Tensor, labels: Tensor, *, ignore: int = -100) -> Tensor:
    """Mean negative log-likelihood of the labels that are not `ignore`; 0 when there are none"""
    losses = F.cross_entropy(wide(logits).flatten(0, -2), labels.flatten(), ignore_index=ignore, reduction="sum")
    return losses / (labels != ignore).sum().clamp_min(1)


@op("x[... d], w[v d], labels:i64[...] -> loss:acc[]", whole="... v d", flops="2*rest*v*d", over="...", summed=True)
def linear_cross_entropy(x: Tensor, w: Tensor, labels: Tensor, *, ignore: int = -100, softcap: float = 0.0) -> Tensor:
    """The head's linear and the loss in one, so that the logits need not exist at once"""
    logits = wide(F.linear(x, w.to(x.dtype)))
    return cross_entropy.reference(torch.tanh(logits / softcap) * softcap if softcap else logits, labels, ignore=ignore)


@cross_entropy.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 5), torch.tensor([[0, 4, -100], [2, 1, 1]]), {}]


@linear_cross_entropy.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 4), sample.randn(5, 4), torch.tensor([[0, 4, -100], [2, 1, 1]]), {}]
