"""Where tokens stand: positions as a value of their own, and the rotary embedding that reads them."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..op import op
from .pointwise import wide

Tensor = torch.Tensor


@op("tokens:i64[b t], at:i64[]?, cu:i64[n+1]? -> p:i64[b t]", map="b", scan="t", whole="n", over="t")
def positions(tokens: Tensor, at: Tensor | None = None, cu: Tensor | None = None) -> Tensor:
    """0, 1, 2, ... per row, from `at` on, or anew in every packed segment"""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    if cu is not None:
        index = index - cu[torch.searchsorted(cu[1:].contiguous(), index, right=True)]
    return (index if at is None else index + at).expand(tokens.shape[0], -1).contiguous()


@positions.samples
def _(sample: Any) -> list[Any]:
    return [torch.zeros(1, 7, dtype=torch.int64), None, torch.tensor([0, 3, 3, 7])]


@op("x[b t h d], p:i64[b t] -> y[b t h d]", map="b t h", whole="d", flops="6*b*t*h*d", row=True, linear="x")
def rope(
    x: Tensor,
    p: Tensor,
    *,
    theta: float = 10000.0,
    fraction: float = 1.0,
    interleaved: bool = False,
    scaling: tuple[float, ...] = (),
    rounded: bool = False,
    inverse: bool = False,
) -> Tensor:
    """Rotate the first `fraction` of each head by its position: halves (i, i + d/2) or interleaved pairs (2i, 2i + 1)

    `rounded` takes frequencies that are rounded to float32; `inverse` turns the other way, which undoes it.
    """
    width = int(x.shape[-1] * fraction)
    angle = wide(p.to(x.dtype) if x.dtype == torch.float64 else p)[..., None] * frequencies(width, theta, scaling, x, rounded)
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    sin = -sin if inverse else sin
    h = wide(x)
    a, b = (h[..., :width:2], h[..., 1:width:2]) if interleaved else (h[..., : width // 2], h[..., width // 2 : width])
    turned = (a * cos - b * sin, b * cos + a * sin)
    y = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return (torch.cat([y, h[..., width:]], -1) if width < x.shape[-1] else y).to(x.dtype)


def frequencies(width: int, theta: float, scaling: tuple[float, ...], like: Tensor, rounded: bool = False) -> Tensor:
    """theta^(-2i/width); with `scaling` = (factor, low, high, original length), Llama 3's stretch of the slow ones.

    `rounded` makes every step of it in float32, as the tables are that published models were trained with.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    step = torch.arange(0, width, 2, dtype=torch.float32 if rounded else dtype, device=like.device) / width
    base = 1.0 / theta**step if rounded else theta**-step
    if not scaling:
        return base.to(dtype)
    factor, low, high, original = scaling
    wavelength = 2 * math.pi / base
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    stretched = (1 - blend) * base / factor + blend * base if rounded else base * (blend + (1 - blend) / factor)
    return stretched.to(dtype)


@rope.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 5, 3, 8), torch.arange(5).expand(2, 5), {"fraction": 0.5, "interleaved": True}]


positions.no_gradient("its result is integers")
rope.vjp("""
    if inverse:
        d_x = rope(d_y, p, theta=theta, fraction=fraction, interleaved=interleaved, scaling=scaling, rounded=rounded)
    else:
        d_x = rope(
            d_y, p, theta=theta, fraction=fraction, interleaved=interleaved, scaling=scaling, rounded=rounded, inverse=True
        )
""")
