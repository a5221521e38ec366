"""Forms for an accelerator: plain torch code that no host waits for, so that a decode step can be recorded whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir import ops
from .conv import causal_conv1d as packed_conv1d
from .experts import grouped_linear as grouped_by_host

FEW = 32  # rows up to which each row fetches its expert's matrix: a decode step's


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    cu: Tensor | None = None,
    at: Tensor | None = None,
    *,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v by SDPA, a mask made on the device where one is needed; see the op for the options."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if softcap or sinks is not None:
        return _by_hand(q, k, v, sinks, _visible(q, k, cu, at, causal, window), softcap, scale)
    if cu is None and not window and (not causal or (at is None and q.shape[1] == k.shape[1])):
        return _sdpa(q, k, v, None, scale, causal=causal, gqa=q.shape[2] != k.shape[2])
    return _masked(q, k, v, _visible(q, k, cu, at, causal, window), scale)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, *, causal: bool = False, gqa: bool = False
) -> Tensor:
    """SDPA over [b t h d]."""
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    return o.transpose(1, 2)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """The r heads of a group stand as more rows: keys are never repeated, and kernels that take masks take this."""
    t, r = q.shape[1], q.shape[2] // k.shape[2]
    rows = q.unflatten(2, (-1, r)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    seen = mask.expand(r, *mask.shape).flatten(0, 1)
    o = _sdpa(rows.transpose(1, 2), k, v, seen, scale).transpose(1, 2)
    return o.unflatten(2, (r, t)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _by_hand(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Tensor, softcap: float, scale: float | None
) -> Tensor:
    """What SDPA has no option for: logits bent, one more logit per head."""
    g = k.shape[2]
    rows = _wide(q).unflatten(2, (g, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = torch.einsum("btgrd,bsgd->bgrts", rows, _wide(k))
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        extra = _wide(sinks).unflatten(0, (g, -1))[None, :, :, None, None]
        logits = torch.cat([logits, extra.expand(*logits.shape[:4], 1)], -1)
    weights = torch.softmax(logits, -1)[..., : k.shape[1]]
    return torch.einsum("bgrts,bsge->btgre", weights, _wide(v)).flatten(2, 3).to(q.dtype)


def _visible(q: Tensor, k: Tensor, cu: Tensor | None, at: Tensor | None, causal: bool, window: int) -> Tensor:
    """[t, s]: which keys each query may see."""
    t, s = q.shape[1], k.shape[1]
    j = torch.arange(s, device=q.device)[None]
    i = torch.arange(t, device=q.device)[:, None] + (s - t if at is None else at)
    mask = j <= i if causal else (j >= 0).expand(t, s)
    if window:
        mask = mask & (j > i - window)
    if cu is not None:
        of = torch.searchsorted(cu[1:].contiguous(), torch.arange(s, device=q.device), right=True)
        mask = mask & (of[:t, None] == of[None])
    return mask


def causal_conv1d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    cu: Tensor | None = None,
    *,
    act: str = "none",
) -> tuple[Tensor, Tensor]:
    """All rows at once, a shifted product per tap; packed segments go through the CPU's form."""
    if cu is not None:
        return packed_conv1d(x, w, bias, state, cu, act=act)
    padded = _behind(x, state, w.shape[1] - 1)
    y = _taps(padded, w, x.shape[1])
    y = y if bias is None else y + _wide(bias)
    final = padded[:, padded.shape[1] - w.shape[1] + 1 :].transpose(1, 2)
    return (F.silu(y) if act == "silu" else y).to(x.dtype), final.contiguous()


def anticausal_conv1d(g: Tensor, w: Tensor, final: Tensor | None = None, cu: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The transpose of causal_conv1d, all rows at once."""
    if cu is not None:
        return ops.anticausal_conv1d.reference(g, w, final, cu)
    behind, t = w.shape[1] - 1, g.shape[1]
    padded = F.pad(_wide(g), (0, 0, behind, behind))
    whole = _taps(padded, w.flip(1), t + behind)
    if final is not None:
        whole = whole + F.pad(_wide(final).transpose(1, 2), (0, 0, t, 0))
    start = whole[:, :behind].transpose(1, 2).to(g.dtype)
    return whole[:, behind:].to(g.dtype).contiguous(), start.clone(memory_format=torch.contiguous_format)


def conv1d_taps(x: Tensor, g: Tensor, state: Tensor | None = None, cu: Tensor | None = None, *, k: int) -> Tensor:
    """The gradient of causal_conv1d's taps, all rows at once."""
    if cu is not None:
        return ops.conv1d_taps.reference(x, g, state, cu, k=k)
    padded, t = _wide(_behind(_wide(x), state, k - 1)), x.shape[1]
    return torch.stack([(padded[:, i : i + t] * _wide(g)).sum((0, 1)) for i in range(k)], 1)


def _behind(x: Tensor, state: Tensor | None, count: int) -> Tensor:
    """x with the `count` inputs before it, [b, count + t, c]."""
    past = x.new_zeros(x.shape[0], count, x.shape[2]) if state is None else state.to(x.dtype).transpose(1, 2)
    return torch.cat([past, x], 1)


def _taps(padded: Tensor, w: Tensor, t: int) -> Tensor:
    """sum_i w_i padded_{t+i}, t tokens of it"""
    y = _wide(padded[:, :t]) * _wide(w[:, 0])
    for i in range(1, w.shape[1]):
        y = y + _wide(padded[:, i : i + t]) * _wide(w[:, i])
    return y


def grouped_linear(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """A decode step's few rows each fetch their expert's matrix; many rows are a GEMM per expert, by counts on the host."""
    if x.shape[0] > FEW:
        return grouped_by_host(x, w, counts)
    expert = torch.searchsorted(counts.cumsum(0), torch.arange(x.shape[0], device=x.device), right=True)
    y = torch.bmm(w[expert.clamp(max=w.shape[0] - 1)].to(x.dtype), x[..., None])[..., 0]
    return torch.where((expert < w.shape[0])[:, None], y, torch.zeros_like(y))


def _wide(x: Tensor) -> Tensor:
    """Sums run in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
