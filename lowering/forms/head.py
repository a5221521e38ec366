"""A head's words in torch, in blocks of tokens: what a loss needs of their logits, which are never all there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cpp import softmax
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


def _capped(logits: Tensor, softcap: float) -> Tensor:
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
        logits = _wide(rows[block].to(head.dtype) @ head.t())
        made = softmax.losses(logits, place[block], cap=softcap) or _torch_parts(_capped(logits, softcap), place[block])
        lse[block], wanted[block] = made[0], made[1] * known[block]
    return lse.view(words.shape), wanted.view(words.shape)


def _torch_parts(logits: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    return torch.logsumexp(logits, -1), logits.gather(1, words[:, None])[:, 0]


@own_precision
def _parts_backward(
    d_lse: Tensor, d_wanted: Tensor, x: Tensor, w: Tensor, words: Tensor, lse: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    rows, head, place, known = _flat(x, w, words)
    scales, picks, denominators = d_lse.reshape(-1), d_wanted.reshape(-1) * known, lse.reshape(-1)
    dx = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dw = _wide(w[:0]).new_zeros(w.shape if not len(rows) else 0)
    for lo in range(0, len(rows), HEAD_ROWS):
        block = slice(lo, lo + HEAD_ROWS)
        given = rows[block].to(head.dtype)
        d = _wide(given @ head.t())
        told = denominators[block], scales[block], picks[block]
        if not softmax.pull(d, place[block], *told, cap=softcap):
            _torch_pull(_capped(d, softcap), place[block], *told, softcap)
        dx[block] = d.to(head.dtype) @ head
        both = _wide(d).t(), _wide(given)
        dw = dw.addmm_(*both) if lo else torch.mm(*both)  # the first product needs no zeros to be added to
    return dx.view(x.shape), dw.to(w.dtype)


def _torch_pull(logits: Tensor, words: Tensor, lse: Tensor, scales: Tensor, picks: Tensor, softcap: float) -> None:
    """The gradients of `softmax.pull`, of logits behind the cap."""
    slope = 1 - (logits / softcap).square_() if softcap else 1
    logits.sub_(lse[:, None]).exp_().mul_(scales[:, None])
    logits.scatter_add_(1, words[:, None], picks[:, None].to(logits.dtype)).mul_(slope)


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
