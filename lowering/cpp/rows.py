"""Row kernels in C++: a kernel graph as one library, each piece of it a function over a span of rows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...ir import Graph, dump
from ..rows.expr import Pool
from ..rows.index import Declined
from ..rows.kernel import check, slots_of
from ..rows.pieces import Piece, pieces
from ..rows.pull import sizes
from . import prelude
from .rows_plan import Plan, plan
from .rows_text import FUNCTIONS, HALF, TYPES, rates
from .rows_write import Writer

UNIT = 1 << 14  # numbers that a unit of work writes or reads of each operand, about
SHARED = 64  # units at most that a sum over rows is shared among, whatever the machine: the same bits everywhere
LEAST = 16  # rows of such a unit, at least
MOST_LINES = 3000  # of generated text

_UNITS = """\
// Every unit is alone with its results and its sums, so that the number of threads changes no bit.
typedef void (*Rows)(const int64_t* a, int64_t low, int64_t high, float* sums);

static void over_rows(const int64_t* a, Rows rows, int64_t count, int64_t each, float* sums, int64_t width, int64_t threads)
{
    const int64_t units = (count + each - 1) / each;
    if (!units) return;
#pragma omp parallel num_threads((int)(units < threads ? units : threads)) if (units > 1 && threads > 1)
    {
        Flushed flushed;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++) {
            const int64_t low = unit * each, high = low + each;
            rows(a, low, high < count ? high : count, sums + unit * width);
        }
    }
}

static inline int64_t shared(int64_t count, int64_t most, int64_t least)
{
    int64_t each = (count + most - 1) / most;
    return each < least ? least : each;
}
"""


@dataclass(frozen=True)
class CppKernel:
    """The C++ of a kernel graph. `run` takes one array: addresses of operands and results, strides, sizes, threads."""

    graph: Graph
    name: str
    source: str
    sizes: tuple[str, ...]  # row sizes, in the order of n*
    strides: tuple[tuple[int, int], ...]  # operand and dim, in the order of s*


def cpp_kernel(graph: Graph) -> CppKernel:
    """Generate the kernel of a graph. Raises Declined with the reason where there can be none."""
    return _cpp_kernel(graph, dump(graph))


@lru_cache(maxsize=1024)
def _cpp_kernel(graph: Graph, text: str) -> CppKernel:
    """The text has the values' names, which equal graphs need not share."""
    check(graph)
    if not all(v.type.is_float for v in graph.outputs):
        raise Declined("a result of whole numbers")
    first, second = pieces(graph, Pool())
    return _Source(graph, [plan(p) for p in first], [plan(p) for p in second]).kernel()


class _Source:
    """Writes all pieces of a kernel."""

    def __init__(self, graph: Graph, first: Sequence[Plan], second: Sequence[Plan]) -> None:
        self.graph, self.first, self.second = graph, first, second
        rows = dict.fromkeys(d for v in (*graph.inputs, *graph.outputs) for d in sizes(v) if isinstance(d, str))
        self.sizes = {size: f"n{i}" for i, size in enumerate(rows)}
        self.operands = [sizes(v) for v in graph.inputs]
        self.strides = tuple((i, d) for i, dims in enumerate(self.operands) for d in range(len(dims) - 1))
        self.slots, self.width = slots_of(graph)
        self.waves = dict[tuple[object, ...], str]()

    def kernel(self) -> CppKernel:
        parts = [self.function(f"rows{i}", p) for i, p in enumerate(self.first)]
        parts += [self.function(f"sums{i}", p) for i, p in enumerate(self.second)]
        tables = [_table(name, key) for key, name in self.waves.items()]
        half = HALF if any(v.type.dtype == "f16" for v in (*self.graph.inputs, *self.graph.outputs)) else ""
        library = (prelude.VECTORS, prelude.OPERANDS, FUNCTIONS + half, _UNITS)
        source = "\n".join([_title(self.graph), *library, *tables, *parts, self.entry()])
        if source.count("\n") > MOST_LINES:
            raise Declined(f"its C++ would have {source.count(chr(10))} lines, more than {MOST_LINES}")
        return CppKernel(self.graph, f"rows_{self.graph.name}", source, tuple(self.sizes), self.strides)

    # -- functions ------------------------------------------------------------------------

    def function(self, name: str, p: Plan) -> str:
        results = [(v.type.dtype, [self.sizes[d] if isinstance(d, str) else d for d in sizes(v)]) for v in self.graph.outputs]
        whole = frozenset(i for i, v in enumerate(self.graph.inputs) if not v.type.is_float)
        writer = Writer(p, self.operands, results, self.sizes, self.slots, whole, waves=self.waves)
        lines = writer.function()
        heading = f"static void {name}(const int64_t* a, int64_t low, int64_t high, float* sums)\n{{"
        return "\n".join([heading, *(f"    {x}" for x in [*self.arguments(lines), *lines]), "}\n"])

    def arguments(self, lines: Sequence[str]) -> list[str]:
        """Declarations of what the lines name."""
        used, made = set(re.findall(r"\b[xysn]\d+(?:_\d+)?\b", "\n".join(lines))), list[str]()
        for i, v in enumerate(self.graph.inputs):
            kind = TYPES[v.type.dtype]
            made += [f"const {kind}* const x{i} = (const {kind}*)a[{i}];"] * (f"x{i}" in used)
        for i, v in enumerate(self.graph.outputs):
            kind = TYPES[v.type.dtype]
            made += [f"{kind}* const y{i} = ({kind}*)a[{len(self.operands) + i}];"] * (f"y{i}" in used)
        numbers = {f"s{i}_{d}": self.behind(n) for n, (i, d) in enumerate(self.strides)} | self.numbers()
        return made + [f"const int64_t {name} = a[{place}];" for name, place in numbers.items() if name in used]

    def numbers(self) -> dict[str, int]:
        """Where each row size is among the arguments."""
        return {name: self.behind(len(self.strides) + i) for i, name in enumerate(self.sizes.values())}

    def behind(self, place: int) -> int:
        return len(self.operands) + len(self.graph.outputs) + place

    # -- the entry ------------------------------------------------------------------------

    def entry(self) -> str:
        """What Python calls: every piece over its rows, sums of units in their order, then what reads these."""
        threads = self.behind(len(self.strides) + len(self.sizes))
        lines = [f"const int64_t {name} = a[{place}];" for name, place in self.numbers().items()]
        lines += [f"const int64_t threads = a[{threads}];", *self.fresh()]
        if self.width:
            lines += self.room()
        for i, p in enumerate(self.first):
            each, sums = (f"e{i}", "sums") if p.summing else (str(_unit(p)), "nullptr")
            width = self.width if p.summing else 0
            lines.append(f"over_rows(a, rows{i}, {self.count(p.piece)}, {each}, {sums}, {width}, threads);")
        if self.width:
            lines += [*self.totals(), *(f"sums{i}(a, 0, 1, sums);" for i, _ in enumerate(self.second)), "free(sums);"]
        body = "\n".join(f"    {x}" for x in [*lines, "return 0;"])
        return f'extern "C" __attribute__((visibility("default"))) int run(const int64_t* a)\n{{\n{body}\n}}\n'

    def fresh(self) -> list[str]:
        made = list[str]()
        for i, v in enumerate(self.graph.outputs):
            count = " * ".join([*(self.sizes[d] if isinstance(d, str) else str(d) for d in sizes(v)), "1"])
            made.append(f"fresh((void*)a[{len(self.operands) + i}], {count} * sizeof({TYPES[v.type.dtype]}));")
        return made

    def room(self) -> list[str]:
        """A row of sums for each unit, zero at first."""
        lines, units = list[str](), ["(int64_t)1"]
        for i, p in enumerate(self.first):
            if p.summing:
                lines.append(f"const int64_t e{i} = shared({self.count(p.piece)}, {SHARED}, {LEAST});")
                units.append(f"({self.count(p.piece)} + e{i} - 1) / e{i}")
        lines.append("int64_t units = 1;")
        lines += [f"if (units < {u}) units = {u};" for u in units[1:]]
        return [*lines, f"float* sums = (float*)calloc(units * {self.width}, sizeof(float));", "if (!sums) return 1;"]

    def totals(self) -> list[str]:
        return [
            "for (int64_t unit = 1; unit < units; unit++)",
            f"    for (int64_t i = 0; i < {self.width}; i++) sums[i] += sums[unit * {self.width} + i];",
        ]

    def count(self, piece: Piece) -> str:
        return " * ".join(["(int64_t)1", *(self.sizes[str(a.size)] for a in piece.rows)])


def _unit(p: Plan) -> int:
    """Rows of a unit of work."""
    return max(1, UNIT // math.prod(int(a.size) for a in p.piece.columns))


def _table(name: str, key: tuple[object, ...]) -> str:
    return f"static const double {name}[] = {{{', '.join(map(repr, rates(key)))}}};\n"


def _title(graph: Graph) -> str:
    """The body that the kernel computes, as the reader of its source needs it."""
    text = re.sub(r"[^\x20-\x7e\n]", "?", dump(graph)).replace("\\", "/")
    return "// Row kernel made by plait of\n" + "\n".join(f"//   {line}" for line in text.strip().split("\n")) + "\n"
