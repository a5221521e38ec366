"""Ops that move numbers within a value: split, concat, reshape by signature."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from ..errors import PlacementError, TypeMismatch
from ..op import op
from ..orders import Sections, parse_order
from ..signature import Axis, Binding, Operand, bind, spread
from ..sizes import times
from ..types import Dim, TensorType

Tensor = torch.Tensor


@op("x[... d] -> y[... d]", map="...", whole="d", row=True, linear="x")
def split(x: Tensor, *, sizes: tuple[int, ...], parts: int = 1) -> tuple[Tensor, ...]:
    """Sections of the last dim, in order; with `parts`, of a dim in order sections(parts,...)"""
    if parts > 1 and x.shape[-1] == sum(sizes):  # all of it: every rank's share of a section is put behind the one before
        shares = x.unflatten(-1, (parts, -1)).split([n // parts for n in sizes], -1)
        return tuple(y.flatten(-2) for y in shares)
    if x.shape[-1] * parts != sum(sizes):
        raise TypeMismatch(f"split: {x.shape[-1]} columns are neither all of {sum(sizes)} nor one rank's of {parts}")
    return x.split([n // parts for n in sizes], -1)


@split.infers
def _(x: TensorType, *, sizes: tuple[int, ...], parts: int) -> tuple[TensorType, ...]:
    """How many results there are is an attribute, which letters cannot say."""
    last = x.dims[-1] if x.dims else Dim(0)
    if parts == 1 and (last.axes or last.order):
        raise PlacementError(f"split: x is {x}; role whole must see the last dim whole")
    if sum(sizes) != last.size or not sizes or min(sizes) < 1:
        raise TypeMismatch(f"split: sizes {sizes} add up to {sum(sizes)}, must add up to {last.size}")
    finer = [(n,) for n in sizes] if parts == 1 else _within(last, sizes, parts)
    made = [Dim(n, last.axes, in_sections(parts, within)) for n, within in zip(sizes, finer, strict=True)]
    return tuple(x.with_dim(len(x.dims) - 1, d) for d in made)


def _within(dim: Dim, sizes: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
    """The sections that a dim in order sections(parts,...) has within each of `sizes`."""
    order = parse_order(dim.order)
    if not isinstance(order, Sections) or order.parts != parts:
        raise PlacementError(f"split: the last dim of x is {dim}; with parts={parts} it must be in order sections({parts},...)")
    found, waiting = list[tuple[int, ...]](), [*order.sizes]
    for size in sizes:
        inside = list[int]()
        while waiting and sum(inside) < size:
            inside.append(waiting.pop(0))
        if sum(inside) != size:
            raise PlacementError(f"split: sizes {sizes} must each be one or more of the sections of {dim}")
        found.append(tuple(inside))
    return found


def in_sections(parts: int, sizes: Sequence[int]) -> str:
    """The order of sections of which every rank of `parts` has a share; one section alone is in the natural order."""
    return str(Sections(parts, tuple(sizes))) if len(sizes) > 1 and parts > 1 else ""


@split.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 7), {"sizes": (2, 4, 1)}]


@op("a[... m], b[... n] -> y[... m]", map="...", whole="m n", linear="a b")
def join(a: Tensor, b: Tensor, *, order: str) -> Tensor:
    """a and b in one last dim in order sections(n,...): every rank's share of b behind its share of a"""
    made = _sections(order)
    b, width = b.to(a.dtype), a.shape[-1] + b.shape[-1]
    if width * made.parts == sum(made.sizes) and made.parts > 1:  # one rank's
        return torch.cat([a, b], -1)
    if width != sum(made.sizes):
        raise TypeMismatch(f"join: {width} columns are neither all nor one rank's of {order}")
    return torch.cat([x.unflatten(-1, (made.parts, -1)) for x in (a, b)], -1).flatten(-2)


def _sections(order: str) -> Sections:
    made = parse_order(order)
    if not isinstance(made, Sections):
        raise TypeMismatch(f"join: order is {order or 'natural'!r}, must be sections(n,a,b,...)")
    return made


@join.infers
def _(a: TensorType, b: TensorType, *, order: str) -> TensorType:
    """The order is an attribute, which letters cannot say."""
    wanted = _sections(order)
    if not a.dims or not b.dims:
        raise TypeMismatch(f"join: a is {a}, b is {b}; both must have a last dim")
    m, n = a.dims[-1], b.dims[-1]
    inside = [(n.size,) if not n.order else _sections(n.order).sizes for n in (m, n)] if _joinable(m, n, wanted.parts) else None
    if inside is None or m.axes != n.axes:
        raise PlacementError(
            f"join: the last dims are {m} and {n}; they must be split alike, natural or in the parts of {order}"
        )
    if (*inside[0], *inside[1]) != wanted.sizes:
        raise TypeMismatch(f"join: sections {(*inside[0], *inside[1])} do not make up {order}")
    bare = [x.with_dim(len(x.dims) - 1, Dim(x.dims[-1].size)) for x in (a, b)]
    made = join.result_types(*join.placed(bare, {}))[0]
    return made.with_dim(len(a.dims) - 1, Dim(sum(wanted.sizes), m.axes, order))


def _joinable(m: Dim, n: Dim, parts: int) -> bool:
    """Whether the last dims are natural, or in sections of as many parts."""
    orders = [parse_order(d.order) for d in (m, n)]
    return all(o is None or (isinstance(o, Sections) and o.parts == parts) for o in orders)


@join.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 4), sample.randn(2, 3, 6), {"order": "sections(2,4,6)"}]


@op("a[... m], b[... n] -> y[... m]", map="...", whole="m n", row=True, linear="a b")
def concat(a: Tensor, b: Tensor) -> Tensor:
    """a and b side by side in the last dim"""
    return torch.cat([a, b.to(a.dtype)], -1)


@concat.infers
def _(a: TensorType, b: TensorType) -> TensorType:
    """The last size is a sum, which letters cannot say."""
    concat.placed((a, b), {})
    m, n = a.dims[-1], b.dims[-1]
    if m.order or n.order:
        raise PlacementError(f"concat: a is {a}, b is {b}; the last dims must be in the natural order")
    if not isinstance(m.size, int) or not isinstance(n.size, int):
        raise TypeMismatch(f"concat: a is {a}, b is {b}; the last dims must be numbers")
    return a.with_dim(len(a.dims) - 1, Dim(m.size + n.size))


@op("x[b t d] -> y[b 1 d]", map="b d", scan="t", linear="x")
def last_token(x: Tensor) -> Tensor:
    """y = the last token of every row"""
    return x[:, -1:]


@op("x[...] -> y[...]", map="...", row=True, linear="x")
def reshape(x: Tensor, *, pattern: str) -> Tensor:
    """x with its dims grouped, parted or moved: pattern='... (h=8 d) -> ... h d'; a letter `u=1` may come or go"""
    left, right = sides(pattern)
    size = _numbers(x.shape, left)
    rest = x.dim() - sum(a.letters != ("...",) for a in left)
    flat = [y for a in spread(left, rest) for y in a.letters]
    for i, n in enumerate(x.shape[: rest if left and left[0].letters == ("...",) else 0]):
        size[f"...{i}"] = n
    moved = [y for a in spread(right, rest) for y in a.letters]
    flat, moved = ([a for a in side if not a.endswith("=1")] for side in (flat, moved))
    y = x.reshape([size[a] for a in flat]).permute([flat.index(a) for a in moved])
    return y.reshape([math.prod(size[z] for z in a.letters) for a in spread(right, rest)])


def _numbers(shape: torch.Size, axes: tuple[Axis, ...]) -> dict[str, int]:
    """The number each letter of the left side stands for."""
    size = {x.split("=")[0]: int(x.split("=")[1]) for a in axes for x in a.letters if "=" in x}
    fixed = [a for a in axes if a.letters != ("...",)]
    for axis, n in zip(fixed, shape[len(shape) - len(fixed) :], strict=True):
        known = math.prod(size.get(x.split("=")[0], 1) for x in axis.letters)
        if n % known:
            raise TypeMismatch(f"reshape: ({' '.join(axis.letters)}) is {n} here, must be a multiple of {known}")
        for x in axis.letters:
            if x.split("=")[0] not in size:
                size[x] = n // known
    return {**size, **{f"{k}={v}": v for k, v in size.items()}, "u=1": 1}


@lru_cache(maxsize=512)
def sides(pattern: str) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    sides = pattern.split("->")
    if len(sides) != 2:
        raise TypeMismatch(f"reshape: pattern {pattern!r} must have two sides, '... (h=8 d) -> ... h d'")
    parts = [re.findall(r"\(([^)]*)\)|([\w.=]+)", s) for s in sides]
    left, right = (tuple(Axis(tuple(a.split()) if a else (b,)) for a, b in p) for p in parts)
    flat = [x.split("=")[0] for a in left for x in a.letters]
    if len(set(flat)) < len(flat):
        raise TypeMismatch(f"reshape: pattern {pattern!r} must have each letter once a side")
    named = {x.split("=")[0]: x for a in left for x in a.letters}
    right = tuple(Axis(tuple(named.get(x, x) for x in a.letters)) for a in right)
    if len({tuple(sorted(x for a in side for x in a.letters if not x.endswith("=1"))) for side in (left, right)}) > 1:
        raise TypeMismatch(f"reshape: pattern {pattern!r} must have the same letters on both sides")
    if any("..." in a.letters for a in left[1:]):
        raise TypeMismatch(f"reshape: pattern {pattern!r} may have an ellipsis at the start alone")
    return left, right


@reshape.infers
def _(x: TensorType, *, pattern: str) -> TensorType:
    """The signature is an attribute; letters carry placements over, a split of (h d) is a split of h."""
    left, right = sides(pattern)
    try:
        known = {y: int(y.split("=")[1]) for a in (*left, *right) for y in a.letters if "=" in y}
    except ValueError:
        raise TypeMismatch(f"reshape: pattern {pattern!r}: a size is a number, 'h=8'") from None
    bound = bind("reshape", [Operand("x", left)], [x], known)
    for axis, dim in zip(spread(left, bound.rest), x.dims, strict=True):
        if (dim.axes or dim.order) and "=" in axis.letters[0]:
            raise PlacementError(
                f"reshape {pattern!r}: {dim} is split, so each rank must find {axis.letters[0]} itself; give the inner sizes"
            )
        if dim.order and len(axis.letters) > 1:
            raise PlacementError(f"reshape {pattern!r}: {dim} must be in the natural order to be parted")
    return TensorType(x.dtype, tuple(_grouped(a, bound, pattern) for a in spread(right, bound.rest)), x.partial)


def _grouped(axis: Axis, bound: Binding, pattern: str) -> Dim:
    dims = [bound.dim(y) for y in axis.letters]
    if any(d.axes or d.order for d in dims[1:]):
        raise PlacementError(f"reshape {pattern!r}: a dim that is split may only be the outermost of a group")
    return Dim(times(*(d.size for d in dims)), dims[0].axes, dims[0].order)


@reshape.samples
def _(sample: Any) -> list[Any]:
    return [sample.randn(2, 3, 8), {"pattern": "b t (h=2 d) -> b h t d"}]


@op("w[b 1 d], x[b t d] -> y[b t d]", map="b d", scan="t", linear="w", shape="x")
def put_last(w: Tensor, x: Tensor) -> Tensor:
    """y = w as the last token of every row, 0 before it; x gives its shape alone"""
    return torch.cat([w.new_zeros(x[:, 1:].shape), w], 1)


last_token.vjp("d_x = put_last(d_y, x)")
put_last.vjp("d_w = last_token(d_y)")


@split.vjp
def _(types: Mapping[str, TensorType | None], attrs: Mapping[str, Any]) -> str:
    """There are as many cotangents as sections, put together from the first on."""
    count, parts = len(attrs["sizes"]), attrs["parts"]
    joined, inside = ("d_y0" if count > 1 else "d_y"), list[int]()
    finer = _within(_last(types["x"]), attrs["sizes"], parts) if parts > 1 else []
    for i in range(1, count):
        inside += (*(finer[0] if i == 1 else ()), *finer[i]) if parts > 1 else ()
        joined = f"join({joined}, d_y{i}, order='{in_sections(parts, inside)}')" if parts > 1 else f"concat({joined}, d_y{i})"
    return f"d_x = {joined}"


def _last(type_: TensorType | None) -> Dim:
    assert type_ is not None
    return type_.dims[-1]


@join.vjp
def _(types: Mapping[str, TensorType | None], attrs: Mapping[str, Any]) -> str:
    """The sections are as long as the operands."""
    parts = _sections(attrs["order"]).parts
    return f"d_a, d_b = split(d_y, sizes=({_last(types['a']).size}, {_last(types['b']).size}), parts={parts})"


@concat.vjp
def _(types: Mapping[str, TensorType | None], attrs: Mapping[str, Any]) -> str:
    """The sections are as long as the operands."""
    sizes = [t.dims[-1].size for t in (types["a"], types["b"]) if t is not None]
    return f"d_a, d_b = split(d_y, sizes=({sizes[0]}, {sizes[1]}))"


@reshape.vjp
def _(types: Mapping[str, TensorType | None], attrs: Mapping[str, Any]) -> str:
    """The pattern read backwards, with the sizes that parting what was grouped needs."""
    type_ = types["x"]
    assert type_ is not None
    return f"d_x = reshape(d_y, pattern='{inverse(attrs['pattern'], type_)}')"


def inverse(pattern: str, type_: TensorType) -> str:
    """The pattern that undoes `pattern` on values of this type."""
    left, right = sides(pattern)
    known = {y: int(y.split("=")[1]) for a in (*left, *right) for y in a.letters if "=" in y}
    bound = bind("reshape", [Operand("x", left)], [type_], known)
    if any("..." in a.letters for a in (*left[1:], *right[1:])) or left[:1] != right[:1]:
        left, right = spread(left, bound.rest), spread(right, bound.rest)
    grouped = " ".join(_parted(a, bound, pattern) for a in right)
    return f"{grouped} -> {' '.join(_shown([_bare(x) for x in a.letters]) for a in left)}"


def _parted(axis: Axis, bound: Binding, pattern: str) -> str:
    """One axis with sizes for all letters but one: the first, which may be split, unless another is no number."""
    size = {x: bound.size.get(x, 1) for x in axis.letters}
    free = next((x for x in axis.letters if isinstance(size[x], str)), axis.letters[0])
    if sum(isinstance(n, str) for n in size.values()) > 1:
        raise TypeMismatch(
            f"reshape {pattern!r} has no gradient: {' and '.join(map(str, size.values()))} cannot be told apart again; "
            "all but one of them must be numbers"
        )
    return _shown([_bare(x) if x == free or x.endswith("=1") else f"{_bare(x)}={size[x]}" for x in axis.letters])


def _bare(letter: str) -> str:
    """The letter without its size, unless that is what lets it come and go."""
    name = letter.replace("...", "_") if letter != "..." else letter
    return name if name.endswith("=1") else name.split("=")[0]


def _shown(letters: list[str]) -> str:
    return letters[0] if len(letters) == 1 else f"({' '.join(letters)})"
