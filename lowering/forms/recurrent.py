"""The recurrence token by token: for the few tokens of a decode step, where chunks would only add work."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked import Operands

FEW = 4


def decode(x: Operands) -> tuple[Tensor, Tensor]:
    """o[b t h v] and the final state, for t <= FEW: a handful of calls per token."""
    b, t, heads, width = x.v.shape
    groups, keys = x.k.shape[2:]
    shape = (b * heads, keys, width)
    if x.state is None:
        state = x.v.new_zeros(shape, dtype=x.dtype)
    else:
        state = x.state.to(x.dtype).reshape(shape)
    q, k = (_per_lane(y, heads // groups, x.dtype) for y in (x.q, x.k))
    v = x.v.to(x.dtype).permute(1, 0, 2, 3).reshape(t, b * heads, 1, width)
    beta = None if x.beta is None else x.beta.to(x.dtype).transpose(0, 1).reshape(t, b * heads, 1, 1)
    fade = _fade(x)
    out = list[Tensor]()
    for i in range(t):
        state = state.clone() if fade is None else state * fade[i]
        value = torch.baddbmm(v[i], k[i], state, alpha=-1) if x.delta else v[i]
        state.baddbmm_(k[i].mT, value if beta is None else value * beta[i])
        out.append(torch.bmm(q[i], state))
    o = torch.stack(out).mul_(x.scale).view(t, b, heads, width).transpose(0, 1)
    return o.to(x.v.dtype, memory_format=torch.contiguous_format), state.view(b, heads, keys, width)


def _per_lane(x: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """[b t g k] as one row per token and lane, [t, b*g*r, 1, k]."""
    b, t, g, k = x.shape
    return x.to(dtype).permute(1, 0, 2, 3).unsqueeze(3).expand(t, b, g, r, k).reshape(t, b * g * r, 1, k)


def _fade(x: Operands) -> Tensor | None:
    """The decay as a factor of the state, [t, lane, 1 or k, 1]."""
    if x.decay is None:
        return None
    b, t, heads = x.decay.shape[:3]
    return x.decay.to(x.dtype).exp().transpose(0, 1).reshape(t, b * heads, -1, 1)
