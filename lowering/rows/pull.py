"""Pulling: a kernel graph's value at an index, as an expression of operands at indices. Views cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...ir import Graph, Node, Value
from ...ir.sizes import Size
from .expr import Expr, Pool
from .index import Axis, Declined, Index, along, combined

Where = tuple[Index, ...]
Form = Callable[["Puller", Node, int, Where], Expr]
FORMS: dict[str, Form] = {}  # by op: what it is at an index
CROSS = ("column_sum", "conv1d_taps")  # ops whose results are sums over rows, made in two stages


def form(*names: str) -> Callable[[Form], Form]:
    """Register how ops of these names are computed for one element."""

    def define(fn: Form) -> Form:
        FORMS.update(dict.fromkeys(names, fn))
        return fn

    return define


@dataclass
class Puller:
    """One piece's expressions. `splits` says which axes are parted; `columns` are the row's own axes, in order.

    Axes are named by that order, so that pieces of one shape run along the same axes and share expressions.
    """

    graph: Graph
    pool: Pool
    splits: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])
    rows: list[Axis] = field(default_factory=list[Axis])
    columns: list[Axis] = field(default_factory=list[Axis])
    origin: dict[Axis, tuple[int, ...]] = field(default_factory=dict[Axis, tuple[int, ...]])  # the path that was split so far
    partials: bool = False  # whether sums over rows are there to be read
    known: dict[tuple[Value, Where], Expr] = field(default_factory=dict[tuple[Value, Where], Expr])
    extra: int = 0

    def at(self, value: Value, where: Where) -> Expr:
        """The value at an index, as its readers see it: a result is rounded to what is stored."""
        key = (value, where)
        if key not in self.known:
            made = self.made(value, where)
            if value in self.graph.outputs and value in self.graph.makers and made.op != "load":
                made = self.pool.make("round", made, params=(self.graph.outputs.index(value),))
            self.known[key] = made
        return self.known[key]

    def made(self, value: Value, where: Where) -> Expr:
        """The value at an index, as its maker computes it."""
        node = self.graph.makers.get(value)
        if node is None:
            return self.pool.load(self.graph.inputs.index(value), where)
        run = FORMS.get(node.op.name)
        if run is None:
            raise Declined(f"{node.op.name} has no row form")
        outer, self.pool.loc = self.pool.loc, node.loc
        try:
            return run(self, node, node.outputs.index(value), where)
        finally:
            self.pool.loc = outer

    def operand(self, node: Node, i: int, where: Where) -> Expr:
        value = node.inputs[i]
        assert value is not None
        return self.at(value, where)

    # -- axes -----------------------------------------------------------------------------

    def axis(self, path: tuple[int, ...], size: Size) -> Index:
        """A new axis, in the parts that it has been split into; its places as one index."""
        inner = self.splits.get(path)
        if inner is not None and isinstance(size, int):
            return self.axis((*path, 0), size // inner) * inner + self.axis((*path, 1), inner)
        if size == 1:
            return Index()
        kind = self.columns if isinstance(size, int) else self.rows
        made = Axis(len(kind), size)
        kind.append(made)
        self.origin[made] = path
        return along(made)

    def sum(self, prefix: Where, size: int, of: Callable[[Index], Expr]) -> Expr:
        """The sum of `of` over the last dim, of `size` places, in the row that `prefix` names."""
        last = self._free(prefix, size)
        if last is None:
            self.extra += 1
            last = self.axis((99, self.extra), size)
        inside = of(last)
        over = tuple(sorted(last.axes, key=lambda a: a.place))
        missing = [a for a in over if a not in inside.axes]
        total = self.pool.sum(inside, tuple(a for a in over if a in inside.axes)) if len(missing) < len(over) else inside
        for axis in missing:
            total = self.pool.make("mul", total, float(axis.size))
        return total

    def _free(self, prefix: Where, size: int) -> Index | None:
        """The innermost axes that make up `size`, where the prefix does not run along them."""
        used = frozenset[Axis]().union(*(i.axes for i in prefix))
        taken, product = list[Axis](), 1
        for axis in reversed(self.columns):
            if product == size or axis in used:
                break
            taken, product = [axis, *taken], product * int(axis.size)
        if product != size:
            return None
        index = Index()
        for axis in taken:
            index = index * int(axis.size) + along(axis)
        return index


def sizes(value: Value) -> list[Size]:
    return [d.size for d in value.type.dims]


def number(size: Size, what: str) -> int:
    """A size that must be a number, because it is the length of a row."""
    if not isinstance(size, int):
        raise Declined(f"{what} is along {size}, which is not a fixed width")
    return size


def joined(parts: Sequence[Index], widths: Sequence[Size]) -> Index:
    """The index in a group of dims, from the index in each."""
    index = parts[0] if parts else Index()
    for part, width in zip(parts[1:], widths[1:], strict=True):
        index = index * number(width, "a group") + part
    return combined(index.terms, index.plus)
