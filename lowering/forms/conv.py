"""Short causal convolution, in C++ where there is a compiler; else in torch, one blocked pass, the heads of segments apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir.errors import TypeMismatch
from ..cpp import conv as generated
from .precision import own_precision

# Elements of one block: its few float32 temporaries stay in a core's second-level cache.
BLOCK = 1 << 17
ACTS = ("none", "silu")


@dataclass(frozen=True)
class Heads:
    """The first k-1 rows of every segment: their windows reach back into a state, not into their neighbour."""

    starts: Tensor  # [n]
    ends: Tensor  # [n]
    token: Tensor  # the row of each head row that exists, in order
    real: Tensor  # [n, k-1], false where a segment is shorter than that


def causal_conv1d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    cu: Tensor | None = None,
    *,
    act: str = "none",
) -> tuple[Tensor, Tensor]:
    """y[t] = act(sum_i w[i] x[t-k+1+i] + bias) per channel and segment, and the last k-1 inputs of each segment."""
    if act not in ACTS:
        raise TypeMismatch(f"causal_conv1d: act is {act!r}; it must be one of {', '.join(ACTS)}")
    if cu is None and x.shape[1] == 1:
        return _one_token(x, w, bias, state, act)
    return torch.ops.plait.causal_conv1d(x, w, bias, state, cu, act)


def _one_token(x: Tensor, w: Tensor, bias: Tensor | None, state: Tensor | None, act: str) -> tuple[Tensor, Tensor]:
    """A decode step in five ops that fuse with their neighbours."""
    past = x.new_zeros(x.shape[0], x.shape[2], w.shape[1] - 1) if state is None else state.to(x.dtype)
    window = torch.cat([past, x.transpose(1, 2)], 2)
    y = (_wide(window) * _wide(w)).sum(2) + (0 if bias is None else _wide(bias))
    return (F.silu(y) if act == "silu" else y).to(x.dtype)[:, None], window[:, :, 1:].contiguous()


@own_precision
def _conv(
    x: Tensor, w: Tensor, bias: Tensor | None, state: Tensor | None, cu: Tensor | None, act: str
) -> tuple[Tensor, Tensor]:
    if generated.ready(x, w, act):
        return generated.forward(x, w, bias, state, cu, act)
    rows, heads = x.reshape(-1, x.shape[2]), _heads(x, w, cu)
    taps, wide_bias = _wide(w.t()).contiguous(), None if bias is None else _wide(bias)
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for lo, hi in _blocks(rows, heads):
        block = y[None, lo:hi] if y.dtype == taps.dtype else taps.new_empty(1, hi - lo, y.shape[1])
        _activate(_stencil(_window(rows, lo, hi, taps), taps, wide_bias, block), act)
        if y.dtype != taps.dtype:
            y[lo:hi] = block[0]
    past = _past(rows, heads, state)
    head = _activate(_stencil(_head_window(rows, heads, past), taps, wide_bias), act)
    y[heads.token] = head[heads.real].to(y.dtype)
    return y.view(x.shape), _final(rows, heads, past).to(x.dtype)


@own_precision
def _conv_backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if generated.ready(x, w, act):
        return generated.backward(dy, dfinal, x, w, bias, state, cu, act)
    rows, heads = x.reshape(-1, x.shape[2]), _heads(x, w, cu)
    taps, wide_bias = _wide(w.t()).contiguous(), None if bias is None else _wide(bias)
    grads = dy.reshape(rows.shape)
    dx, dtaps, dbias = _body_backward(grads, rows, heads, taps, wide_bias, act)
    window = _head_window(rows, heads, _past(rows, heads, state))
    dhead = window.new_zeros(*heads.real.shape, rows.shape[1])
    dhead[heads.real] = grads[heads.token].to(dhead.dtype)
    g = _activate_backward(dhead, _stencil(window, taps, wide_bias), act)
    dwindow, dpast = _spread(g, taps, taps.new_zeros(())), _final_backward(dx, _wide(dfinal.transpose(1, 2)), heads)
    dx[heads.token] += dwindow[:, len(taps) - 1 :][heads.real].to(dx.dtype)
    dpast += dwindow[:, : len(taps) - 1]
    dtaps += torch.stack([(g * window[:, i : i + g.shape[1]]).sum((0, 1)) for i in range(len(taps))])
    dstate = dpast.transpose(1, 2).to(x.dtype if state is None else state.dtype)
    dbias = (dbias + g.sum((0, 1))).to(w.dtype if bias is None else bias.dtype)
    return dx.view(x.shape), dtaps.t().to(w.dtype).contiguous(), dbias, dstate.contiguous()


def _body_backward(
    grads: Tensor, rows: Tensor, heads: Heads, taps: Tensor, bias: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through every row but the heads; each block leaves its k-1 unfinished rows of dx to the next."""
    reach, (m, c) = len(taps) - 1, rows.shape
    dx = torch.zeros_like(rows, memory_format=torch.contiguous_format) if len(heads.token) == m else rows.new_empty(m, c)
    dtaps, dbias, carry = taps.new_zeros(len(taps), _step(rows), c), taps.new_zeros(c), taps.new_zeros(1, reach, c)
    is_head = torch.zeros(m, 1, dtype=torch.bool, device=rows.device).index_fill_(0, heads.token, True)
    for lo, hi in _blocks(rows, heads):
        window = _window(rows, lo, hi, taps)
        g = _activate_backward(_wide(grads[lo:hi])[None], _stencil(window, taps, bias), act)
        if is_head[lo:hi].any():
            g = g.masked_fill(is_head[lo:hi], 0)
        for i in range(len(taps)):
            dtaps[i, : hi - lo].addcmul_(g[0], window[0, i : i + hi - lo])
        dbias += 0 if bias is None else g.sum((0, 1))
        dwindow = _spread(g, taps, carry)
        dx[lo - reach : hi] = dwindow[0]
        carry = dwindow[:, hi - lo :]
    return dx, dtaps.sum(1), dbias


def _wide(x: Tensor) -> Tensor:
    """Sums run in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def _stencil(window: Tensor, taps: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """window[n r+k-1 c], taps[k c] -> sum_i taps[i] window[:, i:i+r]."""
    r = window.shape[1] - len(taps) + 1
    first = window[:, :r]
    y = torch.mul(first, taps[0], out=out) if bias is None else torch.addcmul(bias, first, taps[0], out=out)
    for i in range(1, len(taps)):
        y.addcmul_(window[:, i : i + r], taps[i])
    return y


def _spread(g: Tensor, taps: Tensor, carry: Tensor) -> Tensor:
    """The transpose of `_stencil`: g[n r c] -> the gradient of its window, whose first k-1 rows start as `carry`."""
    r, reach = g.shape[1], len(taps) - 1
    dwindow = g.new_empty(g.shape[0], r + reach, g.shape[2])
    dwindow[:, :reach] = carry
    torch.mul(g, taps[reach], out=dwindow[:, reach:])
    for i in range(reach):
        dwindow[:, i : i + r].addcmul_(g, taps[i])
    return dwindow


def _activate(y: Tensor, act: str) -> Tensor:
    return F.silu(y, inplace=True) if act == "silu" else y


def _activate_backward(dy: Tensor, pre: Tensor, act: str) -> Tensor:
    return torch.ops.aten.silu_backward(dy, pre) if act == "silu" else dy


def _step(rows: Tensor) -> int:
    m, c = rows.shape
    return max(1, BLOCK // max(c, 1) if rows.device.type == "cpu" else m)


def _blocks(rows: Tensor, heads: Heads) -> Iterator[tuple[int, int]]:
    """Spans of rows that hold every row but the heads; rows before the first span are all heads."""
    m, step, reach = len(rows), _step(rows), heads.real.shape[1]
    for lo in range(reach, 0 if len(heads.token) == m else m, step):
        yield lo, min(lo + step, m)


def _window(rows: Tensor, lo: int, hi: int, taps: Tensor) -> Tensor:
    return _wide(rows[lo - len(taps) + 1 : hi])[None]


def _heads(x: Tensor, w: Tensor, cu: Tensor | None) -> Heads:
    bounds = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1] if cu is None else cu.long()
    starts, ends = bounds[:-1], bounds[1:]
    rows = starts[:, None] + torch.arange(w.shape[1] - 1, device=x.device)
    real = rows < ends[:, None]
    return Heads(starts, ends, rows[real], real)


def _past(rows: Tensor, heads: Heads, state: Tensor | None) -> Tensor:
    """The k-1 inputs before each segment, [n, k-1, c]."""
    if state is not None:
        return _wide(state.to(rows.dtype)).transpose(1, 2)
    return rows.new_zeros(*heads.real.shape, rows.shape[1], dtype=_wide(rows[:0]).dtype)


def _head_window(rows: Tensor, heads: Heads, past: Tensor) -> Tensor:
    """What the heads read, [n, 2(k-1), c]: the past, then their own rows, zero where there is none."""
    own = torch.zeros_like(past, memory_format=torch.contiguous_format)
    own[heads.real] = rows[heads.token].to(own.dtype)
    return torch.cat([past, own], 1)


def _tails(heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Where the last k-1 inputs are: (inside the segment?, which row if so, which past row if not), each [n, k-1]."""
    reach = heads.real.shape[1]
    row = heads.ends[:, None] - reach + torch.arange(reach, device=heads.ends.device)
    return row >= heads.starts[:, None], row, reach + row - heads.starts[:, None]


def _final(rows: Tensor, heads: Heads, past: Tensor) -> Tensor:
    inside, row, before = _tails(heads)
    last = torch.empty_like(past, memory_format=torch.contiguous_format)
    last[inside] = rows[row[inside]].to(last.dtype)
    segment = torch.nonzero(~inside)[:, 0]
    last[~inside] = past[segment, before[~inside]]
    return last.transpose(1, 2).contiguous()


def _final_backward(dx: Tensor, dlast: Tensor, heads: Heads) -> Tensor:
    """Add the final state's gradient to dx, and return its share of the past's."""
    inside, row, before = _tails(heads)
    dx[row[inside]] += dlast[inside].to(dx.dtype)
    dpast = torch.zeros_like(dlast, memory_format=torch.contiguous_format)
    dpast[torch.nonzero(~inside)[:, 0], before[~inside]] = dlast[~inside]
    return dpast


_OPERANDS = "Tensor x, Tensor w, Tensor? bias, Tensor? state, Tensor? cu, str act"
_op = torch.library.custom_op("plait::causal_conv1d", _conv, mutates_args=(), schema=f"({_OPERANDS}) -> (Tensor, Tensor)")
_op_backward = torch.library.custom_op(
    "plait::causal_conv1d_backward",
    _conv_backward,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor dfinal, {_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(x: Tensor, w: Tensor, bias: Tensor | None, state: Tensor | None, cu: Tensor | None, act: str) -> tuple[Tensor, Tensor]:
    n = x.shape[0] if cu is None else cu.shape[0] - 1
    final = x.new_empty(n, x.shape[2], w.shape[1] - 1)
    return x.new_empty(x.shape), final


@_op_backward.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = (w if bias is None else bias).new_empty(w.shape[0])
    return x.new_empty(x.shape), w.new_empty(w.shape), dbias, (x if state is None else state).new_empty(dfinal.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.act = inputs[5]


def _grad(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dx, dw, dbias, dstate = torch.ops.plait.causal_conv1d_backward(dy, dfinal, *saved, ctx.act)
    return dx, dw, None if saved[2] is None else dbias, None if saved[3] is None else dstate, None, None


_op.register_autograd(_grad, setup_context=_save)
