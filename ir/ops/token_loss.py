"""Losses in parts: a number for each token, sums over tokens that ranks may share, and the mean of what is counted.

A loss whose tokens, batch or vocabulary are split over several mesh axes at once is put together from these.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..op import op
from .pointwise import wide

Tensor = torch.Tensor


@op("logits[... v], labels:i64[...] -> losses:acc[...]", map="...", whole="v", flops="4*rest*v", over="v", summed=True)
def token_losses(logits: Tensor, labels: Tensor, *, ignore: int = -100) -> Tensor:
    """Each token's negative log-likelihood, 0 where its label is `ignore`"""
    losses = F.cross_entropy(wide(logits).flatten(0, -2), labels.flatten(), ignore_index=ignore, reduction="none")
    return losses.reshape(labels.shape)


@op(
    "x[... d], w[v d], labels:i64[...] -> losses:acc[...]",
    map="...", whole="v d", flops="2*rest*v*d", over="v", summed=True,
)  # fmt: skip
def linear_token_losses(x: Tensor, w: Tensor, labels: Tensor, *, ignore: int = -100, softcap: float = 0.0) -> Tensor:
    """The head's linear and each token's negative log-likelihood in one"""
    return token_losses.reference(head_logits(x, w, softcap), labels, ignore=ignore)


@op(
    "x[... d], w[v d], words:i64[...] -> lse:acc[...], wanted:acc[...]",
    map="...", whole="v d", flops="2*rest*v*d",
)  # fmt: skip
def head_parts(x: Tensor, w: Tensor, words: Tensor, *, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Of the head's logits, the log of their exponentials' sum, and that of a word: 0 where it is not one of these"""
    return word_parts(head_logits(x, w, softcap), words)


def word_parts(logits: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """The same of logits that are there."""
    known = (words >= 0) & (words < logits.shape[-1])
    wanted = logits.gather(-1, words.where(known, torch.zeros_like(words)).unsqueeze(-1)).squeeze(-1)
    return torch.logsumexp(logits, -1), wanted.where(known, torch.zeros_like(wanted))


def head_logits(x: Tensor, w: Tensor, softcap: float) -> Tensor:
    """What the head says of every word, in at least float32."""
    logits = wide(F.linear(x, w.to(x.dtype)))
    return torch.tanh(logits / softcap) * softcap if softcap else logits


@op("labels:i64[...] -> y:acc[...]", map="...")
def counted(labels: Tensor, *, ignore: int = -100) -> Tensor:
    """1 for each label that is not `ignore`, else 0"""
    return (labels != ignore).float()


@op("x[...] -> y:acc[]", sum="...", flops="rest", linear="x")
def total(x: Tensor) -> Tensor:
    """The sum of all numbers"""
    return wide(x).sum()


@op("y[], x[...] -> z[...]", map="...", linear="y", shape="x")
def spread_total(y: Tensor, x: Tensor) -> Tensor:
    """y everywhere in the shape of x"""
    return y.expand(x.shape).clone()


@op("total[], count[] -> y[]", flops="1", linear="total")
def mean_of(total: Tensor, count: Tensor) -> Tensor:
    """total / count, 0 where nothing was counted"""
    return (total / wide(count).clamp_min(1)).to(total.dtype)


@op("logits[... e] -> y:acc[...]", map="...", whole="e", flops="3*rest*e")
def z_losses(logits: Tensor) -> Tensor:
    """Each token's logsumexp(logits)^2"""
    return torch.logsumexp(wide(logits), -1).square()


@op("logits[... e] -> y:acc[... e]", map="...", whole="e", flops="4*rest*e")
def router_scores(logits: Tensor, *, score: Literal["softmax", "sigmoid"] = "softmax") -> Tensor:
    """Each token's scores of all experts, which add up to one"""
    if score == "softmax":
        return torch.softmax(wide(logits), -1)
    scores = torch.sigmoid(wide(logits))
    return scores / scores.sum(-1, keepdim=True)


@op("experts:i64[... k] -> y:acc[... e]", map="...", whole="k", flops="rest*k")
def choices_of(experts: Tensor, *, e: int) -> Tensor:
    """How often each token chose each of e experts"""
    none = torch.zeros(*experts.shape[:-1], e, device=experts.device)
    return none.scatter_add(-1, experts, torch.ones_like(experts, dtype=none.dtype))


@op("scores[e], chosen[e], tokens[] -> loss:acc[]", whole="e", flops="3*e", linear="scores")
def balance(scores: Tensor, chosen: Tensor, tokens: Tensor) -> Tensor:
    """e * sum_e (share of choices that went to e) * (mean score of e), given the sums over all tokens"""
    scores = wide(scores)
    share = chosen.to(scores.dtype) / chosen.to(scores.dtype).sum().clamp_min(1)
    return chosen.shape[0] * (share * (scores / tokens.to(scores.dtype).clamp_min(1))).sum()


@token_losses.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 5), torch.tensor([[0, 4, -100], [2, 1, 1]]), {}]


@linear_token_losses.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 4), sample.randn(5, 4), torch.tensor([[0, 4, -100], [2, 1, 1]]), {}]


@head_parts.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 4), sample.randn(5, 4), torch.tensor([[0, 4, -100], [2, 7, 1]]), {}]


@counted.samples
def _(sample: Any) -> list[Any]:
    return [torch.tensor([[0, 4, -100], [2, 1, 1]]), {}]


@choices_of.samples
def _(sample: Any) -> list[Any]:
    return [torch.tensor([[[0, 2], [1, 2], [4, 0]]] * 2), {"e": 5}]


@mean_of.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(), sample.randn().abs() + 2]


@balance.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(5), sample.randn(5).abs() + 1, sample.randn().abs() + 2]


counted.vjp("")
choices_of.vjp("")
total.vjp("d_x = spread_total(d_y, x)")
spread_total.vjp("d_y = total(d_z)")
mean_of.vjp("""
    g = widen(d_y)
    d_total = mean_of(g, count)
    more = step(shift(count, by=-1.0))
    d_count = mul(more, scale(mean_of(mul(g, mean_of(total, count)), count), by=-1.0))
""")
