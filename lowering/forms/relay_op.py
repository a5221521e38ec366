"""A delta rule's final state as one opaque op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ir.errors import PlaitError
from ..cpp import recurrence as generated
from .chunked import Operands, Saved, chunks_of, room, saved_shapes
from .precision import opaque
from .recurrence import check
from .relay import backward, final_state

Maybe = Tensor | None

_OPERANDS = "Tensor k, Tensor v, Tensor? decay, Tensor beta, Tensor? state, Tensor? cu"
_SAVED = "Tensor u, Tensor solve, Tensor states"
_library = torch.library.Library("plait", "FRAGMENT")
_library.define(f"recurrence_final({_OPERANDS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(f"recurrence_final_backward({_OPERANDS}, {_SAVED}, Tensor d) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


def gated_delta_final(k: Tensor, v: Tensor, decay: Maybe, beta: Tensor, state: Maybe = None, cu: Maybe = None) -> Tensor:
    """Of the delta rule with one decay per head, or none."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (k, v, decay, beta, state))
    return torch.ops.plait.recurrence_final(k, v, decay, beta, state, cu, keep)[0]


def kimi_delta_final(k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Maybe = None, cu: Maybe = None) -> Tensor:
    """Of the delta rule with a decay per key channel, decay[b t h k]."""
    return gated_delta_final(k, v, decay, beta, state, cu)


def _operands(k: Tensor, v: Tensor, decay: Maybe, beta: Tensor, state: Maybe, cu: Maybe) -> Operands:
    return Operands(k, k, v, decay, beta, state, cu, 1.0, True)


def _forward(k: Tensor, v: Tensor, decay: Maybe, beta: Tensor, state: Maybe, cu: Maybe, keep: bool) -> tuple[Tensor, ...]:
    """The op's kernel on any device: C++ where it is made for the call, else torch code."""
    x = _operands(k, v, decay, beta, state, cu)
    if not v.shape[0]:
        return _fake(k, v, decay, beta, state, cu, keep)
    if generated.ready(x):
        check(k, k, v, decay, beta, state, cu, "delta")  # C++ reads by address
        chunks = chunks_of(x) if keep or cu is not None else None  # says what is wrong with cu
        saved = room(x, chunks) if keep and chunks else None
        final = generated.final_state(x, saved and (saved.u, saved.states))
    else:
        final, saved = final_state(x, keep=keep)
    return (final, saved.u, saved.solve, saved.states) if saved else (final, *(v.new_empty(0) for _ in range(3)))


def _fake(k: Tensor, v: Tensor, decay: Maybe, beta: Tensor, state: Maybe, cu: Maybe, keep: bool) -> tuple[Tensor, ...]:
    x = _operands(k, v, decay, beta, state, cu)
    final = v.new_empty((x.states, v.shape[2], k.shape[3], v.shape[3]), dtype=x.dtype)
    return final, *(v.new_empty(s, dtype=x.dtype) if keep else v.new_empty(0) for s in saved_shapes(x))


def _backward(
    k: Tensor, v: Tensor, decay: Maybe, beta: Tensor, state: Maybe, cu: Maybe, *rest: Tensor
) -> tuple[Tensor, ...]:  # fmt: skip
    """The backward op's kernel on any device; an empty tensor stands for the gradient of an absent operand."""
    x, none = _operands(k, v, decay, beta, state, cu), v.new_empty(0)
    if not v.shape[0]:
        return _fake_backward(k, v, decay, beta, state)
    if generated.ready(x):
        _, *grads, start = generated.backward(x, (rest[0], rest[2]), None, rest[3], read=False)
        return *(none if y is None else y for y in grads), none if state is None or start is None else start.to(state.dtype)
    out = backward(x, Saved(*rest[:3]), rest[3])
    start = none if state is None else out.state.to(state.dtype)
    return out.k, out.v, none if out.decay is None else out.decay, out.beta, start


def _fake_backward(k: Tensor, v: Tensor, decay: Maybe, beta: Tensor, state: Maybe, *rest: Any) -> tuple[Tensor, ...]:
    like, operands = torch.contiguous_format, (k, v, decay, beta, state)
    return tuple(v.new_empty(0) if x is None else torch.empty_like(x, memory_format=like) for x in operands)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d: Maybe, *unused: Maybe) -> tuple[Maybe, ...]:
    saved = ctx.saved_tensors
    if d is None:
        return (None,) * 7
    grads = torch.ops.plait.recurrence_final_backward(*saved, d)
    return (*(None if x is None else g for x, g in zip(saved[:5], grads, strict=True)), None, None)


def _differentiate_again(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
    raise PlaitError("recurrence_final has no second derivative; differentiate the op's reference in plait.ir.ops instead")


_library.impl("recurrence_final", opaque(_forward), "CompositeExplicitAutograd")
_library.impl("recurrence_final_backward", opaque(_backward), "CompositeExplicitAutograd")
torch.library.register_fake("plait::recurrence_final", _fake, lib=_library)
torch.library.register_fake("plait::recurrence_final_backward", _fake_backward, lib=_library)
torch.library.register_autograd("plait::recurrence_final", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("plait::recurrence_final_backward", _differentiate_again, lib=_library)
