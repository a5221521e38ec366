"""Softmax attention in C++: one library for all sizes of heads, forward and backward."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F

from ...ir import PlaitError
from . import attention_back, attention_forward, attention_text, prelude
from .build import addressable, library
from .products import TRANSPOSE
from .recurrence import in_order

Tensor = torch.Tensor
NAME = "attention"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDEST = 256  # channels of a head
BLOCK = 64  # queries and keys of a block
SHARES = 4  # the fewest units of work of a backward, where there are as many blocks of queries
SMALL = 1 << 20  # products of a call that one thread does sooner than it wakes another
NEVER = -1e30  # the log of a denominator that nothing is added to

_VIEWS = ("q", "k", "v", "o", "d_o", "d_q", "d_k", "d_v")
_POINTERS = ("lse", "sinks", "bias", "d_bias", "d_sinks", "packed", "partial", "borders", "lengths")
_SIZES = (
    "segments", "place", "causal", "window", "batch", "queries", "keys", "heads", "groups", "width", "out", "reach", "splits",
    "threads",
)  # fmt: skip
_CALL = struct.Struct(f"{5 * len(_VIEWS) + len(_POINTERS) + len(_SIZES)}q2d")  # the C++ of a call, field by field
_ABSENT = (0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Sight:
    """Which keys query i, which stands at `at` + i, may see: see the ops for what the options hide."""

    at: int
    causal: bool = True
    window: int = 0
    cu: Tensor | None = None
    lengths: Tensor | None = None

    def needed(self, t: int, s: int) -> slice:
        """Of s keys those that any of t queries sees: what stands behind them in a cache may be anything."""
        last = min(s, max(0, self.at + t)) if self.causal else s
        alone = self.window and self.cu is None and self.lengths is None
        return slice(min(last, max(0, self.at - self.window + 1)) if alone else 0, last)

    def behind(self, first: int) -> Sight:
        """The same, told in keys from `first` on."""
        return replace(self, at=self.at - first)


@dataclass(frozen=True)
class Logits:
    """What becomes of a product: its factor, a softcap, one more logit a head, and what a distance adds, [heads, t + s - 1]."""

    scale: float
    cap: float = 0.0
    sinks: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """Of queries, keys and values, of sinks [heads] and of the bias by distance [heads, t + s - 1]; absent ones are None."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    bias: Tensor | None


def source() -> str:
    """The C++ text: one for all sizes of heads and kinds of logits."""
    front = (prelude.VECTORS, prelude.OPERANDS, TRANSPOSE, attention_text.STRUCTURES, attention_text.NUMBERS)
    parts = (attention_text.TILES, attention_text.SIGHT, attention_forward.FORWARD, attention_forward.ENTRIES)
    back = (attention_back.ROOM, attention_back.WEIGHTS, attention_back.BACKWARD)
    return "// attention\n" + "\n".join((*front, *parts, *back))


@cache
def _library() -> ctypes.CDLL | None:
    made = library(source(), NAME)
    if made is not None:
        for function in (made.forward, made.backward):
            function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int
    return made


def ready(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> bool:
    """Whether C++ runs a call: it is one that C++ is made for, and there is a compiler."""
    known = addressable(q, k, v, *others) and all(x.dtype in TYPES and x.numel() for x in (q, k, v))
    if not known or max(q.shape[3], v.shape[3]) > WIDEST or q.shape[2] % k.shape[2]:
        return False
    return _library() is not None


def forward(q: Tensor, k: Tensor, v: Tensor, sight: Sight, logits: Logits) -> tuple[Tensor, Tensor]:
    """o[b t h e] in q's dtype, and the log of each softmax's denominator [b, h, t]."""
    (b, t, h, _), s = q.shape, k.shape[1]
    o, lse = q.new_empty(b, t, h, v.shape[3]), q.new_empty(b, h, t, dtype=torch.float32)
    seen = sight.needed(t, s)
    if seen.start == seen.stop:
        return o.zero_(), lse.fill_(NEVER)
    _run(
        "forward",
        {"q": q, "k": k[:, seen], "v": v[:, seen], "o": o},
        {"lse": lse},
        sight.behind(seen.start),
        logits,
    )
    return o, lse


def backward(d_o: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sight: Sight, logits: Logits) -> Gradients:
    """The gradients of all operands."""
    (b, t, h, _), seen = q.shape, sight.needed(q.shape[1], k.shape[1])
    s = seen.stop - seen.start
    if not s:
        return _nothing(q, k, v, logits)
    d_q, d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for d in (d_k, d_v):
        d[:, : seen.start], d[:, seen.stop :] = 0, 0
    splits = min(-(-t // BLOCK), -(-SHARES // (b * h)))
    units, shared = b * h * splits, splits > 1 or h > k.shape[2]
    made = {
        "partial": torch.empty(units * -(-s // BLOCK) * _panels(q, v)) if shared else None,
        "d_sinks": None if logits.sinks is None else torch.empty(units),
        "d_bias": None if logits.bias is None else torch.zeros(units, _reach(t, s)),
    }
    views = {"q": q, "k": k[:, seen], "v": v[:, seen], "o": o, "d_o": d_o, "d_q": d_q, "d_k": d_k[:, seen], "d_v": d_v[:, seen]}
    _run("backward", views, {"lse": lse.contiguous(), **made}, sight.behind(seen.start), logits, splits)
    d_sinks, d_bias = (None if x is None else _by_head(x, b, h) for x in (made["d_sinks"], made["d_bias"]))
    return Gradients(d_q, d_k, d_v, d_sinks, None if d_bias is None else d_bias[:, BLOCK : BLOCK + t + s - 1])


def _nothing(q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> Gradients:
    """No query sees a key."""
    zeros = (None if x is None else torch.zeros_like(x) for x in (q, k, v, logits.sinks, logits.bias))
    d_q, d_k, d_v, d_sinks, d_bias = zeros
    assert d_q is not None and d_k is not None and d_v is not None
    return Gradients(d_q, d_k, d_v, d_sinks, d_bias)


def _by_head(x: Tensor, b: int, h: int) -> Tensor:
    """What units of work add up to for each head, rows and shares in order."""
    return in_order(x.view(b, h, -1, *x.shape[1:]).transpose(1, 2).flatten(0, 1))


def _panels(q: Tensor, v: Tensor) -> int:
    """Numbers of a block of keys and values: panels of 64 columns."""
    return sum(-(-x.shape[3] // BLOCK) for x in (q, v)) * BLOCK * BLOCK


def _reach(t: int, s: int) -> int:
    """Numbers of a head's bias by distance, with room for blocks that are not full on both sides."""
    return t + s - 1 + 3 * BLOCK


def _run(
    name: str, views: dict[str, Tensor], floats: dict[str, Tensor | None], sight: Sight, logits: Logits,
    splits: int = 1,
) -> None:  # fmt: skip
    q, k, v = (views[name] for name in "qkv")
    (b, t, h, width), s = q.shape, k.shape[1]
    held = {name: x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for name, x in views.items()}
    cu, lengths = (None if x is None else x.to(torch.int64).contiguous() for x in (sight.cu, sight.lengths))
    bias = None if logits.bias is None else F.pad(logits.bias.float(), (BLOCK, 2 * BLOCK)).contiguous()
    sinks = None if logits.sinks is None else logits.sinks.float().contiguous()
    given = {**floats, "sinks": sinks, "bias": bias, "borders": cu, "lengths": lengths}
    sizes = (
        0 if cu is None else len(cu) - 1, sight.at, sight.causal, sight.window, b, t, s, h, k.shape[2], width, v.shape[3],
        _reach(t, s), splits, torch.get_num_threads() if b * h * t * s * width > SMALL else 1,
    )  # fmt: skip
    pointers = (0 if (x := given.get(name)) is None else x.data_ptr() for name in _POINTERS)
    flat = (n for name in _VIEWS for n in (_view(held[name]) if name in held else _ABSENT))
    made = _library()
    if made is None or getattr(made, name)(_CALL.pack(*flat, *pointers, *sizes, logits.scale, logits.cap)):
        raise PlaitError("attention: its generated C++ is gone; set PLAIT_CACHE to a directory that can be written")


def _view(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), TYPES[x.dtype], *x.stride()[:3]
