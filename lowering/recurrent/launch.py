"""From a recurrence's tensors to launches: sizes, strides, buffers, and how many programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..forms.chunked import Operands
from .source import Source, backward_source, decode_source, forward_source
from .traits import Config, Tile, Traits, config, measured

Tensor = torch.Tensor


@dataclass(frozen=True)
class Step:
    """One launch."""

    source: Source
    function: str
    programs: int
    arguments: Mapping[str, Any]
    tile: Tile


Run = Callable[[Step], None]


@dataclass(frozen=True)
class Saved:
    """What backward reads again; chunks stand one after the other, sequence by sequence, a spare one last."""

    u: Tensor  # [row, head, v]: what the delta rule writes; empty for others
    solve: Tensor  # [chunk, head, row, row]; empty unless the delta rule's
    scores: Tensor  # [chunk, head, row, row]
    states: Tensor  # [chunk, head, k, v]: before each chunk


@dataclass(frozen=True)
class Call:
    """A recurrence's operands with batch and tokens as one, and all that its launches share."""

    x: Operands
    traits: Traits
    config: Config
    target: str
    chunks: int  # of a sequence; of the whole row where packed
    values: Mapping[str, Any]

    def tile(self, function: str) -> Tile:
        """How a function is launched."""
        return measured(self.config, function, self.traits, self.x.k.shape[3], self.x.v.shape[3], self.target)

    @property
    def count(self) -> int:
        """Chunks, or a bound that needs no look into `cu`."""
        return self.chunks if self.traits.packed else self.x.v.shape[0] * self.chunks

    @property
    def saved_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of `Saved`. Never one chunk: a tracer would take it for a constant."""
        b, t, heads, width = self.x.v.shape
        size = self.config.chunk
        pair, inner = (heads, size, size), self.count + 1 if self.x.delta else 0
        rows = b * t if self.x.delta else 0
        return (rows, heads, width), (inner, *pair), (self.count + 1, *pair), (self.count + 1, heads, self.x.k.shape[3], width)

    @property
    def saved_dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of `Saved`."""
        product = self.config.product
        return product, product, self.config.inner, product


def call_of(x: Operands, *, keep: bool = False, output: bool = True, target: str = "sm_90") -> Call:
    """What the launches of a recurrence share."""
    decay = "none" if x.decay is None else "channel" if x.by_channel else "head"
    traits = Traits(decay, x.delta, x.beta is not None, x.cu is not None, x.state is not None, keep, output)
    _, t, heads, width = x.v.shape
    made = config(promoted(x), x.k.shape[3], width, decay=decay, delta=x.delta, target=target)
    size = made.chunk
    chunks = (t + size - 1) // size if x.cu is None else t // size + x.states
    values = {
        **{"t": t, "chunks": chunks, "n_rows": x.v.shape[0] * t, "scale": float(x.scale)},
        **{
            "H": heads,
            "R": heads // x.k.shape[2],
            "K": x.k.shape[3],
            "V": width,
            "CHUNK": size,
            "LEVELS": size.bit_length() - 1,
            "SPLIT": made.split,
        },
        **{
            "PRECISION": made.precision,
            "SOLVE": made.solve,
            "C": made.product,
            "L": made.inner,
            "WIDE": made.wide,
            "TINY": made.tiny,
        },
        **{f"p_{name}": x for name, x in ({} if x.cu is None else _tables(x.cu.to(x.v.device), t, chunks, size)).items()},
    }
    for name in ("q", "k", "v", "decay", "beta"):
        given = getattr(x, name)
        values |= {} if given is None else rows_of(name, given)
    if x.state is not None:
        values["p_state"] = x.state.contiguous()
    return Call(x, traits, made, target, chunks, values)


def promoted(x: Operands) -> torch.dtype:
    """The dtype that q, k and v are multiplied in."""
    return torch.promote_types(torch.promote_types(x.q.dtype, x.k.dtype), x.v.dtype)


def rows_of(name: str, x: Tensor) -> dict[str, Any]:
    """The pointer and strides of x[b t h ...] with batch and tokens as one.

    Strides are compiled in, so that addresses are not computed: none may vary with the number of tokens.
    """
    x = x.flatten(0, 1)
    if (x.dim() == 3 and x.stride(-1) != 1) or x.stride(1) > x.stride(0) > 0:
        x = x.contiguous()
    return {f"p_{name}": x, f"s_{name}_t": x.stride(0), f"s_{name}_h": x.stride(1)}


def _tables(cu: Tensor, tokens: int, chunks: int, size: int) -> dict[str, Tensor]:
    """Segment borders, each one's first chunk, and each chunk's segment; borders that fall or lie outside do no harm."""
    borders = cu.to(torch.int64).clamp(0, tokens).cummax(0).values
    many = (borders[1:] - borders[:-1] + size - 1) // size
    first = torch.cat([many.new_zeros(1), many.cumsum(0)])
    place = torch.arange(chunks, device=cu.device)
    found = torch.searchsorted(first, place, right=True) - 1
    return {"cu": borders, "first": first, "segment": torch.where(place < first[-1], found, -1)}


def _step(call: Call, source: Source, name: str, programs: int, buffers: Mapping[str, Any]) -> Step:
    function, tile = source.functions[name], call.tile(name)
    every = {**call.values, **buffers, "BK": tile.key, "BV": tile.value}
    return Step(source, function.name, programs, {a: every[a] for a in function.arguments}, tile)


def _go(run: Run, step: Step) -> None:
    if step.programs:
        run(step)


def parts_of(width: int, tile: int) -> int:
    return -(-width // tile)


def forward(x: Operands, run: Run, *, keep: bool = False, target: str = "sm_90") -> tuple[Tensor, Tensor, Saved]:
    """o[b t h v], final state[n h k v], and what backward needs."""
    call = call_of(x, keep=keep, target=target)
    saved, o, final = saved_room(call), _output(x), final_room(x)
    buffers = {"p_o": o, "p_final": final, **{f"p_{name}": getattr(saved, name) for name in ("u", "solve", "scores", "states")}}
    _chunks(call, run, buffers)
    return o, final, saved


def final_state(x: Operands, run: Run, *, target: str = "sm_90") -> Tensor:
    """The final state[n h k v] alone: no queries are read, no outputs made."""
    call = call_of(x, output=False, target=target)
    final, saved = final_room(x), saved_room(call)
    _chunks(call, run, {"p_final": final, "p_solve": saved.solve})
    return final


def _chunks(call: Call, run: Run, buffers: Mapping[str, Any]) -> None:
    """The forward's launches."""
    x, source = call.x, forward_source(call.traits)
    heads, lanes = x.v.shape[2], x.v.shape[2] if call.traits.decay == "channel" else x.k.shape[2]
    buffers = {**buffers, **_gated(call, source, run)}
    _go(run, _step(call, source, "prepare", call.count * lanes, buffers))
    _go(run, _step(call, source, "scan", x.states * heads * parts_of(x.v.shape[3], call.tile("scan").value), buffers))


def _gated(call: Call, source: Source, run: Run) -> dict[str, Tensor]:
    """A channel decay's sums, and queries and keys as they meet the state; nothing where decay is no channel's."""
    if call.traits.decay != "channel":
        return {}
    x, c = call.x, call.config
    (b, t, heads, _), width = x.v.shape, x.k.shape[3]
    kinds = {"sums": c.wide, "q_read": c.product, "k_read": c.product, "k_write": c.product}
    made = {f"p_{name}": x.v.new_empty((b * t, heads, width), dtype=dtype) for name, dtype in kinds.items()}
    made["p_fade"] = x.v.new_empty((call.count + 1, heads, width), dtype=torch.float32)
    _go(run, _step(call, source, "gates", call.count * heads * parts_of(width, call.tile("gates").key), made))
    return made


def _output(x: Operands) -> Tensor:
    """Room for o; tokens of a packed row that no segment has are zero."""
    return (torch.zeros_like if x.cu is not None else torch.empty_like)(x.v, memory_format=torch.contiguous_format)


def final_room(x: Operands) -> Tensor:
    return x.v.new_empty((x.states, x.v.shape[2], x.k.shape[3], x.v.shape[3]), dtype=torch.float32)


def saved_room(call: Call) -> Saved:
    """Buffers between the launches; what no chunk fills is zero where they are kept, so that equal calls give equal results."""
    if call.traits.packed and call.traits.keep:
        return Saved(
            *(call.x.v.new_zeros(shape, dtype=d) for shape, d in zip(call.saved_shapes, call.saved_dtypes, strict=True))
        )
    needed = (call.traits.keep, True, call.traits.output, call.traits.keep)
    shapes = [shape if asked else (0,) for shape, asked in zip(call.saved_shapes, needed, strict=True)]
    made = Saved(*(call.x.v.new_empty(shape, dtype=d) for shape, d in zip(shapes, call.saved_dtypes, strict=True)))
    if call.traits.keep:
        for tensor in (made.solve, made.scores, made.states):
            tensor[-1:].zero_()
    return made


def decode(x: Operands, run: Run, *, final: Tensor | None = None, target: str = "sm_90") -> tuple[Tensor, Tensor]:
    """o and the state after a few tokens; `final` may be the state itself, which is then updated in place."""
    call = call_of(x, target=target)
    o = _output(x)
    final = final_room(x) if final is None else final
    programs = x.states * x.v.shape[2] * parts_of(x.v.shape[3], call.tile("decode").value)
    _go(run, _step(call, decode_source(call.traits), "decode", programs, {"p_o": o, "p_final": final}))
    return o, final


@dataclass(frozen=True)
class Gradients:
    """Gradients of the operands."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    state: Tensor  # float32, also where there was none to begin with


def backward(
    x: Operands, saved: Saved, do: Tensor | None, dfinal: Tensor | None, run: Run, *, target: str = "sm_90"
) -> Gradients:
    """Gradients of q, k, v, decay, beta and state."""
    call = call_of(x, keep=True, target=target)
    do = x.v.new_zeros(()).expand_as(x.v).contiguous() if do is None else do
    out, buffers = _gradient_room(call, do, dfinal, saved)
    source, heads, width = backward_source(call.traits), x.v.shape[2], x.k.shape[3]
    buffers |= _gated(call, forward_source(call.traits), run)
    _go(run, _step(call, source, "back", x.states * heads * parts_of(x.v.shape[3], call.tile("back").value), buffers))
    _go(run, _step(call, source, "pulls", call.count * heads, buffers))
    _go(run, _step(call, source, "gradients", call.count * heads * parts_of(width, call.tile("gradients").key), buffers))
    return out()


def _gradient_room(
    call: Call, do: Tensor, dfinal: Tensor | None, saved: Saved
) -> tuple[Callable[[], Gradients], dict[str, Any]]:
    """Buffers by name, and the gradients in them once they are filled."""
    x, like = call.x, torch.zeros_like if call.traits.packed else torch.empty_like
    dense = torch.contiguous_format
    dq, dk = (_head_room(call, y) for y in (x.q, x.k))
    dv = like(x.v, memory_format=dense)
    rows, heads = x.v.shape[0] * x.v.shape[1], x.v.shape[2]
    parts = parts_of(x.k.shape[3], call.tile("gradients").key)
    ddecay = None if x.decay is None else like(x.decay, memory_format=dense)
    if ddecay is not None and not x.by_channel:
        ddecay = ddecay.new_zeros((parts, rows, heads), dtype=torch.float32)
    dbeta = None if x.beta is None else like(x.beta, memory_format=dense, dtype=torch.float32)
    dstate = final_room(x)
    dfinal = torch.zeros_like(dstate) if dfinal is None else dfinal.contiguous()
    buffers = {f"p_{name}": getattr(saved, name) for name in ("u", "solve", "scores", "states")}
    buffers |= {"p_dq": dq, "p_dk": dk, "p_dv": dv, "p_ddecay": ddecay, "p_dbeta": dbeta}
    buffers |= {"p_dstate": dstate, "p_dfinal": dfinal, **rows_of("do", do)}
    buffers |= _between(call, saved)

    def filled() -> Gradients:
        decay = ddecay
        if x.decay is not None and ddecay is not None and not x.by_channel:
            decay = (ddecay[0] if parts == 1 else ddecay.sum(0)).view(x.decay.shape).to(x.decay.dtype)
        beta = None if dbeta is None or x.beta is None else dbeta.to(x.beta.dtype)
        return Gradients(_added_up(dq, x.q), _added_up(dk, x.k), dv, decay, beta, dstate)

    return filled, buffers


def _between(call: Call, saved: Saved) -> dict[str, Any]:
    """Buffers between the backward's launches."""
    v, width = call.x.v.flatten(0, 1), call.tile("back").value
    pulled = v.new_empty((parts_of(v.shape[2], width), *v.shape[:2]), dtype=torch.float32)
    return {
        **{"p_w": v.new_empty(v.shape, dtype=call.config.product), "p_pulled": pulled, "BW": width, "EARLY": call.config.early},
        **{"p_dp": torch.empty_like(saved.scores), "p_da": torch.empty_like(saved.solve)},
        "p_dstates": torch.empty_like(saved.states),
    }


def _head_room(call: Call, x: Tensor) -> Tensor:
    """Room for the gradient of q or k: one for each value head where several read a key head."""
    b, t, _, width = x.shape
    shape, dtype = (b, t, call.x.v.shape[2], width), x.dtype if x.shape[2] == call.x.v.shape[2] else torch.float32
    return x.new_zeros(shape, dtype=dtype) if call.traits.packed else x.new_empty(shape, dtype=dtype)


def _added_up(parts: Tensor, x: Tensor) -> Tensor:
    """Value heads added up into their key head, in order."""
    b, t, heads, width = x.shape
    return parts if parts.shape[2] == heads else parts.view(b, t, heads, -1, width).sum(3).to(x.dtype)
