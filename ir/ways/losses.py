"""Ways of losses: every rank's sums over its own tokens, added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..crossing import Here, Sum, Way
from ..ops.experts import load_balance_loss, z_loss
from ..ops.loss import cross_entropy, linear_cross_entropy
from ..ops.pointwise import wide
from ..types import BYTES, TensorType

Tensor = torch.Tensor
Sizes = Mapping[str, int]


def _wide(type_: TensorType | None) -> int:
    """Bytes of a number that sums are kept in."""
    return max(4, BYTES[type_.dtype]) if type_ else 0


def _two_numbers(types: Sequence[TensorType | None], attrs: Mapping[str, Any], ranks: int, sizes: Sizes) -> int:
    return 2 * (ranks - 1) * 2 * _wide(types[0]) // ranks


def _mean(local: Tensor, count: Tensor) -> Way:
    """The mean over all ranks' tokens, from each rank's own mean and how many it is of."""
    total = yield Sum(torch.stack([local * count, count.to(local.dtype)]))
    return total[0] / total[1].detach().clamp_min(1)


@cross_entropy.way("sums", sent=_two_numbers)
def _(here: Here, logits: Tensor, labels: Tensor) -> Way:
    """Two numbers a rank: the sum over its labels, and how many they are."""
    local = here.run(cross_entropy, logits, labels, **here.attrs)
    return (yield from _mean(local, (labels != here.attrs["ignore"]).sum()))


@linear_cross_entropy.way("sums", sent=_two_numbers)
def _(here: Here, x: Tensor, w: Tensor, labels: Tensor) -> Way:
    """Two numbers a rank: the sum over its labels, and how many they are."""
    local = here.run(linear_cross_entropy, x, w, labels, **here.attrs)
    return (yield from _mean(local, (labels != here.attrs["ignore"]).sum()))


@z_loss.way("sums", sent=_two_numbers)
def _(here: Here, logits: Tensor) -> Way:
    """Two numbers a rank: the sum over its tokens, and how many they are."""
    count = torch.tensor(float(logits[..., 0].numel()), device=logits.device)
    return (yield from _mean(here.run(z_loss, logits), count))


def _per_expert(types: Sequence[TensorType | None], attrs: Mapping[str, Any], ranks: int, sizes: Sizes) -> int:
    logits = types[0]
    assert logits is not None
    size = logits.dims[-1].size
    return 2 * (ranks - 1) * (2 * int(size) + 1) * _wide(logits) // ranks


@load_balance_loss.way("sums", sent=_per_expert)
def _(here: Here, logits: Tensor, experts: Tensor) -> Way:
    """Two numbers an expert: how often the rank chose it, and the sum of its scores; and how many choices there were."""
    scores = wide(logits)
    scores = torch.softmax(scores, -1) if here.attrs["score"] == "softmax" else torch.sigmoid(scores)
    if here.attrs["score"] == "sigmoid":
        scores = scores / scores.sum(-1, keepdim=True)
    e = logits.shape[-1]
    chosen = torch.bincount(experts.reshape(-1), minlength=e).to(scores.dtype)
    tokens = scores.new_tensor([scores.numel() / e])
    total = yield Sum(torch.cat([chosen, scores.reshape(-1, e).sum(0), tokens]))
    count = total[-1].detach().clamp_min(1)
    share = total[:e].detach() / total[:e].detach().sum().clamp_min(1)
    return e * (share * (total[e : 2 * e] / count)).sum()
