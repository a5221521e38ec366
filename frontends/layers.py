"""What each layer kind computes, as IR: one graph per kind, `x + mixer(norm(x))`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

from ..ir import ONES, ZEROS, Builder, Graph, Init, Value, ops, tensor_type
from .kinds import Attention, Gdn, Kda, Mamba2, Mla, Mlp, Moe, Rope
from .layer import Layer, Mixer, borders, heads, merge, short_conv
from .layers_cross import biased, cross
from .layers_scan import SCAN_MIXERS
from .lightning import lightning
from .parallel import Parallel, prefix
from .shared import Shared
from .spec import ModelSpec

FAR_BELOW = -60000.0  # what no sigmoid of is more than 0 in any type, and which all types have


def attention(at: Layer, x: Value, kind: Attention) -> Value:
    """q, gate, k, v from one projection; norm and rope per head; attention; gate; output projection."""
    gated = kind.query_width if kind.gate else 0
    wide = at.linear(x, "w_in", kind.query_width + gated + 2 * kind.kv_width, bias=kind.bias)
    q, *gate, k, v = ops.split(wide, sizes=(kind.query_width, *((gated,) if gated else ()), kind.kv_width, kind.kv_width))
    if kind.clip:
        q, k, v = (ops.clamp(y, low=-kind.clip, high=kind.clip) for y in (q, k, v))
    if kind.qk_norm_whole:
        with at.b.at("qk_norm"):
            q, k = _head_norm(at, q, "q_norm", kind.query_width), _head_norm(at, k, "k_norm", kind.kv_width)
    q, k, v = heads(q, kind.heads), heads(k, kind.kv_heads), heads(v, kind.kv_heads)
    if kind.qk_norm and not kind.qk_norm_whole:
        with at.b.at("qk_norm"):
            q, k = (_head_norm(at, y, name, kind.head_dim) for y, name in ((q, "q_norm"), (k, "k_norm")))
    if kind.rope:
        q, k = turned(at, kind.rope, q, k)
    named = {"cu": at.shared["cu"]} if "cu" in at.shared else {}
    if kind.sinks:
        named["sinks"] = at.wide_vector("sinks", kind.heads, ZEROS)
    options = {"causal": kind.causal, "window": kind.window, "softcap": kind.softcap, "scale": kind.scale}
    o = merge(biased(at, q, k, v, kind) or ops.attention(q, k, v, **named, **options))
    if gate:
        with at.b.at("gate"):
            o = ops.mul(o, ops.sigmoid(gate[0]))
    return at.linear(o, "w_out", at.spec.hidden, residual=True, bias=kind.out_bias)


def _head_norm(at: Layer, x: Value, name: str, size: int) -> Value:
    """RMS norm of the last dim, zero-centered where the model's norms are."""
    w = at.vector(name, size, ZEROS if at.spec.zero_centered else ONES)
    return ops.rms_norm(x, w, eps=at.spec.norm_eps, zero_centered=at.spec.zero_centered)


def turned(at: Layer, rope: Rope, *xs: Value) -> tuple[Value, ...]:
    """Heads, each turned by its position."""
    p, far = at.shared["p"], rope.far
    s, r = rope.scaling, rope.ramp
    scaling = (s.factor, s.low, s.high, float(s.original)) if s else (r.factor, r.low, r.high, 0.0) if r else ()
    options: dict[str, Any] = {
        n: getattr(rope, n) for n in ("theta", "fraction", "interleaved", "divisors", "amplitude", "rounded")
    }
    named = {}
    if far:
        named["reach"] = ops.reach(p)
        options["far"] = (float(far.length), *((far.factor,) if far.factor else far.divisors))
    return tuple(ops.rope(x, p, **named, **options, scaling=scaling) for x in xs)


def mla(at: Layer, x: Value, kind: Mla) -> Value:
    """Latent attention: q | kv latent | shared key from one projection; norms of the latents; heads; rope on what is shared."""
    wide = at.linear(x, "w_in", kind.in_width)
    gated = (kind.heads,) if kind.gate else ()
    q, latent, shared, *gate = ops.split(wide, sizes=(kind.q_rank or kind.query_width, kind.kv_rank, kind.shared_dim, *gated))
    with at.b.at("query"):
        if kind.q_rank:
            q = at.linear(_rank_norm(at, q, "q_norm", kind), "w_q", kind.query_width)
        q_own, q_shared = ops.split(heads(q, kind.heads), sizes=(kind.own_dim, kind.shared_dim))
    with at.b.at("keys"):
        both = heads(at.linear(_rank_norm(at, latent, "kv_norm", kind), "w_kv", kind.kv_width), kind.heads)
        k_own, v = ops.split(both, sizes=(kind.own_dim, kind.value_dim))
        shared = heads(shared, 1)
    if kind.rope:
        q_shared, shared = turned(at, kind.rope, q_shared, shared)
    q, k = ops.concat(q_own, q_shared), ops.concat(k_own, ops.repeat_heads(shared, r=kind.heads))
    o = ops.attention(q, k, v, **borders(at), scale=kind.scale)
    if gate:
        with at.b.at("gate"):
            o = ops.scale_rows(o, ops.cast(ops.sigmoid(ops.widen(gate[0])), dtype=o.type.dtype))
    return at.linear(merge(o), "w_out", at.spec.hidden, residual=True)


def _rank_norm(at: Layer, x: Value, name: str, kind: Mla) -> Value:
    return ops.rms_norm(x, at.vector(name, int(x.type.dims[-1].size), ONES), eps=kind.rank_eps)


def gdn(at: Layer, x: Value, kind: Gdn) -> Value:
    """Gated delta net: q|k|v|z|beta|alpha, conv over q|k|v, delta rule, norm then gate (SEMANTICS: GatedDeltaNet)."""
    wide = at.linear(x, "w_in", kind.in_width)
    qkv, z, beta, alpha = ops.split(wide, sizes=(kind.conv_width, kind.value_width, kind.value_heads, kind.value_heads))
    qkv = short_conv(at, qkv, kind.conv_width, kind.conv)
    q, k, v = ops.split(qkv, sizes=(kind.key_width, kind.key_width, kind.value_width))
    with at.b.at("qk_norm"):
        q, k = (ops.l2_norm(heads(y, kind.key_heads)) for y in (q, k))
    with at.b.at("gates"):
        decay = _decay(at, alpha, kind.value_heads)
        beta = ops.sigmoid(beta)
        beta = beta if kind.beta_scale == 1 else ops.scale(beta, by=kind.beta_scale)
    o, _ = ops.gated_delta_rule(q, k, heads(v, kind.value_heads), decay, beta, **borders(at), scale=kind.key_dim**-0.5)
    o = _norm_then_gate(at, o, heads(z, kind.value_heads), kind.value_dim, kind.gate_act, kind.out_eps)
    return at.linear(o, "w_out", at.spec.hidden, residual=True)


def _decay(at: Layer, alpha: Value, size: int) -> Value:
    """-exp(A_log) softplus(alpha + dt_bias), in at least float32."""
    step = ops.softplus(ops.add_bias(ops.widen(alpha), at.wide_vector("dt_bias", size, ONES)))
    return ops.scale_columns(step, ops.neg_exp(at.wide_vector("A_log", size, Init("log_uniform", (1.0, 16.0)))))


def _norm_then_gate(at: Layer, o: Value, z: Value, size: int, act: str, eps: float | None = None) -> Value:
    with at.b.at("out_norm"):
        n = ops.rms_norm(o, at.vector("out_norm", size, ONES), eps=eps or at.spec.norm_eps)
        return merge(ops.mul(n, getattr(ops, act)(z)))


def kda(at: Layer, x: Value, kind: Kda) -> Value:
    """Kimi delta attention: decay per key channel, delta rule, norm then sigmoid gate."""
    rank, width = kind.rank, kind.width
    wide = at.linear(x, "w_in", kind.in_width)
    qkv, f, g, beta = ops.split(wide, sizes=(3 * width, rank, rank, kind.heads))
    qkv = short_conv(at, qkv, 3 * width, kind.conv)
    q, k, v = (heads(y, kind.heads) for y in ops.split(qkv, sizes=(width, width, width)))
    with at.b.at("qk_norm"):
        q, k = ops.l2_norm(q), ops.l2_norm(k)
    with at.b.at("gates"):
        f, g = (f, g) if kind.full_rank else (at.linear(f, "w_decay", width), at.linear(g, "w_gate", width))
        decay = _channel_decay(at, f, kind)
        beta = ops.sigmoid(ops.widen(beta))
    o, _ = ops.kimi_delta_attention(q, k, v, decay, beta, **borders(at), scale=kind.head_dim**-0.5)
    o = _norm_then_gate(at, o, heads(g, kind.heads), kind.head_dim, "sigmoid")
    return at.linear(o, "w_out", at.spec.hidden, residual=True)


def _channel_decay(at: Layer, f: Value, kind: Kda) -> Value:
    """-exp(A_log) softplus(f + dt_bias) for each key channel, or floor sigmoid(exp(A_log) (f + dt_bias))."""
    step = ops.add_bias(ops.widen(f), at.wide_vector("dt_bias", kind.width, ONES))
    rate = ops.neg_exp(at.wide_vector("A_log", kind.heads, Init("log_uniform", (1.0, 16.0))))
    if not kind.decay_floor:
        return ops.scale_heads(heads(ops.softplus(step), kind.heads), rate)
    return ops.scale(ops.sigmoid(ops.scale_heads(heads(step, kind.heads), ops.scale(rate, by=-1.0))), by=kind.decay_floor)


def mamba2(at: Layer, x: Value, kind: Mamba2) -> Value:
    """Mamba-2: z|x|B|C|dt, conv over x|B|C, state space duality, gate then grouped norm (SEMANTICS: Mamba-2 mixer)."""
    z, xbc, dt = _ssd_input(at, x, kind)
    xbc = short_conv(at, xbc, kind.conv_width, kind.conv, bias=kind.conv_bias)
    v, k, q = ops.split(xbc, sizes=(kind.inner, kind.groups * kind.state, kind.groups * kind.state))
    v, k, q = heads(v, kind.heads), heads(k, kind.groups), heads(q, kind.groups)
    with at.b.at("gates"):
        bias = at.wide_vector("dt_bias", kind.heads, Init("step_bias", (kind.dt_min, kind.dt_max, kind.dt_floor)))
        step = ops.softplus(ops.add_bias(ops.widen(dt), bias))
        if kind.dt_limit:
            step = ops.clamp(step, low=kind.dt_limit[0], high=kind.dt_limit[1])
        rate = ops.neg_exp(at.wide_vector("A_log", kind.heads, Init("log_uniform", (kind.a_min, kind.a_max))))
        decay = ops.scale_columns(step, rate)
    y, _ = ops.ssd(q, k, v, decay, step, **borders(at))
    y = merge(ops.add(y, ops.scale_heads(v, at.wide_vector("D", kind.heads, ONES))))
    with at.b.at("out_norm"):
        y = _ssd_norm(at, y, kind) if kind.norm_first else y
        y = ops.mul(y, ops.silu(z))
        y = y if kind.norm_first else _ssd_norm(at, y, kind)
    return at.linear(y, "w_out", at.spec.hidden, residual=True)


def _ssd_input(at: Layer, x: Value, kind: Mamba2) -> list[Value]:
    """z, what the convolution sees, and dt, each section times its scale."""
    wide = at.linear(x, "w_in", kind.in_width)
    if not kind.in_scales:
        return ops.split(wide, sizes=(kind.inner, kind.conv_width, kind.heads))
    state = kind.groups * kind.state
    sections = ops.split(wide, sizes=(kind.inner, kind.inner, state, state, kind.heads))
    z, v, k, q, dt = (ops.scale(y, by=by) if by != 1 else y for y, by in zip(sections, kind.in_scales, strict=True))
    return [z, ops.concat(ops.concat(v, k), q), dt]


def _ssd_norm(at: Layer, x: Value, kind: Mamba2) -> Value:
    if not kind.out_norm:
        return x
    return ops.rms_norm(x, at.vector("out_norm", kind.inner, ONES), eps=at.spec.norm_eps, groups=kind.norm_groups)


def mlp(at: Layer, x: Value, kind: Mlp) -> Value:
    """Dense feed-forward: act(gate) * up, or act(up)."""
    wide = at.linear(x, "w_in", kind.width * (2 if kind.glu else 1), bias=kind.bias)
    inner = _activate(wide, kind.act, kind.glu, kind.gate_scale)
    return at.linear(inner, "w_out", at.spec.hidden, residual=True, bias=kind.bias)


def parallel(at: Layer, x: Value, kind: Parallel) -> Value:
    """A weighted sum of mixers; x is normed already, unless the parts have norms of their own."""
    made = list[Value]()
    for i, part in enumerate(kind.parts):
        own = replace(at, prefix=prefix(i))
        with at.b.at(part.kind):
            y = MIXERS[part.kind](own, _normed(own, x, "norm") if kind.own_norms else x, part)
            assert isinstance(y, Value)
            made.append(ops.scale(y, by=kind.scales[i]) if kind.scales and kind.scales[i] != 1 else y)
    return reduce(ops.add, made)


def shared(at: Layer, x: Value, kind: Shared) -> Value | tuple[Value, ...]:
    """The mixer of a place that has shared weights ahead of it."""
    return MIXERS[kind.mixer.kind](replace(at, prefix=prefix(0)), x, kind.mixer)


def _activate(x: Value, act: str, glu: bool, gate_scale: float = 1.0) -> Value:
    name, options = ("gelu", {"approximate": "tanh"}) if act == "gelu_tanh" else (act, {})
    if not glu:
        return getattr(ops, name)(x, **options)
    size = int(x.type.dims[-1].size)
    gate, up = ops.split(x, sizes=(size // 2, size // 2))
    gate = gate if gate_scale == 1 else ops.scale(gate, by=gate_scale)
    return ops.mul(getattr(ops, name)(gate, **options), up)


def _clamped(x: Value, kind: Moe) -> Value:
    """(up + shift) * gate * sigmoid(gain * gate), the gate kept below the limit and up within it."""
    gate, up = ops.split(x, sizes=(kind.width, kind.width))
    if kind.limit:
        gate, up = ops.clamp(gate, low=FAR_BELOW, high=kind.limit), ops.clamp(up, low=-kind.limit, high=kind.limit)
    gate = ops.mul(gate, ops.sigmoid(ops.scale(gate, by=kind.gain)))
    return ops.mul(ops.shift(up, by=kind.up_shift) if kind.up_shift else up, gate)


def moe(at: Layer, x: Value, kind: Moe) -> tuple[Value, ...]:
    """Routed experts beside an always-on shared one; the balance losses come out as a second result."""
    logits = at.linear(x, "w_router", kind.experts, bias=kind.router_bias)
    named = {"bias": at.wide_vector("route_bias", kind.experts, ZEROS)} if kind.route_bias else {}
    options = {"k": kind.top_k, "score": kind.score, "renormalize": kind.renormalize, "scale": kind.route_scale}
    if kind.groups > 1:
        options |= {"groups": kind.groups, "group_limit": kind.group_limit, "group_best": kind.group_best}
    weights, chosen = ops.route(logits, **named, **options)
    with at.b.at("experts"):
        rows, order, counts = ops.dispatch(x, chosen, e=kind.experts)
        wide = _expert_linear(at, rows, counts, "w_in", kind.width * (2 if kind.glu else 1), kind)
        plain = not kind.limit and kind.gain == 1 and not kind.up_shift
        inner = _activate(wide, kind.act, kind.glu) if plain else _clamped(wide, kind)
        y = ops.combine(_expert_linear(at, inner, counts, "w_out", at.spec.hidden, kind), order, weights)
    if kind.shared_width:
        with at.b.at("shared"):
            y = ops.add(y, _shared(at, x, kind))
    return y, *_balance(kind, logits, chosen)


def _expert_linear(at: Layer, rows: Value, counts: Value, name: str, out: int, kind: Moe) -> Value:
    """One linear for each expert."""
    w = at.weight(name, kind.experts, out, int(rows.type.dims[-1].size), out=name == "w_out")
    y = ops.grouped_linear(rows, w, counts)
    if not kind.bias:
        return y
    bias = at.param(f"{name}_bias", tensor_type(at.dtype, kind.experts, out), ZEROS)
    return ops.add(y, ops.spread_experts(bias, counts, y))


def _shared(at: Layer, x: Value, kind: Moe) -> Value:
    inner = _activate(at.linear(x, "w_shared_in", kind.shared_width * (2 if kind.glu else 1)), kind.act, kind.glu)
    y = at.linear(inner, "w_shared_out", at.spec.hidden, residual=True)
    if not kind.shared_gate:
        return y
    gate = ops.reshape(ops.sigmoid(at.linear(x, "w_shared_gate", 1)), pattern="... u=1 -> ...")
    return ops.scale_rows(y, gate)


def _balance(kind: Moe, logits: Value, chosen: Value) -> tuple[Value, ...]:
    """The weighted balance losses, as one scalar; nothing when neither is asked for."""
    losses = list[Value]()
    if kind.aux_loss:
        losses.append(ops.scale(ops.load_balance_loss(logits, chosen, score=kind.score), by=kind.aux_loss))
    if kind.z_loss:
        losses.append(ops.scale(ops.z_loss(logits), by=kind.z_loss))
    return (ops.add(*losses),) if len(losses) == 2 else tuple(losses)


MIXERS: dict[str, Mixer] = {
    "lightning": lightning,
    "attention": attention, "mla": mla, "gdn": gdn, "kda": kda, "mamba2": mamba2, "mlp": mlp, "moe": moe,
    "parallel": parallel, "shared": shared, "cross": cross, **SCAN_MIXERS,
}  # fmt: skip


def build_layer(kind: Any, spec: ModelSpec, dtype: str, shared: Mapping[str, Any], name: str, length: str = "s") -> Graph:
    """`x + mixer(norm(x))` of one kind, normed where the spec says; `shared` are the types of what else it reads, by name."""
    b = Builder(name, "layer")
    x = b.input("x", tensor_type(dtype, "b", length, spec.hidden))
    layer = Layer(b, spec, dtype, {n: b.input(n, t) for n, t in shared.items()})
    with b.at(name):
        place = kind.norm_place or spec.norm_place
        bare = place == "after" or (isinstance(kind, Parallel) and kind.own_norms)
        seen = ops.add(x, layer.linear(layer.shared["aside"], "w_aside", spec.hidden)) if "aside" in shared else x
        h = seen if bare else _normed(layer, seen, "norm")
        made = MIXERS[kind.kind](layer, h, kind)
        y, *losses = made if isinstance(made, tuple) else (made,)
        y = y if place in ("before", "stream") else _normed(layer, y, "post_norm")
        y = _scaled(y, spec.residual_scale * kind.add_scale)
        if spec.dropout and "seed" in layer.shared:
            y = ops.dropout(y, layer.shared["seed"], p=spec.dropout)
        return b.finish([ops.add(_scaled(h if place == "stream" else x, kind.skip_scale), y), *losses])


def _scaled(x: Value, by: float) -> Value:
    return x if by == 1 else ops.scale(x, by=by)


def _normed(layer: Layer, x: Value, name: str) -> Value:
    with layer.b.at(name):
        return layer.norm(x, name, layer.spec.hidden)
