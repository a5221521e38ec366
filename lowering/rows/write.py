"""Writing one section as a Triton function: axes, loads, one line per expression, stores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .expr import Expr, walk
from .index import Axis, Extent, Index, Modulo, Swapped
from .pieces import Store
from .text import CASTS, LIBRARY, TEXT, index_text, number, rope_arguments
from .tiles import PARTS, Section

PART_TILE = 32  # partial sums that the second stage reads at once


@dataclass(frozen=True)
class Slot:
    """Where a named sum over rows lies among the partial sums of a program: its first column, and how many."""

    offset: int
    width: int


@dataclass
class Writer:
    """The text of one section, grown line by line. `uses` are the kernel arguments that the text names."""

    name: str
    section: Section
    dims: Sequence[Sequence[int | str]]  # of every operand
    sizes: Mapping[str, str]  # argument name of every row size
    slots: Mapping[str, Slot]
    row: int  # columns of the partial sums
    results: Sequence[Sequence[int | str]]  # dims of every result, sizes by argument name
    integers: frozenset[int]  # operands of whole numbers
    uses: dict[str, None] = field(default_factory=dict[str, None])
    calls: set[str] = field(default_factory=set[str])
    head: list[str] = field(default_factory=list[str])  # before any loop
    body: list[str] = field(default_factory=list[str])  # once per unit block
    part: list[str] | None = None  # inside a loop along the chunked axis
    names: dict[Expr, str] = field(default_factory=dict[Expr, str])
    local: dict[Expr, str] = field(default_factory=dict[Expr, str])  # names inside that loop
    loc: dict[int, str] = field(default_factory=dict[int, str])
    count: int = 0
    alone: bool = False  # whether `i_0`, the tile of one 0, is named

    # -- shapes and masks -----------------------------------------------------------------

    def place(self, axis: Axis) -> int:
        """The tile dim of an inner axis; units are dim 0."""
        return 1 + self.section.inner.index(axis)

    def spread(self, dim: int) -> str:
        """The subscript that puts a vector along one tile dim."""
        rank = 1 + len(self.section.inner)
        return "" if rank == 1 else "[" + ", ".join(":" if d == dim else "None" for d in range(rank)) + "]"

    def shape(self, axes: frozenset[Axis]) -> list[int]:
        units = self.section.units if axes & set(self.section.outer) else 1
        return [units, *(self.section.width(a) if a in axes else 1 for a in self.section.inner)]

    def masked(self, axis: Axis) -> bool:
        """Whether the tile is wider than the axis."""
        if axis in self.section.inner:
            return axis == self.section.chunk or self.section.width(axis) != axis.size
        return True

    def masks(self, axes: frozenset[Axis]) -> list[str]:
        """The masks of places outside the axes."""
        found = ["m_u"] if axes & set(self.section.outer) else []
        return found + [f"m_{a.name}" for a in self.section.inner if a in axes and self.masked(a)]

    # -- lines ----------------------------------------------------------------------------

    def line(self, e: Expr, text: str) -> str:
        """A new name for an expression's text, on a line where its axes are known."""
        name = f"t{self.count}"
        self.count += 1
        lines = self.lines(e.axes)
        loc = re.sub(r"[^\w.\[\]\- ]", "", e.loc)
        said = f"  # {loc}" if loc and self.loc.get(id(lines)) != loc else ""
        self.loc[id(lines)] = loc
        lines.append(f"{name} = {text}{said}")
        self.known(e.axes)[e] = name
        return name

    def lines(self, axes: frozenset[Axis]) -> list[str]:
        if self.part is not None and self.section.chunk in axes:
            return self.part
        return self.body if axes & set(self.section.outer) or not self.section.repeats else self.head

    def known(self, axes: frozenset[Axis]) -> dict[Expr, str]:
        return self.local if self.part is not None and self.section.chunk in axes else self.names

    def use(self, name: str) -> str:
        self.uses[name] = None
        return name

    def text(self, e: Expr) -> str:
        """The name of an expression, written if it is not yet."""
        for x in walk_unknown(e, self):
            self.write(x)
        return self.known(e.axes).get(e) or self.inline(e)

    def inline(self, e: Expr) -> str:
        if e.op == "const":
            return number(float(e.params[0]))  # type: ignore[arg-type] # a const holds a number
        assert e.op == "index" and isinstance(e.params[0], Index)
        return f"({' + '.join([self.index(e.params[0]), *self.point(e.axes)])})"

    def write(self, e: Expr) -> None:
        if e.op in ("const", "index"):
            return
        if e.op == "sum":
            self.line(e, self.total(e, self.text(e.args[0])))
        elif e.op == "load":
            self.load(e)
        elif e.op == "partial":
            self.partial(e)
        else:
            self.line(e, self.formula(e))

    def formula(self, e: Expr) -> str:
        args = [self.text(a) for a in e.args]
        if e.op == "round":
            return f"{args[0]}.to({self.use(f'p_y{e.params[0]}')}.dtype.element_ty).to(tl.float32)"
        if e.op == "cast":
            return f"{args[0]}.to({CASTS[str(e.params[0])]}).to(tl.float32)"
        if e.op == "ge":
            return f"{args[0]} >= {e.params[0]}"
        if e.op == "valid":
            assert isinstance(e.params[0], Index)
            return " & ".join(self.bounds(e.params[0], e.params[1])) or "True"  # type: ignore[arg-type] # a size
        self.calls |= {e.op} & LIBRARY.keys()
        if e.op == "rope_wave":
            return f"rope_wave({args[0]}, {args[1]}, {rope_arguments(e.params)})"
        return TEXT[e.op].format(*args)

    def index(self, index: Index) -> str:
        for term, _ in index.terms:
            if isinstance(term, Extent):
                self.use(self.sizes[term.size])
            if isinstance(term, Swapped | Modulo):
                self.index(term.of)
        return index_text(index, self.sizes)

    def point(self, axes: frozenset[Axis]) -> list[str]:
        """What makes a tile of one place of a lone address; Triton stores no tile there otherwise."""
        self.alone |= not axes
        return [] if axes else ["i_0"]

    # -- memory ---------------------------------------------------------------------------

    def bounds(self, index: Index, size: int | str) -> list[str]:
        """Checks that an index is inside a dim, those that are not sure anyway."""
        above, below = index.within(size)
        end = str(size) if isinstance(size, int) else self.sizes[size]
        if not below and isinstance(size, str):
            self.use(end)
        text = self.index(index)
        return [f"({text} >= 0)"] * (not above) + [f"({text} < {end})"] * (not below)

    def load(self, e: Expr) -> None:
        operand, where = e.load_of()
        checks = [c for i, s in zip(where, self.dims[operand], strict=True) for c in self.bounds(i, s)]
        mask = " & ".join([*self.masks(e.axes), *checks])
        offsets = [
            f"({self.index(i)}) * {self.use(f's_x{operand}_{d}')}" if len(i.terms) > 1 or i.plus else
            f"{self.index(i)} * {self.use(f's_x{operand}_{d}')}"
            for d, i in enumerate(where) if i.terms or i.plus
        ]  # fmt: skip
        pointer = " + ".join([self.use(f"p_x{operand}"), *offsets, *self.point(e.axes)])
        whole = operand in self.integers
        outside = f", mask={mask}, other=0{'' if whole else '.0'}" if mask else ""
        self.line(e, f"tl.load({pointer}{outside})" + ("" if whole else ".to(tl.float32)"))

    def store(self, s: Store) -> None:
        """One result element per place of the tile."""
        target = int(s.target)
        value = self.text(s.expr)
        axes = frozenset[Axis]().union(*(i.axes for i in s.where))
        strides = contiguous(self.results[target])
        parts = list[str]()
        for i, stride in zip(s.where, strides, strict=True):
            if i.terms or i.plus:
                inside = self.index(i)
                inside = f"({inside})" if " " in inside and stride != "1" else inside
                parts.append(inside if stride == "1" else f"{inside} * {self.stride(stride)}")  # int64 from the left on
        pointer = " + ".join([self.use(f"p_y{target}"), *parts, *self.point(axes)])
        mask = " & ".join(self.masks(axes))
        lines = self.lines(axes)
        lines.append(f"tl.store({pointer}, {value}{f', mask={mask}' if mask else ''})")

    def stride(self, stride: str) -> str:
        for name in re.findall(r"\bn_\d+\b", stride):
            self.use(name)
        return stride

    # -- sums -----------------------------------------------------------------------------

    def outside(self, e: Expr) -> str:
        """The mask of a sum's places, where the tile is wider than the axes."""
        return " & ".join(f"m_{a.name}" for a in e.params if isinstance(a, Axis) and self.masked(a))

    def total(self, e: Expr, value: str, masked: bool = False) -> str:
        """The sum along inner axes; padded places are left out unless they are 0 already."""
        axes = [a for a in e.params if isinstance(a, Axis)]
        if (masks := self.outside(e)) and not masked:
            value = f"tl.where({masks}, {value}, 0.0)"
        for axis in sorted(axes, key=self.place, reverse=True):
            value = f"tl.sum({value}, axis={self.place(axis)}, keep_dims=True)"
        return value

    def partial(self, e: Expr) -> None:
        """What the programs of the first stage have summed, added up in their order."""
        slot = self.slots[str(e.params[0])]
        where = e.params[1]
        assert isinstance(where, Index)
        self.use("p_s")
        self.use("g")
        shape = self.shape(e.axes)
        name, rank = f"a{self.count}", 1 + len(self.section.inner)
        self.count += 1
        index = f"i_q{'[' + ', '.join([':', *['None'] * (rank - 1)]) + ']' if rank > 1 else ''}"
        masks = " & ".join([f"({index} + i_p < g)", *self.masks(e.axes)])
        place = f"(i_p + {index}).to(tl.int64) * {self.row} + {slot.offset} + {self.index(where)}"
        self.body += [
            f"{name} = tl.zeros([{', '.join(map(str, [PART_TILE, *shape[1:]]))}], tl.float32)",
            f"i_q = tl.arange(0, {PART_TILE})",
            f"for i_p in range(0, g, {PART_TILE}):",
            f"    {name} += tl.load(p_s + {place}, mask={masks}, other=0.0)",
        ]
        self.line(e, f"tl.sum({name}, axis=0, keep_dims=True)")


def walk_unknown(e: Expr, writer: Writer) -> list[Expr]:
    """What must be written for `e`, operands first, in a loop's body or before it."""
    found, seen, waiting = list[Expr](), set[Expr](), [(e, False)]
    while waiting:
        x, ready = waiting.pop()
        if x in writer.known(x.axes):
            continue
        if ready:
            found.append(x)
        elif x not in seen:
            seen.add(x)
            waiting += [(x, True), *((a, False) for a in reversed(x.args))]
    return found


def contiguous(dims: Sequence[int | str]) -> list[str]:
    """The strides of a result, as text over the sizes' names."""
    made, after = list[str](), list[str]()
    for size in reversed(dims):
        made.append(" * ".join(after) or "1")
        if size != 1:
            after = [str(size), *after]
    return made[::-1]


__all__ = ["PARTS", "Slot", "Writer", "contiguous", "walk"]
