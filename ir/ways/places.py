"""Ways of ops that ask only where a token stands: nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..crossing import Here, Way
from ..ops.position import positions
from ..ops.random import dropout, dropped
from ..types import TensorType

Tensor = torch.Tensor


def nothing(types: Sequence[TensorType | None], attrs: Mapping[str, Any], ranks: int, sizes: Mapping[str, int]) -> int:
    return 0


@positions.way("here", sent=nothing)
def _(here: Here, tokens: Tensor, at: Tensor | None = None, cu: Tensor | None = None) -> Way:
    """Each rank counts its own tokens' places."""
    yield from ()
    index = here.tokens(tokens.shape[1], cu).to(tokens.device)
    if cu is not None:
        index = index - cu[torch.searchsorted(cu[1:].contiguous(), index, right=True)]
    return (index if at is None else index + at).expand(tokens.shape[0], -1).contiguous()


@dropout.way("here", sent=nothing)
def _(here: Here, x: Tensor, seed: Tensor) -> Way:
    """Each rank draws for its own tokens, which are the dim before the last, what one rank would draw for them."""
    yield from ()
    rows, (tokens, width) = x.shape[:-2], x.shape[-2:]
    own = here.tokens(tokens).to(x.device)
    starts = torch.arange(rows.numel(), device=x.device).reshape(*rows, 1, 1) * (tokens * here.ranks)
    index = (starts + own[:, None]) * width + torch.arange(width, device=x.device)
    return dropped(x, index, seed, here.attrs["p"])
