"""Eager modules through torch.export: calls of aten ops as a graph."""

from . import blocks, mixers, pairs, products  # their calls are entered among the handlers
from .build import Built, build_graph
from .export import Exported, TraceError, as_call, export

__all__ = ["Built", "Exported", "TraceError", "as_call", "blocks", "build_graph", "export", "mixers", "pairs", "products"]
