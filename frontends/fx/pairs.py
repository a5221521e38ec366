"""Numbers that stand in pairs: complex ones, as a last dim of their two parts, and columns taken two by two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...ir import Value
from ...ir.rearrange import permuted, viewed
from .handlers import Call, Handler, Made, argument, handles, is_tensor, rank

if TYPE_CHECKING:
    from .build import Tracing

COMPLEX: dict[str, Handler] = {}  # calls that make or read complex numbers, by name
_LAWS = ("theta", "scaling", "divisors", "amplitude", "rounded")


def is_complex(x: Any) -> bool:
    """Whether a traced value holds complex numbers."""
    return is_tensor(x) and x.meta["val"].is_complex()


def touches_complex(node: Call) -> bool:
    """Whether a call makes complex numbers, or reads some."""
    value = node.meta.get("val")
    return (isinstance(value, torch.Tensor) and value.is_complex()) or any(map(is_complex, node.all_input_nodes))


def _complex(*names: str) -> Any:
    def define(rule: Handler) -> Handler:
        COMPLEX.update(dict.fromkeys(names, rule))
        return rule

    return define


@_complex("view_as_complex.default", "view_as_real.default", "clone.default", "contiguous.default", "alias.default")
def _as_it_is(t: Tracing, node: Call) -> Made:
    return t.value(node.args[0])


@_complex("complex.default")
def _joined(t: Tracing, node: Call) -> Made:
    return pair(t, *(t.value(x) for x in node.args[:2]))


@_complex("polar.default")
def _polar(t: Tracing, node: Call) -> Made:
    length, angle = (t.value(x) for x in node.args[:2])
    parts = (t.emit("aten", angle, target=f"aten.{f}.default", args="x0") for f in ("cos", "sin"))
    return pair(t, *(_times(t, part, length) for part in parts))


@_complex("real.default", "imag.default")
def _part(t: Tracing, node: Call) -> Made:
    return _parts(t, t.value(node.args[0]))["imag" in str(node.target)]


@_complex("mul.Tensor")
def _product(t: Tracing, node: Call) -> Made:
    """A rotation where one of the two is a table of angles that have a law; else sums of products of parts."""
    x, y = node.args[:2]
    for a, b in ((x, y), (y, x)):
        if is_complex(a) and is_complex(b) and (made := _rotated(t, node, a, b)) is not None:
            return made
    if not is_tensor(y) or not is_complex(x) or not is_complex(y):
        number = y if is_complex(x) else x
        pairs = t.value(x if is_complex(x) else y)
        if not is_tensor(number):
            return t.emit("scale", pairs, by=float(number)) if isinstance(number, int | float) else None
        again = t.emit("aten", t.value(number), target="aten.unsqueeze.default", args="x0, -1")
        return _times(t, pairs, again)
    (a, b), (c, d) = (_parts(t, t.value(v)) for v in (x, y))
    real = t.emit("sub", _times(t, a, c), _times(t, b, d))
    return pair(t, real, t.emit("add", _times(t, a, d), _times(t, b, c)))


def _rotated(t: Tracing, node: Call, x: Call, table: Call) -> Value | None:
    """Heads turned by their positions, pair by pair."""
    known = t.tables.get(table)
    if known is None or x in t.known.nodes or rank(x) != 4 or t.shape(x) != t.shape(node):
        return None
    words = ["1"] * (4 - rank(table)) + known.attrs["shape"].split()
    first = {("1", "t"): True, ("t", "1"): False}.get((words[1], words[2]))
    if first is None or words[0] not in ("1", "b") or words[3] != "d":
        return None
    dims = "b h t" if first else "b t h"
    heads = t.emit("reshape", t.value(x), pattern=f"{dims} n r -> b t h (n r)")
    turned = t.emit("rope", heads, t.positions(), interleaved=True, **{k: v for k, v in known.attrs.items() if k in _LAWS})
    return t.emit("reshape", turned, pattern=f"b t h (n r=2) -> {dims} n r")


@_complex("view.default", "reshape.default", "_unsafe_view.default", "unsqueeze.default", "squeeze.dim")
def _view(t: Tracing, node: Call) -> Made:
    return t.view(t.value(node.args[0]), viewed((*t.shape(node.args[0]), 2), (*t.shape(node), 2)))


@_complex("transpose.int")
def _transposed(t: Tracing, node: Call) -> Made:
    n = rank(node.args[0])
    order = list(range(n + 1))
    i, j = (int(d) % n for d in node.args[1:3])
    order[i], order[j] = order[j], order[i]
    return t.view(t.value(node.args[0]), permuted((*t.shape(node.args[0]), 2), order))


@_complex("slice.Tensor")
def _slice(t: Tracing, node: Call) -> Made:
    """Some rows of a table, by sizes that are numbers."""
    dim, start, end = argument(node, 1, "dim", 0) % rank(node), argument(node, 2, "start") or 0, argument(node, 3, "end")
    x = t.value(node.args[0])
    if t.shape(node.args[0]) == t.shape(node):
        return x
    if not isinstance(start, int) or not isinstance(end, int) or argument(node, 4, "step", 1) != 1:
        return None
    return t.emit("aten", x, target="aten.slice.Tensor", args=f"x0, {dim}, {start}, {end}")


def pair(t: Tracing, a: Value, b: Value) -> Value:
    """Two values side by side in a new last dim."""
    return t.emit("aten", a, b, target="aten.stack.default", args="[x0, x1], -1")


def _parts(t: Tracing, x: Value) -> tuple[Value, Value]:
    first, second = (t.emit("aten", x, target="aten.select.int", args=f"x0, -1, {i}") for i in (0, 1))
    return first, second


def _times(t: Tracing, a: Value, b: Value) -> Value:
    if a.type == b.type:
        return t.emit("mul", a, b)
    return t.emit("aten", a, b, target="aten.mul.Tensor", args="x0, x1")


@handles("stack.default")
def _stack(t: Tracing, node: Call) -> Made:
    """Two beside each other, number by number: concat and a turn of its columns."""
    parts, dim = node.args[0], argument(node, 1, "dim", 0)
    if len(parts) != 2 or dim not in (-1, rank(node) - 1) or rank(node) < 2:
        return None
    a, b = (t.value(x) for x in parts)
    if not a.type.is_float or a.type != b.type or not isinstance(a.type.shape[-1], int):
        return None
    return t.emit("reshape", t.emit("concat", a, b), pattern="... (r=2 n) -> ... n r")
