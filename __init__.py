"""plait: compile hybrid language models."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads spin on small tiles; torch's do the work here

from plait.api import compile, load, program
from plait.frontends import ModelSpec, load_spec
from plait.ir import Graph, Mesh, PlaitError, evaluate, parse, simulate, trace
from plait.runtime import CompiledModel

__version__ = "0.1.0"
__all__ = [
    "CompiledModel", "Graph", "Mesh", "ModelSpec", "PlaitError", "compile", "evaluate", "load", "load_spec", "parse", "program",
    "simulate", "trace",
]  # fmt: skip
