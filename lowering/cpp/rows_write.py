"""Writing one piece of a row kernel as a C++ function over a span of rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..rows.expr import Expr
from ..rows.index import Axis, Declined, Index
from ..rows.pieces import Store
from ..rows.write import Slot, contiguous
from .rows_plan import End, Nest, Plan
from .rows_text import TEXT, index_text, number

SMALL = 8  # turns of a loop that is written out


@dataclass
class Scope:
    """The inside of a loop: the axes that are known in it, its lines, and what they name."""

    axes: frozenset[Axis]
    parent: Scope | None = None
    lines: list[str] = field(default_factory=list[str])
    names: dict[Expr, str] = field(default_factory=dict[Expr, str])

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1

    def above(self, depth: int) -> Scope:
        """The scope around this one, or itself, of that depth."""
        return self if self.parent is None or self.depth <= depth else self.parent.above(depth)

    def level(self, axes: frozenset[Axis]) -> int:
        """The depth of the outermost scope where the axes are known."""
        outside = self.parent is not None and axes <= self.parent.axes
        return self.parent.level(axes) if self.parent is not None and outside else self.depth

    def find(self, e: Expr) -> tuple[str, int] | None:
        if e in self.names:
            return self.names[e], self.depth
        return self.parent.find(e) if self.parent is not None else None


@dataclass
class Writer:
    """The text of one piece, grown scope by scope."""

    plan: Plan
    dims: Sequence[Sequence[int | str]]  # of every operand
    results: Sequence[tuple[str, Sequence[int | str]]]  # dtype and dims of every result, sizes by name
    sizes: Mapping[str, str]  # name of every row size
    slots: Mapping[str, Slot]
    whole: frozenset[int]  # operands of whole numbers
    rows: dict[Expr, tuple[str, int]] = field(default_factory=dict[Expr, tuple[str, int]])  # its place in an array; the depth
    waves: dict[tuple[object, ...], str] = field(default_factory=dict[tuple[object, ...], str])
    made: list[tuple[Expr, str]] = field(default_factory=list[tuple[Expr, str]])  # arrays that a visit is filling
    loc: str = ""
    count: int = 0

    # -- expressions ----------------------------------------------------------------------

    def text(self, e: Expr, scope: Scope) -> str:
        """What an expression is called, on a line where its axes are known, which is written if it is not there."""
        return self.reference(e, scope)[0]

    def reference(self, e: Expr, scope: Scope) -> tuple[str, int]:
        if (found := scope.find(e)) is not None:
            return found
        if e in self.rows:
            place, depth = self.rows[e]
            return place, max(depth, scope.level(e.axes))
        if e.op in ("const", "index"):
            return self.inline(e), scope.level(e.axes)
        args = [self.reference(a, scope) for a in e.args]
        at = scope.above(max([scope.level(e.axes), *(depth for _, depth in args)]))
        return self.line(e, self.formula(e, [text for text, _ in args]), at), at.depth

    def line(self, e: Expr, formula: str, at: Scope) -> str:
        name, self.count = f"t{self.count}", self.count + 1
        whole = e.op == "load" and e.params[0] in self.whole
        kind = "bool" if e.op in ("ge", "gt") else "int64_t" if whole else "float"
        loc = re.sub(r"[^\w.\[\]\- ]", "", e.loc)
        said, self.loc = f"  // {loc}" if loc and loc != self.loc else "", loc
        at.lines.append(f"const {kind} {name} = {formula};{said}")
        at.names[e] = name
        if e in self.plan.kept and e not in self.rows:
            kept = f"k{name[1:]}"
            at.lines.append(f"{kept}{self.subscript(e.axes & set(self.plan.inner))} = {name};")
            self.made.append((e, kept))
        return name

    def inline(self, e: Expr) -> str:
        if e.op == "const":
            return number(float(e.params[0]))  # type: ignore[arg-type] # a const holds a number
        assert isinstance(e.params[0], Index)
        return f"({index_text(e.params[0])})"

    def formula(self, e: Expr, args: Sequence[str]) -> str:
        if e.op == "load":
            return self.load(e)
        if e.op == "partial":
            assert isinstance(e.params[1], Index)
            return f"sums[{self.slots[str(e.params[0])].offset} + {index_text(e.params[1])}]"
        if e.op in ("round", "cast"):
            dtype = self.results[int(e.params[0])][0] if e.op == "round" else str(e.params[0])  # type: ignore[arg-type]
            return args[0] if dtype == "f32" else f"round_{dtype}({args[0]})"
        if e.op == "ge":
            return f"{args[0]} >= {e.params[0]}"
        if e.op == "rope_wave":
            name = self.waves.setdefault(e.params[1:], f"rates{len(self.waves)}")
            return f"wave({args[0]}, {name}[{args[1]}], {e.params[0]})"
        if e.op not in TEXT:
            raise Declined(f"{e.op} has no C++ here")
        return TEXT[e.op].format(*args)

    def load(self, e: Expr) -> str:
        operand, where = e.load_of()
        if not all(all(i.within(s)) for i, s in zip(where, self.dims[operand], strict=True)):
            raise Declined("it reads beyond its rows, as the convolutions do that have C++ of their own")
        steps = [f"s{operand}_{d}" for d in range(len(where) - 1)] + ["1"]
        return f"load(x{operand}[{_offset(where, steps)}])"

    def subscript(self, axes: frozenset[Axis]) -> str:
        """The place in an array over these columns."""
        return "".join(f"[{a.name}]" for a in self.columns(axes))

    def array(self, name: str, axes: frozenset[Axis]) -> str:
        return f"float {name}{''.join(f'[{a.size}]' for a in self.columns(axes))};"

    def columns(self, axes: frozenset[Axis]) -> list[Axis]:
        return [a for a in self.plan.piece.columns if a in axes]

    # -- loops ----------------------------------------------------------------------------

    def loops(self, scope: Scope, axes: Sequence[Axis], body: Callable[[Scope], None], sums: str = "") -> None:
        """A loop in a loop for each axis; the last one in vectors."""
        if not axes:
            body(scope)
            return
        axis, rest = axes[0], axes[1:]
        inside = Scope(scope.axes | {axis}, scope)
        self.loops(inside, rest, body, sums)
        small = isinstance(axis.size, int) and axis.size <= SMALL
        around = any(line.lstrip().startswith("for ") for line in inside.lines)
        if not around and not small:
            scope.lines.append("#pragma omp simd" + (f" reduction(+ : {sums})" if sums else ""))
        elif not around:  # a loop around others stays one: compilers make no vectors of what is inside a loop written out
            scope.lines.append(f"#pragma GCC unroll {SMALL}")
        name = axis.name
        scope.lines.append(f"for (int64_t {name} = 0; {name} < {axis.size}; {name}++) {{")
        scope.lines += [f"    {x}" for x in inside.lines] + ["}"]

    def keep(self, e: Expr, scope: Scope) -> None:
        """Make an expression for all of its columns, in an array."""
        name, self.count = f"k{self.count}", self.count + 1
        scope.lines.append(self.array(name, e.axes))

        def fill(inside: Scope) -> None:
            inside.lines.append(f"{name}{self.subscript(e.axes)} = {self.text(e, inside)};")

        self.loops(scope, self.columns(e.axes), fill)
        self.rows[e] = (f"{name}{self.subscript(e.axes)}", scope.depth)

    def function(self) -> list[str]:
        """Every line of the function's body."""
        p = self.plan
        top = Scope(frozenset())
        for e in p.once:
            self.keep(e, top)
        row = Scope(top.axes | set(p.piece.rows), top)
        for e in p.each_row:
            self.keep(e, row)
        self.loops(row, p.outer, self.visits)
        heading = ["for (int64_t u = low; u < high; u++) {", *(f"    {x}" for x in self.places())]
        return [*top.lines, *heading, *(f"    {x}" for x in row.lines), "}"]

    def places(self) -> list[str]:
        """Where a row stands among the sizes."""
        lines, rest = list[str](), "u"
        for i, axis in enumerate(reversed(self.plan.piece.rows)):
            size, last = self.sizes[str(axis.size)], i == len(self.plan.piece.rows) - 1
            lines.append(f"const int64_t {axis.name} = {rest if last else f'{rest} % {size}'};")
            if not last:
                lines.append(f"const int64_t u{i} = {rest} / {size};")
            rest = f"u{i}"
        return lines

    def visits(self, scope: Scope) -> None:
        for nests in self.plan.visits:
            for nest in nests:
                self.made = list[tuple[Expr, str]]()
                before = len(scope.lines)
                (self.total if nest.along else self.ends)(nest, scope)
                inner = set(self.plan.inner)
                scope.lines[before:before] = [self.array(name, e.axes & inner) for e, name in self.made]
                self.rows |= {e: (f"{name}{self.subscript(e.axes & inner)}", scope.depth) for e, name in self.made}

    # -- sums along a row -----------------------------------------------------------------

    def total(self, nest: Nest, scope: Scope) -> None:
        """Sums along several axes of a row, in one number for each place of the last of them."""
        kept, ends = nest.axes[: len(nest.axes) - len(nest.along)], [e for e in nest.ends if isinstance(e, Expr)]
        names: dict[End, str] = {e: self.number() for e in ends}
        results = self.found(ends, names, kept, scope)
        self.loops(scope, kept, partial(self.row_total, nest.along, names, results))

    def number(self) -> str:
        """A fresh name of a sum."""
        self.count += 1
        return f"a{self.count}"

    def found(self, ends: Sequence[Expr], names: Mapping[End, str], kept: Sequence[Axis], scope: Scope) -> dict[Expr, str]:
        """Where sums are found: by their names, or in arrays over the axes that stay apart."""
        if not kept:
            scope.names.update((e, names[e]) for e in ends)
            return {}
        scope.lines += [self.array(f"{names[e]}s", frozenset(kept)) for e in ends]
        found = {e: f"{names[e]}s{self.subscript(frozenset(kept))}" for e in ends}
        self.rows |= {e: (place, scope.depth) for e, place in found.items()}
        return found

    def row_total(self, along: Sequence[Axis], names: Mapping[End, str], results: Mapping[Expr, str], scope: Scope) -> None:
        scope.lines += [f"float {n}p[{along[-1].size}] = {{}};" for n in names.values()]

        def add(inside: Scope) -> None:
            inside.lines += [
                f"{n}p[{along[-1].name}] += {self.text(e.args[0], inside)};" for e, n in names.items() if isinstance(e, Expr)
            ]

        self.loops(scope, along, add)
        for name in names.values():
            scope.lines += [f"float {name} = 0;", f"#pragma omp simd reduction(+ : {name})"]
            scope.lines.append(f"for (int64_t i = 0; i < {along[-1].size}; i++) {name} += {name}p[i];")
        scope.lines += [f"{place} = {names[e]};" for e, place in results.items()]

    # -- one visit's loops ----------------------------------------------------------------

    def ends(self, nest: Nest, scope: Scope) -> None:
        """Stores, and sums along the last axis, in one loop."""
        last, kept = nest.axes[-1:], nest.axes[:-1]
        inward = [e for e in nest.ends if isinstance(e, Expr) or (e.sums and not e.where[0].axes >= set(last))]
        names = {e: self.number() for e in inward} if last else {}
        sums = [e for e in inward if isinstance(e, Expr)]
        results = dict[Expr, str]()

        def row(inside: Scope) -> None:
            inside.lines += [f"float {n} = 0;" for n in names.values()]
            self.loops(inside, last, each, ", ".join(names.values()))
            for e, name in names.items():
                if isinstance(e, Store):
                    inside.lines.append(f"{self.slot(e)} += {self.times(e, name)};")
                elif e in results:
                    inside.lines.append(f"{results[e]} = {name};")

        def each(inside: Scope) -> None:
            values = [self.text(e.args[0] if isinstance(e, Expr) else e.expr, inside) for e in nest.ends]
            inside.lines += [self.stored(e, value, names.get(e, "")) for e, value in zip(nest.ends, values, strict=True)]

        results |= self.found(sums, names, kept, scope)
        self.loops(scope, kept, row)

    def stored(self, s: End, value: str, name: str) -> str:
        if isinstance(s, Expr):
            return f"{name} += {value};"
        if not s.sums:
            target = int(s.target)
            place = _offset(s.where, contiguous(self.results[target][1]))
            return f"store(y{target} + {place}, {value});"
        return f"{name} += {value};" if name else f"{self.slot(s)} += {self.times(s, value)};"

    def slot(self, s: Store) -> str:
        return f"sums[{self.slots[str(s.target)].offset} + {index_text(s.where[0])}]"

    def times(self, s: Store, value: str) -> str:
        """A sum runs along inner axes that what is summed does not vary along, too."""
        apart = s.domain - s.expr.axes - s.where[0].axes
        for axis in (a for a in self.plan.inner if a in apart):
            value = f"{value} * {axis.size}.0f"
        return value


def _offset(where: Sequence[Index], steps: Sequence[str]) -> str:
    """The place of an element, from its index in every dim."""
    parts = list[str]()
    for i, step in zip(where, steps, strict=True):
        if i.terms or i.plus:
            parts.append(f"({index_text(i)})" + (f" * ({step})" if step != "1" else ""))
    return " + ".join(parts) or "0"
