"""Griffin's gated unit in C++: a group of channels walks over a segment's tokens, its states in a core's first cache."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache

import torch

from ...ir import PlaitError
from ...ir.ops.scan import STEEPEST
from . import prelude
from .build import addressable, library
from .recurrence import TYPES
from .scan import GROUP, PIECE, UNITS, segments_of

Tensor = torch.Tensor
Maybe = Tensor | None
NAME = "rg_lru"

_POINTERS = ("x", "decay", "h", "d_h", "d_x", "d_decay")
_FLOATS = ("state", "final", "starts", "d_final", "d_state")
_SIZES = ("type", "decay_type", "channels", "count", "threads")


class Call(ctypes.Structure):
    """What the library's functions take: contiguous operands; x, h and their gradients share a dtype; absent ones are null."""

    _fields_ = (
        *((name, c_void_p) for name in (*_POINTERS, *_FLOATS, "places", "segments")),
        *((name, c_int64) for name in _SIZES),
    )


_STRUCTURES = f"""\
// Tokens [start, end), and which of all pieces is their first.
struct Segment {{ int64_t start, end, piece; }};
struct Call {{
    void {", ".join("*" + name for name in _POINTERS)};
    float {", ".join("*" + name for name in _FLOATS)};
    const int64_t* places;  // a sequence begins where its place is 0
    const Segment* segments;
    int64_t {", ".join(_SIZES)};
}};
constexpr int PIECE = {PIECE}, GROUP = {GROUP}, AHEAD = 6;
constexpr float FLATTEST = {0.5 / STEEPEST}f;  // roots below it have the slope that it has
"""

_TOKENS = """\
// Channels [from, from + n) of a call.
struct Span {
    const Call& c;
    int64_t from;
    int n;

    // A token's channels as floats, zeros up to a whole vector.
    const float* row(const void* p, int64_t type, int64_t t, float* room) const
    {
        const int64_t place = t * c.channels + from;
        if (type == F32 && n % W == 0) return (const float*)p + place;
        read_row(room, (const char*)p + place * (type == F32 ? 4 : 2), type, n, (n + W - 1) / W * W, 1);
        return room;
    }

    Ahead ahead(const void* p, int64_t type, int64_t t) const { return {p, type, t * c.channels + from}; }

    void write(void* p, int64_t type, int64_t t, const float* line) const
    {
        write_row((char*)p + (t * c.channels + from) * (type == F32 ? 4 : 2), line, type, n, 1);
    }

    // States, or their gradients; nothing is zero.
    void load(float* to, const float* p, int64_t number) const
    {
        memset(to, 0, sizeof(float) * GROUP);
        if (p) memcpy(to, p + number * c.channels + from, sizeof(float) * n);
    }

    void store(float* p, int64_t number, const float* line) const
    {
        memcpy(p + number * c.channels + from, line, sizeof(float) * n);
    }
};

static inline Vec root_of(Vec x)
{
    float lanes[W];
    at(lanes) = x;
    for (int i = 0; i < W; i++) lanes[i] = sqrtf(lanes[i]);
    return at(lanes);
}

// What a token keeps of the state and what its input is multiplied by: e^d and sqrt(1 - e^2d), from e^d - 1.
struct Gate {
    Vec keep, root;
    Gate(Vec d, bool begins)
    {
        const Vec less = exp_less_one(d);
        keep = begins ? Vec{} : less + 1.0f;
        root = begins ? all(1) : root_of(-less * (less + 2.0f));
    }
};
"""

_FORWARD = """\
static void token(const Span& s, int64_t t, float* h)
{
    float rooms[2][GROUP];
    const float *x = s.row(s.c.x, s.c.type, t, rooms[0]), *d = s.row(s.c.decay, s.c.decay_type, t, rooms[1]);
    const bool begins = s.c.places[t] == 0;
    const Ahead xs = s.ahead(s.c.x, s.c.type, t + AHEAD), ds = s.ahead(s.c.decay, s.c.decay_type, t + AHEAD);
    for (int i = 0; i < s.n; i += W) {
        xs.ask(i);
        ds.ask(i);
        const Gate gate(at(d + i), begins);
        at(h + i) = gate.keep * at(h + i) + gate.root * at(x + i);
    }
}

static void scan(const Call& c, int64_t number, int64_t low, int64_t high, int64_t)
{
    const Segment run = c.segments[number];
    const Span s = {c, low, (int)(high - low)};
    float h[GROUP];
    s.load(h, c.state, number);
    for (int64_t t = run.start; t < run.end; t++) {
        token(s, t, h);
        s.write(c.h, c.type, t, h);
    }
    s.store(c.final, number, h);
}
"""

_BACKWARD = """\
// What the tokens of a piece read: the states before them, their gates and their inputs.
struct Piece {
    float before[PIECE][GROUP], keep[PIECE][GROUP], root[PIECE][GROUP], x[PIECE][GROUP];
};

static void again(const Span& s, Piece& p, int64_t first, int64_t last, float* h)
{
    for (int64_t t = first; t < last; t++) {
        const int64_t i = t - first;
        float room[GROUP];
        const float *x = s.row(s.c.x, s.c.type, t, p.x[i]), *d = s.row(s.c.decay, s.c.decay_type, t, room);
        const bool begins = s.c.places[t] == 0;
        for (int j = 0; j < s.n; j += W) {
            const Gate gate(at(d + j), begins);
            at(p.before[i] + j) = at(h + j);
            at(p.keep[i] + j) = gate.keep;
            at(p.root[i] + j) = gate.root;
            at(p.x[i] + j) = at(x + j);
            at(h + j) = gate.keep * at(h + j) + gate.root * at(x + j);
        }
    }
}

// One token's gradients, given that of the state behind it (g), which becomes that of the state before it.
static void pull(const Span& s, const Piece& p, int64_t i, int64_t t, float* g)
{
    float rooms[3][GROUP], *d_x = rooms[0], *d_decay = rooms[1];
    const float* dy = s.c.d_h ? s.row(s.c.d_h, s.c.type, t, rooms[2]) : nullptr;
    const Ahead dys = s.ahead(s.c.d_h, s.c.type, t - AHEAD);
    for (int j = 0; j < s.n; j += W) {
        dys.ask(j);
        const Vec own = dy ? at(g + j) + at(dy + j) : at(g + j), keep = at(p.keep[i] + j), root = at(p.root[i] + j);
        const Vec flat = pick(root < all(FLATTEST), all(FLATTEST), root);
        at(d_x + j) = own * root;
        at(g + j) = own * keep;
        at(d_decay + j) = own * keep * (at(p.before[i] + j) - keep * at(p.x[i] + j) / flat);
    }
    s.write(s.c.d_x, s.c.type, t, d_x);
    s.write(s.c.d_decay, s.c.decay_type, t, d_decay);
}

static void scan_back(const Call& c, int64_t number, int64_t low, int64_t high, int64_t)
{
    const Segment run = c.segments[number];
    const Span s = {c, low, (int)(high - low)};
    float h[GROUP], g[GROUP];
    Piece p;
    s.load(h, c.state, number);
    for (int64_t t = run.start; t < run.end; t++) {
        if ((t - run.start) % PIECE == 0) s.store(c.starts, run.piece + (t - run.start) / PIECE, h);
        token(s, t, h);
    }
    s.load(g, c.d_final, number);
    for (int64_t i = (run.end - run.start + PIECE - 1) / PIECE; i-- > 0;) {
        const int64_t first = run.start + i * PIECE, last = first + PIECE < run.end ? first + PIECE : run.end;
        s.load(h, c.starts, run.piece + i);
        again(s, p, first, last, h);
        for (int64_t t = last; t-- > first;) pull(s, p, t - first, t, g);
    }
    if (c.d_state) s.store(c.d_state, number, g);
}
"""


def source() -> str:
    """The C++ text, the same for all sizes."""
    shared = (prelude.VECTORS, prelude.LESS_ONE, prelude.OPERANDS, prelude.AHEAD)
    parts = (*shared, _STRUCTURES, _TOKENS, _FORWARD, _BACKWARD, UNITS)
    return f"// {NAME}\n" + "\n".join(parts)


@cache
def _library() -> ctypes.CDLL | None:
    made = library(source(), NAME)
    if made is not None:
        for function in (made.forward, made.backward):
            function.argtypes, function.restype = (ctypes.POINTER(Call),), ctypes.c_int
    return made


def ready(x: Tensor, decay: Tensor, *others: Maybe) -> bool:
    """Whether C++ runs a call: it is one that C++ is made for, and there is a compiler."""
    if not addressable(x, decay, *others) or any(y is not None and y.dtype not in TYPES for y in (x, decay, *others[1:])):
        return False
    return x.numel() > 0 and others[0] is not None and _library() is not None


def _call(x: Tensor, decay: Tensor, p: Tensor, borders: list[int], others: dict[str, Maybe]) -> tuple[Call, dict[str, Maybe]]:
    """The call, and what has to live until it is done."""
    rows, pieces = segments_of(borders)
    threads = torch.get_num_threads() if x.numel() > 1 << 15 else 1
    call = Call(
        type=TYPES[x.dtype], decay_type=TYPES[decay.dtype], channels=x.shape[2], count=len(borders) - 1, threads=threads
    )
    if "d_x" in others:
        others["starts"] = torch.empty(pieces, x.shape[2])
    given = {"x": x.contiguous(), "decay": decay.contiguous(), "places": p.long().contiguous(), "segments": rows, **others}
    for name, tensor in given.items():
        if tensor is not None:
            setattr(call, name, tensor.data_ptr())
    return call, given


def _float(x: Maybe) -> Maybe:
    return None if x is None else x.float().contiguous()


def forward(x: Tensor, decay: Tensor, p: Tensor, state: Maybe, borders: list[int]) -> tuple[Tensor, Tensor]:
    """h[b t c] and the final states [n c]."""
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    final = x.new_empty(len(borders) - 1, x.shape[2], dtype=torch.float32)
    _run("forward", *_call(x, decay, p, borders, {"state": _float(state), "h": h, "final": final}))
    return h, final


def backward(
    d_h: Maybe, d_final: Maybe, x: Tensor, decay: Tensor, p: Tensor, state: Maybe, borders: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of x, decay and state; an empty tensor stands for that of an absent one."""
    d_x, d_decay = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x, decay))
    d_state = None if state is None else torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)
    given = {"d_h": None if d_h is None else d_h.to(x.dtype).contiguous(), "d_final": _float(d_final), "state": _float(state)}
    _run("backward", *_call(x, decay, p, borders, {**given, "d_x": d_x, "d_decay": d_decay, "d_state": d_state}))
    return d_x, d_decay, x.new_empty(0) if d_state is None or state is None else d_state.to(state.dtype)


def _run(name: str, call: Call, kept: dict[str, Maybe]) -> None:
    made = _library()
    if made is None or getattr(made, name)(ctypes.byref(call)):
        raise PlaitError("rg_lru: its generated C++ is gone; set PLAIT_CACHE to a directory that can be written")
    del kept
