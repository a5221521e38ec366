"""The short convolution and what it pulls back, by generated kernels, as torch ops, and the forms that run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ir import PlaitError
from ...ir.errors import TypeMismatch
from ..forms import device
from ..forms.precision import opaque
from .conv_launch import TAPS, Conv, forward, taps, transposed
from .run import Run, interpreted, launched
from .traits import HALF

Maybe = Tensor | None

_OPERANDS = "Tensor x, Tensor w, Tensor? bias, Tensor? state, Tensor? cu, str act, bool interpreted"
_library = torch.library.Library("plait", "FRAGMENT")
_library.define(f"conv_kernels({_OPERANDS}) -> (Tensor, Tensor)")
_library.define(f"conv_kernels_backward(Tensor? dy, Tensor? dfinal, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define("conv_kernels_transposed(Tensor g, Tensor w, Tensor? final, Tensor? cu, bool interpreted) -> (Tensor, Tensor)")
_library.define("conv_kernels_taps(Tensor x, Tensor g, Tensor? state, Tensor? cu, int k, bool interpreted) -> Tensor")


def kernel_conv(
    x: Tensor,
    w: Tensor,
    bias: Maybe = None,
    state: Maybe = None,
    cu: Maybe = None,
    *,
    act: str = "none",
    interpreted: bool = False,
) -> tuple[Tensor, Tensor]:
    """`forms.device.causal_conv1d` by generated kernels where there are any for these operands."""
    # One token is a decode step's, and a few products that fuse with their neighbours.
    if (cu is None and x.shape[1] == 1) or declined(x, w.shape[1], interpreted):
        return device.causal_conv1d(x, w, bias, state, cu, act=act)
    _check("causal_conv1d", x, w.shape, cu, {"state": state}, act)
    return torch.ops.plait.conv_kernels(x, w, bias, state, cu, act, interpreted)


def kernel_transposed(
    g: Tensor, w: Tensor, final: Maybe = None, cu: Maybe = None, *, interpreted: bool = False
) -> tuple[Tensor, Tensor]:
    """`forms.device.anticausal_conv1d` by generated kernels where there are any for these operands."""
    if declined(g, w.shape[1], interpreted):
        return device.anticausal_conv1d(g, w, final, cu)
    _check("anticausal_conv1d", g, w.shape, cu, {"final": final})
    return torch.ops.plait.conv_kernels_transposed(g, w, final, cu, interpreted)


def kernel_taps(x: Tensor, g: Tensor, state: Maybe = None, cu: Maybe = None, *, k: int, interpreted: bool = False) -> Tensor:
    """`forms.device.conv1d_taps` by generated kernels where there are any for these operands."""
    if declined(x, k, interpreted):
        return device.conv1d_taps(x, g, state, cu, k=k)
    _check("conv1d_taps", x, torch.Size((x.shape[2], k)), cu, {"state": state})
    return torch.ops.plait.conv_kernels_taps(x, g, state, cu, k, interpreted)


def declined(x: Tensor, k: int, interpreted: bool) -> str:
    """Why operands have no generated kernel; empty where they have one."""
    if not interpreted and x.device.type != "cuda":
        return f"on {x.device.type} the torch form is faster than an interpreter"
    if x.dtype not in (*HALF, torch.float32):
        return f"kernels add up in float32, and x is {str(x.dtype)[6:]}"
    return "" if 1 < k <= TAPS else f"{k} taps; a kernel has 2 to {TAPS}"


def _check(op: str, x: Tensor, w: torch.Size, cu: Maybe, states: dict[str, Maybe], act: str = "none") -> None:
    """Kernels trust what they are given: operands that do not fit are named before any runs."""
    if act not in ("none", "silu"):
        raise TypeMismatch(f"{op}: act is {act!r}; it must be none or silu")
    if w[0] != x.shape[2]:
        raise TypeMismatch(f"{op}: w is {list(w)} for {x.shape[2]} channels; it must be [{x.shape[2]}, taps]")
    if cu is not None and (cu.dim() != 1 or x.shape[0] != 1 or (cu.shape[0] < 2 and x.shape[1])):
        raise TypeMismatch(f"{op}: cu is {list(cu.shape)} for {list(x.shape[:2])} tokens; it must be borders of one packed row")
    shape = Conv(x, w[1], cu).state_shape
    for name, state in states.items():
        if state is not None and state.shape != shape:
            raise TypeMismatch(f"{op}: {name} is {list(state.shape)}; it must be {list(shape)}")


def _how(interpret: bool) -> Run:
    return interpreted if interpret else launched


def _forward(x: Tensor, w: Tensor, bias: Maybe, state: Maybe, cu: Maybe, act: str, interpret: bool) -> tuple[Tensor, Tensor]:
    return forward(x, w, bias, state, cu, _how(interpret), act=act)


def _fake_forward(x: Tensor, w: Tensor, bias: Maybe, state: Maybe, cu: Maybe, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(Conv(x, w.shape[1], cu).state_shape)


def _backward(
    dy: Maybe, dfinal: Maybe, x: Tensor, w: Tensor, bias: Maybe, state: Maybe, cu: Maybe, act: str, interpret: bool
) -> tuple[Tensor, ...]:
    """The backward op's kernel; an empty tensor stands for the gradient of an absent operand."""
    run, dy = _how(interpret), torch.zeros_like(x) if dy is None else dy
    dw, dbias, dz = taps(x, dy, state, cu, run, k=w.shape[1], w=w, bias=bias, act=act)
    dx, dstate = transposed(dz, w, dfinal, cu, run, state=state is not None, dtype=x.dtype)
    dbias = x.new_empty(0) if bias is None else dbias.to(bias.dtype)
    return dx, dw.to(w.dtype), dbias, x.new_empty(0) if state is None else dstate.to(state.dtype)


def _fake_backward(dy: Maybe, dfinal: Maybe, *operands: Any) -> tuple[Tensor, ...]:
    x = operands[0]
    return tuple(x.new_empty(0) if y is None else y.new_empty(y.shape) for y in operands[:4])


def _transposed(g: Tensor, w: Tensor, final: Maybe, cu: Maybe, interpret: bool) -> tuple[Tensor, Tensor]:
    return transposed(g, w, final, cu, _how(interpret))


def _fake_transposed(g: Tensor, w: Tensor, final: Maybe, cu: Maybe, *_: Any) -> tuple[Tensor, Tensor]:
    return g.new_empty(g.shape), g.new_empty(Conv(g, w.shape[1], cu).state_shape)


def _taps(x: Tensor, g: Tensor, state: Maybe, cu: Maybe, k: int, interpret: bool) -> Tensor:
    return taps(x, g, state, cu, _how(interpret), k=k)[0]


def _fake_taps(x: Tensor, g: Tensor, state: Maybe, cu: Maybe, k: int, *_: Any) -> Tensor:
    return x.new_empty((x.shape[2], k), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Maybe, dfinal: Maybe) -> tuple[Maybe, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.plait.conv_kernels_backward(dy, dfinal, *saved, *ctx.options)
    return (*(None if x is None else d for x, d in zip(saved[:4], grads, strict=True)), None, None, None)


def _differentiate_again(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
    raise PlaitError("conv_kernels has no second derivative; compile with target='reference' to differentiate twice")


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "conv_kernels": (_forward, _fake_forward),
    "conv_kernels_backward": (_backward, _fake_backward),
    "conv_kernels_transposed": (_transposed, _fake_transposed),
    "conv_kernels_taps": (_taps, _fake_taps),
}
for _name, (_kernel, _fake) in _IMPLEMENTATIONS.items():
    _library.impl(_name, opaque(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"plait::{_name}", _fake, lib=_library)
    if _name != "conv_kernels":
        torch.library.register_autograd(f"plait::{_name}", _differentiate_again, lib=_library)
torch.library.register_autograd("plait::conv_kernels", _differentiate, setup_context=_setup, lib=_library)
