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


@op("p:i64[b t] -> reach:i64[b]", map="b", whole="t")
def reach(p: Tensor) -> Tensor:
    """How many positions each row reaches over: its last one and all before"""
    return p.amax(1) + 1 if p.shape[1] else p.new_zeros(p.shape[0])


@op(
    "x[b t h d], p:i64[b t], reach:i64[b]? -> y[b t h d]",
    map="b t h", whole="d", flops="6*b*t*h*d", row=True, linear="x",
)  # fmt: skip
def rope(
    x: Tensor,
    p: Tensor,
    reach: Tensor | None = None,
    *,
    theta: float = 10000.0,
    fraction: float = 1.0,
    interleaved: bool = False,
    scaling: tuple[float, ...] = (),
    divisors: tuple[float, ...] = (),
    far: tuple[float, ...] = (),
    amplitude: float = 1.0,
    rounded: bool = False,
    inverse: bool = False,
) -> Tensor:
    """Rotate the first `fraction` of each head by its position: halves (i, i + d/2) or interleaved pairs (2i, 2i + 1)

    `rounded` takes frequencies that are rounded to float32; `far`, with `reach`, are those of rows that reach beyond a length;
    `amplitude` multiplies what is rotated; `inverse` turns the other way, which undoes it where the amplitude is 1.
    """
    width = int(x.shape[-1] * fraction)
    rate = frequencies(width, theta, scaling, x, rounded, divisors)
    if reach is not None and far:
        beyond = far_frequencies(width, theta, far, reach, rate, rounded)
        rate = torch.where(reach[:, None, None] > far[0], beyond.unsqueeze(-2), rate)
    angle = wide(p.to(x.dtype) if x.dtype == torch.float64 else p)[..., None] * rate
    cos, sin = (y[:, :, None] * amplitude for y in (angle.cos(), angle.sin()))
    sin = -sin if inverse else sin
    h = wide(x)
    a, b = (h[..., :width:2], h[..., 1:width:2]) if interleaved else (h[..., : width // 2], h[..., width // 2 : width])
    turned = (a * cos - b * sin, b * cos + a * sin)
    y = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return (torch.cat([y, h[..., width:]], -1) if width < x.shape[-1] else y).to(x.dtype)


def frequencies(
    width: int, theta: float, scaling: tuple[float, ...], like: Tensor, rounded: bool = False, divisors: tuple[float, ...] = ()
) -> Tensor:
    """theta^(-2i/width), stretched by `scaling` = (factor, low, high, length) or divided by one number for each pair.

    With a length, Llama 3's stretch: in full below `low` turns within it, not above `high`. With length 0, YaRN's ramp over
    pairs: up to pair `low` not, from pair `high` on in full. `rounded` makes every step of it in float32, as the tables are
    that published models were trained with.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    step = torch.arange(0, width, 2, dtype=torch.float32 if rounded else dtype, device=like.device) / width
    if divisors:
        return (1.0 / (step.new_tensor(divisors) * theta**step)).to(dtype)
    base = 1.0 / theta**step if rounded else theta**-step
    if not scaling:
        return base.to(dtype)
    factor, low, high, length = scaling
    if not length:
        return _ramped(theta**step, factor, low, high).to(dtype)
    wavelength = 2 * math.pi / base
    blend = ((length / wavelength - low) / (high - low)).clamp(0, 1)
    stretched = (1 - blend) * base / factor + blend * base if rounded else base * (blend + (1 - blend) / factor)
    return stretched.to(dtype)


def far_frequencies(
    width: int, theta: float, far: tuple[float, ...], reach: Tensor, like: Tensor, rounded: bool = False
) -> Tensor:
    """Frequencies of rows that reach beyond far[0] positions: with other divisors, or a base that grows with the reach.

    far = (length, one divisor for each pair) or (length, factor); each in float32 steps where `rounded`.
    """
    length, *numbers = far
    dtype = torch.float32 if rounded else like.dtype
    step = torch.arange(0, width, 2, dtype=dtype, device=like.device) / width
    if len(numbers) > 1:
        return (1.0 / (step.new_tensor(numbers) * theta**step)).to(like.dtype)
    factor = numbers[0]
    grown = theta * (factor * reach.to(dtype) / length - (factor - 1)).clamp_min(1) ** (width / (width - 2))
    return (1.0 / grown[:, None] ** step).to(like.dtype)


def _ramped(wavelength: Tensor, factor: float, low: float, high: float) -> Tensor:
    """Frequencies of pairs up to `low` as they are, from `high` on `factor` times slower; rounded step by step as in YaRN."""
    pairs = torch.arange(len(wavelength), dtype=wavelength.dtype, device=wavelength.device)
    kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    return 1.0 / (factor * wavelength) * (1 - kept) + 1.0 / wavelength * kept


@rope.samples
def _(sample: Any) -> list[Any]:
    attrs = {"fraction": 0.5, "interleaved": True, "far": (5.0, 3.0)}
    return [sample.randn(2, 5, 3, 8), torch.arange(5).expand(2, 5), torch.tensor([4, 9]), attrs]


@reach.samples
def _(sample: Any) -> list[Any]:
    return [torch.arange(10).reshape(2, 5)]


positions.no_gradient("its result is integers")
reach.no_gradient("its result is integers")
rope.vjp("""
    if inverse:
        d_x = rope(
            d_y, p, reach, theta=theta, fraction=fraction, interleaved=interleaved, scaling=scaling, divisors=divisors, far=far,
            amplitude=amplitude, rounded=rounded
        )
    else:
        d_x = rope(
            d_y, p, reach, theta=theta, fraction=fraction, interleaved=interleaved, scaling=scaling, divisors=divisors, far=far,
            amplitude=amplitude, rounded=rounded, inverse=True
        )
""")
