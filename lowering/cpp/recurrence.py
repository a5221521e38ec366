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
from . import channel_decay, head_decay, prelude, products, skeleton, units, walk_back
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
_FLOATS = ("start", "final", "d_final", "d_start", "u", "states")  # contiguous float32
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
_KINDS = {
    "head": (head_decay.HEAD, head_decay.HEAD_GRADIENTS, 0, 0),
    "channel": (channel_decay.CHANNEL, channel_decay.CHANNEL_GRADIENTS, channel_decay.EXTRA, channel_decay.BACK_EXTRA),
}


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
    factors, gradients, extra, back_extra = _KINDS[traits.decay]
    constants = (
        f"constexpr int DK = {traits.width}, DV = {traits.out}, KINDS = {1 + traits.delta};\n"
        f"constexpr bool DELTA = {'true' if traits.delta else 'false'};\n"
        f"constexpr int EXTRA = {extra}, BACK_EXTRA = {back_extra};  // of keys, that a kind of decay needs\n"
    )
    parts = (
        f"// {traits.name}\n{prelude.VECTORS}", prelude.OPERANDS, products.PRODUCTS, products.TRANSPOSE, constants, _STRUCTURES,
        skeleton.ROOM, skeleton.PARTS, factors, skeleton.FORWARD, gradients, walk_back.BACKWARD, units.DECODE, units.ENTRIES,
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
    return Traits(x.delta, "channel" if x.by_channel else "head", padded(x.k.shape[3]), padded(x.v.shape[3]))


def padded(channels: int) -> int:
    """The size that a library is made for."""
    return -(-channels // 16) * 16


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


_NAMES = ("q", "k", "v", "decay", "beta")


def _arguments(x: Operands, *, read: bool) -> Arguments:
    b, t, heads, out = x.v.shape
    keys, width = x.k.shape[2:]
    made, few = Call(), together(heads, keys)
    made.batch, made.tokens, made.keys, made.heads, made.width, made.out = b, t, keys, heads, width, out
    made.segments, made.together, made.scale = x.states, few, x.scale
    made.threads = torch.get_num_threads() if b * t * heads * width * out > SMALL else 1
    args = Arguments(made, [])
    for name in _NAMES[not read :]:
        args.view(name, getattr(x, name))
    if x.cu is not None:
        args.alive.append(x.cu.to(torch.int64).contiguous())
        made.borders = args.alive[-1].data_ptr()
    return args


def _run(x: Operands, name: str, args: Arguments) -> None:
    if getattr(library(traits_of(x)), name)(ctypes.byref(args.call)):
        raise PlaitError("linear_recurrence: no memory for its chunks; free some, or use fewer threads")


def forward(x: Operands, saved: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
    """o[b t h v] and the final state; fills u and the states before chunks, if they are to be saved."""
    args, o = _arguments(x, read=True), torch.empty_like(x.v, memory_format=torch.contiguous_format)
    args.view("o", o)
    short = saved is None and x.cu is None and x.v.shape[1] <= FEW
    return o, _forward(x, "decode" if short else "forward", args, saved)


def final_state(x: Operands, saved: Sequence[Tensor] | None) -> Tensor:
    """The final state alone: queries are not read."""
    return _forward(x, "forward", _arguments(x, read=False), saved)


def _forward(x: Operands, name: str, args: Arguments, saved: Sequence[Tensor] | None) -> Tensor:
    final = x.v.new_empty((x.states, x.v.shape[2], x.k.shape[3], x.v.shape[3]), dtype=torch.float32)
    for field, tensor in zip(("start", "final", "u", "states"), (x.state, final, *(saved or ())), strict=False):
        args.floats(field, tensor)
    _run(x, name, args)
    return final


def backward(
    x: Operands, saved: Sequence[Tensor], d_o: Tensor | None, d_final: Tensor | None, *, read: bool = True
) -> tuple[Tensor | None, ...]:
    """Gradients of q (if it was read), k, v, decay, beta and of the state (float32), from what forward saved."""
    args, dense = _arguments(x, read=read), torch.contiguous_format
    operands = {name: getattr(x, name) for name in _NAMES if read or name != "q"}
    grads = {name: torch.empty_like(y, memory_format=dense) for name, y in operands.items() if y is not None}
    parts = _parts(x, args, [name for name in ("q", "k") if name in grads])
    for name, grad in {**grads, **{name: part[0] for name, part in parts.items()}}.items():
        args.view(f"d_{name}", grad)
    args.view("d_o", None if d_o is None else d_o.to(x.v.dtype))
    d_start = None if x.state is None else torch.empty_like(x.state, dtype=torch.float32, memory_format=dense)
    for name, tensor in zip(("u", "states", "start", "d_final", "d_start"), (*saved, x.state, d_final, d_start), strict=True):
        args.floats(name, tensor)
    _run(x, "backward", args)
    grads |= {name: in_order(part).to(operands[name].dtype) for name, part in parts.items()}
    return (*(grads.get(name) for name in _NAMES), d_start)


def _parts(x: Operands, args: Arguments, names: Sequence[str]) -> dict[str, Tensor]:
    """Room for what blocks of value heads give to their key head, if there are several."""
    blocks = x.v.shape[2] // x.k.shape[2] // args.call.together
    args.call.part = x.k.numel()
    return {name: x.k.new_empty((blocks, *x.k.shape), dtype=torch.float32) for name in names} if blocks > 1 else {}


def in_order(parts: Tensor) -> Tensor:
    """Blocks added one after another: the same bits whatever the number of threads."""
    total = parts[0]
    for part in parts[1:]:
        total = total.add_(part)
    return total
