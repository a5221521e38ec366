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
    beta: Tensor
    state: Tensor


@dataclass(frozen=True)
class Return:
    """The way back of the state's gradient: it enters at a segment's last chunk and leaves at its first."""

    begins: dict[int, int]
    lasts: dict[int, int]
    enter: Tensor  # [segment, lane, k, v]
    leave: Tensor


@dataclass(frozen=True)
class Adjoint:
    """Gradients of a group's outputs and values, and of the state before its first chunk and after each."""

    o: Tensor
    values: Tensor
    states: Tensor


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
        decay = torch.empty_like(x.decay, memory_format=torch.contiguous_format) if x.by_channel else torch.empty_like(gates.beta)
    like = torch.contiguous_format
    state = x.v.new_zeros((x.states, x.v.shape[2], x.k.shape[3], x.v.shape[3]), dtype=x.dtype)
    return Results(
        torch.empty_like(x.q, memory_format=like),
        torch.empty_like(x.k, memory_format=like),
        torch.empty_like(x.v, memory_format=like),
        decay,
        torch.empty_like(gates.beta),
        state,
    )


def _gates_by_token(x: Operands, chunks: Chunks, out: Results) -> Results:
    """Gates back to [b t h]: a decay reaches every later row of its chunk, so its gradient is a sum from the end."""
    decay = out.decay
    if x.decay is not None and decay is not None and not x.by_channel:
        sums = decay.double().flip(-1).cumsum(-1).flip(-1)
        decay = torch.empty_like(x.decay, memory_format=torch.contiguous_format)
        scatter(sums.unsqueeze(-1), chunks, 0, chunks.count, decay.unsqueeze(-1))
    beta = out.beta
    if x.beta is not None:
        beta = torch.empty_like(x.beta, memory_format=torch.contiguous_format)
        scatter(out.beta.unsqueeze(-1), chunks, 0, chunks.count, beta.unsqueeze(-1))
    return Results(out.q, out.k, out.v, decay, beta, out.state)


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
    beta = gates.beta[low:high].unsqueeze(-1)
    factors = factors_of(x, gates, chunks, low, high, q, k)
    u = saved.u[low:high] if x.delta else load(x.v, chunks, low, high, x.dtype).mul_(beta)
    solve = saved.solve[low:high] if x.delta else None
    adjoint = _walk_back(factors, load(do, chunks, low, high, x.dtype).mul_(x.scale), solve, way, low, carry)
    grads = _factor_gradients(factors, adjoint, u, saved.states[low:high])
    out.beta[low:high] = (adjoint.values * u).sum(-1) / gates.beta[low:high]
    scatter(adjoint.values.mul_(beta), chunks, low, high, out.v)
    dq, dk = _fold(x, gates, chunks, span, q, k, factors, grads, out)
    scatter(dq, chunks, low, high, out.q)
    scatter(dk, chunks, low, high, out.k)
    return adjoint.states[0]


def _walk_back(factors: Factors, do: Tensor, solve: Tensor | None, way: Return, low: int, carry: Tensor | None) -> Adjoint:
    """The state's gradient through a group, last chunk first, and with it that of u and of the values it solves for."""
    m = do.shape[0]
    du = torch.bmm(factors.scores[0].flatten(0, 1).mT, do.flatten(0, 1)).view_as(do)
    values = du if solve is None else torch.empty_like(du)
    states = do.new_empty((m + 1, *way.enter.shape[1:]))
    if carry is not None:
        states[m].copy_(carry)
    for i in reversed(range(m)):
        after, before = states[i + 1], states[i]
        if low + i in way.lasts:
            after.copy_(way.enter[way.lasts[low + i]])
        du[i].baddbmm_(factors.write[i], after)
        torch.mul(after, factors.fade[i], out=before).baddbmm_(factors.read[0, i].mT, do[i])
        if solve is not None:
            torch.bmm(solve[i].mT, du[i], out=values[i])
            before.baddbmm_(factors.read[1, i].mT, values[i])
        if low + i in way.begins:
            way.leave[way.begins[low + i]].copy_(before)
    return Adjoint(do, values, states)


def _factor_gradients(factors: Factors, adjoint: Adjoint, u: Tensor, states: Tensor) -> Gradients:
    """Gradients of a group's factors, all chunks at once."""
    before, after = states.flatten(0, 1), adjoint.states[1:].flatten(0, 1)
    updates = u.flatten(0, 1)
    scores, read = torch.empty_like(factors.scores), torch.empty_like(factors.read)
    for kind, rows in enumerate((adjoint.o, adjoint.values)[: len(scores)]):
        torch.bmm(rows.flatten(0, 1), updates.mT, out=scores[kind].flatten(0, 1))
        torch.bmm(rows.flatten(0, 1), before.mT, out=read[kind].flatten(0, 1))
    # The delta rule subtracts its scores.
    scores[1:].neg_()
    write = torch.bmm(updates, after.mT).view_as(factors.write)
    fade = (states * adjoint.states[1:]).sum(-1, keepdim=True)
    return Gradients(scores, read, write, fade if factors.fade.shape[2] > 1 else fade.sum(-2, keepdim=True))


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
    beta = gates.beta[low:high] if x.delta else None
    if gates.decay is not None:
        dq, dk, dlog = head_gradients(q, k, gates.decay.of(low, high), beta, factors, grads)
        if out.decay is not None:
            out.decay[low:high] = dlog
        return dq, dk
    assert out.decay is not None
    dq, dk, ddecay = channel_gradients(q, k, load_decay(x, chunks, low, high), beta, factors, grads)
    scatter(ddecay, chunks, low, high, out.decay)
    return dq, dk
