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
    """What backward reads again: updates u, solves T, unless they are made again, and the state before every chunk."""

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


@dataclass(frozen=True)
class Group:
    """Chunks [low, high) of a call: what is worked on together."""

    call: Operands
    gates: Gates
    chunks: Chunks
    low: int
    high: int

    def load(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The group's rows of x[b t h d], times weight, in a new tensor [chunk, lane, row, d]."""
        shape = (self.high - self.low, x.shape[0] * x.shape[2], self.chunks.size, x.shape[3])
        return gather(x, self.chunks, self.low, self.high, x.new_empty(shape, dtype=self.call.dtype), weight)

    def store(self, source: Tensor, x: Tensor, weight: Tensor | None = None) -> None:
        """The group's rows, times weight, back into x[b t h d]."""
        scatter(source, self.chunks, self.low, self.high, x, weight)

    @property
    def beta(self) -> Tensor:
        """[chunk, lane, row, 1]"""
        return self.gates.beta[self.low : self.high]

    @property
    def decay(self) -> HeadDecay | None:
        """Per-head decay, if it is that."""
        return None if self.gates.decay is None else self.gates.decay.of(self.low, self.high)

    def channel_decay(self) -> Tensor:
        """The channel decay as factors in (0, 1]."""
        assert self.call.decay is not None
        return self.load(self.call.decay).clamp_(min=LOG_FLOOR[self.call.dtype]).exp_()

    def factors(self, q: Tensor, k: Tensor) -> Factors:
        """What the chunks do to their state, whichever way it decays."""
        beta, decay = self.beta if self.call.delta else None, self.decay
        if decay is not None:
            return head_factors(q, k, decay, beta, self.call.scale)
        return channel_factors(q, k, self.channel_decay(), beta, self.call.scale)


def invert(scores: Tensor, out: Tensor) -> Tensor:
    """(I + strictly lower scores)^-1. Row-major `out` lets LAPACK's blocked solve run without a copy, three times faster."""
    size = scores.shape[-1]
    unit = torch.eye(size, dtype=scores.dtype, device=scores.device).expand_as(scores)
    return torch.linalg.solve_triangular(scores, unit, upper=False, unitriangular=True, out=out)


def solves(scores: Tensor, saved: Saved | None, low: int, high: int) -> Tensor:
    """Solves of chunks [low, high), where they are kept if they are."""
    out = saved.solve[low:high] if saved and len(saved.solve) else torch.empty_like(scores)
    invert(scores.flatten(0, 1), out.flatten(0, 1))
    return out


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
    """Shapes of `Saved`. The number of chunks is a bound that needs no look into `cu`.

    It is never one: Dynamo would take a size of one for a constant, and compile anew for longer calls.
    """
    count = x.v.shape[1] // CHUNK + (2 if x.cu is None else x.states + 1)
    lanes, width = x.v.shape[0] * x.v.shape[2], x.v.shape[3]
    inner = count if x.delta else 0
    solves = 0 if x.v.device.type == "cpu" and x.dtype == torch.float32 else inner
    return (inner, lanes, CHUNK, width), (solves, lanes, CHUNK, CHUNK), (count, lanes, x.k.shape[3], width)


def inference_chunk(x: Operands) -> int:
    """Rows of a chunk when no backward follows: per-head decay is cheapest at half size, and a short call need not fill one."""
    most = CHUNK if x.by_channel or x.cu is not None else CHUNK // 2
    return min(most, max(16, 1 << max(x.v.shape[1] - 1, 0).bit_length()))


def forward(x: Operands, *, keep: bool) -> tuple[Tensor, Tensor, Saved | None]:
    """o[b t h v], final state[n h k v] and, if kept, what backward needs."""
    chunks = chunks_of(x, CHUNK if keep else inference_chunk(x))
    gates = gates_of(x, chunks)
    shape = (x.states, x.v.shape[2], x.k.shape[3], x.v.shape[3])
    final = x.v.new_zeros(shape, dtype=x.dtype) if x.state is None else x.state.to(x.dtype, copy=True).contiguous()
    saved = room(x, chunks) if keep else None
    lane = (chunks.lanes, *shape[2:])
    slots = saved.states.unbind(0) if saved else (x.v.new_empty(lane, dtype=x.dtype),)
    walk = Walk(slots, chunks.begins(), chunks.ends(), final.view(len(final) * shape[1] // max(chunks.lanes, 1), *lane))
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    for low, high in chunks.groups():
        group = Group(x, gates, chunks, low, high)
        group.store(_outputs(group, walk, saved), o)
    return o, final, saved


def room(x: Operands, chunks: Chunks) -> Saved:
    """Tensors for what backward needs; what no chunk fills is zero, so that equal calls give equal results."""
    room = [x.v.new_empty(s, dtype=x.dtype) for s in saved_shapes(x)]
    for tensor in room:
        tensor[chunks.count :].zero_()
    return Saved(*room)


def _outputs(group: Group, walk: Walk, saved: Saved | None) -> Tensor:
    """Outputs of a group, [chunk, lane, row, v]; the walk moves on to the next."""
    x, low, high = group.call, group.low, group.high
    factors = group.factors(group.load(x.q), group.load(x.k))
    values = group.load(x.v, group.beta)
    if not x.delta:
        return _scan(factors, values, None, values, walk, low)
    scores = factors.scores[1]
    u, solve = (saved.u[low:high] if saved else torch.empty_like(values)), solves(scores, saved, low, high)
    return _scan(factors, values, solve, u, walk, low)


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
