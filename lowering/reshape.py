"""A reshape pattern as torch's own view methods, decided once: Dynamo never reads a pattern."""

from __future__ import annotations

from ..ir import Node, TensorType, ops
from ..ir.signature import Operand, bind, spread

Step = tuple[str, tuple[int | tuple[int, ...], ...]]


def view_steps(node: Node) -> list[Step]:
    """Methods and arguments that turn the operand of a `reshape` node into its result; of a split dim, a rank has a part."""
    value = node.inputs[0]
    assert value is not None
    return _steps(value.type, str(node.attrs["pattern"]))


def _steps(type_: TensorType, pattern: str) -> list[Step]:
    left, right = ops.sides(pattern)
    known = {x: int(x.split("=")[1]) for a in (*left, *right) for x in a.letters if "=" in x}
    bound = bind("reshape", [Operand("x", left)], [type_], known)
    steps, at, flat = list[Step](), 0, list[str]()
    for axis, dim in zip(spread(left, bound.rest), type_.dims, strict=True):
        if len(axis.letters) > 1:
            sizes = [-1 if dim.axes else bound.size[axis.letters[0]], *(bound.size[x] for x in axis.letters[1:])]
            steps.append(("unflatten", (at, tuple(n if isinstance(n, int) else -1 for n in sizes))))
        at, flat = at + len(axis.letters), flat + list(axis.letters)
    steps += [("squeeze", (i,)) for i in reversed(range(len(flat))) if flat[i].endswith("=1")]
    flat = [x for x in flat if not x.endswith("=1")]
    target = spread(right, bound.rest)
    moved = [x for a in target for x in a.letters if not x.endswith("=1")]
    order = tuple(flat.index(x) for x in moved)
    if order != tuple(range(len(order))):
        steps.append(("permute", (order,)))
    return steps + _groups([tuple(a.letters) for a in target])


def _groups(target: list[tuple[str, ...]]) -> list[Step]:
    """Insert unit dims, then flatten each group, right to left so that positions stay true."""
    steps, letters = list[Step](), [x for group in target for x in group]
    steps += [("unsqueeze", (i,)) for i, x in enumerate(letters) if x.endswith("=1")]
    ends, at = list[tuple[int, int]](), 0
    for group in target:
        ends.append((at, at + len(group) - 1))
        at += len(group)
    return steps + [("flatten", (a, b)) for a, b in reversed(ends) if b > a]
