"""Attention to some of the keys, which stand at places of the sequence that are told: torch's flash kernel on runs, or blocks.

Keys are put in order of their places, so that what a run of queries sees is a slice of them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...ir.ops.attention import sees
from .attention import (
    LOGITS,
    QUERIES,
    Block,
    Masking,
    attend_block,
    attend_block_backward,
    by_group,
    by_key,
    from_group,
    from_keys,
)
from .precision import own_precision

EVERYWHERE = 1 << 62
RUNS = 64  # the most runs of queries that are worth a kernel each
_FLASH: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Sight:
    """Where queries and keys stand, on the host, and which of them see each other."""

    queries: list[int]
    keys: list[int]  # rising
    order: Tensor | None  # what brings the keys into that order; None where they are in it
    runs: list[slice]  # queries that stand one behind the other, in one segment
    once: bool  # no two keys at one place
    cu: list[int] | None
    causal: bool
    window: int

    @classmethod
    def of(cls, qp: Tensor, kp: Tensor, cu: Tensor | None, causal: bool, window: int) -> Sight:
        places, order = kp.cpu().sort(stable=True)
        moved = None if bool((order.diff() == 1).all()) else order
        once, borders = bool((places.diff() > 0).all()), None if cu is None else cu.tolist()
        return cls(qp.tolist(), places.tolist(), moved, _runs(qp.cpu(), borders), once, borders, causal, window)

    def segment(self, place: int) -> tuple[int, int]:
        """The borders of the packed segment that a place is in."""
        if self.cu is None:
            return -EVERYWHERE, EVERYWHERE
        i = bisect_right(self.cu, place)
        return self.cu[i - 1] if i else 0, self.cu[i] if i < len(self.cu) else place + 1

    def keys_of(self, first: int, last: int) -> slice:
        """The keys that queries at places from first to last can see at all."""
        low, high = self.segment(first)[0], self.segment(last)[1]
        low = max(low, first - self.window + 1) if self.window else low
        high = min(high, last + 1) if self.causal else high
        return slice(bisect_left(self.keys, low), bisect_left(self.keys, high))

    def sorted(self, x: Tensor) -> Tensor:
        """Keys or values in the order of their places."""
        return x if self.order is None else x.index_select(1, self.order.to(x.device))

    def back(self, x: Tensor) -> Tensor:
        """The same as they came."""
        return x if self.order is None else torch.empty_like(x).index_copy_(1, self.order.to(x.device), x)


def _runs(qp: Tensor, borders: list[int] | None) -> list[slice]:
    new = (qp.diff() != 1) | torch.isin(qp[1:], torch.tensor(borders or [], dtype=qp.dtype))
    cuts = [0, *(new.nonzero()[:, 0] + 1).tolist(), len(qp)]
    return [slice(a, b) for a, b in pairwise(cuts)]


@dataclass(frozen=True)
class Piece:
    """A run of queries and the keys that all of them see; or as many keys, each seen from its own place on."""

    queries: slice
    keys: slice
    diagonal: bool


def pieces(sight: Sight) -> list[Piece] | None:
    """What is seen as plain rectangles and triangles; None where it is neither, or too many."""
    if sight.window or not sight.once or not sight.queries or not sight.keys or len(sight.runs) > RUNS:
        return None
    found = list[Piece]()
    for run in sight.runs:
        first, last = sight.queries[run.start], sight.queries[run.stop - 1]
        seen = sight.keys_of(first, last)
        middle = bisect_left(sight.keys, first) if sight.causal else seen.stop
        if 0 < seen.stop - middle != run.stop - run.start:
            return None
        parts = (Piece(run, slice(seen.start, middle), False), Piece(run, slice(middle, seen.stop), True))
        found += [p for p in parts if p.keys.start < p.keys.stop]
    return found


# -- the forms --------------------------------------------------------------------------------


def attention_part(
    q: Tensor, k: Tensor, v: Tensor, qp: Tensor, kp: Tensor, cu: Tensor | None = None,
    *, causal: bool = True, window: int = 0, softcap: float = 0.0, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention to these keys alone, and the log of each softmax's denominator."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.plait.attention_part(q, k, v, qp, kp, cu, causal, window, softcap, factor)


def attention_part_gradients(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, d_o: Tensor | None, d_lse: Tensor | None, qp: Tensor,
    kp: Tensor, cu: Tensor | None = None,
    *, causal: bool = True, window: int = 0, softcap: float = 0.0, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What these keys add to the cotangents, where o and lse are those of more keys."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    given = torch.zeros_like(o) if d_o is None else d_o
    return torch.ops.plait.attention_part_gradients(q, k, v, o, lse, given, d_lse, qp, kp, cu, causal, window, softcap, factor)


@own_precision
def _forward(
    q: Tensor, k: Tensor, v: Tensor, qp: Tensor, kp: Tensor, cu: Tensor | None, causal: bool, window: int, softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sight = Sight.of(qp, kp, cu, causal, window)
    queries, keys, values = _wide(q), sight.sorted(_wide(k, q)), sight.sorted(_wide(v, q))
    if _takes_flash(q, k, v, softcap) and (plain := pieces(sight)) is not None:
        return _by_flash(queries, keys, values, plain, scale)
    how = Masking(None, 0, causal, window, softcap, scale)
    b, g = q.shape[0], k.shape[2]
    queries, keys, values = by_group(queries, g), by_key(keys), by_key(values)
    o, lse = values.new_zeros(*queries.shape[:3], v.shape[-1]), queries.new_full(queries.shape[:3], -torch.inf)
    for block in _blocks(sight, queries):
        where = (block.heads, slice(None), block.queries)
        o[where], lse[where] = attend_block(queries, keys, values, None, block, how)
    # A row of a block that sees none of it has a denominator that stands for 0.
    lse.masked_fill_(lse < -1e29, -torch.inf)
    return from_group(o, b), from_group(lse[..., None], b)[..., 0]


@own_precision
def _gradients(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, d_o: Tensor, d_lse: Tensor | None, qp: Tensor, kp: Tensor,
    cu: Tensor | None, causal: bool, window: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sight = Sight.of(qp, kp, cu, causal, window)
    queries, o, d_o, lse = (_wide(x, q) for x in (q, o, d_o, lse))
    keys, values = sight.sorted(_wide(k, q)), sight.sorted(_wide(v, q))
    if d_lse is None and _takes_flash(q, k, v, softcap) and (plain := pieces(sight)) is not None:
        d_q, d_k, d_v = _by_flash_backward(queries, keys, values, o, lse, d_o, plain, scale)
        return d_q, sight.back(d_k), sight.back(d_v)
    how, (b, g) = Masking(None, 0, causal, window, softcap, scale), (q.shape[0], k.shape[2])
    delta = (d_o * o).sum(-1) if d_lse is None else (d_o * o).sum(-1) - _wide(d_lse, q)
    queries, keys, values, grads = by_group(queries, g), by_key(keys), by_key(values), by_group(d_o, g)
    norm, delta = by_group(lse[..., None], g)[..., 0], by_group(delta[..., None], g)
    d_q, d_k, d_v = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for block in _blocks(sight, queries):
        attend_block_backward((queries, keys, values), (d_q, d_k, d_v), grads, delta, norm, block, how)
    return from_group(d_q, b), sight.back(from_keys(d_k, b)), sight.back(from_keys(d_v, b))


def _wide(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Sums run in float32 at least."""
    like = x if like is None else like
    return x.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


# -- blocks -----------------------------------------------------------------------------------


def _blocks(sight: Sight, queries: Tensor) -> Iterator[Block]:
    """Some queries, of all heads or of a few, and the keys that any of them sees."""
    n, r, t, _ = queries.shape
    for i0 in range(0, t, QUERIES):
        for rows in _close(sight, i0, min(i0 + QUERIES, t)):
            places = sight.queries[rows]
            keys = sight.keys_of(min(places), max(places))
            if keys.start >= keys.stop:
                continue
            hidden = _hidden(sight, rows, keys, queries.device)
            step = max(1, LOGITS // (r * len(places) * (keys.stop - keys.start)))
            for h in range(0, n, step):
                yield Block(slice(h, h + step), rows, keys, hidden)


def _close(sight: Sight, i0: int, i1: int) -> Iterator[slice]:
    """Queries i0 to i1, cut where the next one stands far away and would be shown keys that nobody sees."""
    cuts = [i for i in range(i0 + 1, i1) if abs(sight.queries[i] - sight.queries[i - 1]) > QUERIES]
    return (slice(a, b) for a, b in zip([i0, *cuts], [*cuts, i1], strict=True))


def _hidden(sight: Sight, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
    cu = None if sight.cu is None else torch.tensor(sight.cu)
    hidden = ~sees(torch.tensor(sight.queries[rows]), torch.tensor(sight.keys[keys]), cu, sight.causal, sight.window)
    return hidden.to(device) if hidden.any() else None


# -- torch's kernel ---------------------------------------------------------------------------


def _takes_flash(q: Tensor, k: Tensor, v: Tensor, softcap: float) -> bool:
    return q.device.type == "cpu" and not softcap and k.shape[-1] == v.shape[-1]


def _by_flash(q: Tensor, k: Tensor, v: Tensor, plain: list[Piece], scale: float) -> tuple[Tensor, Tensor]:
    """Every run of queries against what it sees, merged."""
    o, lse = q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], -torch.inf)
    for piece in plain:
        operands = (x[:, at].transpose(1, 2) for x, at in ((q, piece.queries), (k, piece.keys), (v, piece.keys)))
        part, norm = (x.transpose(1, 2) for x in _FLASH(*operands, 0.0, piece.diagonal, attn_mask=None, scale=scale))
        before = lse[:, piece.queries]
        share = torch.sigmoid(norm - before)[..., None]
        o[:, piece.queries] = torch.lerp(o[:, piece.queries], part, share)
        lse[:, piece.queries] = torch.logaddexp(before, norm)
    return o, lse


def _by_flash_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, d_o: Tensor, plain: list[Piece], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel finds for a piece is right where it is told the result and the denominators of all keys."""
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for piece in plain:
        at, of = piece.queries, piece.keys
        operands = (x[:, i].transpose(1, 2) for x, i in ((d_o, at), (q, at), (k, of), (v, of), (o, at), (lse, at)))
        found = _FLASH_BACKWARD(*operands, 0.0, piece.diagonal, attn_mask=None, scale=scale)
        for total, i, part in zip((d_q, d_k, d_v), (at, of, of), found, strict=True):
            total[:, i] += part.transpose(1, 2)
    return d_q, d_k, d_v


# -- as an op of torch ------------------------------------------------------------------------

_OPERANDS = "Tensor qp, Tensor kp, Tensor? cu, bool causal, int window, float softcap, float scale"
_KEYS = "Tensor q, Tensor k, Tensor v"
_RESULT = "Tensor o, Tensor lse, Tensor d_o, Tensor? d_lse"
_op = torch.library.custom_op(
    "plait::attention_part", _forward, mutates_args=(), schema=f"({_KEYS}, {_OPERANDS}) -> (Tensor, Tensor)"
)

_op_gradients = torch.library.custom_op(
    "plait::attention_part_gradients",
    _gradients,
    mutates_args=(),
    schema=f"({_KEYS}, {_RESULT}, {_OPERANDS}) -> (Tensor, Tensor, Tensor)",
)


@_op_gradients.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _wide(q).new_empty(q.shape), _wide(k, q).new_empty(k.shape), _wide(v, q).new_empty(v.shape)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    o = _wide(q).new_empty(*q.shape[:3], v.shape[-1])
    return o, torch.empty_like(o[..., 0], memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = inputs[6:]


def _grad(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, qp, kp, cu, o, lse = ctx.saved_tensors
    given = torch.zeros_like(o) if d_o is None else d_o
    found = torch.ops.plait.attention_part_gradients(q, k, v, o, lse, given, d_lse, qp, kp, cu, *ctx.options)
    return *(d.to(x.dtype) for d, x in zip(found, (q, k, v), strict=True)), *[None] * 7


_op.register_autograd(_grad, setup_context=_save)
