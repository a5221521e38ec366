"""Every kernel of every preset, forward and backward, interpreted against float64: numbers, and each operand read once."""

from collections.abc import Iterator
from functools import cache
from itertools import cycle

import pytest
from plait.api import program
from plait.ir import Graph
from plait.ir.gradient import backward
from plait.lowering.rows.tiles import shifted
from plait.passes import DEFAULT, Pipeline

from tests.programs import TINY
from tests.row_cases import errors, exact, interpreted, operands, typed

SIZES = {"b": 2, "s": 5}


def kernels(graph: Graph) -> Iterator[Graph]:
    for callee in graph.callees:
        yield from [callee] if callee.role == "kernel" else kernels(callee)


@cache
def distinct() -> dict[str, Graph]:
    """The distinct kernels of all presets, by the preset they were first seen in and their name."""
    found = dict[Graph, str]()
    for preset in TINY:
        for task in ("loss", "cached"):
            for kernel in kernels(Pipeline.parse(DEFAULT).run(program(preset, task=task))):
                found.setdefault(kernel, f"{preset}.{task}.{kernel.name}")
    return {name: kernel for kernel, name in found.items()}


@pytest.mark.parametrize("preset", TINY)
def test_kernels_of_presets(preset: str) -> None:
    """The two dtypes take turns: kernels of one kind come again, with other sizes."""
    mine = {name: kernel for name, kernel in distinct().items() if name.startswith(f"{preset}.")}
    assert mine or preset != TINY[0]
    for (name, kernel), (dtype, limit) in zip(mine.items(), cycle([("f32", 3e-6), ("bf16", 1e-2)]), strict=False):
        kernel = typed(kernel, dtype)
        xs = operands(kernel, SIZES)
        made = backward(kernel, results=True)
        results = interpreted(kernel, xs)
        given = [(*xs, *results.results)[i] for i in made.reads]
        given += operands(made.graph, SIZES, seed=1)[len(given) :]
        again = interpreted(made.graph, given)
        for graph, values, ran in ((kernel, xs, results), (made.graph, given, again)):
            found = errors(ran.results, exact(graph, values))
            assert all(e < limit for e in found), (name, graph.name, found)
            stencil = any(shifted(s.piece) for launch in ran.kernel.launches for s in launch.sections)
            for i, (v, x) in enumerate(zip(graph.inputs, values, strict=True)):
                if v.type.symbols and v.type.is_float:
                    count = ran.traffic[f"p_x{i}"]
                    assert count.distinct_loads <= (3 if stencil else 1) * x.numel(), (name, graph.name, v.name, count)
