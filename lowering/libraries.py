"""The C++ of a program: every library that running it on the CPU calls, before any is built."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from hashlib import sha256

from ..ir import Graph, Mesh
from .cpp import sources, step
from .cpp.rows import cpp_kernel
from .cpp.step_run import step_of
from .cpp_ops import worth
from .cpp_parts import parted
from .kernels import gradient, layout
from .local import local_kernel
from .rows import Declined


def libraries(graph: Graph, mesh: Mesh | None = None) -> dict[str, str]:
    """Name -> text: kernels of rows with their gradients, ops that have C++ of their own, and the decode step's machine."""
    found = sources(graph, partial(_rows, mesh))
    return found | ({"step": step.source()} if mesh is None and step_of(graph, "cpu") is not None else {})


def _rows(mesh: Mesh | None, kernel: Graph) -> Mapping[str, str]:
    """The libraries of a kernel that runs as rows, or does behind its convolution; none where its ops run one by one."""
    try:
        kernel = local_kernel(kernel, mesh)
        worth(kernel)
        back = gradient(kernel, (True,) * len(kernel.outputs), (True,) * len(kernel.inputs))
        computed = [layout(kernel).computed, *([back.layout.computed] if back is not None else [])]
        texts = [cpp_kernel(graph).source for graph in computed if graph.outputs]
    except Declined:
        apart = parted(kernel)
        return {} if apart is kernel else sources(apart, partial(_rows, mesh))
    # Kernels of one name differ in widths: libraries are told apart by their texts.
    return {f"rows_{kernel.name}_{sha256(text.encode()).hexdigest()[:8]}": text for text in texts}
