"""Ways across a split vocabulary: every rank knows its own words, and no rank has all logits of a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..crossing import Gather, Here, Sum, Way
from ..errors import DataError
from ..ops.linear import embedding
from ..ops.pointwise import wide
from ..ops.token_loss import head_parts, linear_token_losses, token_losses, word_parts
from ..types import BYTES, TensorType
from .places import nothing

Tensor = torch.Tensor


@embedding.way("vocabulary", sent=nothing, orders=("",))
def _(here: Here, w: Tensor, tokens: Tensor) -> Way:
    """Each rank looks up the words that it holds; the rows of all others are zeros, to be summed."""
    yield from ()
    _check("embedding: a token", tokens, here.ranks * w.shape[0])
    place = tokens - here.rank * w.shape[0]
    known = (place >= 0) & (place < w.shape[0])
    return F.embedding(place.where(known, torch.zeros_like(place)), w) * known.unsqueeze(-1).to(w.dtype)


def _check(what: str, words: Tensor, size: int, ignore: int | None = None) -> None:
    """Refuse a word that no rank has, which each would take for another's; without waiting for a device."""
    wrong = (words < 0) | (words >= size)
    wrong = wrong if ignore is None else wrong & (words != ignore)
    if words.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"{what} is not from 0 to {size - 1}")  # type: ignore[reportPrivateUsage] # it has no public name
    elif wrong.any():
        rest = "" if ignore is None else f"{ignore} (ignored) or "
        raise DataError(f"{what} is {int(words[wrong][0])}; it must be {rest}from 0 to {size - 1}")


def _two_numbers(types: Sequence[TensorType | None], attrs: Mapping[str, Any], ranks: int, sizes: Mapping[str, int]) -> int:
    """Of every token: one number gathered, one summed."""
    x, labels = types[0], types[-1]
    assert x is not None and labels is not None
    width, tokens = max(4, BYTES[x.dtype]), labels.count({**sizes})
    return (ranks - 1) * tokens * width + 2 * (ranks - 1) * tokens * width // ranks


@token_losses.way("vocabulary", sent=_two_numbers, orders=("",))
def _(here: Here, logits: Tensor, labels: Tensor) -> Way:
    """Two numbers a token: the log of the sum of exponentials of a rank's own words, and the label's logit."""
    _check("token_losses: a label", labels, here.ranks * logits.shape[-1], here.attrs["ignore"])
    lse, wanted = word_parts(wide(logits), labels - here.rank * logits.shape[-1])
    return (yield from _losses(here, lse, wanted, labels))


@linear_token_losses.way("vocabulary", sent=_two_numbers, orders=("",))
def _(here: Here, x: Tensor, w: Tensor, labels: Tensor) -> Way:
    """Two numbers a token: the log of the sum of exponentials of a rank's own words, and the label's logit."""
    _check("linear_token_losses: a label", labels, here.ranks * w.shape[0], here.attrs["ignore"])
    lse, wanted = here.run(head_parts, x, w, labels - here.rank * w.shape[0], softcap=here.attrs["softcap"])
    return (yield from _losses(here, lse, wanted, labels))


def _losses(here: Here, lse: Tensor, wanted: Tensor, labels: Tensor) -> Way:
    whole = torch.logsumexp((yield Gather(lse)), 0)
    losses = whole - (yield Sum(wanted))
    return losses.where(labels != here.attrs["ignore"], torch.zeros_like(losses))
