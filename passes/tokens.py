"""What values and nodes cost a token, at a length that is common in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..ir import Graph, Node, OpDef, Value
from ..ir.sizes import symbols as symbols_of

LENGTH = 4096


@dataclass(frozen=True)
class Tokens:
    """Numbers for the symbolic sizes of a graph, and how many tokens it then has."""

    sizes: Mapping[str, int]
    count: int

    def bytes(self, values: Iterable[Value]) -> int:
        """Bytes a token, rounded up."""
        return -(-sum(v.type.bytes({**self.sizes}) for v in values) // self.count)

    def flops(self, nodes: Iterable[Node]) -> int:
        """Floating-point operations a token, what is called included."""
        return -(-sum(self._flops(n) for n in nodes) // self.count)

    def _flops(self, node: Node) -> int:
        if isinstance(node.op, OpDef):
            types = [v.type if v is not None else None for v in node.inputs]
            return node.op.flops(types, node.attrs, self.sizes)
        return sum(self._flops(n) for n in node.op.nodes)


def tokens_of(graph: Graph) -> Tokens:
    """One sequence of `LENGTH` tokens: the rows of the first float input that has rows, their last symbol being the length."""
    symbols = dict.fromkeys((s for g in (graph, *graph.callees) for s in g.symbols), 1)
    lead = next((v.type for v in graph.inputs if v.type.is_float and len(v.type.dims) > 1), None)
    if lead is None:
        return Tokens(symbols, 1)
    rows = replace(lead, dims=lead.dims[:-1])
    sizes = symbols | dict.fromkeys([s for d in rows.dims for s in sorted(symbols_of(d.size))][-1:], LENGTH)
    return Tokens(sizes, max(1, rows.count(sizes)))
