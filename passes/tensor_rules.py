"""What ops do about features that are split over ranks, where their types alone do not say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

from ..ir import Node, OpDef, TensorType, Value, ops
from ..ir.orders import Sections, parse_order
from .loss_parts import PARTS
from .remarks import Remark
from .tensor_walk import Rule, Unfit, Walk


def _types(walk: Walk, node: Node) -> list[TensorType | None]:
    return [walk.type(v) if v is not None else None for v in node.inputs]


def _split_features(walk: Walk, value: Value) -> bool:
    type_ = walk.type(value)
    return walk.split.dim(type_) == len(type_.dims) - 1


def parted(walk: Walk, node: Node) -> Sequence[Value] | None:
    """Sections of which every rank has a share."""
    (x,) = node.operands
    order = parse_order(walk.type(x).dims[-1].order)
    if not _split_features(walk, x) or not isinstance(order, Sections):
        return None
    return walk.emit(node, [walk.type(x)], {**node.attrs, "parts": order.parts})


def normed(walk: Walk, node: Node) -> Sequence[Value] | None:
    """A norm over features that are split: each rank its own groups, or one sum of squares over all ranks."""
    x, w = node.operands[0], node.inputs[1]
    groups, size = node.attrs["groups"], int(x.type.dims[-1].size)
    if not _split_features(walk, x) or not (groups == 1 or walk.split.divides(groups)):
        return None
    h, eps = ops.widen(walk.at(x)), node.attrs["eps"]
    if groups > 1:
        parts = ops.reshape(h, pattern=f"... (g e={size // groups}) -> ... g e")
        n = ops.reshape(ops.rms_norm(parts, eps=eps), pattern="... g e -> ... (g e)")
    else:
        total = ops.all_reduce(ops.row_sum(ops.mul(h, h)), axis=walk.split.axis)
        walk.notes.said.append(Remark("note", "all_reduce", node.loc, "sums of squares: one number a token"))
        n = ops.scale_rows(h, ops.rsqrt(ops.shift(ops.scale(total, by=1 / size), by=eps)))
    if w is not None:
        dim = walk.type(x).dims[-1]
        factor = ops.widen(walk.at(w, walk.placed(walk.type(w), 0, dim.order) if walk.fresh(w) else None))
        n = ops.scale_columns(n, ops.shift(factor, by=1.0) if node.attrs["zero_centered"] else factor)
    return [n if n.type.dtype == x.type.dtype else ops.cast(n, dtype=x.type.dtype)]


def headed(walk: Walk, node: Node) -> Sequence[Value] | None:
    """Attention and recurrences run on each rank's heads; key heads fewer than ranks are repeated, then shared out."""
    types, split = _types(walk, node), walk.split
    if walk.terms.plain:
        return None
    assert isinstance(node.op, OpDef)
    bound = node.op.bind(types, node.attrs)
    letters = [x for x, uses in bound.uses.items() if any(split.axis in u.dim.axes for u in uses)]
    if not letters:
        _check_idle(walk, node)
        return None
    g, r = bound.size["g"], bound.size.get("r", 1)
    axes = tuple(a for u in bound.uses["g"] for a in u.dim.axes)
    if split.divides(g, axes):
        return None
    keys = [i for i, o in enumerate(node.op.inputs) if _of_keys(o.axes) and node.inputs[i] is not None]
    if not isinstance(g, int) or not isinstance(r, int) or (times := split.ranks // gcd(g, split.ranks)) < 1 or r % times:
        raise Unfit(f"{node.op.name}: {g} key heads of {r} heads each do not part into {split} ranks")
    made = {i: _repeated(walk, node.inputs[i], times) for i in keys}
    inputs = [made.get(i, v) for i, v in enumerate(node.inputs)]
    return _with_keys(walk, node, inputs, made)


def _check_idle(walk: Walk, node: Node) -> None:
    """Refuse columns that were made for heads which do not part."""
    value = node.outputs[0]
    if any(walk.split.lives(v.type) for v in walk.b.params):
        h = value.type.dims[2].size
        raise Unfit(f"{node.op.name}: {h} heads do not part into {walk.split}")


def _of_keys(axes: Sequence[Any]) -> bool:
    letters = {x for a in axes for x in a.letters}
    return "g" in letters and "r" not in letters


def _repeated(walk: Walk, value: Value | None, times: int) -> Value:
    """Key heads, each as often as ranks read it, shared out."""
    assert value is not None
    whole = walk.at(value, walk.split.whole(walk.type(value)))
    why = f"{whole.type.dims[2].size} key heads, each {times} times, for {walk.split} ranks; they are made whole in front"
    walk.notes.said.append(Remark("note", "repeat_heads", walk.b.loc, why))
    return ops.shard(ops.repeat_heads(whole, r=times), axis=walk.split.axis, dim=2)


def _with_keys(walk: Walk, node: Node, inputs: Sequence[Value | None], made: Mapping[int, Value]) -> Sequence[Value]:
    """The op over key heads that were made for it, everything else split as they are."""
    types = [made[i].type if i in made else walk.type(v) if v is not None else None for i, v in enumerate(inputs)]
    full = walk.aligned(node, types)
    given = [made[i] if i in made else walk.at(v, full[i]) if v is not None else None for i, v in enumerate(node.inputs)]
    return walk.b.emit(node.op, given, node.attrs, [v.name for v in node.outputs], node.loc)


def looked_up(walk: Walk, node: Node) -> Sequence[Value] | None:
    """Every rank looks up the words that it holds."""
    w, tokens = node.operands
    type_ = walk.type(w)
    if walk.fresh(w) and not walk.terms.plain and walk.split.divides(type_.dims[0].size, type_.dims[0].axes):
        type_ = walk.split.over(type_, 0)
    table = walk.at(w, type_)
    if walk.split.dim(table.type) != 0:
        return None
    attrs = {"over": walk.split.axis, "by": "vocabulary"}
    made = walk.b.emit(node.op, [table, walk.at(tokens)], attrs, [v.name for v in node.outputs], node.loc)[0]
    return [walk.moved(made, walk.rest(made.type))]


def all_tokens(walk: Walk, node: Node) -> Sequence[Value] | None:
    """Rows of experts are those of all tokens: ranks share their widths."""
    return walk.plain(node, [_tokens_whole(walk, t, i) for i, t in enumerate(_types(walk, node))])


def _tokens_whole(walk: Walk, type_: TensorType | None, index: int) -> TensorType | None:
    """Whole, but for the width of rows, and rows that are still to be summed."""
    if type_ is None or walk.split.axis in type_.partial or (index == 0 and walk.split.dim(type_) == len(type_.dims) - 1):
        return type_
    return walk.split.whole(type_)


RULES: Mapping[str, Rule] = {
    **PARTS,
    "split": parted,
    "rms_norm": normed,
    "embedding": looked_up,
    "dispatch": all_tokens,
    "combine": all_tokens,
    **dict.fromkeys([ops.attention.name, *(op.name for op in ops.FAMILY)], headed),
}
