"""What boundaries leave in a trace, as ops of the IR: recurrences and experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...ir import Value
from .handlers import Call, Made, handles, rank

if TYPE_CHECKING:
    from .build import Tracing


@handles("plait_fx.gated_delta_rule.default", "plait_fx.kimi_delta_attention.default")
def _delta(t: Tracing, node: Call) -> Made:
    """Queries and keys are of length 1 first, where the function makes them so."""
    q, k, v, decay, beta, state, scale, normalize = (*node.args, *[None] * (8 - len(node.args)))
    values = [t.value(x) for x in (q, k, v, decay, beta)]
    if normalize:
        values[:2] = [t.emit("l2_norm", x, eps=1e-6) for x in values[:2]]
    start = None if state is None else t.value(state)
    return t.all(str(node.target).split(".")[1], *values, start, scale=scale)


@handles("plait_fx.rg_lru.default")
def _rg_lru(t: Tracing, node: Call) -> Made:
    """Positions in front of every row begin a sequence."""
    return t.all("rg_lru", *(t.value(x) for x in node.args[:3]))[0]


@handles("plait_fx.ssd.default")
def _ssd(t: Tracing, node: Call) -> Made:
    """Steps are made of dt first: y = ssd + D x."""
    x, dt, a, b, c, d, bias, softplus, low, high, wide = node.args
    step = t.value(dt)
    if bias is not None:
        step = t.emit("add_bias", step, t.value(bias))
    step = t.emit("softplus", step) if softplus else step
    if (low, high) != (0.0, float("inf")) or not softplus:
        step = t.emit("clamp", step, low=low, **({} if high == float("inf") else {"high": high}))
    widened = _f32 if wide else _same
    v, k, q, step, rate = (widened(t, y) for y in (t.value(x), t.value(b), t.value(c), step, t.value(a)))
    y, _ = t.all("ssd", q, k, v, t.emit("scale_columns", step, rate), step)
    return y if d is None else t.emit("add", y, t.emit("scale_heads", v, widened(t, t.value(d))))


@handles("plait_fx.selective_scan.default")
def _selective(t: Tracing, node: Call) -> Made:
    """Tokens stand last there: y = (scan + D x) silu(z)."""
    x, dt, a, b, c, d, z, bias, softplus = node.args
    v, step, k, q = (t.emit("reshape", t.value(y), pattern="b c t -> b t c") for y in (x, dt, b, c))
    if bias is not None:
        step = t.emit("add_bias", step, t.value(bias))
    step = t.emit("softplus", step) if softplus else step
    y = t.all("selective_scan", v, step, t.value(a), k, q)[0]
    if d is not None:
        y = t.emit("add", y, t.emit("scale_columns", v, t.value(d)))
    if z is not None:
        gate = t.emit("reshape", t.value(z), pattern="b c t -> b t c")
        y = t.emit("mul", y, t.emit("silu", gate))
    return t.emit("reshape", y, pattern="b t c -> b c t")


def _same(t: Tracing, x: Value) -> Value:
    return x


def _f32(t: Tracing, x: Value) -> Value:
    """In float32, whatever comes in."""
    if x.type.dtype == "f64":
        return t.emit("aten", x, target="aten.to.dtype", args="x0, f32")
    return x if x.type.dtype == "f32" else t.emit("widen", x)


@handles("plait_fx.experts.default")
def _experts(t: Tracing, node: Call) -> Made:
    """Rows travel to their experts, through a gated MLP each, and back with their weights."""
    x, index, weights, gate_up, down = (t.value(v) for v in node.args[:5])
    rows, order, counts = t.all("dispatch", x, index, e=int(gate_up.type.dims[0].size))
    hidden: Any = t.emit("grouped_linear", rows, gate_up, counts)
    width = int(down.type.dims[2].size)
    gate, up = t.all("split", hidden, sizes=(width, width))
    act = str(node.args[5])
    opened = t.emit("gelu", gate, approximate="tanh") if act == "gelu_tanh" else t.emit(act, gate)
    made = t.emit("grouped_linear", t.emit("mul", opened, up), down, counts)
    return t.emit("combine", made, order, weights)


@handles("transformers.grouped_mm_fallback.default", "_grouped_mm.default")
def _grouped(t: Tracing, node: Call) -> Made:
    """Rows that stand together by expert; where each expert's end is what is told."""
    if rank(node.args[0]) != 2 or rank(node.args[1]) != 3 or len(node.args) < 3:
        return None
    x, w, ends = (t.value(a) for a in node.args[:3])
    zero = t.emit("aten", ends, target="aten.new_zeros.default", args="x0, [1]")
    counts = t.emit("aten", ends, zero, target="aten.diff.default", args="x0, prepend=x1")
    counts = t.emit("aten", counts, target="aten.to.dtype", args="x0, i64")
    return t.emit("grouped_linear", x, t.emit("reshape", w, pattern="e i o -> e o i"), counts)
