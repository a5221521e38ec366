"""The backward of the chunked recurrence: factors are recomputed, the state's gradient walks the chunks from last to first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .channel_decay import channel_gradients
from .chunk_layout import Chunks, scatter
from .chunked import Gates, Group, Operands, Saved, chunks_of, gates_of, solves
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
    after = out.state.new_empty(lane)
    for low, high in reversed(list(chunks.groups())):
        _group_back(Group(x, gates, chunks, low, high), saved, do, way, after, out)
    return _gates_by_token(x, chunks, out)


def _empty_results(x: Operands, gates: Gates) -> Results:
    dense = torch.contiguous_format
    rows = gates.beta.shape[:-1]
    decay = None if x.decay is None else gates.beta.new_empty(rows)
    if x.by_channel and x.decay is not None:
        decay = torch.empty_like(x.decay, memory_format=dense)
    state = gates.beta.new_zeros((x.states, x.v.shape[2], x.k.shape[3], x.v.shape[3]))
    beta = None if x.beta is None else gates.beta.new_empty(rows)
    dq, dk, dv = (torch.empty_like(y, memory_format=dense) for y in (x.q, x.k, x.v))
    return Results(dq, dk, dv, decay, beta, state)


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


def _group_back(group: Group, saved: Saved, do: Tensor, way: Return, after: Tensor, out: Results) -> None:
    """Gradients of one group's operands; turns the state's gradient after the group into the one before it."""
    x, low, high = group.call, group.low, group.high
    q, k, beta = group.load(x.q), group.load(x.k), group.beta
    factors = group.factors(q, k)
    again = x.delta and not len(saved.solve)
    solve = solves(factors.scores[1], None, low, high) if again else saved.solve[low:high]
    kept = Saved(saved.u[low:high] if x.delta else group.load(x.v, beta), solve, saved.states[low:high])
    values, grads = _walk_back(group, factors, group.load(do), kept, way, after)
    if out.beta is not None:
        # values . u is what the gradient of the delta rule's scores has on its diagonal.
        inner = -grads.scores[1].diagonal(dim1=-2, dim2=-1) if x.delta else (values * kept.u).sum(-1)
        torch.div(inner, beta.squeeze(-1), out=out.beta[low:high])
    group.store(values, out.v, beta)
    dq, dk = _fold(group, q, k, factors, grads, out)
    group.store(dq, out.q)
    group.store(dk, out.k)


@dataclass(frozen=True)
class Step:
    """One chunk's tensors on the way back."""

    do: Tensor
    values: Tensor  # gradient of the values, to be written
    saved: Saved
    factors: Factors
    grads: Gradients  # to be written


def _walk_back(
    group: Group, factors: Factors, do: Tensor, saved: Saved, way: Return, after: Tensor
) -> tuple[Tensor, Gradients]:
    """The state's gradient through a group, last chunk first, and with it those of the values and of the factors."""
    delta, values, rows = group.call.delta, torch.empty_like(do), do.new_empty((2, *do.shape[:3]))
    scores, read, write, fade = (torch.empty_like(x) for x in (factors.scores, factors.read, factors.write, factors.fade))
    grads = Gradients(scores, read, write, fade, rows)
    scratch = torch.empty_like(write[0])
    for i in reversed(range(len(do))):
        chunk = group.low + i
        if chunk in way.lasts:
            after.copy_(way.enter[way.lasts[chunk]])
        kept = Saved(saved.u[i], saved.solve[i] if delta else saved.solve, saved.states[i])
        step = Step(do[i], values[i], kept, _factors_at(factors, i), _gradients_at(grads, i))
        _step_back(step, after, delta)
        if factors.pairs is not None:
            _row_sums(step, scratch)
        if chunk in way.begins:
            way.leave[way.begins[chunk]].copy_(after)
    return values, grads


def _factors_at(x: Factors, i: int) -> Factors:
    return Factors(x.scores[:, i], x.read[:, i], x.write[i], x.fade[i])


def _gradients_at(x: Gradients, i: int) -> Gradients:
    return Gradients(x.scores[:, i], x.read[:, i], x.write[i], x.fade[i], x.rows[:, i])


def _step_back(step: Step, after: Tensor, delta: bool) -> None:
    """The state's gradient from after a chunk to before it; all that reads the chunk's state is done while it is in cache."""
    do, values, u, state, grads = step.do, step.values, step.saved.u, step.saved.states, step.grads
    scores, reads = step.factors.scores.unbind(0), step.factors.read.unbind(0)
    dscores, dreads = grads.scores.unbind(0), grads.read.unbind(0)
    du = torch.bmm(scores[0].mT, do, out=None if delta else values).baddbmm_(step.factors.write, after)
    torch.bmm(u, after.mT, out=grads.write)
    _inner(state, after, grads.fade)
    after.mul_(step.factors.fade).baddbmm_(reads[0].mT, do)
    torch.bmm(do, state.mT, out=dreads[0])
    torch.bmm(do, u.mT, out=dscores[0])
    if delta:
        torch.bmm(step.saved.solve.mT, du, out=values)
        after.baddbmm_(reads[1].mT, values)
        torch.bmm(values, state.mT, out=dreads[1])
        # The delta rule subtracts its scores.
        torch.baddbmm(dscores[1], values, u.mT, beta=0, alpha=-1, out=dscores[1])


def _row_sums(step: Step, scratch: Tensor) -> None:
    """read . d read and write . d write of each row."""
    reads, dreads, grads = step.factors.read, step.grads.read, step.grads
    torch.mul(reads[0], dreads[0], out=scratch)
    if len(reads) == 2:
        scratch.addcmul_(reads[1], dreads[1])
    torch.sum(scratch, -1, out=grads.rows[0])
    torch.sum(torch.mul(step.factors.write, grads.write, out=scratch), -1, out=grads.rows[1])


def _inner(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Inner products of states over what a fade scales: a whole lane, or one key of it."""
    if out.shape[1] > 1:
        torch.sum(a * b, -1, keepdim=True, out=out)
        return
    for x, y, z in zip(a.flatten(1).unbind(0), b.flatten(1).unbind(0), out.view(-1).unbind(0), strict=True):
        torch.dot(x, y, out=z)


def _fold(group: Group, q: Tensor, k: Tensor, factors: Factors, grads: Gradients, out: Results) -> tuple[Tensor, Tensor]:
    """Factor gradients down to those of q and k; the decay's go straight to `out`."""
    x, decay = group.call, group.decay
    if decay is not None:
        dq, dk, ddecay = head_gradients(q, k, decay, factors, grads, x.scale)
        if out.decay is not None:
            out.decay[group.low : group.high] = ddecay
        return dq, dk
    assert out.decay is not None
    beta = group.beta if x.delta else None
    dq, dk, ddecay = channel_gradients(q, k, group.channel_decay(), beta, factors, grads, x.scale)
    group.store(ddecay, out.decay)
    return dq, dk
