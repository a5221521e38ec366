"""A `@kernel` graph as Triton source, with all that a launch needs to know."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...ir import Graph, dump
from .body import section_lines
from .expr import Pool
from .index import Declined
from .pieces import pieces, sums_of
from .pull import sizes
from .text import LIBRARY
from .tiles import Section, sections
from .write import Slot, Writer

MAX_LINES = 4000  # of generated text; a kernel beyond that is too much for one launch


@dataclass(frozen=True)
class Launch:
    """One Triton function: its arguments by name, and its sections, whose programs stand one after another."""

    function: str
    arguments: tuple[str, ...]
    sections: tuple[Section, ...]
    warps: int


@dataclass(frozen=True)
class RowKernel:
    """Triton source of a kernel graph.

    Arguments: p_x* operands and p_y* results (by number), p_s the partial sums, s_x*_d strides, n_* row sizes, g how many
    programs share the sums over rows, e_* where a section's programs end.
    """

    graph: Graph
    name: str
    source: str
    launches: tuple[Launch, ...]
    sizes: tuple[str, ...]  # row sizes, in the order of n_*
    sums: int  # columns of the partial sums over rows


def row_kernel(graph: Graph) -> RowKernel:
    """Generate the kernel of a graph. Raises Declined with the reason where there can be none."""
    return _row_kernel(graph, dump(graph))


@lru_cache(maxsize=1024)
def _row_kernel(graph: Graph, text: str) -> RowKernel:
    """Graphs are equal whatever their values are called, so the text, whose names the source has, is part of the key."""
    check(graph)
    pool = Pool()
    first, second = pieces(graph, pool)
    made = _Source(graph, sections(first), sections(second, second=True))
    return made.kernel()


def check(graph: Graph) -> None:
    """Refuse what no row kernel takes."""
    for value in (*graph.inputs, *graph.outputs):
        if value.type.dtype == "f64":
            raise Declined(f"{value.name} is float64, which row kernels would compute in float32")
        if value.type.partial or any(d.order and d.axes for d in value.type.dims):
            raise Declined(f"{value.name} is {value.type}, not a whole local value")
    if graph.params or any(n.callee is not None for n in graph.nodes):
        raise Declined("it has parameters or calls of its own")
    if all(v not in graph.makers for v in graph.outputs):
        raise Declined("it computes nothing")


class _Source:
    """Writes all sections of a kernel."""

    def __init__(self, graph: Graph, first: Sequence[Section], second: Sequence[Section]) -> None:
        self.graph, self.first, self.second = graph, first, second
        rows = dict.fromkeys(d for v in (*graph.inputs, *graph.outputs) for d in sizes(v) if isinstance(d, str))
        self.sizes: dict[str, str] = {size: f"n_{i}" for i, size in enumerate(rows)}
        self.slots, self.row = slots_of(graph)
        self.calls = set[str]()
        self.name = f"plait_{graph.name}"

    def kernel(self) -> RowKernel:
        parts, launches = list[str](), list[Launch]()
        for stage, made in ((self.name, self.first), (f"{self.name}_sums", self.second)):
            if made:
                text, launch = self.stage(stage, made)
                parts.append(text)
                launches.append(launch)
        library = [LIBRARY[n].strip("\n") for n in LIBRARY if n in self.calls]
        header = f'"""{_title(self.graph)}"""\n\nimport triton\nimport triton.language as tl'
        if any("libdevice." in part for part in parts):
            header += "\nfrom triton.language.extra import libdevice"
        source = "\n\n\n".join([header, *library, *parts]) + "\n"
        if source.count("\n") > MAX_LINES:
            raise Declined(f"its kernel would have {source.count(chr(10))} lines, more than {MAX_LINES}")
        return RowKernel(self.graph, self.name, source, tuple(launches), tuple(self.sizes), self.row)

    def stage(self, name: str, made: Sequence[Section]) -> tuple[str, Launch]:
        """One launch: a function per section, and one that gives each program its section."""
        texts, calls, every = list[str](), list[tuple[str, list[str]]](), dict[str, None]()
        for i, section in enumerate(made):
            part = name if len(made) == 1 else f"{name}_{i}"
            writer = self.writer(part, section)
            lines = section_lines(writer)
            self.calls |= writer.calls
            arguments = sorted(writer.uses, key=_argument_order)
            every.update(writer.uses)
            calls.append((part, arguments))
            texts.append(_function(part, ["pid", *arguments], _says(section), lines))
        ends = [f"e_{i}" for i in range(len(made) - 1)]
        arguments = sorted(every, key=_argument_order)
        if len(made) == 1:
            text = _function(name, arguments, _says(made[0]), ["pid = tl.program_id(0)", *_body(texts[0])])
        else:
            texts.append(_function(name, [*arguments, *ends], "Each program finds its section.", _dispatch(calls)))
            text = "\n\n\n".join(texts)
        warps = max(s.warps for s in made)
        return text, Launch(name, (*arguments, *ends), tuple(made), warps)

    def writer(self, name: str, section: Section) -> Writer:
        operands = [sizes(v) for v in self.graph.inputs]
        results = [[self.sizes[d] if isinstance(d, str) else d for d in sizes(v)] for v in self.graph.outputs]
        whole = frozenset(i for i, v in enumerate(self.graph.inputs) if not v.type.is_float)
        return Writer(name, section, operands, self.sizes, self.slots, self.row, results, whole)


def slots_of(graph: Graph) -> tuple[dict[str, Slot], int]:
    """Where each sum over rows lies among the partial sums."""
    slots, row = dict[str, Slot](), 0
    for s in sums_of(graph):
        if s.name not in slots:
            slots[s.name] = Slot(row, s.width)
            row += s.width
    return slots, row


def _argument_order(name: str) -> tuple[int, tuple[int, ...]]:
    kinds = ("p_x", "p_y", "p_s", "s_x", "n", "g", "e")
    return next(i for i, k in enumerate(kinds) if name.startswith(k)), tuple(map(int, re.findall(r"\d+", name)))


def _title(graph: Graph) -> str:
    """The body that the kernel computes, as the reader of its source needs it."""
    text = re.sub(r"[^\x20-\x7e\n]", "?", dump(graph)).replace("\\", "/").replace('"""', "'''")
    return f"Row kernel made by plait of\n\n{text.strip()}\n"


def _says(section: Section) -> str:
    """A section's tile, in words."""
    inner = " x ".join(str(a.size) for a in section.inner) or "1"
    outer = " x ".join(str(a.size) for a in section.outer) or "1"
    visits = f", {section.block} columns at a time" if section.chunk else ""
    sums = "; adds up over its rows" if section.summing else ""
    return f"{section.units} of {outer} rows, each {inner} wide{visits}{sums}."


def _function(name: str, arguments: Sequence[str], says: str, lines: Sequence[str]) -> str:
    """A jitted function, its arguments on as many lines as they need."""
    rows, row = list[str](), "   "
    for argument in arguments:
        if len(row) + len(argument) > 110:
            rows, row = [*rows, row], "   "
        row += f" {argument},"
    head = f"@triton.jit\ndef {name}(\n" + "\n".join([*rows, row]) + "\n):"
    return "\n".join([head, f'    """{says}"""', *(f"    {x}" for x in lines)])


def _body(text: str) -> list[str]:
    """The lines of a function's text, behind its docstring."""
    lines = text.split("\n")
    start = next(i for i, x in enumerate(lines) if x.startswith('    """'))
    return [x[4:] for x in lines[start + 1 :]]


def _dispatch(calls: Sequence[tuple[str, list[str]]]) -> list[str]:
    lines = ["pid = tl.program_id(0)"]
    for i, (name, arguments) in enumerate(calls):
        start = "pid" if i == 0 else f"pid - e_{i - 1}"
        branch = f"if pid < e_{i}:" if i == 0 else "else:" if i == len(calls) - 1 else f"elif pid < e_{i}:"
        lines += [branch, f"    {name}({', '.join([start, *arguments])})"]
    return lines
