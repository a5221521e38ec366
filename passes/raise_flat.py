"""Rows that were flattened before an op and parted after it: what works on rows works on them where they stand."""

from __future__ import annotations

from ..ir import ops
from .match import Match
from .rewrite import Rule
from .structure import orderly


def _merges_rows(found: Match) -> bool:
    """The pattern only merges dims before the last, and says no size."""
    return all(_merges(found.attrs[name]) for name in ("P", "Q") if name in found.attrs)


def _merges(pattern: str) -> bool:
    left, right = ops.sides(pattern)
    plain = all(len(a.letters) == 1 and a.letters[0].partition("=")[2] in ("", "1") for a in left)
    return plain and len(right) == 2 and right[-1] == left[-1] and len(right[0].letters) == len(left) - 1 and orderly(pattern)


def _comes_back(found: Match) -> bool:
    return orderly(found.attrs["P"]) and found.values["x"].type == found.values["y"].type


def _row_op(name: str, operands: str = "", attrs: str = "") -> Rule:
    made = f"{name}({{}}{operands}{attrs})"
    return Rule.of(
        f"flat-{name}{operands.replace(', ', '-')}",
        f"f = reshape(x, pattern=P)\ny = {made.format('f')}",
        f"z = {made.format('x')}\ny = reshape(z, pattern=P)",
        _merges_rows,
    )


def _two(name: str) -> Rule:
    return Rule.of(
        f"flat-{name}",
        f"f = reshape(a, pattern=P)\ng = reshape(b, pattern=P)\ny = {name}(f, g)",
        f"z = {name}(a, b)\ny = reshape(z, pattern=P)",
        _merges_rows,
    )


EXPERTS = """{}
w, i = route({}, k=K, renormalize=N)
r, o, c = dispatch({}, i, e=E)
h = grouped_linear(r, a, c)
t, u = split(h, sizes=Z)
v = activation(t)
m = mul(v, u)
d = grouped_linear(m, b, c)
y = combine(d, o, w)"""

_BACK = "y = aten(f, t, target='aten.{}.default', args=A)"
FLAT = (
    Rule.of(
        "row-of-positions",
        "p = positions(t)\ni = aten(p, target='aten.narrow.default', args='x0, 0, 0, 1')\ne = embedding(w, i)\n"
        "y = aten(x, e, target='aten.add.Tensor', args='x0, x1')",
        "q = positions(t)\nf = embedding(w, q)\ny = add(x, f)",
        lambda found: found.values["x"].type == found.values["y"].type and len(found.values["x"].type.dims) == 3,
    ),
    *(
        Rule.of(f"flat-back-{name}", f"f = reshape(x, pattern=P)\n{_BACK.format(name)}", "x", _comes_back)
        for name in ("view", "reshape")
    ),
    _row_op("linear", ", w"), _row_op("linear", ", w, c"), _row_op("silu"), _row_op("relu"), _row_op("sigmoid"),
    _row_op("gelu", attrs=", approximate=A"), _row_op("rms_norm", ", w", ", eps=E, zero_centered=Z, groups=G"),
    _row_op("rms_norm", "", ", eps=E, groups=G"), _row_op("scale_columns", ", w"), _row_op("add_bias", ", w"),
    _row_op("layer_norm", ", w, c", ", eps=E"), _row_op("scale", attrs=", by=A"), _row_op("widen"),
    _row_op("cast", attrs=", dtype=A"), _two("add"), _two("mul"), _two("sub"),
    Rule.of(
        "flat-scale-rows",
        "f = reshape(a, pattern=P)\ni = reshape(c, pattern=Q)\ng = reshape(i, pattern='... u=1 -> ...')\ny = scale_rows(f, g)",
        "h = reshape(c, pattern='... u=1 -> ...')\nz = scale_rows(a, h)\ny = reshape(z, pattern=P)",
        _merges_rows,
    ),
    Rule.of("flat-experts", EXPERTS.format("f = reshape(l, pattern=P)\ng = reshape(x, pattern=P)", "f", "g"),
            EXPERTS.format("", "l", "x").replace("y = ", "z = ") + "\ny = reshape(z, pattern=P)", _merges_rows),
)  # fmt: skip
