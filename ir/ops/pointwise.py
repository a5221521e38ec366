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


@op("a[...], b[...] -> y[...]", map="...", flops="rest", row=True, linear="a b")
def sub(a: Tensor, b: Tensor) -> Tensor:
    """y = a - b"""
    return (a - b).to(a.dtype)


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


@op("x[...] -> y[...]", map="...", flops="rest", row=True)
def shift(x: Tensor, *, by: float) -> Tensor:
    """y = x + by"""
    return x + by


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


@op("x[...] -> y[...]", map="...", flops="2*rest", row=True)
def rsqrt(x: Tensor) -> Tensor:
    """y = 1 / sqrt(x)"""
    return torch.rsqrt(x)


@op("x[...] -> y[...]", map="...", flops="4*rest", row=True)
def tanh(x: Tensor) -> Tensor:
    """y = tanh(x)"""
    return torch.tanh(x)


@op("x[...] -> y[...]", map="...", flops="6*rest", row=True)
def normal_cdf(x: Tensor) -> Tensor:
    """y = Phi(x), the share of a standard normal below x"""
    return torch.special.ndtr(wide(x)).to(x.dtype)


@op("x[...] -> y[...]", map="...", flops="rest", row=True)
def step(x: Tensor) -> Tensor:
    """y = 1 where x > 0, else 0"""
    return (x > 0).to(x.dtype)


@op("x[...] -> y[...]", map="...", flops="2*rest", row=True)
def inside(x: Tensor, *, low: float = 0.0, high: float = float("inf")) -> Tensor:
    """y = 1 where low <= x <= high, else 0"""
    return ((x >= low) & (x <= high)).to(x.dtype)


@op("x[...] -> y[...]", map="...", row=True, shape="x")
def zeros_like(x: Tensor, *, partial: tuple[str, ...] = ()) -> Tensor:
    """y = 0 in the shape of x, on every rank of the mesh axes that it is `partial` over"""
    return torch.zeros_like(x)


@zeros_like.infers
def _(x: TensorType, *, partial: tuple[str, ...]) -> TensorType:
    """Nothing is a sum over any axis, which letters cannot say."""
    return TensorType(x.dtype, x.dims, frozenset(partial))


@op("x[...] -> y[...]", map="...")
def fixed(x: Tensor) -> Tensor:
    """y = x, which no gradient reaches: a number that is given and not trained"""
    return x.detach().clone()


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


@rsqrt.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(3, 5).abs() + 0.5]


@cast.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(3, 5), {"dtype": "bf16"}]


add.vjp("""
    d_a = d_y
    d_b = d_y
""")
sub.vjp("""
    d_a = d_y
    d_b = scale(d_y, by=-1.0)
""")
mul.vjp("""
    g = widen(d_y)
    d_a = mul(g, b)
    d_b = mul(g, a)
""")
add_bias.vjp("""
    d_x = d_y
    d_w = column_sum(d_y)
""")
scale_columns.vjp("""
    g = widen(d_y)
    d_x = scale_columns(g, w)
    d_w = column_sum(mul(g, x))
""")
scale_rows.vjp("""
    g = widen(d_y)
    d_x = scale_rows(g, w)
    d_w = row_sum(mul(g, x))
""")
scale_heads.vjp("""
    g = widen(d_y)
    d_x = scale_heads(g, w)
    d_w = column_sum(row_sum(mul(g, x)))
""")
scale.vjp("d_x = scale(d_y, by=by)")
shift.vjp("d_x = d_y")
silu.vjp("""
    h = widen(x)
    s = sigmoid(h)
    slope = add(s, mul(mul(h, s), shift(scale(s, by=-1.0), by=1.0)))
    d_x = mul(widen(d_y), slope)
""")
gelu.vjp("""
    h = widen(x)
    if approximate == 'tanh':
        cube = mul(h, mul(h, h))
        t = tanh(scale(add(h, scale(cube, by=0.044715)), by=0.7978845608028654))
        inner = shift(scale(mul(h, h), by=0.10703222440890037), by=0.7978845608028654)
        bend = mul(mul(h, inner), shift(scale(mul(t, t), by=-1.0), by=1.0))
        slope = scale(add(shift(t, by=1.0), bend), by=0.5)
    else:
        density = scale(neg_exp(scale(mul(h, h), by=-0.5)), by=-0.3989422804014327)
        slope = add(normal_cdf(h), mul(h, density))
    d_x = mul(widen(d_y), slope)
""")
relu.vjp("d_x = mul(widen(d_y), step(x))")
relu2.vjp("d_x = mul(widen(d_y), scale(relu(widen(x)), by=2.0))")
sigmoid.vjp("""
    s = sigmoid(widen(x))
    d_x = mul(widen(d_y), mul(s, shift(scale(s, by=-1.0), by=1.0)))
""")
# past 20 the op is x itself: there the sigmoid is taken so far out that it is exactly 1
softplus.vjp("""
    h = widen(x)
    past = step(shift(h, by=-20.0))
    d_x = mul(widen(d_y), sigmoid(add(h, scale(past, by=100.0))))
""")
neg_exp.vjp("d_x = mul(widen(d_y), neg_exp(widen(x)))")
clamp.vjp("d_x = mul(widen(d_y), inside(x, low=low, high=high))")
softcap.vjp(
    lambda types, attrs: (
        f"""
    t = tanh(scale(widen(x), by={1 / attrs["cap"]!r}))
    d_x = mul(widen(d_y), shift(scale(mul(t, t), by=-1.0), by=1.0))
"""
    )
)
rsqrt.vjp("""
    r = rsqrt(widen(x))
    d_x = mul(widen(d_y), scale(mul(r, mul(r, r)), by=-0.5))
""")
tanh.vjp("""
    t = tanh(widen(x))
    d_x = mul(widen(d_y), shift(scale(mul(t, t), by=-1.0), by=1.0))
""")
normal_cdf.vjp("""
    h = widen(x)
    d_x = mul(widen(d_y), scale(neg_exp(scale(mul(h, h), by=-0.5)), by=-0.3989422804014327))
""")
step.vjp("")
inside.vjp("")
zeros_like.vjp("")
fixed.vjp("")
widen.vjp("d_x = d_y")
cast.vjp("d_x = d_y")

ACTIVATIONS = ("silu", "gelu", "relu", "relu2", "sigmoid")
