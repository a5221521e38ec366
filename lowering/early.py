"""C++ of a program built before it is called: a compiler's work on another core, beside lowering and compiling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from ..ir import Graph
from .cpp import begin, sources
from .cpp.rows import cpp_kernel
from .cpp_ops import worth
from .kernels import gradient, layout
from .rows import Declined


def begin_building(graph: Graph, *, gradients: bool) -> None:
    """Begins to build what a program will call on the CPU; who needs a library before it is done waits for that one."""
    begin(lambda: libraries(graph, gradients=gradients))


def libraries(graph: Graph, *, gradients: bool) -> Iterator[tuple[str, str]]:
    """Name and text of every library that a program calls; those of its kernels' gradients last."""
    yield from sources(graph).items()
    kernels = dict.fromkeys(k for layer in (graph, *graph.layers) for k in layer.callees if k.role == "kernel")
    for back in (False, True) if gradients else (False,):
        for kernel in kernels:
            with suppress(Declined):
                worth(kernel)
                made = cpp_kernel(_computed(kernel, back))
                yield made.name, made.source


def _computed(kernel: Graph, back: bool) -> Graph:
    """What the op of a kernel computes, or that of its gradient where all flows."""
    kernel = replace(kernel, outputs=tuple(dict.fromkeys(kernel.outputs)))
    if not back:
        return layout(kernel).computed
    made = gradient(kernel, (True,) * len(kernel.outputs), (True,) * len(kernel.inputs))
    if made is None:
        raise Declined("no gradient flows")
    return made.layout.computed
