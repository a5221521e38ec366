"""Plait's ops under the call shapes of the golden-case checker: `check.py --ops tests.oracle_adapter`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from plait.ir import ops
from plait.ir.op import OPS
from plait.lowering import form_of

Tensor = torch.Tensor


def run(name: str, *operands: Any, **options: Any) -> Any:
    """The form that the CPU target runs for an op, or its reference."""
    form = form_of(OPS[name], "cpu")
    return (form.run if form else OPS[name].reference)(*operands, **options)


def borders(cu: list[int] | None) -> Tensor | None:
    return None if cu is None else torch.tensor(cu)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, beta: Tensor | None = None, scale: float | None = None,
    h0: Tensor | None = None, qk_l2norm: bool = False, cu: list[int] | None = None,
) -> Any:  # fmt: skip
    if qk_l2norm:
        q, k = ops.l2_norm.reference(q), ops.l2_norm.reference(k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if g is None:
        return run("delta_rule", q, k, v, beta, h0, borders(cu), scale=scale)
    name = "gated_delta_rule" if g.dim() == 3 else "kimi_delta_attention"
    return run(name, q, k, v, g, beta, h0, borders(cu), scale=scale)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, Dskip: Tensor | None = None, dt_bias: Tensor | None = None,
    dt_softplus: bool = True, dt_limit: Any = None, h0: Tensor | None = None, cu: list[int] | None = None,
    z: Tensor | None = None,
) -> Any:  # fmt: skip
    step = dt if dt_bias is None else dt + dt_bias
    step = F.softplus(step) if dt_softplus else step
    step = step if dt_limit is None else step.clamp(*dt_limit)
    state = None if h0 is None else h0.transpose(-1, -2)
    y, final = run("ssd", Cm, Bm, x, step * A, step, state, borders(cu))
    if Dskip is not None:
        y = y + (Dskip[:, None] if Dskip.dim() == 1 else Dskip) * x
    return (y if z is None else y * F.silu(z)), final.transpose(-1, -2)


def causal_conv(
    x: Tensor, w: Tensor, bias: Tensor | None = None, act: bool = True, s0: Tensor | None = None, cu: list[int] | None = None
) -> Any:
    return run("causal_conv1d", x, w, bias, s0, borders(cu), act="silu" if act else "none")


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = True, window: int | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, cu: list[int] | None = None,
) -> Any:  # fmt: skip
    options = {"causal": causal, "window": window or 0, "softcap": softcap or 0.0, "scale": scale}
    return run("attention", q, k, v, sinks, borders(cu), None, **options)
