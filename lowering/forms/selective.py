"""Mamba-1's selective scan as one opaque op: C++ where there is a compiler; else torch, channels in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import PlaitError, TypeMismatch
from ..cpp import scan as generated
from .precision import opaque
from .scan import Maybe, Runs, before, begin, begun_back, borders_of, ended_back, finals, runs_of, scan, scan_back, wide

# States of one block of channels over all tokens: the few tensors of that size stay near the processor.
BLOCK = 1 << 18


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Maybe = None, cu: Maybe = None
) -> tuple[Tensor, Tensor]:
    """S_t = e^(step_t rate) S_{t-1} + step_t x_t k_t^T;  o_t = S_t q_t"""
    check(x, step, rate, k, q, state, cu)
    if cu is None and x.shape[1] == 1:
        return _one_token(x, step, rate, k, q, state)
    return torch.ops.plait.selective_scan(x, step, rate, k, q, state, cu)


def check(x: Tensor, step: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Maybe, cu: Maybe) -> None:
    """Refuses operands that do not fit together; the letters are those of the op's signature."""
    if x.dim() != 3 or step.shape != x.shape or rate.dim() != 2 or rate.shape[0] != x.shape[2]:
        raise _mismatch(f"x is {_dims(x)}, step {_dims(step)}, rate {_dims(rate)}; they must be [b t c], [b t c], [c s]")
    (b, t, c), s = x.shape, rate.shape[1]
    if k.shape != (b, t, s) or q.shape != k.shape:
        raise _mismatch(f"k is {_dims(k)}, q {_dims(q)}; they must be [{b} {t} {s}]")
    if cu is not None and (b != 1 or cu.dim() != 1 or cu.shape[0] == 0 or cu.is_floating_point()):
        raise _mismatch(f"with cu, b is {b} and cu {cu.dtype} {_dims(cu)}; pack all sequences into one row, cu [n+1] in int64")
    count = b if cu is None else cu.shape[0] - 1
    if state is not None and state.shape != (count, c, s):
        raise _mismatch(f"state is {_dims(state)}; it must be [{count} {c} {s}]")


def _mismatch(what: str) -> TypeMismatch:
    return TypeMismatch(f"selective_scan: {what}")


def _dims(x: Tensor) -> str:
    return f"[{' '.join(map(str, x.shape))}]"


def _one_token(x: Tensor, step: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Maybe) -> tuple[Tensor, Tensor]:
    """A decode step in a few ops that fuse with their neighbours."""
    dt = wide(step[:, 0])
    made = (dt * wide(x[:, 0]))[..., None] * wide(k)
    final = made if state is None else (dt[..., None] * wide(rate)).exp() * state.to(made.dtype) + made
    return (final * wide(q)).sum(-1).to(x.dtype)[:, None], final


def _channels(x: Tensor, state: int) -> Iterator[slice]:
    """Channels in blocks."""
    b, t, c = x.shape
    width = max(1, BLOCK // max(1, b * t * state))
    return (slice(i, min(c, i + width)) for i in range(0, c, width))


def _forward(x: Tensor, step: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Maybe, cu: Maybe) -> tuple[Tensor, Tensor]:
    if generated.ready(x, step, rate, k, q, state, cu):
        return generated.forward(x, step, rate, k, q, state, borders_of(x, cu))
    runs, o = runs_of(x, cu), torch.empty_like(x, memory_format=torch.contiguous_format)
    keys, reads = wide(k)[:, :, None], wide(q)[..., None]
    final = keys.new_empty(runs.count, *rate.shape)
    for c in _channels(x, rate.shape[1]):
        begun = None if state is None else state[:, c].to(keys.dtype)
        s = _states(runs, wide(x[..., c]), wide(step[..., c]), wide(rate[c]), keys, begun)[0]
        o[..., c] = (s @ reads)[..., 0].to(o.dtype)
        final[:, c] = finals(runs, s, begun)
    return o, final


def _states(runs: Runs, x: Tensor, step: Tensor, rate: Tensor, keys: Tensor, begun: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    """Every state [b t c s]; the decays, 0 where a sequence begins; and what they are there."""
    a, u = (step[..., None] * rate).exp_(), (step * x)[..., None] * keys
    first = begin(runs, a, u, begun)
    return scan(a, u), a, first


def _backward(
    d_o: Maybe, d_final: Maybe, x: Tensor, step: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Maybe, cu: Maybe
) -> tuple[Tensor, ...]:
    """Cotangents of all operands; an empty tensor stands for that of an absent one."""
    if generated.ready(x, step, rate, k, q, state, cu, d_o, d_final):
        return generated.backward(d_o, d_final, x, step, rate, k, q, state, borders_of(x, cu))
    runs, like = runs_of(x, cu), torch.contiguous_format
    d_x, d_step, d_rate = (torch.empty_like(y, memory_format=like) for y in (x, step, rate))
    d_keys, d_reads = (torch.zeros_like(wide(y), memory_format=like) for y in (k, q))
    d_state = x.new_empty(0) if state is None else torch.empty_like(state, memory_format=like)
    for c in _channels(x, rate.shape[1]):
        block = (wide(x[..., c]), wide(step[..., c]), wide(rate[c]), wide(k), wide(q))
        begun = None if state is None else state[:, c].to(d_keys.dtype)
        given = (None if d_o is None else wide(d_o[..., c]), None if d_final is None else d_final[:, c])
        made = _block_backward(runs, *given, *block, begun)
        for out, found in zip((d_x[..., c], d_step[..., c], d_rate[c]), made, strict=False):
            out.copy_(found)
        d_keys += made[3]
        d_reads += made[4]
        if state is not None:
            d_state[:, c] = made[5].to(state.dtype)
    return d_x, d_step, d_rate, d_keys.to(k.dtype), d_reads.to(q.dtype), d_state


def _block_backward(
    runs: Runs, d_o: Maybe, d_final: Maybe, x: Tensor, step: Tensor, rate: Tensor, k: Tensor, q: Tensor, begun: Maybe
) -> tuple[Tensor, ...]:
    """Cotangents of one block of channels, in the order of the operands."""
    keys = k[:, :, None]
    s, a, first = _states(runs, x, step, rate, keys, begun)
    d_s = torch.zeros_like(s) if d_o is None else d_o[..., None] * q[:, :, None]
    d_q = torch.zeros_like(q) if d_o is None else (d_o[:, :, None] @ s)[:, :, 0]
    g = scan_back(a, ended_back(runs, d_s, d_final))
    d_k = ((step * x)[:, :, None] @ g)[:, :, 0]
    into = (g @ keys.mT)[..., 0]
    d_begun = x.new_empty(0) if begun is None else begun_back(runs, first, g, d_final, begun)
    a[runs.rows, runs.starts] = first
    d_log = before(runs, s, begun).mul_(a).mul_(g)
    d_step = into * x + (d_log * rate).sum(-1)
    return into * step, d_step, (d_log * step[..., None]).sum((0, 1)), d_k, d_q, d_begun


_OPERANDS = "Tensor x, Tensor step, Tensor rate, Tensor k, Tensor q, Tensor? state, Tensor? cu"
_library = torch.library.Library("plait", "FRAGMENT")
_library.define(f"selective_scan({_OPERANDS}) -> (Tensor, Tensor)")
_SIX = ", ".join(["Tensor"] * 6)
_library.define(f"selective_scan_backward(Tensor? d_o, Tensor? d_final, {_OPERANDS}) -> ({_SIX})")


def _fake(x: Tensor, step: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Maybe, cu: Maybe) -> tuple[Tensor, Tensor]:
    count = x.shape[0] if cu is None else cu.shape[0] - 1
    return torch.empty_like(x, memory_format=torch.contiguous_format), wide(x).new_empty(count, *rate.shape)


def _fake_backward(d_o: Maybe, d_final: Maybe, x: Tensor, *rest: Maybe) -> tuple[Tensor, ...]:
    like = torch.contiguous_format
    return tuple(x.new_empty(0) if y is None else torch.empty_like(y, memory_format=like) for y in (x, *rest[:5]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_o: Maybe, d_final: Maybe) -> tuple[Maybe, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.plait.selective_scan_backward(d_o, d_final, *saved)
    return (*(None if x is None else g for x, g in zip(saved[:6], grads, strict=True)), None)


def _differentiate_again(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
    raise PlaitError("selective_scan has no second derivative; differentiate the op's reference in plait.ir.ops instead")


_library.impl("selective_scan", opaque(_forward), "CompositeExplicitAutograd")
_library.impl("selective_scan_backward", opaque(_backward), "CompositeExplicitAutograd")
torch.library.register_fake("plait::selective_scan", _fake, lib=_library)
torch.library.register_fake("plait::selective_scan_backward", _fake_backward, lib=_library)
torch.library.register_autograd("plait::selective_scan", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("plait::selective_scan_backward", _differentiate_again, lib=_library)
