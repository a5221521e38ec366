"""From an attention's tensors to launches: sizes, strides, buffers, and how many programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..recurrent.source import Source
from .run import Run, Step
from .source import backward_source, decode_source, forward_source
from .traits import FEW, SPLITS, Config, Tile, Traits, config, padded

Tensor = torch.Tensor


@dataclass(frozen=True)
class Operands:
    """An attention's operands and options."""

    q: Tensor  # [b t h d]
    k: Tensor  # [b s g d]
    v: Tensor  # [b s g e]
    sinks: Tensor | None
    cu: Tensor | None
    at: Tensor | None
    causal: bool
    window: int
    softcap: float
    scale: float

    @property
    def traits(self) -> Traits:
        given = (x is not None for x in (self.sinks, self.cu, self.at))
        return Traits(self.causal, self.window > 0, self.softcap != 0, *given)

    @property
    def rows(self) -> int:
        """Queries of a group."""
        return self.q.shape[1] * self.q.shape[2] // self.k.shape[2]

    @property
    def few(self) -> bool:
        """Whether so few queries come that programs share out keys instead."""
        return self.rows <= FEW and self.cu is None


@dataclass(frozen=True)
class Call:
    """An attention's operands, and all that its launches share."""

    x: Operands
    config: Config
    values: Mapping[str, Any]


def call_of(x: Operands, *, target: str = "sm_90") -> Call:
    """What the launches of an attention share."""
    (b, t, h, d), (_, s, g, e) = x.q.shape, x.v.shape
    cap = abs(x.softcap)
    values = {
        **{"t": t, "s": s, "n": b, "window": x.window, "H": h, "R": h // g, "D": d, "E": e, "BD": padded(d), "BE": padded(e)},
        **{"rise": (cap or x.scale) * math.log2(math.e), "bend": x.scale / cap if cap else 0.0, "scale": float(x.scale)},
        **{"p_sinks": x.sinks, "p_at": x.at, **rows_of("q", x.q), **rows_of("k", x.k), **rows_of("v", x.v)},
        **({} if x.cu is None else _borders(x.cu, s)),
    }
    made = config(x.q.dtype, d, e, rows=x.rows, target=target)
    return Call(x, made, values | {"C": made.product, "PRECISION": made.precision})


def rows_of(name: str, x: Tensor) -> dict[str, Any]:
    """The pointer and strides of x[b t h d].

    Strides of tokens and heads are compiled in, so that addresses are not computed: neither may vary with the number of tokens.
    """
    if x.stride(3) != 1 or x.stride(2) > x.stride(1) or not all(x.stride()):
        x = x.contiguous()
    return {f"p_{name}": x, f"s_{name}_b": x.stride(0), f"s_{name}_t": x.stride(1), f"s_{name}_h": x.stride(2)}


def _borders(cu: Tensor, s: int) -> dict[str, Tensor]:
    """For each token where its segment begins and ends; borders that fall or lie outside do no harm."""
    inner = cu[1:-1].to(torch.int64).clamp(0, s).cummax(0).values
    borders = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), s)])
    of = torch.searchsorted(inner, torch.arange(s, device=cu.device), right=True)
    return {"p_begins": borders[of].to(torch.int32), "p_ends": borders[of + 1].to(torch.int32)}


def _go(run: Run, call: Call, source: Source, name: str, programs: int, tile: Tile, buffers: Mapping[str, Any]) -> None:
    if not programs:
        return
    function = source.functions[name]
    every = {**call.values, **buffers, "BM": tile.queries, "BN": tile.keys}
    run(Step(source, function.name, programs, {a: every[a] for a in function.arguments}, tile.warps, tile.stages))


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def forward(x: Operands, run: Run, *, target: str = "sm_90") -> tuple[Tensor, Tensor]:
    """o[b t h e], and the log of each softmax's denominator [b h t]."""
    call, (b, t, h, _) = call_of(x, target=target), x.q.shape
    o, lse = room(x), x.q.new_empty((b, h, t), dtype=torch.float32)
    tile = call.config.attend
    _go(run, call, forward_source(x.traits), "attend", b * h * _blocks(t, tile.queries), tile, {"p_o": o, "p_lse": lse})
    return o, lse


def room(x: Operands) -> Tensor:
    """Room for o."""
    return x.q.new_empty((*x.q.shape[:3], x.v.shape[3]))


def decode(x: Operands, run: Run, *, target: str = "sm_90") -> Tensor:
    """o[b t h e] of few queries: parts of the keys apart, then together."""
    call, (b, t, h, _), (_, s, g, e) = call_of(x, target=target), x.q.shape, x.v.shape
    splits, source = splits_of(b * g, s, call.config.split), decode_source(x.traits)
    parts = x.q.new_empty((b, g, splits, x.rows, e), dtype=torch.float32)
    sums = x.q.new_empty((2, b, g, splits, x.rows), dtype=torch.float32)
    buffers = {"p_acc": parts, "p_top": sums[0], "p_sum": sums[1], "p_o": (o := room(x)), "splits": splits}
    # The matrix instructions of a warp group take 64 rows of values.
    _go(run, call, source, "split", b * g * splits * (t > 0), call.config.split, {**buffers, "BE": max(64, padded(e))})
    _go(run, call, source, "join", b * t * h, call.config.join, buffers)
    return o


def splits_of(groups: int, s: int, tile: Tile) -> int:
    """Parts of the keys: enough for two programs a processor on a large device, none of less than four blocks."""
    return max(1, min(SPLITS, 264 // max(groups, 1), _blocks(s, 4 * tile.keys)))


@dataclass(frozen=True)
class Gradients:
    """Gradients of the operands."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None


def backward(x: Operands, o: Tensor, lse: Tensor, do: Tensor, run: Run, *, target: str = "sm_90") -> Gradients:
    """Gradients of q, k, v and sinks."""
    call, (b, t, h, _), (_, s, g, _) = call_of(x, target=target), x.q.shape, x.v.shape
    dq, dk, dv = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x.q, x.k, x.v))
    delta, source = torch.empty_like(lse), backward_source(x.traits)
    buffers = {**rows_of("do", do), "p_o": o, "p_lse": lse, "p_delta": delta, "p_dq": dq, "p_dk": dk, "p_dv": dv}
    queries = call.config.queries
    _go(run, call, source, "queries", b * h * _blocks(t, queries.queries), queries, buffers)
    for name, tile in (("keys", call.config.keys), ("values", call.config.values)):
        _go(run, call, source, name, b * g * _blocks(s, tile.keys), tile, buffers)
    return Gradients(dq, dk, dv, None if x.sinks is None else _sinks(x.sinks, lse, delta))


def _sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """What each head's further logit took from all queries."""
    share = torch.exp(sinks.float()[None, :, None] - lse)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)
