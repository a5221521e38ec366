"""Griffin's gated unit as one opaque op, its gates made again in the backward: C++ where there is a compiler, else torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ir.errors import PlaitError, TypeMismatch
from ...ir.ops import gated_input
from ...ir.ops.scan import STEEPEST
from ..cpp import lru as generated
from .precision import opaque
from .scan import Maybe, before, begin, begun_back, borders_of, ended_back, finals, runs_of, scan, scan_back, wide


def rg_lru(x: Tensor, decay: Tensor, p: Tensor, state: Maybe = None, cu: Maybe = None) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) x_t with a_t = e^decay_t; where p_t is 0 a sequence begins: h_t = x_t"""
    if x.dim() != 3 or decay.shape != x.shape or p.shape != x.shape[:2]:
        dims = ", ".join(str([*y.shape]) for y in (x, decay, p))
        raise TypeMismatch(f"rg_lru: x, decay and p are {dims}; they must be [b t c], [b t c] and [b t]")
    if cu is not None and x.shape[0] != 1:
        raise TypeMismatch(f"rg_lru: with cu, b is {x.shape[0]}; pack all sequences into one row")
    if cu is None and x.shape[1] == 1:
        a, u = gated_input(x, decay, p)
        final = u[:, 0] if state is None else a[:, 0] * state.to(u.dtype) + u[:, 0]
        return final.to(x.dtype)[:, None], final
    return torch.ops.plait.rg_lru(x, decay, p, state, cu)


def _forward(x: Tensor, decay: Tensor, p: Tensor, state: Maybe, cu: Maybe) -> tuple[Tensor, Tensor]:
    if generated.ready(x, decay, p, state):
        return generated.forward(x, decay, p, state, borders_of(x, cu))
    runs, (a, root) = runs_of(x, cu), _gates(decay, p)
    u = wide(x) * root
    begun = None if state is None else state.to(u.dtype)
    begin(runs, a, u, begun)
    h = scan(a, u)
    return h.to(x.dtype).contiguous(), finals(runs, h, begun)


def _gates(decay: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """What is kept of the state, and what the input is multiplied by."""
    begins, d = (p == 0)[:, :, None], wide(decay)
    return d.exp().masked_fill_(begins, 0.0), torch.expm1(2 * d).neg_().sqrt_().masked_fill_(begins, 1.0)


def _backward(
    d_h: Maybe, d_final: Maybe, x: Tensor, decay: Tensor, p: Tensor, state: Maybe, cu: Maybe
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of x, decay and state; an empty tensor stands for that of an absent one."""
    if generated.ready(x, decay, p, state, d_h, d_final):
        return generated.backward(d_h, d_final, x, decay, p, state, borders_of(x, cu))
    runs, (a, root) = runs_of(x, cu), _gates(decay, p)
    u = wide(x) * root
    begun = None if state is None else state.to(u.dtype)
    first = begin(runs, a, u, begun)
    h = scan(a, u)
    d_s = torch.zeros_like(h) if d_h is None else wide(d_h).clone()
    g = scan_back(a, ended_back(runs, d_s, d_final))
    d_state = x.new_empty(0) if begun is None else begun_back(runs, first, g, d_final, begun)
    a[runs.rows, runs.starts] = first
    # Where a sequence begins, nothing is kept, and a square that is 0 bends nothing.
    square = torch.exp(2 * wide(decay)).masked_fill_((p == 0)[:, :, None], 0.0)
    bend = square.div_(root.clamp_min(0.5 / STEEPEST)).mul_(wide(x))
    d_decay = before(runs, h, begun).mul_(a).sub_(bend).mul_(g)
    return (g * root).to(x.dtype), d_decay.to(decay.dtype), d_state if state is None else d_state.to(state.dtype)


_OPERANDS = "Tensor x, Tensor decay, Tensor p, Tensor? state, Tensor? cu"
_library = torch.library.Library("plait", "FRAGMENT")
_library.define(f"rg_lru({_OPERANDS}) -> (Tensor, Tensor)")
_library.define(f"rg_lru_backward(Tensor? d_h, Tensor? d_final, {_OPERANDS}) -> (Tensor, Tensor, Tensor)")


def _fake(x: Tensor, decay: Tensor, p: Tensor, state: Maybe, cu: Maybe) -> tuple[Tensor, Tensor]:
    count = x.shape[0] if cu is None else cu.shape[0] - 1
    return torch.empty_like(x, memory_format=torch.contiguous_format), wide(x).new_empty(count, x.shape[2])


def _fake_backward(
    d_h: Maybe, d_final: Maybe, x: Tensor, decay: Tensor, p: Tensor, state: Maybe, cu: Maybe
) -> tuple[Tensor, ...]:
    like = torch.contiguous_format
    return tuple(x.new_empty(0) if y is None else torch.empty_like(y, memory_format=like) for y in (x, decay, state))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_h: Maybe, d_final: Maybe) -> tuple[Maybe, ...]:
    saved = ctx.saved_tensors
    d_x, d_decay, d_state = torch.ops.plait.rg_lru_backward(d_h, d_final, *saved)
    return d_x, d_decay, None, None if saved[3] is None else d_state, None


def _differentiate_again(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
    raise PlaitError("rg_lru has no second derivative; differentiate the op's reference in plait.ir.ops instead")


_library.impl("rg_lru", opaque(_forward), "CompositeExplicitAutograd")
_library.impl("rg_lru_backward", opaque(_backward), "CompositeExplicitAutograd")
torch.library.register_fake("plait::rg_lru", _fake, lib=_library)
torch.library.register_fake("plait::rg_lru_backward", _fake_backward, lib=_library)
torch.library.register_autograd("plait::rg_lru", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("plait::rg_lru_backward", _differentiate_again, lib=_library)
