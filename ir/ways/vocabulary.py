"""Ways across a split vocabulary: every rank knows its own words, and no rank has all logits of a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..crossing import Gather, Here, Sum, Way
from ..ops.linear import embedding
from ..ops.pointwise import wide
from ..ops.token_loss import head_logits, linear_token_losses, token_losses
from ..types import BYTES, TensorType
from .places import nothing

Tensor = torch.Tensor


@embedding.way("vocabulary", sent=nothing, orders=("",))
def _(here: Here, w: Tensor, tokens: Tensor) -> Way:
    """Each rank looks up the words that it holds; the rows of all others are zeros, to be summed."""
    yield from ()
    place, known = _own(here, tokens, w.shape[0])
    return F.embedding(place, w) * known.unsqueeze(-1).to(w.dtype)


def _own(here: Here, words: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where words stand among this rank's, and which of them are this rank's."""
    place = words - here.rank * size
    known = (place >= 0) & (place < size)
    return place.where(known, torch.zeros_like(place)), known


def _three_numbers(types: Sequence[TensorType | None], attrs: Mapping[str, Any], ranks: int, sizes: Mapping[str, int]) -> int:
    """Of every token: the largest logit gathered, then two sums."""
    x, labels = types[0], types[-1]
    assert x is not None and labels is not None
    width, tokens = max(4, BYTES[x.dtype]), labels.count({**sizes})
    return (ranks - 1) * tokens * width + 2 * (ranks - 1) * 2 * tokens * width // ranks


@token_losses.way("vocabulary", sent=_three_numbers, orders=("",))
def _(here: Here, logits: Tensor, labels: Tensor) -> Way:
    """Three numbers a token: the largest logit, the sum of exponentials, the label's logit."""
    return (yield from _losses(here, wide(logits), labels))


@linear_token_losses.way("vocabulary", sent=_three_numbers, orders=("",))
def _(here: Here, x: Tensor, w: Tensor, labels: Tensor) -> Way:
    """Three numbers a token: the largest logit, the sum of exponentials, the label's logit."""
    return (yield from _losses(here, head_logits(x, w, here.attrs["softcap"]), labels))


def _losses(here: Here, logits: Tensor, labels: Tensor) -> Way:
    largest = yield Gather(logits.detach().amax(-1))
    logits = logits - largest.amax(0).unsqueeze(-1)
    place, known = _own(here, labels, logits.shape[-1])
    wanted = logits.gather(-1, place.unsqueeze(-1)).squeeze(-1)
    sums = yield Sum(torch.stack([logits.exp().sum(-1), wanted.where(known, torch.zeros_like(wanted))]))
    losses = sums[0].log() - sums[1]
    return losses.where(labels != here.attrs["ignore"], torch.zeros_like(losses))
