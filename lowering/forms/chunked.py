"""The chunked forward of a linear recurrence: matmuls within chunks, one pass of the state across them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .channel_decay import LOG_FLOOR, channel_factors
from .chunk_layout import CHUNK, Chunks, cut, cut_packed, gather, gather_gate, scatter
from .head_decay import Factors, HeadDecay, head_decay, head_factors


@dataclass(frozen=True)
class Operands:
    """A recurrence's tensors as they came, and how to read them."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    state: Tensor | None
    cu: Tensor | None
    scale: float
    delta: bool

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in: float64 stays, all else is float32."""
        return torch.float64 if self.v.dtype == torch.float64 else torch.float32

    @property
    def by_channel(self) -> bool:
        """Decay per key channel."""
        return self.decay is not None and self.decay.dim() == 4

    @property
    def states(self) -> int:
        """How many sequences keep a state."""
        return self.v.shape[0] if self.cu is None else self.cu.shape[0] - 1


@dataclass(frozen=True)
class Saved:
    """What backward reads again: updates u, solves T and the state before every chunk."""

    u: Tensor
    solve: Tensor
    states: Tensor


@dataclass(frozen=True)
class Gates:
    """Gates of every chunk: beta[chunk, lane, row, 1] kept off zero (backward divides by it), and per-head decay if any."""

    beta: Tensor
    decay: HeadDecay | None


# exp is zero to all purposes well before these, and sums stay finite when a gate is -inf.
_STRONGEST = {torch.float32: -128.0, torch.float64: -800.0}
_TINY = {torch.float32: 1e-20, torch.float64: 1e-150}


def chunks_of(x: Operands, size: int = CHUNK) -> Chunks:
    """How this call's tokens are cut."""
    lanes = x.v.shape[0] * x.v.shape[2]
    return cut(x.v.shape[1], lanes, size) if x.cu is None else cut_packed(x.cu, x.v.shape[1], lanes, size)


def gates_of(x: Operands, chunks: Chunks) -> Gates:
    """The small tensors of the whole sequence, laid out once."""
    shape = (chunks.count, chunks.lanes, chunks.size)
    beta = x.v.new_ones(shape, dtype=x.dtype) if x.beta is None else gather_gate(x.beta, chunks, x.dtype)
    beta = torch.where(beta.abs() < _TINY[x.dtype], _TINY[x.dtype], beta).unsqueeze(-1)
    if x.by_channel:
        return Gates(beta, None)
    if x.decay is None:
        gate = beta.new_zeros(shape, dtype=torch.float64)
    else:
        gate = gather_gate(x.decay, chunks, torch.float64).clamp_(min=_STRONGEST[x.dtype])
    return Gates(beta, head_decay(gate, beta, x.scale))


def load(x: Tensor, chunks: Chunks, low: int, high: int, dtype: torch.dtype, weight: Tensor | None = None) -> Tensor:
    """Rows of chunks [low, high) of x[b t h d], times weight, in a new tensor."""
    out = x.new_empty((high - low, x.shape[0] * x.shape[2], chunks.size, x.shape[3]), dtype=dtype)
    return gather(x, chunks, low, high, out, weight)


def load_decay(x: Operands, chunks: Chunks, low: int, high: int) -> Tensor:
    """The channel decay of a group as factors in (0, 1]."""
    assert x.decay is not None
    return load(x.decay, chunks, low, high, x.dtype).clamp_(min=LOG_FLOOR[x.dtype]).exp_()


def factors_of(x: Operands, gates: Gates, chunks: Chunks, low: int, high: int, q: Tensor, k: Tensor) -> Factors:
    """The factors of a group, whichever way it decays."""
    beta = gates.beta[low:high] if x.delta else None
    if gates.decay is not None:
        return head_factors(q, k, gates.decay.of(low, high), beta, x.scale)
    return channel_factors(q, k, load_decay(x, chunks, low, high), beta, x.scale)


def invert(scores: Tensor, out: Tensor) -> Tensor:
    """(I + strictly lower scores)^-1. Row-major `out` lets LAPACK's blocked solve run without a copy, three times faster."""
    size = scores.shape[-1]
    unit = torch.eye(size, dtype=scores.dtype, device=scores.device).expand_as(scores)
    return torch.linalg.solve_triangular(scores, unit, upper=False, unitriangular=True, out=out)


@dataclass(frozen=True)
class Walk:
    """Where the state stands before and after each chunk: in slots, entering from and leaving to its segment's `ends`."""

    slots: tuple[Tensor, ...]
    begins: dict[int, int]
    lasts: dict[int, int]
    ends: Tensor

    def before(self, chunk: int) -> Tensor:
        """The state that enters a chunk."""
        slot = self.slots[chunk % len(self.slots)]
        return slot.copy_(self.ends[self.begins[chunk]]) if chunk in self.begins else slot

    def after(self, chunk: int) -> Tensor:
        """Where the state that leaves a chunk is to be written."""
        return self.ends[self.lasts[chunk]] if chunk in self.lasts else self.slots[(chunk + 1) % len(self.slots)]


def saved_shapes(x: Operands) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of `Saved`. The number of chunks is a bound that needs no look into `cu`."""
    count = x.v.shape[1] // CHUNK + (1 if x.cu is None else x.states)
    lanes, width = x.v.shape[0] * x.v.shape[2], x.v.shape[3]
    inner = count if x.delta else 0
    return (inner, lanes, CHUNK, width), (inner, lanes, CHUNK, CHUNK), (count, lanes, x.k.shape[3], width)


def forward(x: Operands, *, keep: bool) -> tuple[Tensor, Tensor, Saved | None]:
    """o[b t h v], final state[n h k v] and, if kept, what backward needs."""
    t, heads = x.v.shape[1:3]
    # A short call without backward need not fill a whole chunk.
    chunks = chunks_of(x, CHUNK if keep or x.cu is not None else min(32, max(16, 1 << max(t - 1, 0).bit_length())))
    gates = gates_of(x, chunks)
    shape = (x.states, heads, x.k.shape[3], x.v.shape[3])
    final = x.v.new_zeros(shape, dtype=x.dtype) if x.state is None else x.state.to(x.dtype, copy=True).contiguous()
    saved = Saved(*(x.v.new_empty(s, dtype=x.dtype) for s in saved_shapes(x))) if keep else None
    lane = (chunks.lanes, *shape[2:])
    slots = saved.states.unbind(0) if saved else (x.v.new_empty(lane, dtype=x.dtype),)
    walk = Walk(slots, chunks.begins(), chunks.ends(), final.view(len(final) * heads // max(chunks.lanes, 1), *lane))
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    for low, high in chunks.groups():
        scatter(_group(x, gates, chunks, low, high, walk, saved), chunks, low, high, o)
    return o, final, saved


def _group(x: Operands, gates: Gates, chunks: Chunks, low: int, high: int, walk: Walk, saved: Saved | None) -> Tensor:
    """Outputs of chunks [low, high), [chunk, lane, row, v]; the walk moves on to `high`."""
    q, k = load(x.q, chunks, low, high, x.dtype), load(x.k, chunks, low, high, x.dtype)
    factors = factors_of(x, gates, chunks, low, high, q, k)
    u = load(x.v, chunks, low, high, x.dtype, gates.beta[low:high])
    if not x.delta:
        return _scan(factors, u, None, u, walk, low)
    scores = factors.scores[1]
    kept = (saved.u[low:high], saved.solve[low:high]) if saved else (torch.empty_like(u), torch.empty_like(scores))
    size = scores.shape[-1]
    invert(scores.view(-1, size, size), kept[1].view(-1, size, size))
    return _scan(factors, u, kept[1], kept[0], walk, low)


def _scan(factors: Factors, values: Tensor, solve: Tensor | None, u: Tensor, walk: Walk, low: int) -> Tensor:
    """The state's pass over a group's chunks; with a solve, it turns values into u (the delta rule) on its way."""
    o = torch.empty_like(u)
    reads, scores, writes, fades = factors.read[0].unbind(0), factors.scores[0].unbind(0), factors.write.unbind(0), factors.fade
    keys = factors.read[1].unbind(0) if solve is not None else ()
    steps = zip(o.unbind(0), u.unbind(0), values.unbind(0), reads, scores, writes, fades.unbind(0), strict=True)
    for i, (out, update, value, read, score, write, fade) in enumerate(steps):
        state = walk.before(low + i)
        if solve is not None:
            torch.bmm(solve[i], value.baddbmm_(keys[i], state), out=update)
        torch.bmm(read, state, out=out)
        out.baddbmm_(score, update)
        torch.mul(state, fade, out=walk.after(low + i)).baddbmm_(write.mT, update)
    return o
