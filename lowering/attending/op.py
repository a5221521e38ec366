"""Softmax attention by generated kernels as torch ops, and the form that runs them.

On a CUDA device they launch Triton; interpreted ones run it on the CPU, slowly. The torch form runs elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ir import PlaitError, ops
from ...ir.errors import TypeMismatch
from ..forms import device
from ..forms.precision import opaque
from ..gpu.machine import target_of
from .choice import alone
from .launch import Operands, backward, decode, forward, room
from .run import Run, interpreted, launched
from .traits import WIDEST

Maybe = Tensor | None

_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu, Tensor? at"
_OPTIONS = "bool causal, int window, float softcap, float scale, bool interpreted"
_library = torch.library.Library("plait", "FRAGMENT")
_library.define(f"attention_kernels({_OPERANDS}, {_OPTIONS}, bool keep) -> (Tensor, Tensor)")
_library.define(
    f"attention_kernels_backward(Tensor do, Tensor o, Tensor lse, {_OPERANDS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Maybe = None,
    cu: Maybe = None,
    at: Maybe = None,
    *,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
    interpreted: bool = False,
) -> Tensor:
    """`forms.device.attention` by generated kernels where they are the better choice for these operands."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    options, k, v = Options(causal, window, softcap, factor), k.to(q.dtype), v.to(q.dtype)
    if not factor:  # what is hidden would be a product of zero and infinity, here and in SDPA
        return _by(ops.attention.reference, (q, k, v, sinks, cu, at), options)
    if factor < 0:  # the largest logit is that of the largest product, here and in SDPA
        q, options = -q, options._replace(scale=-factor)
    bare = sinks is None and cu is None and not window and not softcap and k.shape[3] == v.shape[3]
    known = bare and not interpreted and alone(causal, at is not None, q.shape[1], k.shape[1])
    if known or declined(q, k, v, interpreted):
        return _by(device.attention, (q, k, v, sinks, cu, at), options)
    given = (q, k, v, sinks)
    _check(*given, cu, at)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    return torch.ops.plait.attention_kernels(*given, cu, at, *options, interpreted, keep)[0]


class Options(NamedTuple):
    """An attention's options, its scale known."""

    causal: bool
    window: int
    softcap: float
    scale: float


def _by(form: Callable[..., Tensor], operands: tuple[Maybe, ...], options: Options) -> Tensor:
    return form(*operands, **options._asdict())


def declined(q: Tensor, k: Tensor, v: Tensor, interpreted: bool) -> str:
    """Why operands have no generated kernel; empty where they have one."""
    if not interpreted and q.device.type != "cuda":
        return f"on {q.device.type} the torch form is faster than an interpreter"
    if q.dtype not in WIDEST:
        return f"products of {str(q.dtype)[6:]} are no tensor core's; cuBLAS takes them"
    most = max(WIDEST.values()) if interpreted else WIDEST[q.dtype]  # an interpreter has no registers
    if not (0 < q.shape[-1] <= most and 0 < v.shape[-1] <= most):
        return f"heads of {q.shape[-1]} and {v.shape[-1]} channels; a program's registers take 1 to {most} of {q.dtype}"
    return ""


def _check(q: Tensor, k: Tensor, v: Tensor, sinks: Maybe, cu: Maybe, at: Maybe) -> None:
    """Kernels trust what they are given: operands that do not fit are named before any runs."""
    b, t, h, d = q.shape
    s, g = k.shape[1], k.shape[2]
    if k.shape != (b, s, g, d) or v.shape[:3] != (b, s, g) or not g or h % g:
        raise TypeMismatch(
            f"attention: q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; they must be [b, t, g*r, d], [b, s, g, d] "
            "and [b, s, g, e]"
        )
    if sinks is not None and sinks.shape != (h,):
        raise TypeMismatch(f"attention: sinks are {list(sinks.shape)}; they must be [{h}], one for each head of q")
    if cu is not None and (cu.dim() != 1 or t > s):
        raise TypeMismatch(f"attention: cu is {list(cu.shape)} for {t} queries and {s} keys; every query must stand at a key")
    if at is not None and at.numel() != 1:
        raise TypeMismatch(f"attention: at is {list(at.shape)}; it must be one number")
    if any(x is not None and x.device != q.device for x in (k, v, sinks, cu, at)):
        devices = ", ".join(str(x.device) for x in (q, k, v, sinks, cu, at) if x is not None)
        raise TypeMismatch(f"attention: operands are on {devices}; they must be on one device")


def _how(x: Tensor, interpret: bool) -> tuple[Run, str]:
    return (interpreted, "sm_90") if interpret else (launched, target_of(x.device))


def _operands(values: tuple[Any, ...]) -> Operands:
    return Operands(*values[:10])


def _forward(*values: Any) -> tuple[Tensor, Tensor]:
    """The op's kernel; without a backward the denominators are left out."""
    x, (interpret, keep) = _operands(values), values[10:]
    run, target = _how(x.q, interpret)
    if keep:
        return forward(x, run, target=target)
    o = decode(x, run, target=target) if x.few else forward(x, run, target=target)[0]
    return o, o.new_empty(0, dtype=torch.float32)


def _fake_forward(*values: Any) -> tuple[Tensor, Tensor]:
    x, keep = _operands(values), values[-1]
    b, t, h, _ = x.q.shape
    return room(x), x.q.new_empty((b, h, t) if keep else (0,), dtype=torch.float32)


def _backward(do: Tensor, o: Tensor, lse: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward op's kernel; an empty tensor stands for the gradient of absent sinks."""
    x, interpret = _operands(values), values[10]
    run, target = _how(x.q, interpret)
    made = backward(x, o, lse, do, run, target=target)
    return made.q, made.k, made.v, o.new_empty(0) if made.sinks is None else made.sinks


def _fake_backward(do: Tensor, o: Tensor, lse: Tensor, *values: Any) -> tuple[Tensor, ...]:
    dense, sinks = torch.contiguous_format, values[3]
    made = (torch.empty_like(x, memory_format=dense) for x in values[:3])
    return *made, o.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps the operands and what forward left for backward; only o is differentiable."""
    ctx.save_for_backward(*output, *inputs[:6])
    ctx.options = inputs[6:11]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, do: Tensor, unused: Maybe) -> tuple[Maybe, ...]:
    *grads, sinks = torch.ops.plait.attention_kernels_backward(do, *ctx.saved_tensors, *ctx.options)
    return *grads, None if ctx.saved_tensors[5] is None else sinks, *(None,) * 8


def _differentiate_again(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
    raise PlaitError("attention_kernels has no second derivative; compile with target='reference' to differentiate twice")


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attention_kernels": (_forward, _fake_forward),
    "attention_kernels_backward": (_backward, _fake_backward),
}
for _name, (_kernel, _fake) in _IMPLEMENTATIONS.items():
    _library.impl(_name, opaque(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"plait::{_name}", _fake, lib=_library)
torch.library.register_autograd("plait::attention_kernels", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("plait::attention_kernels_backward", _differentiate_again, lib=_library)
