"""The op `aten` as the call of torch's that it stands for: Dynamo never reads its text."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..ir import Node
from ..ir.ops.aten import Computed, arguments, resolved, takes_device


def foreign_call(graph: fx.Graph, node: Node, operands: list[fx.Node | None]) -> fx.Node:
    """The call, its sizes read off the operands when it runs."""

    def leaf(at: Any) -> Any:
        if isinstance(at, Computed):
            return _computed(graph, at, [leaf(factor) for factor in at.factors])
        value = operands[at.operand]
        return value if at.dim is None else graph.call_function(torch.ops.aten.sym_size.int, (value, at.dim))

    positional, named = arguments(node.attrs["args"]).filled(leaf)
    if takes_device(node.attrs["target"]):
        named["device"] = graph.call_function(getattr, (operands[0], "device"))
    made = graph.call_function(resolved(node.attrs["target"]), positional, named)
    several = any(str(r.type).startswith("List") for r in resolved(node.attrs["target"])._schema.returns)
    return graph.call_function(operator.getitem, (made, 0)) if several and len(node.outputs) == 1 else made


def _computed(graph: fx.Graph, at: Computed, factors: list[Any]) -> Any:
    """A product of sizes plus a number."""
    total: Any = at.times
    for factor in factors:
        total = factor if total == 1 else graph.call_function(operator.mul, (total, factor))
    return graph.call_function(operator.add, (total, at.plus)) if at.plus else total
