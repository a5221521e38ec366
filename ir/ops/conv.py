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
    map="b c", scan="t", whole="k n", flops="2*b*t*c*k", same="n b cu",
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
