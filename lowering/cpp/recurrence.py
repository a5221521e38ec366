"""Linear recurrences in C++: one library per traits and head sizes, forward, backward and decode."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from ...ir import PlaitError
from . import decays, prelude, skeleton, units
from .build import addressable
from .build import library as built

if TYPE_CHECKING:
    from ..forms.chunked import Operands

Tensor = torch.Tensor
WIDEST = 256  # channels of a head
SMALL = 1 << 18  # products of a call that one thread does sooner than it wakes another
FEW = 4  # tokens that are cheaper one by one than as a chunk
TYPES = {torch.float32: 0, torch.bfloat16: 1}


class View(ctypes.Structure):
    """An operand: where it starts, its dtype, and its strides in elements; channels stand side by side."""

    _fields_ = (("data", c_void_p), ("type", c_int64), ("batch", c_int64), ("token", c_int64), ("head", c_int64))


_VIEWS = ("q", "k", "v", "decay", "beta", "o", "d_o", "d_q", "d_k", "d_v", "d_decay", "d_beta")
_FLOATS = ("start", "final", "d_final", "d_start", "u", "solve", "states")  # contiguous float32
_SIZES = ("batch", "tokens", "keys", "heads", "width", "out", "segments", "together", "part", "threads")


class Call(ctypes.Structure):
    """What a library's functions take."""

    _fields_ = (
        *((name, View) for name in _VIEWS),
        *((name, c_void_p) for name in (*_FLOATS, "borders")),
        *((name, c_int64) for name in _SIZES),
        ("scale", c_double),
    )


_STRUCTURES = f"""\
// Strides are in elements; channels stand side by side.
struct View {{ void* data; int64_t type, batch, token, head; }};
struct Call {{
    View {", ".join(_VIEWS)};
    float {", ".join("*" + name for name in _FLOATS)};
    const int64_t* borders;  // of packed segments
    int64_t {", ".join(_SIZES)};
    double scale;
}};
"""
_KINDS = {"head": (decays.HEAD, decays.HEAD_GRADIENTS), "channel": (decays.CHANNEL, decays.CHANNEL_GRADIENTS)}


@dataclass(frozen=True)
class Traits:
    """What a library is made for: sizes are multiples of 16, smaller heads are padded within it."""

    delta: bool
    decay: str  # head (also none and constant) or channel
    width: int
    out: int

    @property
    def name(self) -> str:
        return f"recurrence_{'delta' if self.delta else 'additive'}_{self.decay}_{self.width}x{self.out}"


def source(traits: Traits) -> str:
    """The C++ text of a member of the family."""
    factors, gradients = _KINDS[traits.decay]
    constants = (
        f"constexpr int DK = {traits.width}, DV = {traits.out}, KINDS = {1 + traits.delta};\n"
        f"constexpr bool DELTA = {'true' if traits.delta else 'false'};\n"
    )
    parts = (
        f"// {traits.name}\n{prelude.VECTORS}", prelude.OPERANDS, prelude.PRODUCTS, constants, _STRUCTURES, decays.ROWS,
        skeleton.ROOM, "static void share(const Chunk& c, Room& r);\n", skeleton.PARTS, factors, skeleton.FORWARD, gradients,
        skeleton.BACKWARD, units.DECODE, units.ENTRIES,
    )  # fmt: skip
    return "\n".join(parts)


@cache
def library(traits: Traits) -> ctypes.CDLL | None:
    """The library of a member; None where there is no compiler, or one that fails: the torch form runs then."""
    made = built(source(traits), traits.name)
    if made is None:
        return None
    for function in (made.forward, made.backward, made.decode):
        function.argtypes, function.restype = (ctypes.POINTER(Call),), ctypes.c_int
    return made


def ready(x: Operands) -> bool:
    """Whether C++ runs a call: it is one that C++ is made for, and there is a compiler."""
    return takes(x) and library(traits_of(x)) is not None


def takes(x: Operands) -> bool:
    """Whether a call is one that C++ is made for."""
    tensors = [y for y in (x.q, x.k, x.v, x.decay, x.beta) if y is not None]
    known = addressable(*tensors) and all(y.dtype in TYPES for y in tensors)
    return known and x.v.numel() > 0 and 0 < x.k.shape[3] <= WIDEST and x.v.shape[3] <= WIDEST


def traits_of(x: Operands) -> Traits:
    """Which library a call needs."""
    width, out = (-(-n // 16) * 16 for n in (x.k.shape[3], x.v.shape[3]))
    return Traits(x.delta, "channel" if x.by_channel else "head", width, out)


def together(heads: int, keys: int) -> int:
    """Value heads of a key head that share its products: a function of sizes alone, and few enough that threads find work."""
    r = heads // keys
    return next(n for n in (4, 3, 2, 1) if r % n == 0)


@dataclass(frozen=True)
class Arguments:
    """A call being filled in, and the tensors that must live until it is over."""

    call: Call
    alive: list[Tensor]

    def view(self, name: str, x: Tensor | None) -> None:
        """An operand by its strides; one whose channels do not stand side by side is copied."""
        if x is None:
            return
        x = x.contiguous() if x.dim() == 4 and x.stride(3) != 1 and x.shape[3] > 1 else x
        self.alive.append(x)
        setattr(self.call, name, View(x.data_ptr(), TYPES[x.dtype], x.stride(0), x.stride(1), x.stride(2)))

    def floats(self, name: str, x: Tensor | None) -> None:
        """A state or what was saved."""
        if x is None:
            return
        x = x.float().contiguous()
        self.alive.append(x)
        setattr(self.call, name, x.data_ptr())


def _arguments(x: Operands) -> Arguments:
    b, t, heads, out = x.v.shape
    keys, width = x.k.shape[2:]
    made, few = Call(), together(heads, keys)
    made.batch, made.tokens, made.keys, made.heads, made.width, made.out = b, t, keys, heads, width, out
    made.segments, made.together, made.scale = x.states, few, x.scale
    made.threads = torch.get_num_threads() if b * t * heads * width * out > SMALL else 1
    args = Arguments(made, [])
    for name in ("q", "k", "v", "decay", "beta"):
        args.view(name, getattr(x, name))
    if x.cu is not None:
        args.alive.append(x.cu.to(torch.int64).contiguous())
        made.borders = args.alive[-1].data_ptr()
    return args


def _run(x: Operands, name: str, args: Arguments) -> None:
    if getattr(library(traits_of(x)), name)(ctypes.byref(args.call)):
        raise PlaitError("linear_recurrence: no memory for its chunks; free some, or use fewer threads")


def forward(x: Operands, saved: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
    """o[b t h v] and the final state; fills u, solve and the states before chunks, if they are to be saved."""
    args = _arguments(x)
    o = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    final = x.v.new_empty((x.states, x.v.shape[2], x.k.shape[3], x.v.shape[3]), dtype=torch.float32)
    args.view("o", o)
    args.floats("start", x.state)
    args.floats("final", final)
    for name, tensor in zip(("u", "solve", "states"), saved or (), strict=False):
        args.floats(name, tensor)
    short = saved is None and x.cu is None and x.v.shape[1] <= FEW
    _run(x, "decode" if short else "forward", args)
    return o, final


def backward(x: Operands, saved: Sequence[Tensor], d_o: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay, beta and of the state (float32), from what forward saved."""
    args, dense = _arguments(x), torch.contiguous_format
    grads = [None if y is None else torch.empty_like(y, memory_format=dense) for y in (x.q, x.k, x.v, x.decay, x.beta)]
    for name, grad in zip(("d_q", "d_k", "d_v", "d_decay", "d_beta"), grads, strict=True):
        args.view(name, grad)
    args.view("d_o", None if d_o is None else d_o.to(x.v.dtype))
    blocks = x.v.shape[2] // x.k.shape[2] // args.call.together
    parts = [x.k.new_empty((blocks, *x.k.shape), dtype=torch.float32) for _ in range(2 if blocks > 1 else 0)]
    for name, part in zip(("d_q", "d_k"), parts, strict=False):
        args.view(name, part[0])
        args.call.part = x.k.numel()
    d_start = x.v.new_empty((x.states, x.v.shape[2], x.k.shape[3], x.v.shape[3]), dtype=torch.float32)
    for name, tensor in zip(("u", "solve", "states", "d_final", "d_start"), (*saved, d_final, d_start), strict=True):
        args.floats(name, tensor)
    _run(x, "backward", args)
    summed = [in_order(part).to(like.dtype) for part, like in zip(parts, (x.q, x.k), strict=False)]
    return (*(summed or grads[:2]), *grads[2:], d_start)


def in_order(parts: Tensor) -> Tensor:
    """Blocks added one after another: the same bits whatever the number of threads."""
    total = parts[0]
    for part in parts[1:]:
        total = total.add_(part)
    return total
