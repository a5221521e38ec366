"""Ways of what asks where rows and tokens stand, for dropout: nothing is sent."""

from __future__ import annotations

import torch

from ..crossing import Here, Way
from ..ops.dropping import rows_of, tokens_of
from .places import nothing

Tensor = torch.Tensor


@rows_of.way("here", sent=nothing, orders=("",))
def _(here: Here, x: Tensor) -> Way:
    """Each rank counts its own rows' places."""
    yield from ()
    return here.tokens(x.shape[0]).to(x.device)


@tokens_of.way("here", sent=nothing)
def _(here: Here, x: Tensor) -> Way:
    """Each rank counts its own tokens' places."""
    yield from ()
    return here.tokens(x.shape[1]).to(x.device), torch.tensor(x.shape[1] * here.ranks, device=x.device)
