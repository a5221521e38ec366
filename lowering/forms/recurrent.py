"""The recurrence token by token: for the few tokens of a decode step, where chunks would only add work."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked import Operands

FEW = 4


def decode(x: Operands) -> tuple[Tensor, Tensor]:
    """o[b t h v] and the final state, for 1 <= t <= FEW. Generation waits for this: as few calls as it takes."""
    b, t, heads, width = x.v.shape
    shape = (b * heads, x.k.shape[3], width)
    state = x.v.new_zeros(shape, dtype=x.dtype) if x.state is None else _cast(x.state, x.dtype).reshape(shape)
    out = list[Tensor]()
    for i in range(t):
        state = _fade(x, state, i)
        out.append(_step(x, state, i))
    o = out[0].view(b, 1, heads, width) if t == 1 else torch.stack([y.view(b, heads, width) for y in out], 1)
    return _cast(o, x.v.dtype), state.view(b, heads, *shape[1:])


def _step(x: Operands, state: Tensor, i: int) -> Tensor:
    """Writes token i into the state [lane, k, v], in place, and reads it: [lane, 1, v]."""
    lanes, _, width = state.shape
    k = _rows(x.k.select(1, i), lanes, x.dtype)
    value = _cast(x.v.select(1, i), x.dtype).reshape(lanes, 1, width)
    if x.delta:
        value = torch.baddbmm(value, k, state, alpha=-1)
    if x.beta is not None:
        value = value * _cast(x.beta.select(1, i), x.dtype).reshape(lanes, 1, 1)
    state.baddbmm_(k.transpose(1, 2), value)
    o = torch.bmm(_rows(x.q.select(1, i), lanes, x.dtype), state)
    return o if x.scale == 1 else o.mul_(x.scale)


def _fade(x: Operands, state: Tensor, i: int) -> Tensor:
    """The state decayed by token i, always a new tensor: the caller's own stays as it is."""
    if x.decay is None:
        return state.clone()
    decay = _cast(x.decay.select(1, i), x.dtype).exp()
    return state * decay.reshape(len(state), -1, 1)


def _rows(x: Tensor, lanes: int, dtype: torch.dtype) -> Tensor:
    """[b g k] as one row per lane: key heads repeated for their value heads."""
    b, g, width = x.shape
    r = lanes // (b * g)
    x = _cast(x, dtype)
    return (x if r == 1 else x.unsqueeze(2).expand(b, g, r, width)).reshape(lanes, 1, width)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # The check is cheaper than a call that does nothing.
    return x if x.dtype == dtype else x.to(dtype)
