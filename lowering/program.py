"""What lowering makes: one fx module per distinct layer, an entry that calls them, and a report of every choice."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import fx

from ..ir import Graph, parameters


@cache
def fingerprint() -> str:
    """A digest of the source of every op, every form and the generator of row kernels."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted([*(root / "ir").rglob("*.py"), *(root / "lowering").rglob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


_PLAIN = ContextVar("plain", default=False)


@contextmanager
def plain() -> Generator[None]:
    """Inside, CPU ops are torch code where C++ could be built for them too: for a call that nothing is worth building for."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_plain() -> bool:
    """Whether ops are to run as torch code."""
    return _PLAIN.get()


@dataclass(frozen=True)
class Choice:
    """What runs a node: a form of its own, or the op's reference under `torch.compile`."""

    graph: str
    op: str
    loc: str
    runs: str
    why: str


@dataclass(frozen=True)
class Program:
    """A lowered graph. Every module is a function of its inputs and then its parameters, in the graph's order.

    The entry takes its own inputs, its own parameters, and then those of every layer call, `parameters` in all.
    """

    graph: Graph
    target: str
    entry: fx.GraphModule
    layers: Mapping[str, fx.GraphModule]  # by the name the entry calls them
    parameters: tuple[str, ...]  # full names, in the order the entry takes them
    choices: tuple[Choice, ...]
    fingerprint: str  # of the code behind every call: compiled code of another version must not be found in a cache
    # Of a cached program on the CPU: told what runs each layer, what runs one token a row, where it can, instead of them.
    step: Callable[[Mapping[Graph, Callable[..., Any]]], Callable[..., Any]] | None = None

    @property
    def source(self) -> str:
        """The Python text of every module, the entry first, each with a legend of what its names stand for."""
        graphs = dict(zip(self.layers, self.graph.layers, strict=True))
        parts = [_listing("entry", self.graph, self.entry), *(_listing(n, graphs[n], m) for n, m in self.layers.items())]
        return "\n\n".join(parts) + "\n"


def _listing(name: str, graph: Graph, module: fx.GraphModule) -> str:
    """One module's text and, below it, those of its kernels."""
    inputs = [f"x{i} {v.name}" for i, v in enumerate(graph.inputs)]
    params = [f"p{i} {n}" for i, n in enumerate(parameters(graph))]
    legend = textwrap.fill(f"{graph.name}: {', '.join([*inputs, *params])}", 118, initial_indent="# ", subsequent_indent="#   ")
    kernels = [g for g in graph.callees if g.role == "kernel"]
    inner = [_listing(f"kernel{i}", g, getattr(module, f"kernel{i}")) for i, g in enumerate(kernels)]
    return "\n\n".join([f"# {name}\n{legend}\n{module.code.strip()}", *inner])
