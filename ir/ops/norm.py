"""Normalizations: each row of the last dim by its own statistics, in at least float32."""

from __future__ import annotations

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
