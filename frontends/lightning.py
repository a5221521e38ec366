"""What lightning attention computes, as IR."""

from __future__ import annotations

from ..ir import ONES, Init, Value, ops
from .kinds_lightning import Lightning
from .layer import Layer, borders, heads, merge


def lightning(at: Layer, x: Value, kind: Lightning) -> Value:
    """q|k|v|gate, activation of q|k|v, S_t = e^slope S_{t-1} + k_t v_t^T, norm of all heads, then gate."""
    width = kind.width
    qkv, gate = ops.split(at.linear(x, "w_in", 4 * width), sizes=(3 * width, width))
    name, options = ("gelu", {"approximate": "tanh"}) if kind.act == "gelu_tanh" else (kind.act, {})
    qkv = getattr(ops, name)(qkv, **options)
    q, k, v = (heads(y, kind.heads) for y in ops.split(qkv, sizes=(width, width, width)))
    slope = ops.fixed(at.wide_vector("slope", kind.heads, Init("slopes", (1.0,))))
    o, _ = ops.retention(q, k, v, slope, **borders(at))
    with at.b.at("out_norm"):
        n = ops.rms_norm(merge(o), at.vector("out_norm", width, ONES), eps=kind.out_eps)
        n = ops.mul(ops.sigmoid(gate), n)
    return at.linear(n, "w_out", at.spec.hidden, residual=True)
