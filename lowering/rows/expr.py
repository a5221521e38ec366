"""Scalar expressions of a row kernel, each distinct one made once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from .index import Axis, Index


@dataclass(frozen=True, eq=False)
class Expr:
    """One computed number per element. `op` is load, const, index, valid, sum, partial, round, or a name in `emit.TEXT`.

    `axes` are those along which it varies; `sums` the reductions inside it.
    """

    op: str
    args: tuple[Expr, ...] = ()
    params: tuple[Hashable, ...] = ()
    axes: frozenset[Axis] = frozenset()
    loc: str = field(default="", repr=False)

    def load_of(self) -> tuple[int, tuple[Index, ...]]:
        """Which operand a load reads, and where."""
        operand, *where = self.params
        return operand, tuple(where)  # type: ignore[return-value] # a load has these params by construction


@dataclass
class Pool:
    """Makes expressions; equal ones are one object."""

    known: dict[Hashable, Expr] = field(default_factory=dict[Hashable, Expr])
    loc: str = ""

    def make(
        self, op: str, *args: Expr | float, params: tuple[Hashable, ...] = (), axes: frozenset[Axis] | None = None
    ) -> Expr:
        """An operation on expressions and numbers."""
        operands = tuple(self.const(a) if isinstance(a, float | int) else a for a in args)
        key = (op, tuple(id(a) for a in operands), params, axes)
        if key not in self.known:
            found = frozenset[Axis]().union(*(a.axes for a in operands)) if axes is None else axes
            self.known[key] = Expr(op, operands, params, found, self.loc)
        return self.known[key]

    def const(self, value: float) -> Expr:
        return self.make("const", params=(float(value),), axes=frozenset())

    def load(self, operand: int, where: tuple[Index, ...]) -> Expr:
        """Operand number `operand` at an index per dim; 0 outside of it."""
        return self.make("load", params=(operand, *where), axes=_axes(where))

    def index(self, where: Index) -> Expr:
        """An index as a whole number."""
        return self.make("index", params=(where,), axes=where.axes)

    def valid(self, where: Index, size: int | str) -> Expr:
        """Whether an index is inside a dim."""
        return self.make("valid", params=(where, size), axes=where.axes)

    def sum(self, of: Expr, over: tuple[Axis, ...]) -> Expr:
        """The sum along axes of one row."""
        return self.make("sum", of, params=over, axes=of.axes - set(over))

    def partial(self, name: str, where: Index) -> Expr:
        """An element of what the programs of the first stage have summed."""
        return self.make("partial", params=(name, where), axes=where.axes)


def _axes(where: tuple[Index, ...]) -> frozenset[Axis]:
    return frozenset[Axis]().union(*(i.axes for i in where))


def walk(roots: list[Expr]) -> list[Expr]:
    """Every expression under the roots, operands first."""
    seen, order, waiting = set[Expr](), list[Expr](), [(r, False) for r in reversed(roots)]
    while waiting:
        e, ready = waiting.pop()
        if ready:
            order.append(e)
        elif e not in seen:
            seen.add(e)
            waiting += [(e, True), *((a, False) for a in reversed(e.args))]
    return order
