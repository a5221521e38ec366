"""What is known of a trace before any number is given: values that depend on sizes and buffers alone, and those values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from .export import Exported
from .views import bound, symbols_of

Tensor = torch.Tensor
MAKERS = ("new_ones", "new_zeros", "new_full", "zeros_like", "ones_like", "full_like")  # read a shape, not what is in it
LARGEST = 4000  # numbers up to here, such as a window, are looked at with more tokens than that
CHANGED = ("dropout", "rand", "bernoulli", "normal_")


@dataclass(frozen=True)
class Probe:
    """Sizes for torch's symbols."""

    at: Mapping[str, int]


class Known:
    """Which values of a trace depend on sizes and buffers alone, and what they are at given sizes."""

    def __init__(self, exported: Exported) -> None:
        signature = exported.program.graph_signature
        self.graph: fx.Graph = exported.program.graph
        held = {**exported.program.state_dict, **exported.program.constants}
        named = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        self.buffers: dict[str, Tensor] = {n: held[t] for n, t in named.items() if isinstance(held.get(t), Tensor)}
        self.nodes = set[fx.Node]()
        for node in self.graph.nodes:
            if self._depends_on_sizes_alone(node):
                self.nodes.add(node)
        self._values = dict[tuple[fx.Node, int], Tensor]()

    def _depends_on_sizes_alone(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return node.name in self.buffers
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            return node.op == "call_function" and isinstance(value, int | torch.SymInt)
        name = _name(node)
        if name.startswith(CHANGED):
            return False
        operands = node.all_input_nodes[1:] if name in MAKERS else node.all_input_nodes
        return all(x in self.nodes for x in operands)

    @cached_property
    def probes(self) -> list[dict[str, int]]:
        """Several sets of sizes, none of them the example's."""
        found = dict.fromkeys(
            s for n in self.graph.nodes if isinstance(v := n.meta.get("val"), Tensor) for s in sorted(symbols_of(v.shape))
        )
        return [{s: n + 2 * i for i, s in enumerate(found)} for n in ((2, 7, 4) if found else (2,))]

    def roots(self) -> list[fx.Node]:
        """Known tensors that something reads which is not known."""
        return [
            n for n in self.graph.nodes
            if n in self.nodes and isinstance(n.meta.get("val"), Tensor) and n.op == "call_function"
            and any(u not in self.nodes for u in n.users)
        ]  # fmt: skip

    def above(self, node: fx.Node) -> list[fx.Node]:
        """The node and every known tensor that it is made of."""
        found, waiting = dict[fx.Node, None](), [node]
        while waiting:
            n = waiting.pop()
            if n in found or n not in self.nodes:
                continue
            found[n] = None
            waiting += n.all_input_nodes
        return list(found)

    def largest(self, node: fx.Node) -> int:
        """The largest number below torch's own end of everything that the value is made with."""
        numbers = [a for n in self.above(node) for a in _leaves((n.args, n.kwargs)) if isinstance(a, int)]
        return max((abs(n) for n in numbers if abs(n) < 2**31), default=0)

    def factors(self, node: fx.Node) -> list[float]:
        """1, and what a table may be multiplied by: the numbers that it is made with."""
        numbers = [a for n in self.above(node) for a in _leaves((n.args, n.kwargs)) if isinstance(a, float)]
        return list(dict.fromkeys([1.0, *(a for a in numbers if 0 < a < math.inf)]))

    def lifted(self, node: fx.Node) -> bool:
        """Whether it is made of numbers that the module holds."""
        return any(n.op == "placeholder" for n in self.above(node))

    def value(self, node: fx.Node, at: Mapping[str, int]) -> Tensor:
        """What it is at these sizes."""
        key = (node, hash(tuple(sorted(at.items()))))
        if key not in self._values:
            self._values[key] = self._computed(node, at)
        return self._values[key]

    def _computed(self, node: fx.Node, at: Mapping[str, int]) -> Tensor:
        if node.op == "placeholder":
            return self.buffers[node.name]

        def leaf(a: Any) -> Any:
            if not isinstance(a, fx.Node):
                return a
            value = a.meta.get("val")
            if not isinstance(value, Tensor):
                return bound(value, at) if isinstance(value, int | torch.SymInt) else value
            if a in self.nodes:
                return self.value(a, at)
            return torch.zeros([bound(n, at) for n in value.shape], dtype=value.dtype)

        args = fx.map_arg(node.args, leaf)
        kwargs = fx.map_arg(node.kwargs, leaf)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator] # an op of torch


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if str(node.target).startswith("aten.") else str(node.target)


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, Mapping):
        return [x for v in tree.values() for x in _leaves(v)]  # type: ignore[reportUnknownVariableType] # any tree
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        return [x for v in tree for x in _leaves(v)]  # type: ignore[reportUnknownVariableType] # any tree
    return [tree]
