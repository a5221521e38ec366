"""Linear recurrences by generated kernels as torch ops, and a form for every member of the family.

On a CUDA device they launch Triton; interpreted ones run it on the CPU, slowly. The torch form runs elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ir import PlaitError, TypeMismatch
from ...ir.errors import DataError
from ..forms import recurrence as torch_form
from ..forms import relay_op
from ..forms.chunked import Operands
from ..forms.precision import opaque
from .launch import Run, Saved, backward, call_of, decode, final_room, forward
from .launch import final_state as final_state_kernels
from .run import interpreted, launched, target_of
from .traits import FEW, unfit

Maybe = Tensor | None

_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? state, Tensor? cu"
_ATTRIBUTES = "float scale, str update, bool interpreted"
_RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_library = torch.library.Library("plait", "FRAGMENT")
_library.define(f"recurrence_kernels({_OPERANDS}, {_ATTRIBUTES}, bool keep) -> {_RESULTS}")
_library.define(
    f"recurrence_kernels_backward({_OPERANDS}, Tensor u, Tensor solve, Tensor scores, Tensor states, "
    f"Tensor? do, Tensor? dfinal, {_ATTRIBUTES}) -> {_RESULTS}"
)
_library.define(
    "recurrence_state(Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? state, Tensor? cu, str update, bool interpreted)"
    " -> Tensor"
)
_library.define(f"recurrence_step({_OPERANDS.replace('Tensor? state', 'Tensor(a!) state')}, {_ATTRIBUTES}) -> Tensor")


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Maybe = None,
    beta: Maybe = None,
    state: Maybe = None,
    cu: Maybe = None,
    *,
    scale: float = 1.0,
    update: str = "delta",
    interpreted: bool = False,
    carried: bool = False,
) -> tuple[Tensor, Tensor]:
    """`forms.recurrence.linear_recurrence` by generated kernels where there are any for these operands.

    A `carried` state is given up: a step of few tokens writes the new one over it.
    """
    if declined(q, k, v, interpreted):
        return torch_form.linear_recurrence(q, k, v, decay, beta, state, cu, scale=scale, update=update)
    torch_form.check(q, k, v, decay, beta, state, cu, update)
    given = (q, k, v, decay, beta, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if carried and not keep and cu is None and state is not None and _few(v) and state.dtype == torch.float32:
        return torch.ops.plait.recurrence_step(*given, None, scale, update, interpreted), state
    o, final, *_ = torch.ops.plait.recurrence_kernels(*given, cu, scale, update, interpreted, keep)
    return o, final


def _few(v: Tensor) -> bool:
    """Whether there are so few tokens that they go one after another; a number that may be any is many."""
    return not isinstance(v.shape[1], torch.SymInt) and 0 < v.shape[1] <= FEW


def final_state(
    k: Tensor, v: Tensor, decay: Maybe, beta: Maybe, state: Maybe = None, cu: Maybe = None, *, interpreted: bool = False
) -> Tensor:
    """`gated_delta_final` and `kimi_delta_final` by generated kernels where there are any for these operands."""
    if declined(k, k, v, interpreted):
        return relay_op.gated_delta_final(k, v, decay, _there(beta), state, cu)
    torch_form.check(k, k, v, decay, beta, state, cu, "delta")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (k, v, decay, beta, state)):
        return linear_recurrence(k, k, v, decay, beta, state, cu, interpreted=interpreted)[1]
    return torch.ops.plait.recurrence_state(k, v, decay, beta, state, cu, "delta", interpreted)


def _there(x: Maybe) -> Tensor:
    if x is None:
        raise TypeMismatch("gated_delta_final: beta is missing; it must be [b t h]")
    return x


def declined(q: Tensor, k: Tensor, v: Tensor, interpreted: bool) -> str:
    """Why operands have no generated kernel; empty where they have one."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if not interpreted and q.device.type != "cuda":
        return f"on {q.device.type} the torch form is faster than an interpreter"
    return unfit(dtype, k.shape[-1], v.shape[-1])


def _operands(values: tuple[Any, ...], scale: float, update: str) -> Operands:
    q, k, v, decay, beta, state, cu = values
    return Operands(q, k, v, decay, beta, state, cu, scale, update == "delta")


def _read(values: tuple[Any, ...], scale: float, update: str) -> Operands:
    """The operands; borders are looked at where that makes no host wait, and elsewhere clamped into the row by the kernels."""
    x = _operands(values, scale, update)
    if x.cu is not None and x.cu.device.type == "cpu":
        borders, tokens = [int(n) for n in x.cu.tolist()], x.v.shape[1]
        if borders[0] != 0 or borders[-1] != tokens or borders != sorted(borders):
            raise DataError(f"cu: {borders} must rise from 0 to the number of tokens, {tokens}; pass cumulative lengths")
    return x


def _how(device: torch.device, interpret: bool) -> tuple[Run, str]:
    return (interpreted, "sm_90") if interpret else (launched, target_of(device))


def _forward(*values: Any) -> tuple[Tensor, ...]:
    """The op's kernel."""
    *given, scale, update, interpret, keep = values
    x = _read(tuple(given), scale, update)
    run, target = _how(x.q.device, interpret)
    if not keep and x.cu is None and 0 < x.v.shape[1] <= FEW:
        return *decode(x, run, target=target), *(x.v.new_empty(0) for _ in range(4))
    o, final, saved = forward(x, run, keep=keep, target=target)
    kept = (saved.u, saved.solve, saved.scores, saved.states) if keep else tuple(x.v.new_empty(0) for _ in range(4))
    return o, final, *kept


def _fake_forward(*values: Any) -> tuple[Tensor, ...]:
    *given, scale, update, _, keep = values
    x = _operands(tuple(given), scale, update)
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    if not keep:
        return o, final_room(x), *(x.v.new_empty(0) for _ in range(4))
    call = call_of(x, keep=True)
    return o, final_room(x), *(x.v.new_empty(s, dtype=d) for s, d in zip(call.saved_shapes, call.saved_dtypes, strict=True))


def _backward(*values: Any) -> tuple[Tensor, ...]:
    """The backward op's kernel; an empty tensor stands for the gradient of an absent operand."""
    *given, u, solve, scores, states, do, dfinal, scale, update, interpret = values
    x = _operands(tuple(given), scale, update)
    run, target = _how(x.q.device, interpret)
    out = backward(x, Saved(u, solve, scores, states), do, dfinal, run, target=target)
    state = None if x.state is None else out.state.to(x.state.dtype)
    return tuple(x.v.new_empty(0) if d is None else d for d in (out.q, out.k, out.v, out.decay, out.beta, state))


def _fake_backward(*values: Any) -> tuple[Tensor, ...]:
    dense, v = torch.contiguous_format, values[2]
    return tuple(v.new_empty(0) if x is None else torch.empty_like(x, memory_format=dense) for x in values[:6])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps the operands and what forward left for backward; only o and final are differentiable."""
    ctx.save_for_backward(*inputs[:7], *output[2:])
    ctx.attributes = inputs[7:10]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Maybe, dfinal: Maybe, *unused: Maybe) -> tuple[Maybe, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.plait.recurrence_kernels_backward(*saved, do, dfinal, *ctx.attributes)
    return (*(None if x is None else g for x, g in zip(saved[:6], grads, strict=True)), *(None,) * 5)


def _differentiate_again(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
    raise PlaitError("recurrence_kernels has no second derivative; compile with target='reference' to differentiate twice")


def _state(*values: Any) -> Tensor:
    """The state op's kernel."""
    k, *given, update, interpret = values
    run, target = _how(k.device, interpret)
    return final_state_kernels(_read((k, k, *given), 1.0, update), run, target=target)


def _fake_state(*values: Any) -> Tensor:
    k, *given, update, _ = values
    return final_room(_operands((k, k, *given), 1.0, update))


def _step(*values: Any) -> Tensor:
    """A few tokens, the state updated in place."""
    *given, scale, update, interpret = values
    x = _operands(tuple(given), scale, update)
    if x.cu is not None or x.state is None:
        raise TypeMismatch(
            "recurrence_step: cu is given, or no state; a step takes one row of tokens for each state that it updates"
        )
    torch_form.check(x.q, x.k, x.v, x.decay, x.beta, x.state, None, update)
    run, target = _how(x.q.device, interpret)
    if x.state.is_contiguous():
        return decode(x, run, final=x.state, target=target)[0]
    o, final = decode(x, run, target=target)
    x.state.copy_(final)
    return o


def _fake_step(*values: Any) -> Tensor:
    return torch.empty_like(values[2], memory_format=torch.contiguous_format)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "recurrence_kernels": (_forward, _fake_forward),
    "recurrence_kernels_backward": (_backward, _fake_backward),
    "recurrence_state": (_state, _fake_state),
    "recurrence_step": (_step, _fake_step),
}
for _name, (_kernel, _fake) in _IMPLEMENTATIONS.items():
    _library.impl(_name, opaque(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"plait::{_name}", _fake, lib=_library)
torch.library.register_autograd("plait::recurrence_kernels", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("plait::recurrence_kernels_backward", _differentiate_again, lib=_library)
