"""How a piece of a row kernel is looped in C++: which axes are outside, and what each visit of a row sums and stores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..rows.expr import Expr, walk
from ..rows.index import Axis, Declined
from ..rows.pieces import Piece, Store

HEAVY = frozenset({"exp", "sigmoid", "tanh", "log1p", "erf", "rope_wave"})  # sooner kept than made again
End = Expr | Store  # a sum along a row, or a store


@dataclass(frozen=True)
class Nest:
    """Sums, or stores, that share their loops over inner axes."""

    axes: tuple[Axis, ...]
    along: tuple[Axis, ...]  # the last of them, where sums run along several
    ends: tuple[End, ...]


@dataclass(frozen=True)
class Plan:
    """The loops of a piece: rows, outer columns, and within these one visit of the inner axes after another."""

    piece: Piece
    outer: tuple[Axis, ...]
    inner: tuple[Axis, ...]
    visits: tuple[tuple[Nest, ...], ...]
    once: tuple[Expr, ...]  # made before the first row
    each_row: tuple[Expr, ...]  # made at the start of a row, because outer columns share it
    kept: frozenset[Expr]  # made in one visit for another

    @property
    def summing(self) -> bool:
        """Whether it adds up over rows."""
        return any(s.sums for s in self.piece.stores)


def plan(piece: Piece) -> Plan:
    """The loops of a piece. Raises Declined where a sum is not along the last of its axes."""
    exprs = walk([s.expr for s in piece.stores])
    summed = {a for e in exprs if e.op == "sum" for a in e.params if isinstance(a, Axis)}
    inner = tuple(a for a in piece.columns if a in summed or a == piece.columns[-1])
    outer = tuple(a for a in piece.columns if a not in inner)
    once, each_row = _shared(piece, exprs, (*piece.rows, *outer, *inner))
    visits = _visits(piece, exprs, inner)
    return Plan(piece, outer, inner, visits, once, each_row, _kept(visits, inner, {*once, *each_row}))


# -- visits -------------------------------------------------------------------------------


def _visits(piece: Piece, exprs: Sequence[Expr], inner: Sequence[Axis]) -> tuple[tuple[Nest, ...], ...]:
    """Sums as early as what they need is known, and stores with them."""
    depth = dict[Expr, int]()
    for e in exprs:
        depth[e] = max((depth[a] for a in e.args), default=0) + (e.op == "sum")
    ends: list[tuple[int, End]] = [(depth[e], e) for e in exprs if e.op == "sum"]
    ends += [(depth[s.expr] + 1, s) for s in piece.stores]
    last = max(d for d, _ in ends)
    return tuple(_nests([e for d, e in ends if d == visit], inner) for visit in range(1, last + 1))


def _nests(ends: Iterable[End], inner: Sequence[Axis]) -> tuple[Nest, ...]:
    groups = dict[tuple[tuple[Axis, ...], tuple[Axis, ...]], list[End]]()
    for end in ends:
        groups.setdefault(_loops(end, inner), []).append(end)
    return tuple(Nest(axes, along, tuple(found)) for (axes, along), found in groups.items())


def _loops(end: End, inner: Sequence[Axis]) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """The inner axes that an end runs over, and those of them that a sum runs along, where they are several."""
    if isinstance(end, Store):
        found = end.expr.axes | frozenset[Axis]().union(*(i.axes for i in end.where))
        return tuple(a for a in inner if a in found), ()
    axes = tuple(a for a in inner if a in end.args[0].axes)
    along = tuple(a for a in axes if a in end.params)
    if axes[len(axes) - len(along) :] != along:
        raise Declined("a sum is along an axis whose places do not stand together")
    return axes, along if len(along) > 1 else ()  # along one axis, it shares a loop with stores


def _kept(visits: Sequence[Sequence[Nest]], inner: Sequence[Axis], made: set[Expr]) -> frozenset[Expr]:
    """What is dear and needed in several visits."""
    seen, twice = set[Expr](), set[Expr]()
    for nests in visits:
        heavy = {e for e in _within(nests, made) if e.op in HEAVY and e.axes & set(inner)}
        twice |= heavy & seen
        seen |= heavy
    return frozenset(twice)


def _within(nests: Sequence[Nest], made: set[Expr]) -> set[Expr]:
    """All that is computed in a visit: sums of earlier ones are there, and what is in `made`."""
    found = set[Expr]()
    waiting = [end.expr if isinstance(end, Store) else end.args[0] for nest in nests for end in nest.ends]
    while waiting:
        e = waiting.pop()
        if e not in found and e not in made and e.op != "sum":
            found.add(e)
            waiting += e.args
    return found


# -- what rows or outer columns share -----------------------------------------------------


def _shared(piece: Piece, exprs: Sequence[Expr], order: Sequence[Axis]) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
    """What is dear and would be made again in a loop that it does not vary along: once for all rows, or once a row."""
    sums = set[Expr]()
    for e in exprs:
        if e.op == "sum" or any(a in sums for a in e.args):
            sums.add(e)
    apart = [e for e in exprs if e.op in HEAVY and e not in sums and _repeated(e, order)]
    users = {a for e in exprs if e not in apart for a in e.args} | {s.expr for s in piece.stores}
    rows = set(piece.rows)
    wanted = [e for e in apart if e in users or not all(_user_shares(e, u, rows) for u in apart if e in u.args)]
    return tuple(e for e in wanted if not e.axes & rows), tuple(e for e in wanted if e.axes & rows)


def _user_shares(e: Expr, user: Expr, rows: set[Axis]) -> bool:
    return bool(e.axes & rows) == bool(user.axes & rows)


def _repeated(e: Expr, order: Sequence[Axis]) -> bool:
    places = [order.index(a) for a in e.axes]
    return bool(places) and max(places) + 1 > len(places)
