"""Short causal convolution: each channel over its last k tokens."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..op import op
from .pointwise import wide
from .recurrence import segments

Tensor = torch.Tensor


@op(
    "x[b t c], w[c k], bias[c]?, state[n c k-1]?, cu:i64[n+1]? -> y[b t c], final[n c k-1]",
    map="b c", scan="t", whole="k n", flops="2*b*t*c*k", same="n b cu", over="t",
)  # fmt: skip
def causal_conv1d(
    x: Tensor, w: Tensor, bias: Tensor | None = None, state: Tensor | None = None, cu: Tensor | None = None,
    *, act: Literal["none", "silu"] = "none",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y_t = act(sum_i w_i x_{t-k+1+i} + bias); `state` is the k - 1 inputs before the start, `final` the last ones"""
    runs = segments(x.shape[0], x.shape[1], cu)
    rows, finals, behind = [list[Tensor]() for _ in range(x.shape[0])], list[Tensor](), w.shape[1] - 1
    for n, (b, start, end) in enumerate(runs):
        past = x.new_zeros(x.shape[2], behind) if state is None else state[n].to(x.dtype)
        padded = torch.cat([past, x[b, start:end].T], -1)
        taps = torch.stack([wide(padded)[:, i : i + end - start] for i in range(behind + 1)], -1)
        y = torch.einsum("ctk,ck->tc", taps, wide(w))
        rows[b].append(y if bias is None else y + wide(bias))
        finals.append(padded[:, padded.shape[1] - behind :])
    y = torch.stack([torch.cat(row) for row in rows])
    return (F.silu(y) if act == "silu" else y).to(x.dtype), torch.stack(finals)


@causal_conv1d.samples
def _(sample: Any) -> list[Any]:
    cu = torch.tensor([0, 1, 1, 5]) if sample.coin() else None
    runs, batch = (3, 1) if cu is not None else (3, 3)
    return [sample.randn(batch, 5, 7), sample.randn(7, 4), sample.randn(7), sample.randn(runs, 7, 3), cu, {"act": "silu"}]


@op(
    "g[b t c], w[c k], final[n c k-1]?, cu:i64[n+1]? -> x[b t c], start[n c k-1]",
    map="b c", scan="t", whole="k n", flops="2*b*t*c*k", same="n b cu", linear="g final", over="t",
)  # fmt: skip
def anticausal_conv1d(g: Tensor, w: Tensor, final: Tensor | None = None, cu: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x_t = sum_i w_i g_{t+k-1-i}, the transpose of causal_conv1d: `start` for its state, `final` from its last inputs"""
    rows, starts, behind = [list[Tensor]() for _ in range(g.shape[0])], list[Tensor](), w.shape[1] - 1
    for n, (b, start, end) in enumerate(segments(g.shape[0], g.shape[1], cu)):
        taps = wide(g)[b, start:end].T[:, None] * wide(w)[:, :, None]
        padded = sum((F.pad(taps[:, i], (i, behind - i)) for i in range(1, behind + 1)), F.pad(taps[:, 0], (0, behind)))
        if final is not None:
            padded = padded + F.pad(wide(final)[n], (end - start, 0))
        starts.append(padded[:, :behind])
        rows[b].append(padded[:, behind:].T)
    return torch.stack([torch.cat(row) for row in rows]).to(g.dtype), torch.stack(starts).to(g.dtype)


@op(
    "x[b t c], g[b t c], state[n c k-1]?, cu:i64[n+1]? -> w:acc[c k]",
    map="c", sum="b", scan="t", whole="k n", flops="2*b*t*c*k", same="n b cu", linear="x state, g", over="t",
)  # fmt: skip
def conv1d_taps(x: Tensor, g: Tensor, state: Tensor | None = None, cu: Tensor | None = None, *, k: int) -> Tensor:
    """w_i = sum_t g_t x_{t-k+1+i}: the gradient of causal_conv1d's taps"""
    w = wide(x.new_zeros(x.shape[2], k))
    for n, (b, start, end) in enumerate(segments(x.shape[0], x.shape[1], cu)):
        past = w.new_zeros(x.shape[2], k - 1) if state is None else wide(state)[n]
        padded = torch.cat([past, wide(x)[b, start:end].T], -1)
        taps = torch.stack([padded[:, i : i + end - start] for i in range(k)], 1)
        w = w + torch.einsum("ckt,tc->ck", taps, wide(g)[b, start:end])
    return w


@anticausal_conv1d.samples
def _(sample: Any) -> list[Any]:
    cu = torch.tensor([0, 1, 1, 5]) if sample.coin() else None
    runs, batch = (3, 1) if cu is not None else (3, 3)
    return [sample.randn(batch, 5, 7), sample.randn(7, 4), sample.randn(runs, 7, 3), cu]


@conv1d_taps.samples
def _(sample: Any) -> list[Any]:
    cu = torch.tensor([0, 1, 1, 5]) if sample.coin() else None
    runs, batch = (3, 1) if cu is not None else (3, 3)
    return [sample.randn(batch, 5, 7), sample.randn(batch, 5, 7), sample.randn(runs, 7, 3), cu, {"k": 4}]


causal_conv1d.vjp("""
    if act == 'silu':
        z, last = causal_conv1d(widen(x), w, bias, state, cu, over=over, by=by, order=order)
        s = sigmoid(z)
        g = mul(widen(d_y), add(s, mul(mul(z, s), shift(scale(s, by=-1.0), by=1.0))))
    else:
        g = widen(d_y)
    d_x, d_state = anticausal_conv1d(g, w, d_final, cu, over=over, by=by, order=order)
    d_w = conv1d_taps(x, g, state, cu, k=k, over=over, by=by, order=order)
    d_bias = column_sum(g)
""")
anticausal_conv1d.vjp("""
    d_g, d_final = causal_conv1d(d_x, w, state=d_start, cu=cu, over=over, by=by, order=order)
    d_w = conv1d_taps(d_x, g, d_start, cu, k=k, over=over, by=by, order=order)
""")
conv1d_taps.vjp("""
    d_x, d_state = anticausal_conv1d(widen(g), d_w, cu=cu, over=over, by=by, order=order)
    d_g, last = causal_conv1d(widen(x), d_w, state=state, cu=cu, over=over, by=by, order=order)
""")
