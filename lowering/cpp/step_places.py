"""What each op that knows where tokens stand is in a decode step: positions, rotations, caches, attention, scans."""

from __future__ import annotations

import torch

from ...ir.ops import frequencies
from ...ir.ops.biased import buckets
from .step_forms import FORMS, HEAD, Maybe, Tensor, floats, form, need
from .step_record import Tape, key

Numbers = tuple[float, ...]


def _places(t: Tape, p: Maybe, rows: int, later: int = 0) -> Tensor:
    """A place for each row, so many behind the given one; one that is given for all is read for each."""
    y = t.new(rows, dtype=torch.int64)
    t.say("POSITIONS", [_each(p, rows)], [y], [rows, 1, 1, 1], [later])
    return y


def _each(at: Maybe, rows: int) -> Maybe:
    return at if at is None else at.reshape(-1).expand(rows)


@form
def positions(t: Tape, tokens: Tensor, at: Maybe = None) -> Tensor:
    return _places(t, at, tokens.shape[0]).view(tokens.shape)


FORMS["cached_positions"] = positions


@form
def shift_positions(t: Tape, p: Tensor, *, by: int) -> Tensor:
    return _places(t, p, p.shape[0], by).view(p.shape)


@form
def reach(t: Tape, p: Tensor) -> Tensor:
    return _places(t, p, p.shape[0], 1)


@form
def rope(
    t: Tape, x: Tensor, p: Tensor, reach: Maybe = None, *, theta: float = 10000.0, fraction: float = 1.0,
    interleaved: bool = False, scaling: Numbers = (), divisors: Numbers = (), far: Numbers = (), amplitude: float = 1.0,
    rounded: bool = False, inverse: bool = False,
) -> Tensor:  # fmt: skip
    floats(x)
    width = int(x.shape[-1] * fraction)
    need(x.dim() == 4 and width >= 2)
    rate = _frequencies(t, width, theta, scaling, divisors, rounded)
    beyond = far if reach is not None else ()
    named = (key(rate), key(p), beyond, theta, amplitude, reach is not None and key(reach))
    if named not in t.turned:
        # Every layer turns alike: cosines and sines are made once a step.
        others = t.constant(1.0 / (torch.tensor(beyond[1:]) * _steps(theta, width))) if len(beyond) > 2 else None
        t.turned[named] = made = t.new(x.shape[0], width, dtype=torch.float32)
        told, length, factor = [p.flatten(), rate, reach if beyond else None, others], *(beyond or (0.0, 0.0))[:2]
        t.say("TURNS", told, [made], [x.shape[0], 1, 1, 1], [width // 2], [amplitude, length, factor, theta])
    y = t.new(*x.shape, dtype=x.dtype)
    t.say("ROPE", [x, t.turned[named]], [y], list(x.shape), [width // 2, int(interleaved), int(inverse)])
    return y


def _steps(theta: float, width: int) -> Tensor:
    return theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)


def _frequencies(t: Tape, width: int, theta: float, scaling: Numbers, divisors: Numbers, rounded: bool) -> Tensor:
    named = (width, theta, scaling, divisors, rounded)
    if named not in t.frequencies:
        t.frequencies[named] = t.constant(frequencies(width, theta, scaling, torch.empty(0), rounded, divisors))
    return t.frequencies[named]


def _write(t: Tape, cache: Tensor, x: Tensor, at: Maybe, kind: str, whole: list[int]) -> Tensor:
    floats(cache, x)
    need(key(cache) in t.given and cache.is_contiguous())
    t.say(kind, [cache, x, at], [], list(x.shape), whole)
    return cache


@form
def cache_write(t: Tape, cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
    need(cache.shape[0] == x.shape[0])
    return _write(t, cache, x, _each(at, x.shape[0]), "CACHE_WRITE", [0])


@form
def cached_write(t: Tape, cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
    need(cache.shape[0] == x.shape[0])
    return _write(t, cache, x, _each(at, x.shape[0]), "CACHE_WRITE", [1])


@form
def page_write(t: Tape, pool: Tensor, x: Tensor, slots: Tensor) -> Tensor:
    return _write(t, pool, x, slots.flatten(), "PAGE_WRITE", [0, pool.shape[0]])


def _attention(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, *, sinks: Maybe = None, at: Maybe = None, pages: Maybe = None,
    lengths: Maybe = None, table: Maybe = None, near: Maybe = None, far: int = 0, window: int = 0, softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """One token a row against what waits; a cache may be of any length, and a part of another one's channels."""
    floats(q, k, v, sinks, table)
    (b, _, heads, d), keys, e = q.shape, k.shape[2], v.shape[3]
    need(max(d, e) <= HEAD and k.dtype == v.dtype and {key(k), key(v)} <= t.given and k.stride(3) == v.stride(3) == 1)
    o = t.new(b, 1, heads, e, dtype=q.dtype)
    size, factor = [b, keys, heads // keys, 1], d**-0.5 if scale is None else scale
    told = [q, k, v, sinks, _each(at, b), pages, lengths, table, near]
    t.say("ATTENTION", told, [o], size, [d, e, window, 0, far], [factor, softcap])
    return o


@form
def attention(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, sinks: Maybe = None, cu: Maybe = None, at: Maybe = None, *, window: int = 0,
    softcap: float = 0.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    need(cu is None and at is not None)
    return _attention(t, q, k, v, sinks=sinks, at=at, window=window, softcap=softcap, scale=scale)


@form
def cached_attention(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, at: Tensor, sinks: Maybe = None, *, window: int = 0, softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    return _attention(t, q, k, v, sinks=sinks, at=at, window=window, softcap=softcap, scale=scale)


@form
def paged_attention(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, table: Tensor, at: Tensor, sinks: Maybe = None, *, window: int = 0,
    softcap: float = 0.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    need(table.is_contiguous())
    return _attention(t, q, k, v, sinks=sinks, at=at, pages=table, window=window, softcap=softcap, scale=scale)


@form
def biased_attention(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, table: Maybe = None, lengths: Maybe = None, at: Maybe = None, *,
    causal: bool = True, reach: int = 128, slopes: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    need(at is not None if causal else table is None)
    near = None
    if table is not None and not slopes:
        named = ("buckets", table.shape[0], reach)
        if named not in t.frequencies:
            t.frequencies[named] = t.constant(buckets(-torch.arange(reach + 1), table.shape[0], True, reach))
        near = t.frequencies[named]
    at, far = at if causal else None, reach if near is not None else 2**62
    return _attention(t, q, k, v, at=at, scale=scale, lengths=lengths, table=table, near=near, far=far)


@form
def selective_scan(
    t: Tape, x: Tensor, step: Tensor, rate: Tensor, k: Tensor, q: Tensor, state: Maybe = None
) -> tuple[Tensor, Tensor]:
    floats(x, step, rate, k, q, state)
    (b, _, c), s = x.shape, rate.shape[1]
    need(state is None or (state.is_contiguous() and state.dtype == torch.float32))
    o, final = t.new(*x.shape, dtype=x.dtype), t.new(b, c, s, dtype=torch.float32)
    told = [x.flatten(1), step.flatten(1), rate, k.flatten(1), q.flatten(1), state]
    t.say("SELECTIVE_SCAN", told, [o.flatten(1), final], [b, 1, c, s])
    return o, final


@form
def rg_lru(t: Tape, x: Tensor, decay: Tensor, p: Tensor, state: Maybe = None) -> tuple[Tensor, Tensor]:
    floats(x, decay, state)
    (b, _, c) = x.shape
    need(state is None or (state.is_contiguous() and state.dtype == torch.float32))
    h, final = t.new(*x.shape, dtype=x.dtype), t.new(b, c, dtype=torch.float32)
    t.say("RG_LRU", [x.flatten(1), decay.flatten(1), p.flatten(), state], [h.flatten(1), final], [b, c])
    return h, final
