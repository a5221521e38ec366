"""Losses taken apart: numbers of tokens, sums that every mesh axis adds its part to, and what is made of the sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir import Node, TensorType, Value, ops
from .tensor_walk import Rule, Walk


def summed(value: Value) -> Value:
    """The sum over all tokens, on every rank."""
    made = ops.total(value) if len(value.type.dims) else value
    return everywhere(made)


def everywhere(value: Value) -> Value:
    """A sum of which ranks hold parts, closed over every axis."""
    for axis in sorted(value.type.partial):
        value = ops.all_reduce(value, axis=axis)
    return value


def labelled(walk: Walk, node: Node) -> Sequence[Value] | None:
    """The mean over labels of losses of their own."""
    if not _lives(walk, node):
        return None
    labels, ignore = node.inputs[-1], node.attrs["ignore"]
    assert labels is not None
    losses = _token_losses(walk, node)
    there = walk.at(labels, _as_tokens(walk, losses, labels))
    return [ops.mean_of(summed(losses), summed(ops.counted(there, ignore=ignore)))]


def _lives(walk: Walk, node: Node) -> bool:
    return any(walk.split.lives(walk.at(v).type) for v in node.operands)


def _as_tokens(walk: Walk, losses: Value, labels: Value) -> TensorType:
    """The labels' type, split as the losses are."""
    type_, at = walk.type(labels), walk.split.dim(losses.type)
    return type_ if at is None or walk.split.lives(type_) else walk.split.over(type_, at)


def _token_losses(walk: Walk, node: Node) -> Value:
    """Each token's loss, every rank of the walk's axis with its own tokens, or its own words."""
    op = ops.linear_token_losses if node.is_op("linear_cross_entropy") else ops.token_losses
    attrs = {k: v for k, v in node.attrs.items() if k not in ("over", "by", "order")}
    types = [walk.rest(walk.type(v)) for v in node.operands]
    words = types[1].dims[0] if op is ops.linear_token_losses else types[0].dims[-1]
    if walk.split.axis in words.axes:
        attrs |= {"over": walk.split.axis, "by": "vocabulary"}
        types = [t if t.dims[0] is words or t.dims[-1] is words else walk.split.whole(t) for t in types]
    inputs = [walk.at(v, t) for v, t in zip(node.operands, _met(walk, types), strict=True)]
    return walk.b.emit(op, inputs, attrs, ["losses"], node.loc)[0]


def _met(walk: Walk, types: Sequence[TensorType]) -> list[TensorType]:
    """Labels split as the tokens are that they belong to."""
    first, last, at = types[0], types[-1], walk.split.dim(types[0])
    alone = at is None or at >= len(last.dims) or walk.split.lives(last)
    return [*types[:-1], last if alone or at is None or first is last else walk.split.over(last, at)]


def mean_square(walk: Walk, node: Node) -> Sequence[Value] | None:
    """The mean over tokens of logsumexp^2."""
    (logits,) = node.operands
    if not _lives(walk, node):
        return None
    found = ops.z_losses(walk.at(logits, walk.rest(walk.type(logits))))
    return [ops.mean_of(summed(found), summed(_ones(found)))]


def _ones(value: Value) -> Value:
    return ops.shift(ops.zeros_like(value), by=1.0)


def evenness(walk: Walk, node: Node) -> Sequence[Value] | None:
    """How even the choices are, from sums over tokens for each expert."""
    if not _lives(walk, node):
        return None
    types = [walk.rest(walk.type(v)) for v in node.operands]
    logits, experts = (walk.at(v, t) for v, t in zip(node.operands, _met(walk, types), strict=True))
    scores = ops.router_scores(logits, score=node.attrs["score"])
    chosen = ops.choices_of(experts, e=int(logits.type.dims[-1].size))
    tokens = summed(_ones(ops.row_sum(scores)))
    sums = [everywhere(ops.column_sum(x)) for x in (scores, chosen)]
    return [ops.balance(*sums, tokens)]


PARTS: Mapping[str, Rule] = {
    "cross_entropy": labelled,
    "linear_cross_entropy": labelled,
    "z_loss": mean_square,
    "load_balance_loss": evenness,
}
