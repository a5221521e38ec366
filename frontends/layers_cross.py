"""Attention to another sequence, and attention with a bias by distance or over rows of their own lengths, as IR."""

from __future__ import annotations

from typing import Any

from ..ir import Builder, Graph, TensorType, Value, ops
from .kinds_cross import Cross
from .layer import Layer, heads, merge
from .spec import ModelSpec


def cross(at: Layer, x: Value, kind: Cross) -> Value:
    """Queries from the decoder; keys and values are given, since they are the same for every token."""
    q = heads(at.linear(x, "w_q", kind.query_width, bias=kind.bias), kind.heads)
    k, v, lengths = (at.shared[name] for name in ("keys", "values", "lengths"))
    o = merge(ops.biased_attention(q, k, v, lengths=lengths, causal=False, scale=kind.scale))
    return at.linear(o, "w_out", at.spec.hidden, residual=True, bias=kind.out_bias)


def memory_graph(kind: Cross, spec: ModelSpec, dtype: str, memory: TensorType, name: str) -> Graph:
    """The keys and values of a cross attention: what of the encoder its block remembers."""
    b = Builder(f"{name}_memory", "layer")
    at = Layer(b, spec, dtype, {})
    with b.at(f"{name}.memory"):
        wide = at.linear(b.input("memory", memory), "w_kv", 2 * kind.kv_width, bias=kind.bias)
        return b.finish([heads(y, kind.kv_heads) for y in ops.split(wide, sizes=(kind.kv_width, kind.kv_width))])


def biased(at: Layer, q: Value, k: Value, v: Value, kind: Any) -> Value | None:
    """Attention of a stack with a bias by distance, or with rows of their own lengths; None where plain attention is it."""
    named = {name: at.shared[name] for name in ("table", "lengths") if name in at.shared}
    if not named:
        return None
    reach = {"reach": kind.relative.reach} if kind.relative else {}
    return ops.biased_attention(q, k, v, **named, **reach, causal=kind.causal, scale=kind.scale)
