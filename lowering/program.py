"""What lowering makes: one fx module per distinct layer, an entry that calls them, and a report of every choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from ..ir import Graph


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

    @property
    def source(self) -> str:
        """The Python text of every module, the entry first."""
        modules = {self.graph.name: self.entry, **self.layers}
        return "\n\n".join(f"# {name}\n{module.code.strip()}" for name, module in modules.items()) + "\n"
