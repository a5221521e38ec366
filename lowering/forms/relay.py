"""The state that a delta rule ends in, without its outputs: what ranks tell each other before they compute any."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .channel_decay import channel_gradients
from .chunk_layout import CHUNK, Chunks, scatter
from .chunked import Group, Operands, Saved, Walk, chunks_of, gates_of, inference_chunk, room, solves
from .head_decay import Factors, Gradients, head_gradients

# A unit state that nothing is written to fades away: below this it is zero, for products of subnormal numbers are slow.
_TINY = {torch.float32: 1e-25, torch.float64: 1e-200}


@dataclass(frozen=True)
class Keys:
    """What a group of chunks does to its state, S' = fade S + write^T u with u = solve (beta v - beta read S).

    Factors are those of an additive rule whose queries are the keys; beta comes on top.
    """

    k: Tensor  # [chunk, b*g, row, k]
    factors: Factors
    scores: Tensor  # beta x the factors'
    read: Tensor  # -beta x the factors'


def _keys(group: Group) -> Keys:
    k = group.load(group.call.k)
    factors = replace(group, call=replace(group.call, delta=False)).factors(k, k)
    return Keys(k, factors, factors.scores[0] * group.beta, factors.read[0] * -group.beta)


def _floored(state: Tensor) -> None:
    torch.ops.aten.hardshrink.out(state, _TINY[state.dtype], out=state)


def final_state(x: Operands, *, keep: bool) -> tuple[Tensor, Saved | None]:
    """final[n h k v] and, if kept, what `backward` reads again."""
    chunks = chunks_of(x, CHUNK if keep else inference_chunk(x))
    gates = gates_of(x, chunks)
    shape = (x.states, x.v.shape[2], x.k.shape[3], x.v.shape[3])
    final = x.v.new_zeros(shape, dtype=x.dtype) if x.state is None else x.state.to(x.dtype, copy=True).contiguous()
    saved = room(x, chunks) if keep else None
    lane = (chunks.lanes, *shape[2:])
    slots = saved.states.unbind(0) if saved else (x.v.new_empty(lane, dtype=x.dtype),)
    walk = Walk(slots, chunks.begins(), chunks.ends(), final.view(len(final) * shape[1] // max(chunks.lanes, 1), *lane))
    for low, high in chunks.groups():
        _pass(Group(x, gates, chunks, low, high), walk, saved)
    return final, saved


def _pass(group: Group, walk: Walk, saved: Saved | None) -> None:
    """The state's pass over a group's chunks."""
    low, high, keys = group.low, group.high, _keys(group)
    values, scores = group.load(group.call.v, group.beta), keys.scores
    u, solve = (saved.u[low:high] if saved else torch.empty_like(values)), solves(scores, saved, low, high)
    for i, (update, value, read) in enumerate(zip(u.unbind(0), values.unbind(0), keys.read.unbind(0), strict=True)):
        state, after = walk.before(low + i), walk.after(low + i)
        torch.bmm(solve[i], value.baddbmm_(read, state), out=update)
        torch.mul(state, keys.factors.fade[i], out=after).baddbmm_(keys.factors.write[i].mT, update)
        _floored(after)


# -- backward ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Gradients of the operands, filled in group by group; those of per-head gates by chunk until the end."""

    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor
    state: Tensor


def backward(x: Operands, saved: Saved, dfinal: Tensor) -> Results:
    """Gradients of k, v, decay, beta and state: the state's own walks the chunks from last to first."""
    chunks = chunks_of(x)
    gates = gates_of(x, chunks)
    out = _empty(x, gates.beta)
    out.state.copy_(dfinal)  # what a sequence without tokens passes through
    ends, lane = out.state.view(-1, chunks.lanes, *out.state.shape[2:]), (chunks.lanes, *out.state.shape[2:])
    enter, after = ends.clone(), out.state.new_empty(lane)
    begins, lasts = chunks.begins(), chunks.ends()
    for low, high in reversed(list(chunks.groups())):
        group = Group(x, gates, chunks, low, high)
        keys = _keys(group)
        solve = saved.solve[low:high] if len(saved.solve) else solves(keys.scores, None, low, high)
        kept = Saved(saved.u[low:high], solve, saved.states[low:high])
        values, grads = torch.empty_like(kept.u), _room_for(keys)
        for i in reversed(range(high - low)):
            if low + i in lasts:
                after.copy_(enter[lasts[low + i]])
            _step(i, keys, kept, after, values, grads)
            if low + i in begins:
                ends[begins[low + i]].copy_(after)
        _fold(group, keys, kept, values, grads, out)
    decay = out.decay if x.by_channel else _by_token(out.decay, x.decay, chunks)
    beta = _by_token(out.beta, x.beta, chunks)
    assert beta is not None
    return Results(out.k, out.v, decay, beta, out.state)


def _empty(x: Operands, beta: Tensor) -> Results:
    dense = torch.contiguous_format
    decay = None if x.decay is None else beta.new_empty(beta.shape[:-1])
    if x.by_channel and x.decay is not None:
        decay = torch.empty_like(x.decay, memory_format=dense)
    state = beta.new_zeros((x.states, x.v.shape[2], x.k.shape[3], x.v.shape[3]))
    k, v = (torch.empty_like(y, memory_format=dense) for y in (x.k, x.v))
    return Results(k, v, decay, beta.new_empty(beta.shape[:-1]), state)


def _room_for(keys: Keys) -> Gradients:
    f = keys.factors
    scores, read, write, fade = (torch.empty_like(y) for y in (f.scores, f.read, f.write, f.fade))
    return Gradients(scores, read, write, fade, write.new_empty((2, *write.shape[:3])))


def _step(i: int, keys: Keys, kept: Saved, after: Tensor, values: Tensor, grads: Gradients) -> None:
    """The state's gradient from after a chunk to before it, and on its way those of what made the chunk."""
    u, state, f = kept.u[i], kept.states[i], keys.factors
    torch.bmm(kept.solve[i].mT, torch.bmm(f.write[i], after), out=values[i])
    torch.bmm(u, after.mT, out=grads.write[i])
    fade = (state * after).sum(-1, keepdim=True)
    grads.fade[i] = fade if f.fade.shape[2] > 1 else fade.sum(1, keepdim=True)
    after.mul_(f.fade[i]).baddbmm_(keys.read[i].mT, values[i])
    torch.bmm(values[i], state.mT, out=grads.read[0, i])
    torch.bmm(values[i], u.mT, out=grads.scores[0, i])
    _floored(after)


def _fold(group: Group, keys: Keys, kept: Saved, values: Tensor, grads: Gradients, out: Results) -> None:
    """Gradients of the factors down to those of the operands."""
    f, beta, decay = keys.factors, group.beta, group.decay
    # values . u is what the scores' gradient has on its diagonal, where keys do not meet themselves.
    torch.div((values * kept.u).sum(-1), beta.squeeze(-1), out=out.beta[group.low : group.high])
    group.store(values, out.v, beta)
    grads.scores[0].mul_(-beta).diagonal(dim1=-2, dim2=-1).zero_()
    grads.read[0].mul_(-beta)
    if decay is not None:
        torch.sum(f.read[0] * grads.read[0], -1, out=grads.rows[0])
        torch.sum(f.write * grads.write, -1, out=grads.rows[1])
        dq, dk, ddecay = head_gradients(keys.k, keys.k, decay, f, grads, 1.0)
        if out.decay is not None:
            out.decay[group.low : group.high] = ddecay
        group.store((dq + dk).view_as(keys.k), out.k)
        return
    assert out.decay is not None
    dq, dk, ddecay = channel_gradients(keys.k, keys.k, group.channel_decay(), None, f, grads, 1.0)
    group.store(ddecay, out.decay)
    group.store(dq + dk, out.k)


def _by_token(laid: Tensor | None, gate: Tensor | None, chunks: Chunks) -> Tensor | None:
    """A gate's gradient from [chunk, lane, row] to the gate's own shape."""
    if gate is None or laid is None:
        return None
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    scatter(laid.unsqueeze(-1), chunks, 0, chunks.count, out.unsqueeze(-1))
    return out
