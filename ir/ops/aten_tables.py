"""Tables that eager models compute from positions alone: rotary cosines and sines, masks of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from ..errors import TypeMismatch
from ..op import op
from ..types import DTYPES, Dim, TensorType
from .pointwise import wide
from .position import frequencies

Tensor = torch.Tensor


@op("p:i64[b t] -> y:acc[b t d]", whole="b t")
def rope_table(
    p: Tensor,
    *,
    part: Literal["cos", "sin"],
    width: int,
    shape: str,
    dtype: str,
    theta: float = 10000.0,
    scaling: tuple[float, ...] = (),
    divisors: tuple[float, ...] = (),
    amplitude: float = 1.0,
    rounded: bool = False,
    layout: Literal["halves", "pairs", "once"] = "halves",
) -> Tensor:
    """The cosine or sine of every angle that `rope` turns by, in a shape such as 'b 1 t d'

    An angle stands twice in a row of `width`: in both halves, or in pairs; `once` is half as wide. A shape without b is that
    of the first row.
    """
    like = torch.empty((), dtype=torch.float64 if dtype == "f64" else torch.float32, device=p.device)
    angle = wide(p.to(like.dtype))[..., None] * frequencies(width, theta, scaling, like, rounded, divisors)
    y = ((angle.cos() if part == "cos" else angle.sin()) * amplitude).to(DTYPES[dtype])
    if layout != "once":
        y = torch.cat([y, y], -1) if layout == "halves" else y.repeat_interleave(2, -1)
    return _shaped(y, shape)


@op("p:i64[b t] -> m[t t]", whole="b", scan="t")
def visible_table(
    p: Tensor, *, shape: str, dtype: str = "bool", window: int = 0, causal: bool = True, inverted: bool = False,
    hidden: float = float("-inf"),
) -> Tensor:  # fmt: skip
    """Which keys every query may see, in a shape such as 'b 1 t t': true and false, or 0 and `hidden` to be added to logits"""
    i = torch.arange(p.shape[1], device=p.device)
    seen = i[None] <= i[:, None] if causal else torch.ones(len(i), len(i), dtype=torch.bool, device=p.device)
    if window:
        seen = seen & (i[None] > i[:, None] - window)
    if inverted:
        seen = ~seen
    if dtype != "bool":
        # the lowest number of a dtype may not be a float32 that is finite elsewhere: it is clamped to what there is
        low = max(hidden, torch.finfo(DTYPES[dtype]).min) if hidden > -float("inf") else hidden
        seen = torch.zeros(seen.shape, dtype=DTYPES[dtype], device=p.device).masked_fill(~seen, low)
    return _shaped(seen.expand(p.shape[0], *seen.shape), shape)


def _shaped(y: Tensor, shape: str) -> Tensor:
    """[b, ...] with dims of one put in, and only the first of b where the shape has none."""
    words = shape.split()
    y = y if "b" in words else y[0]
    for i, word in enumerate(words):
        y = y.unsqueeze(i) if word == "1" else y
    return y


def _dims(p: TensorType, shape: str, sizes: Mapping[str, Dim], name: str, dtype: str) -> TensorType:
    """The type in this shape."""
    words, known = shape.split(), {"1": Dim(1), "b": p.dims[0], **sizes}
    if dtype not in DTYPES or not words or any(w not in known for w in words):
        raise TypeMismatch(f"{name}: shape is {shape!r} in {dtype!r}; a shape is made of {', '.join(known)}, such as 'b 1 t d'")
    return TensorType(dtype, tuple(known[w] for w in words))


@rope_table.infers
def _(p: TensorType, *, part: str, width: int, shape: str, dtype: str, layout: str, **rest: Any) -> TensorType:
    """Shape and dtype are attributes, which letters cannot say."""
    rope_table.placed([p], {})
    columns = width // 2 if layout == "once" else width
    return _dims(p, shape, {"t": p.dims[1], "d": Dim(columns)}, "rope_table", dtype)


@visible_table.infers
def _(p: TensorType, *, shape: str, dtype: str, **rest: Any) -> TensorType:
    """Shape and dtype are attributes, which letters cannot say."""
    visible_table.placed([p], {})
    return _dims(p, shape, {"t": p.dims[1]}, "visible_table", dtype)


@rope_table.samples
def _(sample: Any) -> list[Any]:
    attrs = {"part": "sin", "width": 8, "shape": "b 1 t d", "dtype": "f32"}
    return [torch.arange(5).expand(3, 5).contiguous(), attrs]


@visible_table.samples
def _(sample: Any) -> list[Any]:
    return [torch.arange(5).expand(3, 5).contiguous(), {"shape": "1 1 t t", "window": 3}]


rope_table.vjp("")
visible_table.vjp("")
