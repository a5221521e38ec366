"""How a piece is cut into tiles: what one program computes at once, and how many programs there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .expr import walk
from .index import Axis
from .pieces import Piece

TILE = 4096  # elements of a tile, where rows are narrow enough to choose
WIDEST = 8192  # elements of a row that one tile holds; longer rows are visited in parts
PARTS = 256  # programs that a sum over rows is shared among, whatever the device: the same bits everywhere
STENCIL = 256  # columns of a tile whose rows are read again by the rows behind them, so that these stand in it too
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

    @property
    def summing(self) -> bool:
        """Whether it adds up over rows, and so keeps its programs few."""
        return any(s.sums for s in self.piece.stores)

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

    @property
    def warps(self) -> int:
        """Of 32 threads with 16 elements each, in float32."""
        return max(1, min(16, self.elements // 512))


def sections(pieces: Sequence[Piece], second: bool = False) -> list[Section]:
    """Each piece with its tile; all have tiles of about one size, since they are parts of one launch."""
    made = [_section(p, 1) for p in pieces]
    tile = SECOND if second else max([TILE, *(s.elements for s in made)])
    return [_section(s.piece, 1 if second or s.looped else max(1, tile // s.elements), second) for s in made]


def _section(piece: Piece, units: int, second: bool = False) -> Section:
    summed = _summed(piece)
    kept = {a for s in piece.stores if s.sums for i in s.where for a in i.axes}
    inner, size = list[Axis](), 1
    limit = SECOND if second else STENCIL if _shifted(piece) else TILE
    for axis in reversed(piece.columns):
        wide = padded(int(axis.size))
        if axis in summed | kept or not inner or size * wide <= limit:
            inner, size = [axis, *inner], size * wide
    outer = (*piece.rows, *(a for a in piece.columns if a not in inner))
    chunk = max(inner, key=lambda a: int(a.size), default=None)
    if chunk is None or size <= (WIDEST if chunk in summed else limit):
        return Section(piece, outer, tuple(inner), None, False, 0, units)
    rest = size // padded(int(chunk.size))
    block = max(1, (TILE if chunk in summed else limit) // rest)
    return Section(piece, outer, tuple(inner), chunk, chunk in summed, block, units)


def _summed(piece: Piece) -> set[Axis]:
    """Axes along which a row is summed."""
    inside = [e for e in walk([s.expr for s in piece.stores]) if e.op == "sum"]
    return {a for e in inside for a in e.params if isinstance(a, Axis)}


def _shifted(piece: Piece) -> bool:
    """Whether it reads other rows than those it writes."""
    loads = [e.load_of()[1] for e in walk([s.expr for s in piece.stores]) if e.op == "load"]
    return any(i.plus and i.axes & set(piece.rows) for where in loads for i in where)


def padded(n: int) -> int:
    """The next power of two: tiles have no other sizes."""
    return 1 << max(0, n - 1).bit_length()
