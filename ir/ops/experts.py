"""Mixture of experts: route, dispatch to sorted rows, one linear per expert, combine; and the losses that balance it.

Sources: Switch Transformer (arXiv 2101.03961), ST-MoE (2202.08906), DeepSeek-V3 (2412.19437).
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from ..op import op
from .pointwise import wide
from .token_wise import token_wise

Tensor = torch.Tensor


@op("logits[... e], bias[e]? -> weights:acc[... k], experts:i64[... k]", map="...", whole="e", flops="6*rest*e")
def route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    score: Literal["softmax", "sigmoid"] = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    group_limit: int = 1,
    group_best: int = 2,
) -> tuple[Tensor, Tensor]:
    """The k best experts of each token, lowest index first among equals, and their weights

    `bias` steers the choice and not the weights; with `groups`, only the `group_limit` groups whose `group_best` best scores
    sum highest are eligible; `renormalize` makes the k weights sum to one before `scale`.
    """
    scores = torch.softmax(wide(logits), -1) if score == "softmax" else torch.sigmoid(wide(logits))
    choice = scores if bias is None else scores + wide(bias)
    if groups > 1:
        by_group = choice.unflatten(-1, (groups, -1))
        best = by_group.topk(min(group_best, by_group.shape[-1]), -1).values.sum(-1)
        keep = torch.zeros_like(best, dtype=torch.bool).scatter(-1, _first(best, group_limit), True)
        choice = by_group.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(-2)
    experts = _first(choice, k)
    weights = scores.gather(-1, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if score == "sigmoid" else 0.0))
    return weights * scale, experts


def _first(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest, lowest index first among equals."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@route.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(3, 5, 6), sample.randn(6), {"k": 2, "groups": 3, "group_limit": 2}]


@op("x[... d], experts:i64[... k] -> rows[(... k) d], order:i64[(... k)], counts:i64[e]", map="d", whole="... k", linear="x")
def dispatch(x: Tensor, experts: Tensor, *, e: int) -> tuple[Tensor, Tensor, Tensor]:
    """One row per (token, choice), sorted by expert; `order` is the pair of each row, `counts` how many rows an expert has"""
    flat = experts.reshape(-1)
    order = flat.sort(stable=True).indices
    rows = x.reshape(-1, x.shape[-1])[order // experts.shape[-1]]
    return rows, order, torch.bincount(flat, minlength=e)


@dispatch.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 4), torch.tensor([[[0, 2], [1, 2], [4, 0]]] * 2), {"e": 5}]


@op("x[n i], w[e o i], counts:i64[e] -> y[n o]", map="o", sum="i", whole="n e", flops="2*n*i*o", linear="x, w")
def grouped_linear(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """Each expert's linear on its own rows, which stand together in order of expert"""
    parts = x.split([int(c) for c in counts])
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, w.to(x.dtype), strict=True)])


@grouped_linear.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(7, 4), sample.randn(3, 6, 4), torch.tensor([3, 0, 4])]


@op("rows[n d], order:i64[n], weights[... k] -> y[... d]", map="d", whole="n ... k", flops="2*n*d", linear="rows, weights")
def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Rows back at their tokens, weighted and summed over the choices"""
    back = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    chosen = wide(rows)[back].reshape(*weights.shape, rows.shape[-1])
    return (chosen * wide(weights).unsqueeze(-1)).sum(-2).to(rows.dtype)


@combine.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(12, 4), sample.permutation(12), sample.randn(2, 3, 2)]


@op("y[... d], order:i64[n], weights[... k] -> rows[n d]", map="d", whole="n ... k", flops="n*d", linear="y, weights")
def weigh_rows(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The token's row times the weight of each (token, choice) in `order`: what combine's result asks of its rows"""
    return take_rows.reference(y, order, weights) * weights.reshape(-1)[order].unsqueeze(-1).to(y.dtype)


@op(
    "rows[n d], order:i64[n], y[... d], weights[... k] -> w:acc[... k]",
    sum="d", whole="n ... k", flops="2*n*d", linear="rows, y", shape="weights",
)  # fmt: skip
def weight_products(rows: Tensor, order: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """w = each row times its token's y: what combine's result asks of its weights, which give their shape alone"""
    products = (wide(rows) * wide(take_rows.reference(y, order, weights))).sum(-1)
    return torch.empty_like(products).index_copy(0, order, products).reshape(weights.shape)


@op("x[... d], order:i64[n], experts:i64[... k] -> rows[n d]", map="d", whole="... k n", linear="x")
def take_rows(x: Tensor, order: Tensor, experts: Tensor) -> Tensor:
    """The token's row for each (token, choice) in `order`; `experts` gives the shape of the pairs alone"""
    return x.reshape(-1, x.shape[-1])[order // experts.shape[-1]]


@op("rows[n d], order:i64[n], experts:i64[... k] -> x[... d]", map="d", whole="n ... k", flops="n*d", linear="rows")
def sum_rows(rows: Tensor, order: Tensor, experts: Tensor) -> Tensor:
    """Rows back at their tokens, summed over the choices: the gradient of dispatch"""
    total = wide(rows.new_zeros(experts[..., 0].numel(), rows.shape[-1]))
    total = total.index_add(0, order // experts.shape[-1], wide(rows))
    return total.reshape(*experts.shape[:-1], rows.shape[-1]).to(rows.dtype)


@op("a[n o], b[n i], counts:i64[e] -> y[e o i]", map="o i", whole="n e", flops="2*n*i*o", linear="a, b")
def grouped_outer(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """y = a^T b of each expert's own rows: the gradient of its weight"""
    sizes = [int(c) for c in counts]
    return torch.stack([wide(p).T @ wide(q) for p, q in zip(a.split(sizes), b.split(sizes), strict=True)]).to(a.dtype)


@take_rows.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 4), sample.permutation(12), sample.integers(5, 2, 3, 2)]


@sum_rows.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(12, 4), sample.permutation(12), sample.integers(5, 2, 3, 2)]


@weigh_rows.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 4), sample.permutation(12), sample.randn(2, 3, 2)]


@weight_products.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(12, 4), sample.permutation(12), sample.randn(2, 3, 4), sample.randn(2, 3, 2)]


@grouped_outer.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(7, 6), sample.randn(7, 4), torch.tensor([3, 0, 4])]


for _op in (dispatch, grouped_linear, combine, weigh_rows, weight_products, take_rows, sum_rows, grouped_outer):
    token_wise(_op)

combine.vjp("""
    d_rows = weigh_rows(d_y, order, weights)
    d_weights = weight_products(rows, order, d_y, weights)
""")
weigh_rows.vjp("""
    d_y = combine(d_rows, order, weights)
    d_weights = weight_products(d_rows, order, y, weights)
""")
weight_products.vjp("""
    d_rows = weigh_rows(y, order, d_w)
    d_y = combine(rows, order, d_w)
""")
dispatch.vjp("d_x = sum_rows(d_rows, order, experts)")
take_rows.vjp("d_x = sum_rows(d_rows, order, experts)")
sum_rows.vjp("d_rows = take_rows(d_x, order, experts)")
grouped_linear.vjp("""
    d_x = grouped_linear(d_y, reshape(w, pattern='e o i -> e i o'), counts)
    d_w = grouped_outer(d_y, x, counts)
""")
grouped_outer.vjp("""
    d_a = grouped_linear(b, d_y, counts)
    d_b = grouped_linear(a, reshape(d_y, pattern='e o i -> e i o'), counts)
""")


@op("logits[... e], experts:i64[... k] -> loss:acc[]", whole="... e k", flops="4*rest*e", over="...", summed=True)
def load_balance_loss(logits: Tensor, experts: Tensor, *, score: Literal["softmax", "sigmoid"] = "softmax") -> Tensor:
    """e * sum_e (share of choices that went to e) * (mean score of e), 1 when even"""
    scores = torch.softmax(wide(logits), -1) if score == "softmax" else torch.sigmoid(wide(logits))
    if score == "sigmoid":
        scores = scores / scores.sum(-1, keepdim=True)
    e = logits.shape[-1]
    share = torch.bincount(experts.reshape(-1), minlength=e).to(scores.dtype) / max(1, experts.numel())
    return e * (share * scores.reshape(-1, e).mean(0)).sum()


@load_balance_loss.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 5), torch.tensor([[[0, 2], [1, 2], [4, 0]]] * 2), {}]


@op("logits[... e] -> loss:acc[]", whole="... e", flops="3*rest*e", over="...", summed=True)
def z_loss(logits: Tensor) -> Tensor:
    """mean(logsumexp(logits)^2): keeps router logits small"""
    return torch.logsumexp(wide(logits), -1).square().mean()
