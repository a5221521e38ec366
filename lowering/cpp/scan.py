"""The selective scan in C++: a vector of channels walks over a segment, its states in registers; a library per state size."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F

from ...ir import PlaitError
from . import prelude
from .build import addressable, library
from .recurrence import TYPES, in_order

Tensor = torch.Tensor
Maybe = Tensor | None
MOST = 64  # numbers of a channel's state
PIECE = 32  # tokens whose states are made again together
GROUP = 128  # channels of a unit of work: a constant, so that sums over channels have one order
LANES = 16  # channels are padded to a multiple of this, which every vector divides

_FLOATS = (
    "x", "step", "rate", "k", "q", "state", "o", "final", "starts",
    "d_o", "d_final", "d_x", "d_step", "d_rate", "d_k", "d_q", "d_state",
)  # fmt: skip
_SIZES = ("tokens", "channels", "count", "threads")


class Call(ctypes.Structure):
    """What a library's functions take: contiguous float32, rates and states with channels last; absent ones are null."""

    _fields_ = (
        *((name, c_void_p) for name in (*_FLOATS, "segments")),
        *((name, c_int64) for name in _SIZES),
    )


_STRUCTURES = f"""\
// Tokens [start, end), and which of all pieces is their first.
struct Segment {{ int64_t start, end, piece; }};
struct Call {{
    float {", ".join("*" + name for name in _FLOATS)};
    const Segment* segments;
    int64_t {", ".join(_SIZES)};
}};
constexpr int PIECE = {PIECE}, GROUP = {GROUP}, SOON = 8;
"""

_FORWARD = """\
// What a token does to W channels: their decays, and what is written into their states.
struct Token {
    Vec dt, u;
    const float *k, *q;

    Token(const Call& c, int64_t t, int64_t from)
        : dt(at(c.step + t * c.channels + from)), u(dt * at(c.x + t * c.channels + from)), k(c.k + t * S), q(c.q + t * S)
    {
    }
};

static inline Vec decay(const Call& c, const Token& x, int64_t from, int j)
{
    return exp_of(x.dt * at(c.rate + j * c.channels + from));
}

static inline float* row(float* states, const Call& c, int64_t n, int64_t from) { return states + n * S * c.channels + from; }

static inline void load(Vec* h, const float* from, const Call& c)
{
    for (int j = 0; j < S; j++) h[j] = from ? at(from + j * c.channels) : Vec{};
}

static inline void store(const Vec* h, float* to, const Call& c)
{
    for (int j = 0; j < S; j++) at(to + j * c.channels) = h[j];
}

// Outputs of a segment, or, where there are none, the states that its pieces start from.
template <bool OUT> static inline void walk(const Call& c, int64_t n, int64_t from)
{
    const Segment s = c.segments[n];
    Vec h[S];
    load(h, c.state ? row(c.state, c, n, from) : nullptr, c);
    for (int64_t t = s.start; t < s.end; t++) {
        const Token x(c, t, from);
        // Rows in time stand further apart than a processor looks by itself.
        __builtin_prefetch(c.step + (t + SOON) * c.channels + from);
        __builtin_prefetch(c.x + (t + SOON) * c.channels + from);
        if (!OUT && (t - s.start) % PIECE == 0) store(h, row(c.starts, c, s.piece + (t - s.start) / PIECE, from), c);
        Vec y = {};
        for (int j = 0; j < S; j++) {
            h[j] = decay(c, x, from, j) * h[j] + x.u * x.k[j];
            if (OUT) y += h[j] * x.q[j];
        }
        if (OUT) at(c.o + t * c.channels + from) = y;
    }
    if (OUT) store(h, row(c.final, c, n, from), c);
}

static void scan(const Call& c, int64_t n, int64_t low, int64_t high, int64_t)
{
    for (int64_t from = low; from < high; from += W) walk<true>(c, n, from);
}
"""

_BACKWARD = """\
// The states of a piece, from the one that it starts from on, and its decays.
struct Piece {
    Vec h[PIECE + 1][S], a[PIECE][S];
};

static inline void again(const Call& c, Piece& p, int64_t low, int64_t high, int64_t number, int64_t from)
{
    load(p.h[0], row(c.starts, c, number, from), c);
    for (int64_t t = low; t < high; t++) {
        const Token x(c, t, from);
        const int i = (int)(t - low);
        for (int j = 0; j < S; j++) {
            p.a[i][j] = decay(c, x, from, j);
            p.h[i + 1][j] = p.a[i][j] * p.h[i][j] + x.u * x.k[j];
        }
    }
}

// One token's gradients, given those of the states behind it (g), which become those of the states before it.
static inline void pull(const Call& c, const Piece& p, int i, int64_t t, int64_t from, int64_t group, Vec* g, Vec* d_rate)
{
    const Token x(c, t, from);
    const int64_t place = t * c.channels + from, own = (group * c.tokens + t) * S;
    if (c.d_o) __builtin_prefetch(c.d_o + place - SOON * c.channels);
    const Vec dy = c.d_o ? at(c.d_o + place) : Vec{};
    Vec du = {}, d_dt = {};
    for (int j = 0; j < S; j++) {
        g[j] += dy * x.q[j];
        c.d_q[own + j] += sum(dy * p.h[i + 1][j]);
        c.d_k[own + j] += sum(g[j] * x.u);
        du += g[j] * x.k[j];
        g[j] *= p.a[i][j];
        const Vec log = g[j] * p.h[i][j];
        d_dt += log * at(c.rate + j * c.channels + from);
        d_rate[j] += log * x.dt;
    }
    at(c.d_x + place) = du * x.dt;
    at(c.d_step + place) = d_dt + du * at(c.x + place);
}

static void scan_back(const Call& c, int64_t n, int64_t low, int64_t high, int64_t group)
{
    const Segment s = c.segments[n];
    Piece p;
    for (int64_t from = low; from < high; from += W) {
        walk<false>(c, n, from);
        Vec g[S], d_rate[S] = {};
        load(g, c.d_final ? row(c.d_final, c, n, from) : nullptr, c);
        for (int64_t number = (s.end - s.start + PIECE - 1) / PIECE; number-- > 0;) {
            const int64_t first = s.start + number * PIECE, last = first + PIECE < s.end ? first + PIECE : s.end;
            again(c, p, first, last, s.piece + number, from);
            for (int64_t t = last; t-- > first;) pull(c, p, (int)(t - first), t, from, group, g, d_rate);
        }
        if (c.d_state) store(g, row(c.d_state, c, n, from), c);
        store(d_rate, row(c.d_rate, c, n, from), c);
    }
}
"""

UNITS = """\
// Every unit is alone with its results, so that the number of threads changes no bit.
typedef void (*Work)(const Call&, int64_t, int64_t, int64_t, int64_t);

static int over_units(const Call& c, Work work)
{
    const int64_t groups = (c.channels + GROUP - 1) / GROUP, units = c.count * groups;
#pragma omp parallel num_threads((int)(units < c.threads ? units : c.threads))
    {
        Flushed flushed;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++) {
            const int64_t group = unit % groups, low = group * GROUP, high = low + GROUP;
            work(c, unit / groups, low, high < c.channels ? high : c.channels, group);
        }
    }
    return 0;
}

#define ENTRY extern "C" __attribute__((visibility("default"))) int
ENTRY forward(const Call* c) { return over_units(*c, scan); }
ENTRY backward(const Call* c) { return over_units(*c, scan_back); }
"""


def source(state: int) -> str:
    """The C++ text for so many numbers a channel."""
    parts = (prelude.VECTORS, f"constexpr int S = {state};\n", _STRUCTURES, _FORWARD, _BACKWARD, UNITS)
    return f"// selective_scan, states of {state}\n" + "\n".join(parts)


def name_of(state: int) -> str:
    """What its library is called."""
    return f"scan_{state}"


@cache
def _library(state: int) -> ctypes.CDLL | None:
    made = library(source(state), name_of(state))
    if made is not None:
        for function in (made.forward, made.backward):
            function.argtypes, function.restype = (ctypes.POINTER(Call),), ctypes.c_int
    return made


def ready(*operands: Maybe) -> bool:
    """Whether C++ runs a call with x, step, rate and the rest: it is one that C++ is made for, and there is a compiler."""
    x, _, rate = operands[:3]
    if x is None or rate is None or not addressable(*operands):
        return False
    known = all(y is None or y.dtype in TYPES or y.dtype == torch.int64 for y in operands)
    return known and x.numel() > 0 and 1 <= rate.shape[1] <= MOST and _library(rate.shape[1]) is not None


def _wide(x: Tensor) -> Tensor:
    """[..., c] as contiguous float32, channels padded with zeros."""
    return F.pad(x.float(), (0, -x.shape[-1] % LANES)).contiguous()


def _states(x: Maybe) -> Maybe:
    """[n c s] as [n s c]."""
    return None if x is None else _wide(x.transpose(1, 2))


def segments_of(borders: list[int]) -> tuple[Tensor, int]:
    """[count, 3]: where each segment starts and ends, and which of all pieces is its first; and how many pieces there are."""
    pieces = [0]
    for a, b in pairwise(borders):
        pieces.append(pieces[-1] + -(-(b - a) // PIECE))
    rows = zip(borders[:-1], borders[1:], pieces[:-1], strict=True)
    return torch.tensor(list(rows), dtype=torch.int64).reshape(-1, 3), pieces[-1]


def _call(x: Tensor, rate: Tensor, borders: list[int], operands: dict[str, Maybe]) -> tuple[Call, list[Tensor]]:
    """The call, and what has to live until it is done."""
    rows, pieces = segments_of(borders)
    channels = -(-x.shape[2] // LANES) * LANES
    threads = torch.get_num_threads() if x.numel() * rate.shape[1] > 1 << 16 else 1
    call = Call(tokens=x.shape[0] * x.shape[1], channels=channels, count=len(borders) - 1, threads=threads)
    if operands.get("d_o") is not None or operands.get("d_final") is not None:
        operands["starts"] = torch.empty(max(1, pieces), rate.shape[1], channels)
    kept = {"segments": rows, "rate": _wide(rate.t()), **operands}
    for name, tensor in kept.items():
        if tensor is not None:
            setattr(call, name, tensor.data_ptr())
    return call, [y for y in kept.values() if y is not None]


def _operands(x: Tensor, step: Tensor, k: Tensor, q: Tensor, state: Maybe) -> dict[str, Maybe]:
    narrow = {"k": k.float().contiguous(), "q": q.float().contiguous()}
    return {"x": _wide(x), "step": _wide(step), **narrow, "state": _states(state)}


def forward(
    x: Tensor, step: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Maybe, borders: list[int]
) -> tuple[Tensor, Tensor]:
    """o[b t c] and the final states [n c s]."""
    given = _operands(x, step, k, q, state)
    o = torch.empty_like(_there(given["x"]))
    final = o.new_empty(len(borders) - 1, rate.shape[1], o.shape[2])
    call, kept = _call(x, rate, borders, {**given, "o": o, "final": final})
    _run(rate, "forward", call, kept)
    c = x.shape[2]
    return o[..., :c].to(x.dtype).contiguous(), final[..., :c].transpose(1, 2).contiguous()


def backward(
    d_o: Maybe, d_final: Maybe, x: Tensor, step: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Maybe, borders: list[int]
) -> tuple[Tensor, ...]:
    """Cotangents of x, step, rate, k, q and state."""
    given = _operands(x, step, k, q, state)
    wide, (b, t, c), s = _there(given["x"]), x.shape, rate.shape[1]
    groups, count = -(-wide.shape[2] // GROUP), len(borders) - 1
    made = {"d_x": torch.empty_like(wide), "d_step": torch.empty_like(wide)}
    made |= {name: wide.new_zeros(groups, b * t, s) for name in ("d_k", "d_q")}
    made |= {name: wide.new_empty(count, s, wide.shape[2]) for name in ("d_rate", "d_state")}
    given |= {"d_o": torch.zeros_like(wide) if d_o is None else _wide(d_o), "d_final": _states(d_final)}
    call, kept = _call(x, rate, borders, {**given, **made})
    _run(rate, "backward", call, kept)
    d_rate = in_order(made["d_rate"])[:, :c].t() if count else torch.zeros_like(rate)
    d_k, d_q = (in_order(made[n]).view(b, t, s) for n in ("d_k", "d_q"))
    d_state = x.new_empty(0) if state is None else made["d_state"][..., :c].transpose(1, 2).to(state.dtype).contiguous()
    wide_ones = (made[n][..., :c].contiguous() for n in ("d_x", "d_step"))
    d_x, d_step = (d.to(y.dtype) for d, y in zip(wide_ones, (x, step), strict=True))
    return d_x, d_step, d_rate.to(rate.dtype).contiguous(), d_k.to(k.dtype), d_q.to(q.dtype), d_state


def _there(x: Maybe) -> Tensor:
    assert x is not None
    return x


def _run(rate: Tensor, name: str, call: Call, kept: list[Tensor]) -> None:
    made = _library(rate.shape[1])
    if made is None or getattr(made, name)(ctypes.byref(call)):
        raise PlaitError("selective_scan: its generated C++ is gone; set PLAIT_CACHE to a directory that can be written")
    del kept
