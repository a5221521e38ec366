"""Nodes as passes see them: which are views, which work on one token's row, what a region saves, a copy."""

from __future__ import annotations

from collections.abc import Iterable

from ..ir import Builder, Node, OpDef, Value, ops

VIEWS = ("split", "reshape")
Sides = tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]


def is_view(node: Node) -> bool:
    """Whether its results can be views of its operand, which cost nothing outside a kernel and a copy inside."""
    return node.is_op(*VIEWS)


def row_wise(node: Node) -> bool:
    """Whether each row of its results comes from that row of its operands; a reshape must leave the tokens' dims alone."""
    if not isinstance(node.op, OpDef) or not node.op.row:
        return False
    return not node.is_op("reshape") or _keeps_tokens(node)


def _keeps_tokens(node: Node) -> bool:
    """Leading dims stay as they are; what is regrouped behind them are plain numbers, the columns of a row."""
    was, now = node.operands[0].type.dims, node.outputs[0].type.dims
    left, right = _letters(node.attrs["pattern"])
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    kept = same + (len(was) - len(left) if left[:1] == (("...",),) else 0)
    return same > 0 and not any(isinstance(d.size, str) for d in (*was[kept:], *now[kept:]))


def orderly(pattern: str) -> bool:
    """Whether a reshape only groups and parts dims, moving none."""
    flat = [[x for axis in side for x in axis if not x.endswith("=1")] for side in _letters(pattern)]
    return flat[0] == flat[1]


def mirrored(first: str, second: str) -> bool:
    """Whether the second reshape's text is the first's read backwards, parting dims into the same sizes."""
    (a, b), (c, d) = _letters(first), _letters(second)
    if (_bare(a), _bare(b)) != (_bare(d), _bare(c)):
        return False
    return all(len(axis) == 1 for axis in c) or (a, b) == (d, c)


def _letters(pattern: str) -> Sides:
    left, right = ops.sides(pattern)
    return tuple(a.letters for a in left), tuple(a.letters for a in right)


def _bare(side: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    return [[x.split("=")[0] for x in axis] for axis in side]


def copy_node(b: Builder, node: Node, env: dict[Value, Value]) -> None:
    """Emit a node again over the values that `env` has for its operands, and enter its results there."""
    inputs = [env[v] if v is not None else None for v in node.inputs]
    made = b.emit(node.op, inputs, node.attrs, [v.name for v in node.outputs], node.loc)
    env.update(zip(node.outputs, made, strict=True))


def bytes_saved(nodes: Iterable[Node], operands: Iterable[Value], results: Iterable[Value]) -> int:
    """Bytes a token that need not cross memory when the nodes run as one: each op's own traffic less the region's."""
    own = sum(_bytes(v) for n in nodes if not is_view(n) for v in (*n.operands, *n.outputs))
    return max(0, own - sum(_bytes(v) for v in (*operands, *results)))


def _bytes(value: Value) -> int:
    """With every symbolic size one; parameters are read once for many tokens and count nothing."""
    symbols = value.type.symbols
    return value.type.bytes(dict.fromkeys(symbols, 1)) if symbols else 0
