"""Normalizations: each row of the last dim by its own statistics, in at least float32."""

from __future__ import annotations

from typing import Any

import torch

from ..op import op
from .pointwise import wide

Tensor = torch.Tensor


@op("x[... d], w[d]? -> y[... d]", map="...", whole="d", flops="4*rest*d", row=True)
def rms_norm(x: Tensor, w: Tensor | None = None, *, eps: float = 1e-6, zero_centered: bool = False, groups: int = 1) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * w, the mean over each of `groups` parts; zero-centered: * (1 + w)"""
    h = wide(x).unflatten(-1, (groups, -1))
    y = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if w is not None:
        y = y * (1 + wide(w) if zero_centered else wide(w))
    return y.to(x.dtype)


@op("x[... d], w[d]?, bias[d]? -> y[... d]", map="...", whole="d", flops="7*rest*d", row=True)
def layer_norm(
    x: Tensor, w: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5, zero_centered: bool = False
) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * w + bias; zero-centered: * (1 + w)"""
    h = wide(x)
    h = h - h.mean(-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if w is not None:
        y = y * (1 + wide(w) if zero_centered else wide(w))
    return (y if bias is None else y + wide(bias)).to(x.dtype)


@op("x[... d] -> y[... d]", map="...", whole="d", flops="3*rest*d", row=True)
def l2_norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """y = x / sqrt(sum(x^2) + eps)"""
    h = wide(x)
    return (h * torch.rsqrt(h.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


@rms_norm.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(3, sample.size(), 6), sample.randn(6)]


rms_norm.vjp("""
    g = widen(d_y)
    if groups > 1:
        h = reshape(widen(x), pattern='... (g={groups} d) -> ... g d')
    else:
        h = widen(x)
    r = rsqrt(shift(row_mean(mul(h, h)), by=eps))
    n = scale_rows(h, r)
    if w:
        if zero_centered:
            u = shift(widen(w), by=1.0)
        else:
            u = widen(w)
        s = scale_columns(g, u)
    else:
        s = g
    if groups > 1:
        m = reshape(s, pattern='... (g={groups} d) -> ... g d')
        e = scale_rows(sub(m, scale_rows(n, row_mean(mul(m, n)))), r)
        d_x = reshape(e, pattern='... g d -> ... (g d)')
        d_w = column_sum(mul(g, reshape(n, pattern='... g d -> ... (g d)')))
    else:
        d_x = scale_rows(sub(s, scale_rows(n, row_mean(mul(s, n)))), r)
        d_w = column_sum(mul(g, n))
""")
layer_norm.vjp("""
    g = widen(d_y)
    h = widen(x)
    c = sub(h, spread_rows(row_mean(h), h))
    r = rsqrt(shift(row_mean(mul(c, c)), by=eps))
    n = scale_rows(c, r)
    if w:
        if zero_centered:
            u = shift(widen(w), by=1.0)
        else:
            u = widen(w)
        s = scale_columns(g, u)
    else:
        s = g
    e = sub(s, scale_rows(n, row_mean(mul(s, n))))
    d_x = scale_rows(sub(e, spread_rows(row_mean(s), s)), r)
    d_w = column_sum(mul(g, n))
    d_bias = column_sum(g)
""")
l2_norm.vjp("""
    g = widen(d_y)
    h = widen(x)
    r = rsqrt(shift(row_sum(mul(h, h)), by=eps))
    n = scale_rows(h, r)
    d_x = scale_rows(sub(g, scale_rows(n, row_sum(mul(g, n)))), r)
""")
