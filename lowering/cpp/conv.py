"""The short causal convolution in C++: one pass forward, one backward; a library per number of taps and activation."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from itertools import pairwise

import torch

from ...ir import DataError, PlaitError, TypeMismatch
from . import prelude
from .build import addressable, library
from .recurrence import TYPES, in_order

Tensor = torch.Tensor
PIECE = 256  # tokens of a unit of work: a constant, so that sums over tokens have one order
MOST = 8  # taps

_POINTERS = ("x", "dy", "y", "dx")
_FLOATS = ("taps", "bias", "past", "last", "d_last", "d_past", "d_taps")
_SIZES = ("type", "rows", "channels", "row", "d_row", "count")


class Call(ctypes.Structure):
    """What a library's functions take; x, y, dy and dx share a dtype."""

    _fields_ = (
        *((name, c_void_p) for name in (*_POINTERS, *_FLOATS, "pieces")),
        *((name, c_int64) for name in (*_SIZES, "threads")),
    )


_STRUCTURES = f"""\
// A segment's tokens [start, end), of which [low, high) are worked on.
struct Piece {{ int64_t segment, start, end, low, high; }};
struct Call {{
    void {", ".join("*" + name for name in _POINTERS)};
    float {", ".join("*" + name for name in _FLOATS)};
    const Piece* pieces;
    int64_t {", ".join((*_SIZES, "threads"))};
}};
constexpr int BLOCK = 1024;  // channels worked on together: their rows stay in a core's first cache
"""

_ROWS = """\
// A vector that may be cut short: n of its numbers exist.
template <bool CUT> static inline Vec load(const float* p, int n)
{
    if (!CUT) return at(p);
    Vec x = {};
    memcpy(&x, p, sizeof(float) * n);
    return x;
}

template <bool CUT> static inline void store(float* p, Vec x, int n)
{
    if (CUT) memcpy(p, &x, sizeof(float) * n);
    else at(p) = x;
}

// A span of channels of rows in time. Rows that are not float are widened into a ring.
struct Rows {
    const Call& c;
    const Piece& p;
    int64_t from;
    int n;
    float ring[K][BLOCK];

    // Row t of x, or of what was before the segment.
    const float* row(int64_t t)
    {
        if (t < p.start) return c.past + (p.segment * (K - 1) + t - p.start + K - 1) * c.channels + from;
        if (c.type == F32) return (const float*)c.x + t * c.row + from;
        return ring[t % K];
    }

    void widen(int64_t t)
    {
        if (c.type != F32 && t >= p.start) read_row(ring[t % K], (const uint16_t*)c.x + t * c.row + from, c.type, n, n, 1);
    }

    // The window that ends in token t.
    void window(int64_t t, const float** rows)
    {
        widen(t);
        for (int i = 0; i < K; i++) rows[i] = row(t - K + 1 + i);
    }
};

// Taps, bias, and how far apart the taps of a channel stand.
struct Taps {
    const float *taps, *bias;
    int64_t apart;
};

template <bool CUT> static inline Vec before_act(const float* const* rows, const Taps& w, int d, int few)
{
    Vec y = w.bias ? load<CUT>(w.bias + d, few) : Vec{};
    for (int i = 0; i < K; i++) y += load<CUT>(w.taps + i * w.apart + d, few) * load<CUT>(rows[i] + d, few);
    return y;
}
"""

_FORWARD = """\
template <bool CUT> static inline void token(const float* const* rows, const Taps& w, float* to, int d, int few)
{
    const Vec y = before_act<CUT>(rows, w, d, few);
    store<CUT>(to + d, SILU ? y / (exp_of(-y) + 1.0f) : y, few);
}

static void conv(const Call& c, const Piece& p, int64_t from, int n, int64_t)
{
    Rows x{c, p, from, n, {}};
    float line[BLOCK];
    const Taps w = {c.taps + from, c.bias ? c.bias + from : nullptr, c.channels};
    const float* rows[K];
    for (int64_t t = p.low - K + 1; t < p.low; t++) x.widen(t);
    for (int64_t t = p.low; t < p.high; t++) {
        x.window(t, rows);
        const Ahead next(c.x, c.type, (t + 1) * c.row + from);
        float* to = c.type == F32 ? (float*)c.y + t * c.channels + from : line;
        int d = 0;
        for (; d + W <= n; d += W) {
            next.ask(d);
            token<false>(rows, w, to, d, W);
        }
        if (d < n) token<true>(rows, w, to, d, n - d);
        if (c.type != F32) write_row((uint16_t*)c.y + t * c.channels + from, line, c.type, n, 1);
    }
    if (p.high < p.end) return;
    for (int j = 0; j < K - 1; j++)
        memcpy(c.last + (p.segment * (K - 1) + j) * c.channels + from, x.row(p.end - K + 1 + j), sizeof(float) * n);
}
"""

_BACKWARD = """\
// A token's gradient before the activation; `own` tokens add to the gradients of taps and bias.
template <bool CUT>
static inline void pull(const float* const* rows, const Taps& w, const float* dy, float* g, float* sums, bool own, int d,
                        int few)
{
    Vec dt = load<CUT>(dy + d, few);
    if (SILU) {
        const Vec y = before_act<CUT>(rows, w, d, few), s = 1.0f / (exp_of(-y) + 1.0f);
        dt *= s * (y * (1.0f - s) + 1.0f);
    }
    store<CUT>(g + d, dt, few);
    if (!own) return;
    for (int i = 0; i <= K; i++) {
        float* to = sums + i * w.apart + d;
        store<CUT>(to, load<CUT>(to, few) + (i < K ? dt * load<CUT>(rows[i < K ? i : 0] + d, few) : dt), few);
    }
}

// An input's gradient from those of the K tokens that saw it, the last of them first.
template <bool CUT>
static inline void give(const float* const* g, const Taps& w, const float* last, float* to, int d, int few)
{
    Vec dx = last ? load<CUT>(last + d, few) : Vec{};
    for (int i = 0; i < K; i++) dx += load<CUT>(w.taps + i * w.apart + d, few) * load<CUT>(g[i] + d, few);
    store<CUT>(to + d, dx, few);
}

static void conv_back(const Call& c, const Piece& p, int64_t from, int n, int64_t number)
{
    Rows x{c, p, from, n, {}};
    float ring[K][BLOCK] = {}, line[BLOCK];
    float* sums = c.d_taps + number * (K + 1) * c.channels + from;
    const Taps w = {c.taps + from, c.bias ? c.bias + from : nullptr, c.channels};
    const float *rows[K], *g[K];
    for (int i = 0; i <= K; i++) memset(sums + i * c.channels, 0, sizeof(float) * n);
    for (int64_t t = p.low - K + 1; t < p.low; t++) x.widen(t);
    for (int64_t t = p.low; t < p.high + K - 1; t++) {
        for (int i = 0; i < K; i++) g[i] = ring[(t - i - p.start + K) % K];
        float* own = ring[(t - p.start) % K];
        int d = 0;
        if (t < p.end) {
            x.window(t, rows);
            const Ahead next(c.x, c.type, (t + 1) * c.row + from), pulled(c.dy, c.type, (t + 1) * c.d_row + from);
            const float* dy = c.type == F32 ? (const float*)c.dy + t * c.d_row + from : line;
            if (c.type != F32) read_row(line, (const uint16_t*)c.dy + t * c.d_row + from, c.type, n, n, 1);
            for (; d + W <= n; d += W) {
                next.ask(d);
                pulled.ask(d);
                pull<false>(rows, w, dy, own, sums, t < p.high, d, W);
            }
            if (d < n) pull<true>(rows, w, dy, own, sums, t < p.high, d, n - d);
        } else
            memset(own, 0, sizeof(float) * n);
        const int64_t s = t - K + 1, kept = s - (p.end - K + 1);
        if (s < p.low && p.low > p.start) continue;
        const float* last = kept >= 0 ? c.d_last + (p.segment * (K - 1) + kept) * c.channels + from : nullptr;
        float* to = c.type == F32 ? (float*)c.dx + s * c.channels + from : line;
        if (s < p.start) to = c.d_past + (p.segment * (K - 1) + s - p.start + K - 1) * c.channels + from;
        for (d = 0; d + W <= n; d += W) give<false>(g, w, last, to, d, W);
        if (d < n) give<true>(g, w, last, to, d, n - d);
        if (s >= p.start && c.type != F32) write_row((uint16_t*)c.dx + s * c.channels + from, line, c.type, n, 1);
    }
}
"""

_ENTRIES = """\
// Every unit is alone with its results, so that the number of threads changes no bit.
typedef void (*Work)(const Call&, const Piece&, int64_t, int, int64_t);

static int over_units(const Call& c, Work work)
{
    const int64_t blocks = (c.channels + BLOCK - 1) / BLOCK, units = c.count * blocks;
#pragma omp parallel num_threads((int)(units < c.threads ? units : c.threads))
    {
        Flushed flushed;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++) {
            const int64_t from = unit % blocks * BLOCK, left = c.channels - from;
            work(c, c.pieces[unit / blocks], from, (int)(left < BLOCK ? left : BLOCK), unit / blocks);
        }
    }
    return 0;
}

#define ENTRY extern "C" __attribute__((visibility("default"))) int
ENTRY forward(const Call* c)
{
    fresh(c->y, c->rows * c->channels * (c->type == F32 ? 4 : 2));
    return over_units(*c, conv);
}
ENTRY backward(const Call* c)
{
    fresh(c->dx, c->rows * c->channels * (c->type == F32 ? 4 : 2));
    return over_units(*c, conv_back);
}
"""


def source(taps: int, act: str) -> str:
    """The C++ text for so many taps and an activation."""
    constants = f"constexpr int K = {taps};\nconstexpr bool SILU = {'true' if act == 'silu' else 'false'};\n"
    name = f"// causal_conv1d, {taps} taps, {act}\n"
    parts = (prelude.VECTORS, prelude.OPERANDS, prelude.AHEAD, constants, _STRUCTURES, _ROWS, _FORWARD, _BACKWARD, _ENTRIES)
    return name + "\n".join(parts)


def name_of(taps: int, act: str) -> str:
    """What its library is called."""
    return f"conv_{taps}_{act}"


@cache
def _library(taps: int, act: str) -> ctypes.CDLL | None:
    made = library(source(taps, act), name_of(taps, act))
    if made is not None:
        for function in (made.forward, made.backward):
            function.argtypes, function.restype = (ctypes.POINTER(Call),), ctypes.c_int
    return made


def ready(x: Tensor, w: Tensor, act: str) -> bool:
    """Whether C++ runs a call: it is one that C++ is made for, and there is a compiler."""
    known = addressable(x, w) and x.dtype in TYPES and x.numel() > 0 and 2 <= w.shape[1] <= MOST
    return known and w.dtype in TYPES and _library(w.shape[1], act) is not None


def _rows(x: Tensor) -> Tensor:
    """x[b t c] as rows, a view where strides allow; channels stand side by side."""
    rows = x.reshape(-1, x.shape[2])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _check(x: Tensor, w: Tensor, bias: Tensor | None, state: Tensor | None, cu: Tensor | None) -> None:
    """Refuses operands that do not fit together: C++ reads them by address."""
    b, t, c = x.shape
    n = b if cu is None else len(cu) - 1
    if cu is not None:
        borders = [int(i) for i in cu.tolist()]
        if b != 1 or borders[0] != 0 or borders[-1] != t or borders != sorted(borders):
            raise DataError(f"cu: {borders} of {b} x {t} tokens; it must rise from 0 to {t}, with a batch of 1")
    wanted = (("w", w, (c, w.shape[1])), ("bias", bias, (c,)), ("state", state, (n, c, w.shape[1] - 1)))
    for name, given, shape in wanted:
        if given is not None and given.shape != shape:
            raise TypeMismatch(f"causal_conv1d: {name} is {list(given.shape)}; with x {[b, t, c]} it must be {list(shape)}")


def _pieces(x: Tensor, cu: Tensor | None) -> tuple[Tensor, int]:
    """What is worked on alone, [count, 5], and the number of segments; an empty one has a piece too, for its state."""
    borders = [i * x.shape[1] for i in range(x.shape[0] + 1)] if cu is None else [int(i) for i in cu.tolist()]
    made = [
        (i, start, end, low, min(low + PIECE, end))
        for i, (start, end) in enumerate(pairwise(borders))
        for low in range(start, max(end, start + 1), PIECE)
    ]
    return torch.tensor(made, dtype=torch.int64).reshape(-1, 5), len(borders) - 1


def _call(x: Tensor, rows: Tensor, pieces: Tensor, floats: dict[str, Tensor | None], **others: Tensor) -> Call:
    threads = torch.get_num_threads() if x.numel() > 1 << 16 else 1
    call = Call(
        type=TYPES[x.dtype], rows=len(rows), channels=x.shape[2], row=rows.stride(0), count=len(pieces), threads=threads
    )
    for name, tensor in {"x": rows, "pieces": pieces, **floats, **others}.items():
        if tensor is not None:
            setattr(call, name, tensor.data_ptr())
    return call


def _float(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _operands(x: Tensor, w: Tensor, bias: Tensor | None, state: Tensor | None, n: int) -> dict[str, Tensor | None]:
    past = x.new_zeros(n, w.shape[1] - 1, x.shape[2], dtype=torch.float32)
    if state is not None:
        past = _float(state.to(x.dtype).transpose(1, 2))
    return {"taps": _float(w.t()), "bias": None if bias is None else _float(bias), "past": past}


def forward(
    x: Tensor, w: Tensor, bias: Tensor | None, state: Tensor | None, cu: Tensor | None, act: str
) -> tuple[Tensor, Tensor]:
    """y[b t c] and the last inputs of each segment."""
    _check(x, w, bias, state, cu)
    rows, (pieces, n) = _rows(x), _pieces(x, cu)
    floats = _operands(x, w, bias, state, n)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = torch.empty_like(floats["past"] if floats["past"] is not None else x)
    _run(w, act, "forward", _call(x, rows, pieces, floats, y=y, last=last))
    return y, last.transpose(1, 2).to(x.dtype).contiguous()


def backward(
    dy: Tensor, d_last: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, state: Tensor | None, cu: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w, bias and state."""
    rows, (pieces, n), grads = _rows(x), _pieces(x, cu), _rows(dy.to(x.dtype))
    floats = _operands(x, w, bias, state, n)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    d_past = x.new_empty(n, w.shape[1] - 1, x.shape[2], dtype=torch.float32)
    d_taps = x.new_empty(len(pieces), w.shape[1] + 1, x.shape[2], dtype=torch.float32)
    wide = _float(d_last.transpose(1, 2))
    call = _call(x, rows, pieces, floats, dy=grads, dx=dx, d_last=wide, d_past=d_past, d_taps=d_taps)
    call.d_row = grads.stride(0)
    _run(w, act, "backward", call)
    total = in_order(d_taps)
    d_state = d_past.transpose(1, 2).to(x.dtype if state is None else state.dtype).contiguous()
    d_bias = total[-1].to(w.dtype if bias is None else bias.dtype, copy=True)
    return dx, total[:-1].t().to(w.dtype).contiguous(), d_bias, d_state


def _run(w: Tensor, act: str, name: str, call: Call) -> None:
    made = _library(w.shape[1], act)
    if made is None or getattr(made, name)(ctypes.byref(call)):
        raise PlaitError("causal_conv1d: its generated C++ is gone; set PLAIT_CACHE to a directory that can be written")
