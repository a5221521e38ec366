"""Cross entropy in torch, in blocks of tokens: no copy of the logits is kept, and with the head's linear, no logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import DataError
from ..cpp import softmax
from .precision import own_precision

# Logits of one block: what stays in a core's cache; with the head, enough rows besides for its GEMMs to be fast.
BLOCK = 1 << 18
HEAD_ROWS = 256


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore: int = -100) -> Tensor:
    """Mean negative log-likelihood of the labels that are not `ignore`; 0 when there are none."""
    return torch.ops.plait.cross_entropy(logits, labels, ignore)[0]


def linear_cross_entropy(x: Tensor, w: Tensor, labels: Tensor, *, ignore: int = -100, softcap: float = 0.0) -> Tensor:
    """The cross entropy of x w^T; gradients are made along with the loss, so each block of logits exists once."""
    train_x, train_w = (torch.is_grad_enabled() and operand.requires_grad for operand in (x, w))
    return torch.ops.plait.linear_cross_entropy(x, w.to(x.dtype), labels, ignore, softcap, train_x, train_w)[0]


@own_precision
def _loss(logits: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """The loss, and the log of each softmax's denominator."""
    rows, flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    kept = _kept(flat, ignore, rows.shape[1])
    lse = _wide(rows[:0]).new_zeros(rows.shape[0])
    for lo, hi in _blocks(rows.shape[0], rows.shape[1]):
        lse[lo:hi] = torch.logsumexp(_wide(rows[lo:hi]), -1)
    picked = _wide(rows[kept, flat[kept]])
    return (lse[kept] - picked).sum() / max(1, len(kept)), lse


@own_precision
def _loss_backward(dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore: int) -> Tensor:
    rows, flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    dlogits = torch.empty_like(rows, memory_format=torch.contiguous_format)
    real = flat != ignore
    share = dloss / real.sum().clamp_min(1)
    target = torch.where(real, flat, 0)[:, None]
    for lo, hi in _blocks(rows.shape[0], rows.shape[1]):
        d = (_wide(rows[lo:hi]) - lse[lo:hi, None]).exp_()
        d.scatter_add_(1, target[lo:hi], d.new_full((hi - lo, 1), -1.0))
        dlogits[lo:hi] = d.mul_(share)
    dlogits[~real] = 0
    return dlogits.view(logits.shape)


@own_precision
def _linear_loss(
    x: Tensor, w: Tensor, labels: Tensor, ignore: int, softcap: float, train_x: bool, train_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by x and w, empty where not wanted."""
    flat = labels.reshape(-1)
    kept = _kept(flat, ignore, w.shape[0])
    rows, targets = x.reshape(-1, x.shape[-1])[kept], flat[kept]
    # A CPU multiplies faster in float32 than in half precision.
    head = _wide(w) if x.device.type == "cpu" else w
    loss, share = _wide(rows[:0]).new_zeros(()), 1 / max(1, len(kept))
    dx, dw = rows.new_empty(rows.shape if train_x else 0), _wide(w[:0]).new_zeros(w.shape if train_w and not len(rows) else 0)
    for lo in range(0, len(rows), HEAD_ROWS):
        block, target = rows[lo : lo + HEAD_ROWS].to(head.dtype), targets[lo : lo + HEAD_ROWS]
        part, d = _block_loss(block, head, target, softcap, share if train_x or train_w else None)
        loss += part * share
        d = d.to(head.dtype)
        if train_x:
            dx[lo : lo + HEAD_ROWS] = d @ head
        if train_w:
            both = _wide(d).t(), _wide(block)
            dw = dw.addmm_(*both) if lo else torch.mm(*both)  # the first product needs no zeros to be added to
    return loss, _scattered(dx, kept, x) if train_x else dx, dw.to(w.dtype)


def _scattered(rows: Tensor, kept: Tensor, like: Tensor) -> Tensor:
    """Rows back at the tokens they came from, zero elsewhere."""
    full = rows.new_zeros(like.numel() // like.shape[-1], like.shape[-1])
    full[kept] = rows
    return full.view(like.shape)


def _block_loss(block: Tensor, head: Tensor, target: Tensor, softcap: float, share: float | None) -> tuple[Tensor, Tensor]:
    """The summed loss of some tokens; with a share of each, its gradient by their logits (before the cap)."""
    logits = _wide(block @ head.t())
    if (made := softmax.losses(logits, target, cap=softcap, share=share)) is not None:
        return (made[0] - made[1]).sum(), logits
    if softcap:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    lse = torch.logsumexp(logits, -1, keepdim=True)
    part = (lse - logits.gather(1, target[:, None])).sum()
    if share is None:
        return part, logits
    slope = 1 - (logits / softcap).square_() if softcap else None
    d = logits.sub_(lse).exp_()
    d.scatter_add_(1, target[:, None], d.new_full((len(target), 1), -1.0)).mul_(share)
    return part, d if slope is None else d.mul_(slope)


def _kept(flat: Tensor, ignore: int, v: int) -> Tensor:
    """Which tokens count, in order."""
    kept = torch.nonzero(flat != ignore)[:, 0]
    labels = flat[kept]
    wrong = labels[(labels < 0) | (labels >= v)]
    if len(wrong):
        raise DataError(f"cross_entropy: a label is {int(wrong[0])}; it must be {ignore} (ignored) or from 0 to {v - 1}")
    return kept


def _blocks(n: int, v: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // max(1, v))
    for lo in range(0, n, step):
        yield lo, min(lo + step, n)


def _wide(x: Tensor) -> Tensor:
    """Sums run in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


_op = torch.library.custom_op(
    "plait::cross_entropy", _loss, mutates_args=(), schema="(Tensor logits, Tensor labels, int ignore) -> (Tensor, Tensor)"
)
_op_backward = torch.library.custom_op(
    "plait::cross_entropy_backward",
    _loss_backward,
    mutates_args=(),
    schema="(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int ignore) -> Tensor",
)
_op_linear = torch.library.custom_op(
    "plait::linear_cross_entropy",
    _linear_loss,
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor labels, int ignore, float softcap, bool train_x, bool train_w)"
    " -> (Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(logits: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((), dtype=wide), logits.new_empty(labels.numel(), dtype=wide)


@_op_backward.register_fake
def _(dloss: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore: int) -> Tensor:
    return logits.new_empty(logits.shape)


@_op_linear.register_fake
def _(
    x: Tensor, w: Tensor, labels: Tensor, ignore: int, softcap: float, train_x: bool, train_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((), dtype=wide), x.new_empty(x.shape if train_x else 0), w.new_empty(w.shape if train_w else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.ignore = inputs[2]


def _grad(ctx: Any, dloss: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.plait.cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.ignore), None, None


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.train = inputs[5:]


def _grad_linear(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw = (grad * dloss.to(grad.dtype) if train else None for grad, train in zip(ctx.saved_tensors, ctx.train, strict=True))
    return dx, dw, *[None] * 5


_op.register_autograd(_grad, setup_context=_save)
_op_linear.register_autograd(_grad_linear, setup_context=_save_linear)
