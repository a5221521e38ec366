"""Linear recurrences as one opaque op: gated delta rule, delta rule, KDA, SSD, gated linear attention and retention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ir.errors import PlaitError, TypeMismatch
from ..cpp import recurrence as generated
from .chunked import Operands, Saved, chunks_of, forward, room, saved_shapes
from .chunked_backward import backward
from .precision import opaque
from .recurrent import FEW, decode

UPDATES = ("delta", "additive")
Maybe = Tensor | None

_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? state, Tensor? cu"
_ATTRIBUTES = "float scale, str update"
_library = torch.library.Library("plait", "FRAGMENT")
# Dynamo and AOTAutograd see two opaque calls, so compile time does not grow with tokens. With keep, forward also
# returns what backward reads again.
_library.define(f"linear_recurrence({_OPERANDS}, {_ATTRIBUTES}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"linear_recurrence_backward({_OPERANDS}, Tensor u, Tensor solve, Tensor states, Tensor? do, Tensor? dfinal, {_ATTRIBUTES})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


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
) -> tuple[Tensor, Tensor]:
    """S' = exp(decay) S; S = S' + beta k (v - S'^T k)^T (delta) or S' + beta k v^T (additive); o = scale S^T q."""
    check(q, k, v, decay, beta, state, cu, update)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, decay, beta, state))
    o, final, *_ = torch.ops.plait.linear_recurrence(q, k, v, decay, beta, state, cu, scale, update, keep)
    return o, final


def check(q: Tensor, k: Tensor, v: Tensor, decay: Maybe, beta: Maybe, state: Maybe, cu: Maybe, update: str) -> None:
    """Refuses operands that do not fit together; the letters are those of the op's signature."""
    if update not in UPDATES:
        raise TypeMismatch(f"linear_recurrence: update is {update!r}; it must be one of {', '.join(UPDATES)}")
    if len(places := {x.device for x in (q, k, v, decay, beta, state) if x is not None}) > 1:
        raise _mismatch(f"operands are on {' and '.join(sorted(map(str, places)))}; move all to one device")
    if not (q.dim() == k.dim() == v.dim() == 4 and q.shape == k.shape and v.shape[:2] == k.shape[:2]):
        raise _mismatch(f"q {_dims(q)}, k {_dims(k)}, v {_dims(v)} must be [b t g k], [b t g k], [b t h v]")
    b, t, g, width = k.shape
    heads, out = v.shape[2:]
    if heads % g:
        raise _mismatch(f"v has {heads} heads, k has {g}; value heads must be a multiple of key heads")
    if decay is not None and decay.shape not in ((b, t, heads), (b, t, heads, width)):
        raise _mismatch(f"decay is {_dims(decay)}; it must be [{b} {t} {heads}] or [{b} {t} {heads} {width}]")
    if beta is not None and beta.shape != (b, t, heads):
        raise _mismatch(f"beta is {_dims(beta)}; it must be [{b} {t} {heads}]")
    if cu is not None and (b != 1 or cu.dim() != 1 or cu.shape[0] == 0 or cu.is_floating_point()):
        raise _mismatch(f"with cu, b is {b} and cu {cu.dtype} {_dims(cu)}; pack all sequences into one row, cu [n+1] in int64")
    count = b if cu is None else cu.shape[0] - 1
    if state is not None and state.shape != (count, heads, width, out):
        raise _mismatch(f"state is {_dims(state)}; it must be [{count} {heads} {width} {out}]")


def _mismatch(what: str) -> TypeMismatch:
    return TypeMismatch(f"linear_recurrence: {what}")


def _dims(x: Tensor) -> str:
    return "[" + " ".join(str(n) for n in x.shape) + "]"


def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Maybe, beta: Maybe, state: Maybe, cu: Maybe, scale: float, update: str, keep: bool
) -> tuple[Tensor, ...]:
    """The op's kernel on any device: C++ where it is made for the call, else torch code."""
    x = Operands(q, k, v, decay, beta, state, cu, scale, update == "delta")
    if not v.shape[0]:
        return tuple(y.zero_() for y in _fake_forward(q, k, v, decay, beta, state, cu, scale, update, keep))
    if generated.ready(x):
        check(q, k, v, decay, beta, state, cu, update)  # C++ reads by address
        chunks = chunks_of(x) if keep or cu is not None else None  # says what is wrong with cu
        saved = room(x, chunks) if keep and chunks else None
        o, final = generated.forward(x, saved and (saved.u, saved.states))
        return o, final, *((saved.u, saved.solve, saved.states) if saved else (v.new_empty(0) for _ in range(3)))
    if not keep and cu is None and 0 < v.shape[1] <= FEW:
        o, final = decode(x)
        return o, final, *(v.new_empty(0) for _ in range(3))
    o, final, saved = forward(x, keep=keep)
    if saved is None:
        return o, final, *(v.new_empty(0) for _ in range(3))
    return o, final, saved.u, saved.solve, saved.states


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Maybe, beta: Maybe, state: Maybe, cu: Maybe, scale: float, update: str, keep: bool
) -> tuple[Tensor, ...]:
    x = Operands(q, k, v, decay, beta, state, cu, scale, update == "delta")
    final = v.new_empty((x.states, v.shape[2], k.shape[3], v.shape[3]), dtype=x.dtype)
    saved = [v.new_empty(s, dtype=x.dtype) for s in saved_shapes(x)] if keep else [v.new_empty(0) for _ in range(3)]
    return torch.empty_like(v, memory_format=torch.contiguous_format), final, *saved


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Maybe,
    beta: Maybe,
    state: Maybe,
    cu: Maybe,
    u: Tensor,
    solve: Tensor,
    states: Tensor,
    do: Maybe,
    dfinal: Maybe,
    scale: float,
    update: str,
) -> tuple[Tensor, ...]:
    """The backward op's kernel on any device; an empty tensor stands for the gradient of an absent operand."""
    x = Operands(q, k, v, decay, beta, state, cu, scale, update == "delta")
    none = v.new_empty(0)
    if not v.shape[0]:
        return _fake_backward(q, k, v, decay, beta, state)
    if generated.ready(x):
        *grads, start = generated.backward(x, (u, states), do, dfinal)
        return *(none if y is None else y for y in grads), none if state is None or start is None else start.to(state.dtype)
    out = backward(x, Saved(u, solve, states), do, dfinal)
    return (
        out.q,
        out.k,
        out.v,
        none if out.decay is None else out.decay,
        none if out.beta is None else out.beta,
        none if state is None else out.state.to(state.dtype),
    )


def _fake_backward(q: Tensor, k: Tensor, v: Tensor, decay: Maybe, beta: Maybe, state: Maybe, *rest: Any) -> tuple[Tensor, ...]:
    like, operands = torch.contiguous_format, (q, k, v, decay, beta, state)
    return tuple(v.new_empty(0) if x is None else torch.empty_like(x, memory_format=like) for x in operands)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps the operands and what forward left for backward; only o and final are differentiable."""
    ctx.save_for_backward(*inputs[:7], *output[2:])
    ctx.scale, ctx.update = inputs[7:9]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, do: Maybe, dfinal: Maybe, *unused: Maybe) -> tuple[Maybe, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.plait.linear_recurrence_backward(*saved, do, dfinal, ctx.scale, ctx.update)
    return (*(None if x is None else g for x, g in zip(saved[:6], grads, strict=True)), None, None, None, None)


def _differentiate_again(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
    raise PlaitError("linear_recurrence has no second derivative; differentiate the op's reference in plait.ir.ops instead")


_library.impl("linear_recurrence", opaque(_forward), "CompositeExplicitAutograd")
_library.impl("linear_recurrence_backward", opaque(_backward), "CompositeExplicitAutograd")
torch.library.register_fake("plait::linear_recurrence", _fake_forward, lib=_library)
torch.library.register_fake("plait::linear_recurrence_backward", _fake_backward, lib=_library)
torch.library.register_autograd("plait::linear_recurrence", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("plait::linear_recurrence_backward", _differentiate_again, lib=_library)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Maybe = None, cu: Maybe = None, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The delta rule with a decay per head."""
    return linear_recurrence(q, k, v, decay, beta, state, cu, scale=scale, update="delta")


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Maybe = None, cu: Maybe = None, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The delta rule without decay."""
    return linear_recurrence(q, k, v, None, beta, state, cu, scale=scale, update="delta")


def kimi_delta_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Maybe = None, cu: Maybe = None, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The delta rule with a decay per key channel, decay[b t h k]."""
    return linear_recurrence(q, k, v, decay, beta, state, cu, scale=scale, update="delta")


def ssd(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Maybe = None, cu: Maybe = None, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mamba-2's state space: q is C, k is B, v is x, beta is dt, decay is dt A."""
    return linear_recurrence(q, k, v, decay, beta, state, cu, scale=scale, update="additive")


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Maybe = None, cu: Maybe = None, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Linear attention with a decay per key channel, decay[b t h k]."""
    return linear_recurrence(q, k, v, decay, None, state, cu, scale=scale, update="additive")


def retention(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Maybe = None, cu: Maybe = None, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Linear attention with one constant log decay per head, slope[h]."""
    decay = slope.expand(*v.shape[:2], -1)
    return linear_recurrence(q, k, v, decay, None, state, cu, scale=scale, update="additive")
