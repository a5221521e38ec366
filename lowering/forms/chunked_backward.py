"""The backward of the chunked recurrence: factors are recomputed, the state's gradient walks the chunks from last to first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .channel_decay import channel_gradients
from .chunk_layout import Chunks, scatter
from .chunked import Gates, Operands, Saved, chunks_of, factors_of, gates_of, load, load_decay
from .head_decay import Factors, Gradients, head_gradients


@dataclass(frozen=True)
class Adjoint:
    """Gradients on their way: of a group's outputs, of its updates before the solve, and of the state around its chunks."""

    o: Tensor  # [chunk, lane, row, v]
    updates: Tensor  # [chunk, lane, row, v]
    states: Tensor  # [1 + chunk, lane, k, v]: before the first chunk, after each


@dataclass(frozen=True)
class Results:
    """Gradients of the operands; gates are laid out by chunk until the end."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor
    state: Tensor


def backward(x: Operands, saved: Saved, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay, beta and state, None where there is no such operand."""
    chunks = chunks_of(x)
    gates = gates_of(x, chunks)
    out = _results(x, gates)
    do = x.v.new_zeros(()).expand_as(x.v) if do is None else do
    ends = torch.zeros_like(out.state) if dfinal is None else dfinal.to(x.dtype).contiguous()
    lane = (chunks.lanes, *ends.shape[2:])
    flow = _Flow(chunks.begins(), chunks.ends(), ends.view(-1, *lane), out.state.view(-1, *lane))
    out.state.copy_(ends)
    carry: Tensor | None = None
    for low, high in reversed(list(chunks.groups())):
        carry = _group(x, gates, chunks, low, high, saved, do, flow, carry, out)
    return _finish(x, chunks, out)
