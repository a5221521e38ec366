"""The softmax of logits in C++: each row's denominator, its word's logit, and gradients in the logits' own memory."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from . import prelude
from .build import addressable, library
from .rows_text import FUNCTIONS

Tensor = torch.Tensor
NAME = "softmax"
LEAST = 1 << 16  # logits from which on a call is worth its library
PARTS, BOTH, PULL = 0, 1, 2  # denominators and words' logits; these and gradients of their difference; gradients alone

_ROWS = """\
// Numbers that do not fill a vector, beside some that no maximum and no sum sees.
struct Edge {
    float x[W];
    Edge(const float* from, int64_t n, float rest)
    {
        for (int64_t i = 0; i < W; i++) x[i] = i < n ? from[i] : rest;
    }
};

static float highest(const float* x, int64_t v)
{
    const int64_t whole = v / W * W;
    const Edge edge(x + whole, v - whole, -INFINITY);
    Vec top = at(edge.x);
    for (int64_t i = 0; i < whole; i += W) top = pick(at(x + i) > top, at(x + i), top);
    float y = top[0];
    for (int i = 1; i < W; i++) y = top[i] > y ? top[i] : y;
    return y;
}

// The sum of e^(x - top), in parts of few numbers, so that a large vocabulary loses nothing; `kept` leaves the numbers in x.
template <bool kept> static double total(float* x, int64_t v, float top)
{
    const int64_t whole = v / W * W;
    double sums = 0;
    for (int64_t low = 0; low < whole; low += 64 * W) {
        Vec part = {};
        for (int64_t i = low; i < whole && i < low + 64 * W; i += W) {
            const Vec e = exp_of(at(x + i) - top);
            if (kept) at(x + i) = e;
            part += e;
        }
        sums += sum(part);
    }
    for (int64_t i = whole; i < v; i++) {
        const float e = exp_one(x[i] - top);
        if (kept) x[i] = e;
        sums += e;
    }
    return sums;
}

static void capped(float* x, int64_t v, float cap)
{
    if (cap == 0) return;
#pragma omp simd
    for (int64_t i = 0; i < v; i++) x[i] = tanh_one(x[i] / cap) * cap;
}

// Gradients by logits, of the denominator times `scale` and of the word's logit times `picked`.
static void pull(float* x, int64_t v, float cap, int64_t word, float lse, float scale, float picked)
{
    const float slope = cap == 0 ? 0.0f : 1 / (cap * cap), own = x[word];
#pragma omp simd
    for (int64_t i = 0; i < v; i++) x[i] = exp_one(x[i] - lse) * scale * (1.0f - x[i] * x[i] * slope);
    x[word] += picked * (1.0f - own * own * slope);
}

static bool without_nan(const float* x, int64_t v)
{
    bool all = true;
    for (int64_t i = 0; i < v; i++) all = all && x[i] == x[i];
    return all;
}

static void one_row(float* x, int64_t v, float cap, int64_t word, float* lse, float* wanted, bool both, float share)
{
    capped(x, v, cap);
    const float top = highest(x, v);
    const bool finite = top - top == 0, kept = both && cap == 0 && finite;
    double sums = 0;
    *wanted = x[word];
    if (finite) {
        sums = kept ? total<true>(x, v, top) : total<false>(x, v, top);
        *lse = (float)(top + log(sums));
    } else
        *lse = without_nan(x, v) ? top : NAN;
    if (kept) {
        const float scale = (float)(share / sums);
#pragma omp simd
        for (int64_t i = 0; i < v; i++) x[i] *= scale;
        x[word] -= share;
    } else if (both)
        pull(x, v, cap, word, *lse, share, -share);
}

// Every row is alone, so that the number of threads changes no bit.
extern "C" __attribute__((visibility("default"))) void run(
    int64_t mode, int64_t rows, int64_t v, float* logits, const int64_t* words, float* lse, float* wanted,
    const float* scales, const float* picks, float cap, float share, int64_t threads)
{
#pragma omp parallel num_threads((int)(rows < threads ? rows : threads)) if (rows > 1 && threads > 1)
    {
        Flushed flushed;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            float* const x = logits + r * v;
            if (mode != 2) one_row(x, v, cap, words[r], lse + r, wanted + r, mode == 1, share);
            else {
                capped(x, v, cap);
                pull(x, v, cap, words[r], lse[r], scales[r], picks[r]);
            }
        }
    }
}
"""


def source() -> str:
    """The library's text."""
    return "\n".join([prelude.VECTORS, prelude.OPERANDS, FUNCTIONS, _ROWS])


@cache
def _library() -> Any:
    made = library(source(), NAME)
    if made is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        made.run.argtypes = [number] * 3 + [pointer] * 6 + [ctypes.c_float] * 2 + [number]
        made.run.restype = None
    return made


def losses(logits: Tensor, words: Tensor, *, cap: float = 0.0, share: float | None = None) -> tuple[Tensor, Tensor] | None:
    """Each row's denominator (its log) and its word's logit; None where torch must do it.

    With `share`, logits become the gradients of (denominator - word's logit) * share by the logits before the cap.
    """
    if not _ours(logits, words):
        return None
    lse, wanted = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    _run(PARTS if share is None else BOTH, logits, words, lse, wanted, None, None, cap, share or 0.0)
    return lse, wanted


def pull(logits: Tensor, words: Tensor, lse: Tensor, scales: Tensor, picks: Tensor, *, cap: float = 0.0) -> bool:
    """Logits become gradients, of denominators times scales and of words' logits times picks; whether this was done."""
    if not _ours(logits, words) or any(x.dtype != torch.float32 for x in (lse, scales, picks)):
        return False
    _run(PULL, logits, words, lse.contiguous(), None, scales.contiguous(), picks.contiguous(), cap, 0.0)
    return True


def _ours(logits: Tensor, words: Tensor) -> bool:
    fits = (logits.dtype, words.dtype) == (torch.float32, torch.int64) and logits.is_contiguous() and words.is_contiguous()
    return fits and logits.numel() >= LEAST and addressable(logits, words) and _library() is not None


def _run(
    mode: int, logits: Tensor, words: Tensor, lse: Tensor, wanted: Tensor | None, scales: Tensor | None, picks: Tensor | None,
    cap: float, share: float,
) -> None:  # fmt: skip
    found = [None if x is None else x.data_ptr() for x in (logits, words, lse, wanted, scales, picks)]
    _library().run(mode, *logits.shape, *found, cap, share, torch.get_num_threads())
