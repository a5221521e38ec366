"""Recurrences whose state is a number, or a few, for every channel: Mamba-1's selective scan and the gated unit of Griffin.

`cu` are packed segment borders, the state starts anew at each; `state` is what every sequence begins with.
Sources: Mamba (arXiv 2312.00752), Griffin (2402.19427).
"""

from __future__ import annotations

from typing import Any

import torch

from ..op import OpDef, op
from .pointwise import wide
from .recurrence import segments

Tensor = torch.Tensor
Result = tuple[Tensor, Tensor]
# The slope of a square root grows without bound towards 0: it is held here, as the models that have this unit were trained.
STEEPEST = 1000.0
_ROLES: dict[str, Any] = {"map": "b c", "scan": "t", "same": "n b cu", "over": "t"}


@op(
    "x[b t c], step[b t c], rate[c s], k[b t s], q[b t s], state[n c s]?, cu:i64[n+1]? -> o:x[b t c], final:acc[n c s]",
    **_ROLES, whole="s n", flops="7*b*t*c*s",
)  # fmt: skip
def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Tensor | None = None, cu: Tensor | None = None
) -> Result:
    """Mamba-1 with k = B, q = C, step = dt, rate = A: S_t = e^(step_t A) S_{t-1} + step_t x_t k_t^T;  o_t = S_t q_t"""
    u, dt, keys, reads, a = (wide(y) for y in (x, step, k, q, rate))
    rows, finals = [list[Tensor]() for _ in range(x.shape[0])], list[Tensor]()
    for n, (b, start, end) in enumerate(segments(x.shape[0], x.shape[1], cu)):
        s = u.new_zeros(a.shape) if state is None else state[n].to(u.dtype)
        for t in range(start, end):
            s = (dt[b, t, :, None] * a).exp() * s + (dt[b, t] * u[b, t])[:, None] * keys[b, t]
            rows[b].append(s @ reads[b, t])
        finals.append(s)
    return _stacked(rows, x), torch.stack(finals) if finals else u.new_zeros(0, *a.shape)


def _stacked(rows: list[list[Tensor]], x: Tensor) -> Tensor:
    """[b t c] of a row's tokens, in the dtype of x."""
    empty = x.new_zeros(0, x.shape[2])
    return torch.stack([torch.stack(row) if row else empty for row in rows]).to(x.dtype)


@op(
    "x[b t c], decay[b t c], p:i64[b t], state[n c]?, cu:i64[n+1]? -> h:x[b t c], final:acc[n c]",
    **_ROLES, whole="n", flops="8*b*t*c",
)  # fmt: skip
def rg_lru(x: Tensor, decay: Tensor, p: Tensor, state: Tensor | None = None, cu: Tensor | None = None) -> Result:
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) x_t with a_t = e^decay_t; where p_t is 0 a sequence begins: h_t = x_t"""
    a, u = gated_input(x, decay, p)
    rows, finals = [list[Tensor]() for _ in range(x.shape[0])], list[Tensor]()
    for n, (b, start, end) in enumerate(segments(x.shape[0], x.shape[1], cu)):
        h = u.new_zeros(x.shape[2]) if state is None else state[n].to(u.dtype)
        for t in range(start, end):
            h = a[b, t] * h + u[b, t]
            rows[b].append(h)
        finals.append(h)
    return _stacked(rows, x), torch.stack(finals) if finals else u.new_zeros(0, x.shape[2])


def gated_input(x: Tensor, decay: Tensor, p: Tensor) -> Result:
    """The unit as h_t = a_t h_{t-1} + u_t: what is kept, and what comes in."""
    begins = (p == 0)[:, :, None]
    d = wide(decay)
    return d.exp().masked_fill(begins, 0.0), wide(x) * held_root(-torch.expm1(2 * d)).masked_fill(begins, 1.0)


def held_root(x: Tensor) -> Tensor:
    """sqrt(x) with a slope of at most STEEPEST."""
    fixed = x.detach()
    slope = 0.5 / fixed.clamp_min(0.25 / STEEPEST**2).sqrt()
    return fixed.sqrt() + (x - fixed) * slope


SCANS: tuple[OpDef, ...] = (selective_scan, rg_lru)


def _sizes(sample: Any) -> tuple[Tensor | None, int, int]:
    """Segment borders or none, rows of the batch, and sequences."""
    cu = torch.tensor([0, 1, 1, 5]) if sample.coin() else None
    return (cu, 1, 3) if cu is not None else (None, 2, 2)


@selective_scan.samples
def _(sample: Any) -> list[Any]:
    cu, b, runs = _sizes(sample)
    t, c, s, rand = 5, 6, 3, sample.randn
    step, rate = rand(b, t, c).abs(), -rand(c, s).abs()
    return [rand(b, t, c), step, rate, rand(b, t, s), rand(b, t, s), rand(runs, c, s), cu]


@rg_lru.samples
def _(sample: Any) -> list[Any]:
    cu, b, runs = _sizes(sample)
    places = torch.tensor([[0, 0, 1, 2, 3]]) if cu is not None else torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])
    return [sample.randn(b, 5, 6), -sample.randn(b, 5, 6).abs() - 0.01, places, sample.randn(runs, 6), cu]


@op("x[... h i], w[h o i] -> y[... h o]", map="... h o", sum="i", flops="2*rest*h*i*o", linear="x, w")
def head_linear(x: Tensor, w: Tensor) -> Tensor:
    """y = x w^T, every head with a matrix of its own"""
    return torch.einsum("...hi,hoi->...ho", x, w.to(x.dtype))


@op("a[... h o], b[... h i] -> y[h o i]", map="h o i", sum="...", flops="2*rest*h*i*o", linear="a, b")
def head_outer(a: Tensor, b: Tensor) -> Tensor:
    """y = a^T b for every head, summed over all rows: the gradient of head_linear's weight"""
    rows = [wide(y).reshape(-1, *y.shape[-2:]).transpose(0, 1) for y in (a, b)]
    return (rows[0].mT @ rows[1]).to(a.dtype)


head_linear.vjp("""
    d_x = head_linear(d_y, reshape(w, pattern='h o i -> h i o'))
    d_w = head_outer(d_y, x)
""")
head_outer.vjp("""
    d_a = head_linear(b, d_y)
    d_b = head_linear(a, reshape(d_y, pattern='h o i -> h i o'))
""")
