"""Gradients of a short convolution where no compiler sees them: all tokens at once, packed segments too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import device


def anticausal_conv1d(g: Tensor, w: Tensor, final: Tensor | None = None, cu: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The transpose of causal_conv1d: a shifted product per tap, none from behind a segment's end."""
    if cu is None:
        return device.anticausal_conv1d(g, w, final)
    behind, t, at = w.shape[1] - 1, g.shape[1], torch.arange(g.shape[1], device=g.device)
    end, padded, taps = _of(at, cu[1:], cu), F.pad(_wide(g), (0, 0, 0, behind)), _wide(w)
    x = padded[:, :t] * taps[:, behind]
    for j in range(1, behind + 1):
        x = torch.addcmul(x, padded[:, j : j + t], (at + j < end)[:, None] * taps[:, behind - j])
    start = _wide(device.anticausal_conv1d(_heads(g, cu, behind), w)[1])
    if final is not None:
        x, start = _with_final(x, start, _wide(final), cu)
    return x.to(g.dtype), start.to(g.dtype)


def _with_final(x: Tensor, start: Tensor, final: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
    """The k - 1 last inputs' own cotangents, which reach beyond the start of a segment that is shorter."""
    behind = final.shape[2]
    place = cu[1:, None] - behind + torch.arange(behind, device=cu.device)
    inside = place >= cu[:-1, None]
    x = x.index_add(1, place[inside], final.transpose(1, 2)[inside][None])
    n, m = (~inside).nonzero(as_tuple=True)
    into = start.transpose(1, 2).index_put((n, cu.diff()[n] + m), final.transpose(1, 2)[n, m], accumulate=True)
    return x, into.transpose(1, 2).contiguous()


def conv1d_taps(x: Tensor, g: Tensor, state: Tensor | None = None, cu: Tensor | None = None, *, k: int) -> Tensor:
    """The gradient of causal_conv1d's taps: a sum per tap, of no input from before a segment's start but its state."""
    if cu is None:
        return device.conv1d_taps(x, g, state, k=k)
    behind, t, at = k - 1, x.shape[1], torch.arange(x.shape[1], device=x.device)
    start, padded, rows = _of(at, cu[:-1], cu), F.pad(_wide(x), (0, 0, behind, 0)), _wide(g)
    sums = [((at - behind + i >= start)[:, None] * padded[:, i : i + t] * rows).sum((0, 1)) for i in range(k)]
    if state is not None:
        heads, past = _heads(_wide(g), cu, behind), _wide(state).transpose(1, 2)
        sums = [s + (heads[:, : behind - i] * past[:, i:]).sum((0, 1)) for i, s in enumerate(sums)]
    return torch.stack(sums, 1)


def _of(at: Tensor, borders: Tensor, cu: Tensor) -> Tensor:
    """The border of each token's segment."""
    return borders[torch.searchsorted(cu[1:].contiguous(), at, right=True)]


def _heads(x: Tensor, cu: Tensor, count: int) -> Tensor:
    """[n, count, c]: the first tokens of every segment, zeros where it is shorter."""
    place = cu[:-1, None] + torch.arange(count, device=cu.device)
    return x[0, place.clamp(max=x.shape[1] - 1)] * (place < cu[1:, None])[..., None]


def _wide(x: Tensor) -> Tensor:
    """Sums run in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
