"""Pointwise ops: every dim maps."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..errors import TypeMismatch
from ..op import op
from ..types import DTYPES, FLOATS, TensorType

Tensor = torch.Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


@op("a[...], b[...] -> y[...]", map="...", flops="rest", commutes=True, row=True, linear="a b")
def add(a: Tensor, b: Tensor) -> Tensor:
    """y = a + b"""
    return (a + b).to(a.dtype)


@op("a[...], b[...] -> y[...]", map="...", flops="rest", commutes=True, row=True, linear="a, b")
def mul(a: Tensor, b: Tensor) -> Tensor:
    """y = a * b"""
    return (a * b).to(a.dtype)


@op("x[... d], w[d] -> y[... d]", map="... d", flops="rest*d", row=True, linear="x w")
def add_bias(x: Tensor, w: Tensor) -> Tensor:
    """y = x + w, the same w for every row"""
    return (x + w).to(x.dtype)


@op("x[... d], w[d] -> y[... d]", map="... d", flops="rest*d", row=True, linear="x, w")
def scale_columns(x: Tensor, w: Tensor) -> Tensor:
    """y = x * w, one factor per column"""
    return (x * w).to(x.dtype)


@op("x[... d], w[...] -> y[... d]", map="... d", flops="rest*d", row=True, linear="x, w")
def scale_rows(x: Tensor, w: Tensor) -> Tensor:
    """y = x * w, one factor per row"""
    return (x * w.unsqueeze(-1)).to(x.dtype)


@op("x[... h d], w[h] -> y[... h d]", map="... h d", flops="rest*h*d", row=True, linear="x, w")
def scale_heads(x: Tensor, w: Tensor) -> Tensor:
    """y = x * w, one factor per head"""
    return (x * w.unsqueeze(-1)).to(x.dtype)


@op("x[...] -> y[...]", map="...", flops="rest", row=True, linear="x")
def scale(x: Tensor, *, by: float) -> Tensor:
    """y = by * x"""
    return x * by


@op("x[...] -> y[...]", map="...", flops="4*rest", row=True)
def silu(x: Tensor) -> Tensor:
    """y = x * sigmoid(x)"""
    return F.silu(x)


@op("x[...] -> y[...]", map="...", flops="8*rest", row=True)
def gelu(x: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """y = x * Phi(x), or its tanh approximation"""
    return F.gelu(x, approximate=approximate)


@op("x[...] -> y[...]", map="...", flops="rest", row=True)
def relu(x: Tensor) -> Tensor:
    """y = max(x, 0)"""
    return F.relu(x)


@op("x[...] -> y[...]", map="...", flops="2*rest", row=True)
def relu2(x: Tensor) -> Tensor:
    """y = max(x, 0)^2"""
    return F.relu(x).square()


@op("x[...] -> y[...]", map="...", flops="3*rest", row=True)
def sigmoid(x: Tensor) -> Tensor:
    """y = 1 / (1 + exp(-x))"""
    return torch.sigmoid(x)


@op("x[...] -> y[...]", map="...", flops="4*rest", row=True)
def softplus(x: Tensor) -> Tensor:
    """y = log(1 + exp(x)), x itself above 20"""
    return F.softplus(x)


@op("x[...] -> y[...]", map="...", flops="2*rest", row=True)
def neg_exp(x: Tensor) -> Tensor:
    """y = -exp(x): a log-parameter to a negative rate"""
    return -torch.exp(x)


@op("x[...] -> y[...]", map="...", flops="2*rest", row=True)
def clamp(x: Tensor, *, low: float = 0.0, high: float = float("inf")) -> Tensor:
    """y = min(max(x, low), high)"""
    return x.clamp(low, high)


@op("x[...] -> y[...]", map="...", flops="6*rest", row=True)
def softcap(x: Tensor, *, cap: float) -> Tensor:
    """y = cap * tanh(x / cap)"""
    return torch.tanh(x / cap) * cap


@op("x[...] -> y:acc[...]", map="...", row=True, linear="x")
def widen(x: Tensor) -> Tensor:
    """y = x in at least float32"""
    return wide(x)


@op("x[...] -> y[...]", map="...", row=True, linear="x")
def cast(x: Tensor, *, dtype: str) -> Tensor:
    """y = x as another dtype; float64 stays, so that a program can be checked in float64"""
    return x if x.dtype == torch.float64 else x.to(DTYPES[dtype])


@cast.infers
def _(x: TensorType, *, dtype: str) -> TensorType:
    """The dtype is an attribute, which letters cannot say."""
    if dtype not in FLOATS or not x.is_float:
        raise TypeMismatch(f"cast: dtype is {dtype!r}, must be one of {', '.join(FLOATS)}")
    return TensorType(x.dtype if x.dtype == "f64" else dtype, x.dims, x.partial)


@cast.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(3, 5), {"dtype": "bf16"}]


ACTIVATIONS = ("silu", "gelu", "relu", "relu2", "sigmoid")
