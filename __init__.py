"""plait: compile hybrid language models."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.api import compile, load, program, save_hf, shard_batch
    from plait.frontends import ModelSpec, load_spec
    from plait.frontends.hf import load_hf
    from plait.ir import Graph, Mesh, PlaitError, evaluate, parse, simulate, trace
    from plait.runtime import CompiledModel
    from plait.runtime.mesh import close, init
    from plait.tracing import Traced, trace_module

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads spin on small tiles; torch's do the work here

__version__ = "0.1.0"
__all__ = [
    "CompiledModel", "Graph", "Mesh", "ModelSpec", "PlaitError", "Traced",
    "close", "compile", "evaluate", "init", "load", "load_hf",
    "load_spec", "parse", "program", "save_hf", "shard_batch", "simulate", "trace", "trace_module",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is first used: `plait --help` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'plait' has no attribute {name!r}")
    from plait import api, frontends, ir, runtime, tracing
    from plait.frontends import hf
    from plait.runtime import mesh

    homes = dict.fromkeys(("compile", "load", "program", "save_hf", "shard_batch"), api)
    homes |= dict.fromkeys(("ModelSpec", "load_spec"), frontends) | {"load_hf": hf} | dict.fromkeys(("close", "init"), mesh)
    homes |= dict.fromkeys(("Traced", "trace_module"), tracing)
    return getattr({**homes, "CompiledModel": runtime}.get(name, ir), name)
