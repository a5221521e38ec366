"""Mixture of experts in torch: choose, sort rows by expert, one GEMM per expert, sum back without atomics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import DataError, TypeMismatch
from .precision import own_precision

SCORES = ("softmax", "sigmoid")
# Rows from which a bfloat16 GEMM on a CPU is faster in float32, its weights' conversion included.
FEW_ROWS = 8


def route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    group_limit: int = 1,
    group_best: int = 2,
) -> tuple[Tensor, Tensor]:
    """Weights and indices of the k best experts, lowest index first among equals; see the op for the options."""
    scores = _scores(logits, score)
    eligible = logits.shape[-1] // groups * (group_limit if groups > 1 else 1)
    if k > eligible:
        raise TypeMismatch(f"route: k is {k}; it must be at most the {eligible} experts that its groups leave")
    choice = scores.detach() if bias is None else scores.detach() + _wide(bias.detach())
    if groups > 1:
        choice = _best_groups(choice, groups, group_limit, group_best)
    experts = _first(choice, k)
    weights = scores.gather(-1, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if score == "sigmoid" else 0.0))
    return weights * scale, experts


def _scores(logits: Tensor, score: str) -> Tensor:
    if score not in SCORES:
        raise TypeMismatch(f"a router's score is {score!r}; it must be one of {', '.join(SCORES)}")
    return torch.softmax(_wide(logits), -1) if score == "softmax" else torch.sigmoid(_wide(logits))


def _best_groups(choice: Tensor, groups: int, limit: int, members: int) -> Tensor:
    """Experts outside the `limit` groups whose best members sum highest lose all chance."""
    by_group = choice.unflatten(-1, (groups, -1))
    best = by_group.topk(min(members, by_group.shape[-1]), -1).values.sum(-1)
    keep = torch.zeros_like(best, dtype=torch.bool).scatter(-1, _first(best, limit), True)
    return by_group.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(-2)


def _first(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest, lowest index first among equals.

    A float32's bits order as an integer's once negatives are flipped, which leaves the low half of an int64 for the
    index: all keys differ, so an unstable top-k is deterministic, and it is 7 times faster than a stable sort.
    Scores are never -0.0, which would come after 0.0.
    """
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    bits = scores.view(torch.int32).long()
    ordered = torch.where(bits < 0, -(1 << 31) - 1 - bits, bits)
    last = (1 << 32) - 1
    keys = ordered * (1 << 32) + (last - torch.arange(scores.shape[-1], device=scores.device))
    return last - keys.topk(k, -1).values.remainder(1 << 32)


def dispatch(x: Tensor, experts: Tensor, *, e: int) -> tuple[Tensor, Tensor, Tensor]:
    """One row per (token, choice), sorted by expert; which pair each row is; how many rows each expert has."""
    flat = experts.reshape(-1)
    grouped, order = flat.sort(stable=True)
    bounds = torch.searchsorted(grouped, torch.arange(e + 1, device=flat.device))
    rows: Any = _Gather.apply(x.reshape(-1, x.shape[-1]), order, experts.shape[-1])
    return rows, order, bounds.diff()


def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Rows back at their tokens, weighted and summed over the choices."""
    y: Any = _Combine.apply(rows, order, _wide(weights).reshape(-1, weights.shape[-1]))
    return y.reshape(*weights.shape[:-1], rows.shape[-1])


class _Gather(torch.autograd.Function):
    """rows[i] = x[order[i] // k]; its gradient is a gather and a sum, where autograd's is a scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        back = _wide(grads[0])[_inverse(order)].unflatten(0, (-1, ctx.k))
        return back.sum(1).to(grads[0].dtype), None, None


class _Combine(torch.autograd.Function):
    """y[t] = sum_c weights[t, c] rows[place of pair (t, c)]"""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, order, weights)
        chosen = rows[_inverse(order)].unflatten(0, weights.shape)
        return (_wide(chosen) * weights[..., None]).sum(1).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, order, weights = ctx.saved_tensors
        dy = _wide(grads[0])[order // weights.shape[1]]
        drows = dy * weights.reshape(-1)[order][:, None]
        dweights = (dy * rows).sum(1)[_inverse(order)].view_as(weights)
        return drows.to(rows.dtype), None, dweights


def _inverse(order: Tensor) -> Tensor:
    """Where each pair's row is."""
    return torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))


def grouped_linear(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """Rows of expert j, which stand together in order of expert, times w[j]^T; rows past the last expert's are zero."""
    return torch.ops.plait.grouped_linear(x, w.to(x.dtype), counts)


@own_precision
def _grouped_linear(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    y, used = x.new_empty(x.shape[0], w.shape[1]), 0
    for j, lo, used in _spans(x, counts):
        _mm(x[lo:used], w[j].t(), y[lo:used])
    y[used:] = 0
    return y


@own_precision
def _grouped_outer(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """The gradient of each expert's weights, zero where it has no rows."""
    dw = x.new_zeros(counts.shape[0], dy.shape[1], x.shape[1])
    for j, lo, hi in _spans(x, counts):
        _mm(dy[lo:hi].t(), x[lo:hi], dw[j])
    return dw


def _spans(x: Tensor, counts: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, row after its last) of the experts that have rows."""
    sizes, lo = counts.tolist(), 0
    if sum(sizes) > len(x) or min(sizes, default=0) < 0:
        raise DataError(f"grouped_linear: counts sum to {sum(sizes)}, x has {len(x)} rows; they must be whole and fit")
    for j, size in enumerate(sizes):
        if size:
            yield j, lo, lo + size
            lo += size


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, in float32 where a CPU is slow at half precision."""
    if a.dtype in (torch.float32, torch.float64) or a.device.type != "cpu" or a.shape[0] < FEW_ROWS:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.float() @ b.float())


def load_balance_loss(logits: Tensor, experts: Tensor, *, score: str = "softmax") -> Tensor:
    """e * sum_j f_j P_j: f_j the share of all (token, choice) pairs that went to expert j, P_j its mean score

    Scores of one token sum to one (sigmoids are divided by their sum), so an even router gives 1, as Megatron's
    auxiliary loss; transformers' `load_balancing_loss_func` is k times this.
    """
    e = logits.shape[-1]
    scores = _scores(logits, score)
    scores = scores / scores.sum(-1, keepdim=True) if score == "sigmoid" else scores
    flat = experts.reshape(-1)
    counts = flat.new_zeros(e).scatter_add(0, flat, torch.ones_like(flat))
    share = counts.to(scores.dtype) / max(1, flat.shape[0])
    return e * (share * scores.reshape(-1, e).mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """mean(logsumexp(logits)^2): keeps router logits small."""
    return torch.logsumexp(_wide(logits), -1).square().mean()


def _wide(x: Tensor) -> Tensor:
    """Sums run in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


_SCHEMA = "Tensor counts) -> Tensor"
_op = torch.library.custom_op(
    "plait::grouped_linear", _grouped_linear, mutates_args=(), schema=f"(Tensor x, Tensor w, {_SCHEMA}"
)
_op_outer = torch.library.custom_op(
    "plait::grouped_outer", _grouped_outer, mutates_args=(), schema=f"(Tensor dy, Tensor x, {_SCHEMA}"
)


@_op.register_fake
def _(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@_op_outer.register_fake
def _(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, counts = ctx.saved_tensors
    dx = torch.ops.plait.grouped_linear(dy, w.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    dw = torch.ops.plait.grouped_outer(dy, x, counts) if ctx.needs_input_grad[1] else None
    return dx, dw, None


_op.register_autograd(_grad, setup_context=_save)
