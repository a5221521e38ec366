"""A head's words in torch, in blocks of tokens: what a loss needs of their logits, which are never all there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .loss import HEAD_ROWS, _kept, _wide  # type: ignore[reportPrivateUsage] # one way to widen, and to refuse a label
from .precision import own_precision


def head_parts(x: Tensor, w: Tensor, words: Tensor, *, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """The log of the sum of all words' exponentials, and the logit of one; the backward makes the logits again."""
    return torch.ops.plait.head_parts(x, w.to(x.dtype), words, softcap, None)


def linear_token_losses(x: Tensor, w: Tensor, labels: Tensor, *, ignore: int = -100, softcap: float = 0.0) -> Tensor:
    """Each token's cross entropy of x w^T, 0 where its label is `ignore`."""
    lse, wanted = torch.ops.plait.head_parts(x, w.to(x.dtype), labels, softcap, ignore)
    losses = lse - wanted
    return losses.where(labels != ignore, torch.zeros_like(losses))


def _logits(block: Tensor, head: Tensor, softcap: float) -> Tensor:
    logits = _wide(block @ head.t())
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _flat(x: Tensor, w: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, the head in a dtype that multiplies fast, each row's word, and whether it is one of the head's."""
    flat = words.reshape(-1)
    known = (flat >= 0) & (flat < w.shape[0])
    return x.reshape(-1, x.shape[-1]), _wide(w) if x.device.type == "cpu" else w, torch.where(known, flat, 0), known


@own_precision
def _parts(x: Tensor, w: Tensor, words: Tensor, softcap: float, ignore: int | None) -> tuple[Tensor, Tensor]:
    """With `ignore`, every other word must be one of the head's."""
    if ignore is not None:
        _kept(words.reshape(-1), ignore, w.shape[0])
    rows, head, place, known = _flat(x, w, words)
    lse = _wide(rows[:0]).new_empty(rows.shape[0])
    wanted = torch.empty_like(lse)
    for lo in range(0, len(rows), HEAD_ROWS):
        block = slice(lo, lo + HEAD_ROWS)
        logits = _logits(rows[block].to(head.dtype), head, softcap)
        lse[block] = torch.logsumexp(logits, -1)
        wanted[block] = logits.gather(1, place[block, None])[:, 0] * known[block]
    return lse.view(words.shape), wanted.view(words.shape)


@own_precision
def _parts_backward(
    d_lse: Tensor, d_wanted: Tensor, x: Tensor, w: Tensor, words: Tensor, lse: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    rows, head, place, known = _flat(x, w, words)
    scales, picks, denominators = d_lse.reshape(-1, 1), (d_wanted.reshape(-1) * known)[:, None], lse.reshape(-1, 1)
    dx, dw = torch.empty_like(rows, memory_format=torch.contiguous_format), _wide(w[:0]).new_zeros(w.shape)
    for lo in range(0, len(rows), HEAD_ROWS):
        block = slice(lo, lo + HEAD_ROWS)
        given = rows[block].to(head.dtype)
        logits = _logits(given, head, softcap)
        slope = 1 - (logits / softcap).square_() if softcap else None
        d = logits.sub_(denominators[block]).exp_().mul_(scales[block])
        d.scatter_add_(1, place[block, None], picks[block].to(d.dtype))
        d = d if slope is None else d.mul_(slope)
        dx[block] = d.to(head.dtype) @ head
        dw.addmm_(_wide(d).t(), _wide(given))
    return dx.view(x.shape), dw.to(w.dtype)


_op = torch.library.custom_op(
    "plait::head_parts",
    _parts,
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor words, float softcap, int? ignore) -> (Tensor, Tensor)",
)
_op_backward = torch.library.custom_op(
    "plait::head_parts_backward",
    _parts_backward,
    mutates_args=(),
    schema="(Tensor d_lse, Tensor d_wanted, Tensor x, Tensor w, Tensor words, Tensor lse, float softcap) -> (Tensor, Tensor)",
)


@_op.register_fake
def _(x: Tensor, w: Tensor, words: Tensor, softcap: float, ignore: int | None) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(words.shape, dtype=wide), x.new_empty(words.shape, dtype=wide)


@_op_backward.register_fake
def _(
    d_lse: Tensor, d_wanted: Tensor, x: Tensor, w: Tensor, words: Tensor, lse: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), w.new_empty(w.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[0])
    ctx.softcap = inputs[3]


def _grad(ctx: Any, d_lse: Tensor, d_wanted: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw = torch.ops.plait.head_parts_backward(d_lse, d_wanted, *ctx.saved_tensors, ctx.softcap)
    return dx, dw, None, None, None


_op.register_autograd(_grad, setup_context=_save)
