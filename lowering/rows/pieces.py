"""Pieces: every result and every sum over rows, over axes that its views respect, cut where what is computed changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...ir import Graph, Node, Value
from ...ir.sizes import Size
from . import forms as forms  # registers every form
from .expr import Expr, Pool
from .index import Axis, Declined, Index, NeedCut, NeedSplit
from .pull import CROSS, Puller, Where, number, sizes
from .stencils import tap_sums

TRIES = 64  # splits and cuts of one store before it is given up
Path = tuple[int, ...]  # a dim and the halves of it that splits made


@dataclass(frozen=True)
class Sum:
    """A sum over rows: what is summed at an index into `dims`, and where it goes among the `width` places of its name."""

    name: str
    dims: tuple[Size, ...]
    at: Callable[[Puller, Where], Expr]
    place: Callable[[Where], Index]
    width: int


@dataclass(frozen=True)
class Store:
    """What one tile writes: result `target` at an index per dim, or the partial sum of that name at one index."""

    target: int | str
    expr: Expr
    where: Where
    domain: frozenset[Axis] = frozenset()  # what a sum runs over and along; a tile may have other axes too

    @property
    def sums(self) -> bool:
        return isinstance(self.target, str)


@dataclass(frozen=True)
class Piece:
    """Stores over the same rows and columns."""

    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    stores: tuple[Store, ...]


@dataclass(frozen=True)
class Job:
    """One store to be made: its dims, what it is at an index, the part of each dim that it covers, and its splits."""

    graph: Graph
    pool: Pool
    dims: tuple[Size, ...]
    make: Callable[[Puller, Where], Store]
    ranges: Mapping[int, tuple[int, int]]
    splits: Mapping[Path, int]

    def over(self, ranges: Mapping[int, tuple[int, int]], splits: Mapping[Path, int]) -> Job:
        return Job(self.graph, self.pool, self.dims, self.make, ranges, splits)


def pieces(graph: Graph, pool: Pool) -> tuple[list[Piece], list[Piece]]:
    """The pieces of the first stage, over rows, and those of the second, which read sums over rows. Raises Declined."""
    late = _late(graph)
    first, second = list[tuple[Job, Piece]](), list[tuple[Job, Piece]]()
    for i, value in enumerate(graph.outputs):
        if value in graph.outputs[:i] or value not in graph.makers:
            continue
        dims = tuple(sizes(value))
        if value in late and any(isinstance(d, str) for d in dims):
            raise Declined(f"{value.name} needs a sum over all rows before its own rows can be made")
        (second if value in late else first).extend(_built(Job(graph, pool, dims, _result(value, i), {}, {})))
    for s in sums_of(graph):
        first += _built(Job(graph, pool, s.dims, _summed(s), {}, {}))
    return _merged(first), _merged(second)


def sums_of(graph: Graph) -> tuple[Sum, ...]:
    """Every sum over rows that results need, in order."""
    needed, waiting = set[Node](), list(graph.outputs)
    while waiting:
        node = graph.makers.get(waiting.pop())
        if node is not None and node not in needed:
            needed.add(node)
            waiting += node.operands
    return tuple(s for n in graph.nodes if n in needed and n.op.name in CROSS for s in _sums(graph, n))


def _sums(graph: Graph, node: Node) -> Iterator[Sum]:
    name = f"sum{graph.nodes.index(node)}"
    if not node.is_op("column_sum"):
        yield from (Sum(name, *parts) for parts in tap_sums(node))
        return
    value = node.operands[0]
    dims = tuple(sizes(value))
    width = number(dims[-1], "column_sum")
    yield Sum(name, dims, lambda pull, where: pull.at(value, where), lambda where: where[-1], width)


def _late(graph: Graph) -> set[Value]:
    """Values that need a sum over rows."""
    found = set[Value]()
    for node in graph.nodes:
        if node.op.name in CROSS or any(v in found for v in node.operands):
            found.update(node.outputs)
    return found


def _result(value: Value, number: int) -> Callable[[Puller, Where], Store]:
    return lambda pull, where: Store(number, pull.made(value, where), where)


def _summed(s: Sum) -> Callable[[Puller, Where], Store]:
    def make(pull: Puller, where: Where) -> Store:
        domain = frozenset[Axis]().union(*(i.axes for i in where))
        return Store(s.name, s.at(pull, where), (s.place(where),), domain)

    return make


# -- splits and cuts ----------------------------------------------------------------------


def _built(job: Job) -> list[tuple[Job, Piece]]:
    """One store, in as many pieces as its views need."""
    done, waiting = list[tuple[Job, Piece]](), [job]
    for _ in range(TRIES):
        if not waiting:
            return done
        job = waiting.pop(0)
        puller = Puller(job.graph, job.pool, dict(job.splits))
        try:
            done.append((job, _piece(job, puller)))
        except NeedSplit as need:
            splits = {**job.splits, puller.origin[need.axis]: need.inner}
            waiting.insert(0, job.over(job.ranges, splits))
        except NeedCut as need:
            waiting[:0] = _cut(job, puller.origin[need.axis], need.at)
    raise Declined("its views cross too often")


def _piece(job: Job, puller: Puller) -> Piece:
    where = list[Index]()
    for i, size in enumerate(job.dims):
        low, high = job.ranges.get(i, (0, size))
        where.append(puller.axis((i,), high - low if isinstance(high, int) else high) + low)
    store = job.make(puller, tuple(where))
    return Piece(tuple(puller.rows), tuple(puller.columns), (store,))


def _cut(job: Job, path: Path, at: int) -> list[Job]:
    """The job in two, at a place of the outermost part of one dim."""
    dim, step = path[0], 1
    if dim >= len(job.dims) or any(half for half in path[1:]):
        raise Declined("parts meet within a group")
    for n in range(1, len(path)):
        step *= job.splits[path[:n]]
    low, high = job.ranges.get(dim, (0, job.dims[dim]))
    splits = {p: n for p, n in job.splits.items() if p[0] != dim}
    border = int(low) + at * step
    return [job.over({**job.ranges, dim: r}, splits) for r in ((int(low), border), (border, int(high)))]


# -- merging ------------------------------------------------------------------------------


def _merged(built: Sequence[tuple[Job, Piece]]) -> list[Piece]:
    """Pieces of one shape are one piece; a row that is not parted takes the parts of another as wide."""
    groups = dict[tuple[tuple[Axis, ...], tuple[Axis, ...]], list[Store]]()
    for job, piece in built:
        piece = _refined(job, piece, [p for _, p in built])
        groups.setdefault((piece.rows, piece.columns), []).extend(piece.stores)
    return [Piece(rows, columns, tuple(stores)) for (rows, columns), stores in groups.items()]


def _refined(job: Job, piece: Piece, others: Sequence[Piece]) -> Piece:
    """The piece with its one column axis parted as another piece's columns are."""
    if len(piece.columns) != 1:
        return piece
    width = piece.columns[0].size
    for other in others:
        parts = [int(a.size) for a in other.columns]
        if len(parts) < 2 or other.rows != piece.rows or _product(parts) != width:
            continue
        puller = Puller(job.graph, job.pool, dict(job.splits))
        _piece(job, puller)
        path, splits = puller.origin[puller.columns[0]], dict(job.splits)
        for n in range(1, len(parts)):
            splits[path] = _product(parts[n:])
            path = (*path, 1)
        try:
            return _piece(job, Puller(job.graph, job.pool, splits))
        except (NeedSplit, NeedCut, Declined):
            continue
    return piece


def _product(parts: Sequence[int]) -> int:
    made = 1
    for n in parts:
        made *= n
    return made
