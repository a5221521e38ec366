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
class Results:
    """Gradients of the operands, filled in group by group; those of per-head gates stay laid out by chunk until the end."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    state: Tensor


@dataclass(frozen=True)
class Return:
    """The way back of the state's gradient: it enters at a segment's last chunk and leaves at its first."""

    begins: dict[int, int]
    lasts: dict[int, int]
    enter: Tensor  # [segment, lane, k, v]
    leave: Tensor


def backward(x: Operands, saved: Saved, do: Tensor | None, dfinal: Tensor | None) -> Results:
    """Gradients of q, k, v, decay, beta and state."""
    chunks = chunks_of(x)
    gates = gates_of(x, chunks)
    out = _empty_results(x, gates)
    lane = (chunks.lanes, *out.state.shape[2:])
    if dfinal is not None:
        # What a sequence without tokens passes through.
        out.state.copy_(dfinal)
    way = Return(chunks.begins(), chunks.ends(), out.state.clone().view(-1, *lane), out.state.view(-1, *lane))
    do = x.v.new_zeros(()).expand_as(x.v) if do is None else do
    carry: Tensor | None = None
    for low, high in reversed(list(chunks.groups())):
        carry = _group(x, gates, chunks, (low, high), saved, do, way, carry, out)
    return _gates_by_token(x, chunks, out)


def _empty_results(x: Operands, gates: Gates) -> Results:
    decay = None
    if x.decay is not None:
        decay = torch.empty_like(x.decay, memory_format=torch.contiguous_format) if x.by_channel else torch.empty_like(gates.beta.squeeze(-1))
    like = torch.contiguous_format
    state = x.v.new_zeros((x.states, x.v.shape[2], x.k.shape[3], x.v.shape[3]), dtype=x.dtype)
    return Results(
        torch.empty_like(x.q, memory_format=like),
        torch.empty_like(x.k, memory_format=like),
        torch.empty_like(x.v, memory_format=like),
        decay,
        None if x.beta is None else torch.empty_like(gates.beta.squeeze(-1)),
        state,
    )


def _gates_by_token(x: Operands, chunks: Chunks, out: Results) -> Results:
    """Gates back to [b t h]."""
    decay = out.decay if x.by_channel else _by_token(out.decay, x.decay, chunks)
    return Results(out.q, out.k, out.v, decay, _by_token(out.beta, x.beta, chunks), out.state)


def _by_token(laid: Tensor | None, gate: Tensor | None, chunks: Chunks) -> Tensor | None:
    """A gate's gradient from [chunk, lane, row] to the gate's own shape."""
    if gate is None or laid is None:
        return None
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    scatter(laid.unsqueeze(-1), chunks, 0, chunks.count, out.unsqueeze(-1))
    return out


def _group(
    x: Operands,
    gates: Gates,
    chunks: Chunks,
    span: tuple[int, int],
    saved: Saved,
    do: Tensor,
    way: Return,
    carry: Tensor | None,
    out: Results,
) -> Tensor:
    """Gradients of one group's operands; returns the state's gradient before it."""
    low, high = span
    q, k = load(x.q, chunks, low, high, x.dtype), load(x.k, chunks, low, high, x.dtype)
    beta = gates.beta[low:high]
    factors = factors_of(x, gates, chunks, low, high, q, k)
    u = saved.u[low:high] if x.delta else load(x.v, chunks, low, high, x.dtype, beta)
    solve = saved.solve[low:high] if x.delta else None
    kept = Saved(u, u if solve is None else solve, saved.states[low:high])
    values, carry, grads = _walk_back(factors, load(do, chunks, low, high, x.dtype), kept, x.delta, way, low, carry)
    if out.beta is not None:
        torch.div((values * u).sum(-1), beta.squeeze(-1), out=out.beta[low:high])
    scatter(values.mul_(beta), chunks, low, high, out.v)
    dq, dk = _fold(x, gates, chunks, span, q, k, factors, grads, out)
    scatter(dq, chunks, low, high, out.q)
    scatter(dk, chunks, low, high, out.k)
    return carry


def _walk_back(
    factors: Factors, do: Tensor, saved: Saved, delta: bool, way: Return, low: int, carry: Tensor | None
) -> tuple[Tensor, Tensor, Gradients]:
    """The state's gradient through a group, last chunk first, and with it those of the values and of the factors.

    Everything of a chunk is done while its state is in cache.
    """
    values = torch.bmm(factors.scores[0].flatten(0, 1).mT, do.flatten(0, 1)).view_as(do)
    grads = Gradients(*(torch.empty_like(x) for x in (factors.scores, factors.read, factors.write, factors.fade)))
    fade_axes = (-1,) if factors.fade.shape[2] > 1 else (-2, -1)
    after = do.new_empty(way.enter.shape[1:]) if carry is None else carry
    product = torch.empty_like(after)
    for i in reversed(range(do.shape[0])):
        if low + i in way.lasts:
            after.copy_(way.enter[way.lasts[low + i]])
        row, update, value, state = do[i], saved.u[i], values[i], saved.states[i]
        value.baddbmm_(factors.write[i], after)
        torch.bmm(update, after.mT, out=grads.write[i])
        torch.sum(torch.mul(state, after, out=product), fade_axes, keepdim=True, out=grads.fade[i])
        after.mul_(factors.fade[i]).baddbmm_(factors.read[0, i].mT, row)
        torch.bmm(row, state.mT, out=grads.read[0, i])
        torch.bmm(row, update.mT, out=grads.scores[0, i])
        if delta:
            value.copy_(torch.bmm(saved.solve[i].mT, value))
            after.baddbmm_(factors.read[1, i].mT, value)
            torch.bmm(value, state.mT, out=grads.read[1, i])
            torch.baddbmm(grads.scores[1, i], value, update.mT, beta=0, alpha=-1, out=grads.scores[1, i])
        if low + i in way.begins:
            way.leave[way.begins[low + i]].copy_(after)
    return values, after, grads


def _fold(
    x: Operands,
    gates: Gates,
    chunks: Chunks,
    span: tuple[int, int],
    q: Tensor,
    k: Tensor,
    factors: Factors,
    grads: Gradients,
    out: Results,
) -> tuple[Tensor, Tensor]:
    """Factor gradients down to those of q and k; the decay's go straight to `out`."""
    low, high = span
    if gates.decay is not None:
        dq, dk, ddecay = head_gradients(q, k, gates.decay.of(low, high), factors, grads, x.scale)
        if out.decay is not None:
            out.decay[low:high] = ddecay
        return dq, dk
    assert out.decay is not None
    beta = gates.beta[low:high] if x.delta else None
    dq, dk, ddecay = channel_gradients(q, k, load_decay(x, chunks, low, high), beta, factors, grads, x.scale)
    scatter(ddecay, chunks, low, high, out.decay)
    return dq, dk
