"""How a piece is cut into tiles: what one program computes at once, and how many programs there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .expr import walk
from .index import Axis, Declined
from .pieces import Piece

TILE = 4096  # elements of a tile, where rows are narrow enough to choose
WIDEST = 8192  # elements of a row that one tile holds; longer rows are visited in parts
HELD = 6  # values per element that registers hold of the widest tile: 65,536 of them are 8 for each of 8,192
MOST = 2 * WIDEST  # elements of any tile
PARTS = 256  # programs that a sum over rows is shared among, whatever the device: the same bits everywhere
LEAST = 16  # of them, however many share the columns
STENCIL = 256  # columns of a tile whose rows are read again by the rows behind them, so that these stand in it too
REPEATS = 8  # blocks of units that a program visits where taps, many and narrow, are read for all of them
SECOND = 128  # columns that a program of the second stage adds up


@dataclass(frozen=True)
class Section:
    """A piece with its tile: `units` places of the outer axes, times all of the inner axes."""

    piece: Piece
    outer: tuple[Axis, ...]  # rows, and columns that need not stand together; flattened into units
    inner: tuple[Axis, ...]
    chunk: Axis | None  # an inner axis that is visited in parts of `block`
    looped: bool  # one program visits all parts, because a sum runs along them
    block: int
    units: int
    second: bool = False  # it adds up partial sums

    @property
    def summing(self) -> bool:
        """Whether it adds up over rows, and so keeps its programs few."""
        return any(s.sums for s in self.piece.stores)

    @property
    def repeats(self) -> bool:
        """Whether a program visits several blocks of units, with what all rows share read once."""
        return self.summing or (shifted(self.piece) and bool(self.outer))

    def width(self, axis: Axis) -> int:
        """Places of an axis in the tile."""
        return self.block if axis == self.chunk else padded(int(axis.size))

    @cached_property
    def elements(self) -> int:
        return self.units * math.prod(self.width(a) for a in self.inner)

    @property
    def chunks(self) -> int:
        """Programs beside each other along the chunked axis."""
        return 1 if self.chunk is None or self.looped else -(-int(self.chunk.size) // self.block)

    @cached_property
    def each(self) -> int:
        """Elements per thread: 16 in float32, fewer where several rows of each operand are held at once.

        Eight bf16 are a load of 128 bits; where rows are not aligned to that, or sums are held too, four are enough.
        """
        if not shifted(self.piece):
            return 16
        return 4 if self.summing or not self.inner or int(self.inner[-1].size) % 16 else 8

    @property
    def warps(self) -> int:
        """Of 32 threads; eight where a tile is of the usual size, as those of partial sums are."""
        return 8 if self.second else max(1, min(16, self.elements // (32 * self.each)))


def sections(pieces: Sequence[Piece], second: bool = False) -> list[Section]:
    """Each piece with its tile; all have tiles of about one size, since they are parts of one launch."""
    made = [_section(p, second) for p in pieces]
    least = min((s.each for s in made), default=16)
    tile = 1 if second else max([TILE * least // 16, *(s.elements for s in made)])
    if (most := max((s.elements for s in made), default=0)) > MOST:
        raise Declined(f"its rows have parts of {most} places that cross each other, at most {MOST} fit")
    return [replace(s, units=max(1, tile // s.elements)) for s in made]


def _section(piece: Piece, second: bool) -> Section:
    """The inner axes are those that sums run along or keep apart, and as many of the last as fit."""
    summed, kept = _summed(piece), {a for s in piece.stores if s.sums for i in s.where for a in i.axes}
    inner, size = list[Axis](), 1
    limit = SECOND if second else STENCIL if shifted(piece) else TILE
    for axis in reversed(piece.columns):
        wide = padded(int(axis.size))
        if axis in summed | kept or not inner or size * wide <= limit:
            inner, size = [axis, *inner], size * wide
    outer = (*piece.rows, *(a for a in piece.columns if a not in inner))
    chunk, looped, block = _chunk(piece, inner, summed, size, limit)
    return Section(piece, outer, tuple(inner), chunk, looped, block, 1, second)


def _chunk(piece: Piece, inner: Sequence[Axis], summed: set[Axis], size: int, limit: int) -> tuple[Axis | None, bool, int]:
    """Which inner axis is visited in parts: one that programs can share if there is one, else one that a program loops over."""
    apart = [a for a in inner if a not in summed]
    if apart and size > limit:
        chunk = max(apart, key=lambda a: int(a.size))
        block = max(1, limit * padded(int(chunk.size)) // size)
        if size // padded(int(chunk.size)) * block <= WIDEST:
            return chunk, False, block
    if size <= (WIDEST if _held(piece) <= HELD else TILE):
        return None, False, 0
    chunk = max(inner, key=lambda a: int(a.size))
    part = TILE // 4 if any(s.sums for s in piece.stores) else TILE
    return chunk, True, max(1, part * padded(int(chunk.size)) // size)


def _held(piece: Piece) -> int:
    """Values that a tile holds at once: what it reads in full, and the sums that it keeps."""
    loads = [e for e in walk([s.expr for s in piece.stores]) if e.op == "load" and e.axes >= set(piece.columns)]
    return len(loads) + sum(s.sums for s in piece.stores)


def _summed(piece: Piece) -> set[Axis]:
    """Axes along which a row is summed."""
    inside = [e for e in walk([s.expr for s in piece.stores]) if e.op == "sum"]
    return {a for e in inside for a in e.params if isinstance(a, Axis)}


def shifted(piece: Piece) -> bool:
    """Whether it reads other rows than those it writes."""
    loads = [e.load_of()[1] for e in walk([s.expr for s in piece.stores]) if e.op == "load"]
    return any(i.plus and i.axes & set(piece.rows) for where in loads for i in where)


def padded(n: int) -> int:
    """The next power of two: tiles have no other sizes."""
    return 1 << max(0, n - 1).bit_length()
