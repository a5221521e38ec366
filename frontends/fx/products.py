"""Products of two tensors by letters, and choices by a mask, as the calls that rules know."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ...ir import TypeMismatch, Value
from ...ir.rearrange import permuted, viewed
from ...ir.sizes import Size, times
from .handlers import Call, Made, constant, handles, is_number

if TYPE_CHECKING:
    from .build import Tracing


@handles("einsum.default")
def _einsum(t: Tracing, node: Call) -> Made:
    """A projection where the second shares no rows with the first, of every head where it has heads; else a matmul."""
    found = re.fullmatch(r"(\w+),(\w+)->(\w*)", str(node.args[0]).replace(" ", ""), re.ASCII)
    if found is None or len(node.args[1]) != 2 or any(len(set(part)) < len(part) for part in found.groups()):
        return None
    first, second, out = found.groups()
    if set(first + second) != set(first + second) & set(out) | set(first) & set(second):
        return None  # a letter that one operand alone has is summed
    x, w = (t.value(v) for v in node.args[1])
    size = dict(zip(first + second, (*x.type.shape, *w.type.shape), strict=True))
    shared = [c for c in first if c in second and c in out]
    inner = [c for c in first if c in second and c not in out]
    rows, columns = ([c for c in out if c in part and c not in shared] for part in (first, second))
    if not inner or not rows or not columns or not x.type.is_float or x.type.dtype != w.type.dtype:
        return None
    letters = _Letters(t, size)
    if not shared:
        made = t.emit("linear", letters(x, first, [*rows, inner]), letters(w, second, [columns, inner]))
        return letters.apart(made, [*rows, columns], out)
    if len(shared) == len(inner) == len(columns) == 1 and len(second) == 3 and out[-2:] == shared[0] + columns[0]:
        given = letters(x, first, [*rows, *shared, *inner])
        made = t.emit("head_linear", given, letters(w, second, [*shared, *columns, *inner]))
        return letters.apart(made, [*rows, *shared, *columns], out)
    a, b = letters(x, first, [*shared, rows, inner]), letters(w, second, [*shared, inner, columns])
    made = t.emit("aten", a, b, target="aten.matmul.default", args="x0, x1")
    return letters.apart(made, [*shared, rows, columns], out)


class _Letters:
    """Views of values whose dims have letters."""

    def __init__(self, t: Tracing, size: dict[str, Size]) -> None:
        self.t, self.size = t, size

    def __call__(self, x: Value, letters: str, groups: list[Any]) -> Value:
        """Dims in the order of the groups, each group one dim."""
        flat = [c for g in groups for c in g]
        shape = [self.size[c] for c in letters]
        turned = self._view(x, permuted(shape, [letters.index(c) for c in flat]))
        return self._view(turned, viewed([self.size[c] for c in flat], [times(*(self.size[c] for c in g)) for g in groups]))

    def apart(self, x: Value, groups: list[Any], out: str) -> Value:
        """The other way, into the order of `out`."""
        flat = [c for g in groups for c in g]
        wide = self._view(x, viewed([times(*(self.size[c] for c in g)) for g in groups], [self.size[c] for c in flat]))
        return self._view(wide, permuted([self.size[c] for c in flat], [flat.index(c) for c in out]))

    def _view(self, x: Value, made: Any) -> Value:
        found = self.t.view(x, made)
        if found is None:
            raise TypeMismatch("no view says this")
        return found


@handles("where.ScalarOther", "where.ScalarSelf", "where.self")
def _where(t: Tracing, node: Call) -> Made:
    """Numbers kept where a known mask says so, and one number elsewhere, are a mask that is filled in."""
    mask, a, b = node.args
    a, b = (constant(t, x) for x in (a, b))
    table = t.tables.get(mask)
    if table is None or table.op != "visible_table" or is_number(a) == is_number(b):
        return None
    x, by = (b, a) if is_number(a) else (a, b)
    if t.shape(x) != t.shape(node):
        return None
    flipped = bool(table.attrs.get("inverted", False)) != is_number(b)
    hidden = t.emit("visible_table", t.positions(), **{**table.attrs, "inverted": flipped})
    return t.emit("aten", t.value(x), hidden, target="aten.masked_fill.Scalar", args=f"x0, x1, {float(by)!r}")
