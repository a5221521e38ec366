"""What the kinds of `kinds_scan` compute, as IR."""

from __future__ import annotations

from ..ir import ONES, ZEROS, Init, Value, ops, tensor_type
from .kinds_scan import GatedConv, Lru, Mamba1
from .layer import Layer, Mixer, borders, heads, merge, short_conv


def mamba1(at: Layer, x: Value, kind: Mamba1) -> Value:
    """x|z, conv over x; step, B and C from what comes out; selective scan; gate."""
    u, z = ops.split(at.linear(x, "w_in", 2 * kind.width, bias=kind.bias), sizes=(kind.width, kind.width))
    u = short_conv(at, u, kind.width, kind.conv, bias=kind.conv_bias)
    parts = ops.split(at.linear(u, "w_read", kind.read_width), sizes=(kind.rank, kind.state, kind.state))
    if kind.norms:
        with at.b.at("norms"):
            names = zip(parts, ("step_norm", "b_norm", "c_norm"), strict=True)
            parts = [ops.rms_norm(y, at.vector(n, int(y.type.dims[-1].size), ONES), eps=at.spec.norm_eps) for y, n in names]
    narrow, k, q = parts
    with at.b.at("gates"):
        bias = at.wide_vector("dt_bias", kind.width, Init("step_bias", (kind.dt_min, kind.dt_max, kind.dt_floor)))
        step = ops.softplus(ops.add_bias(ops.widen(at.linear(narrow, "w_step", kind.width)), bias))
        rate = ops.neg_exp(_rates(at, kind))
    y, _ = ops.selective_scan(u, step, rate, k, q, **borders(at))
    y = ops.add(y, ops.scale_columns(u, at.wide_vector("D", kind.width, ONES)))
    with at.b.at("gate"):
        y = ops.mul(y, ops.silu(z))
    return at.linear(y, "w_out", at.spec.hidden, residual=True, bias=kind.bias)


def _rates(at: Layer, kind: Mamba1) -> Value:
    """The logarithms of decay rates, in at least float32."""
    type_ = tensor_type("f64" if at.dtype == "f64" else "f32", kind.width, kind.state)
    return at.param("A_log", type_, Init("log_uniform", (1.0, float(max(kind.state, 2)))))


def gated_conv(at: Layer, x: Value, kind: GatedConv) -> Value:
    """B|C|x from one projection: C * conv(B * x)."""
    before, behind, u = ops.split(at.linear(x, "w_in", 3 * kind.width, bias=kind.bias), sizes=(kind.width,) * 3)
    y = short_conv(at, ops.mul(before, u), kind.width, kind.conv, bias=kind.bias, act="none")
    return at.linear(ops.mul(behind, y), "w_out", at.spec.hidden, residual=True, bias=kind.bias)


def lru(at: Layer, x: Value, kind: Lru) -> Value:
    """y|x from one projection: act(y) * recurrence(conv(x)), all with biases (Griffin, arXiv 2402.19427)."""
    y, u = ops.split(at.linear(x, "w_in", 2 * kind.width, bias=True), sizes=(kind.width, kind.width))
    u = short_conv(at, u, kind.width, kind.conv, bias=True, act="none")
    with at.b.at("gates"):
        came, kept = (_block_gate(at, u, name, kind) for name in ("input_gate", "decay_gate"))
        rate = ops.scale(ops.softplus(at.wide_vector("rate", kind.width, Init("normal", (1.0,)))), by=-kind.sharpness)
        decay = ops.scale_columns(kept, rate)
    h, _ = ops.rg_lru(ops.mul(u, came), decay, at.shared["p"], **borders(at))
    with at.b.at("gate"):
        name, options = ("gelu", {"approximate": "tanh"}) if kind.act == "gelu_tanh" else (kind.act, {})
        h = ops.mul(h, getattr(ops, name)(y, **options))
    return at.linear(h, "w_out", at.spec.hidden, residual=True, bias=True)


def _block_gate(at: Layer, x: Value, name: str, kind: Lru) -> Value:
    """sigmoid(x w^T + bias) within each block of channels, in at least float32."""
    std = float(f"{(0.01 / kind.block) ** 0.5:.6g}")
    w = at.param(f"w_{name}", tensor_type(at.dtype, kind.heads, kind.block, kind.block), Init("normal", (std,)))
    y = merge(ops.head_linear(heads(x, kind.heads), w))
    return ops.sigmoid(ops.widen(ops.add_bias(y, at.vector(f"{name}_bias", kind.width, ZEROS))))


SCAN_MIXERS: dict[str, Mixer] = {"mamba1": mamba1, "gated_conv": gated_conv, "lru": lru}
