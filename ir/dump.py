"""Text form, out: a dump is Python syntax, so dumps, rules, fixtures and `.ir` files are one language."""

from __future__ import annotations

import hashlib
import keyword
from collections.abc import Iterable

from .graph import Graph, Node, Value
from .op import OPS, OpDef

WIDE = 118  # a longer header is broken, one parameter a line


def dump(graph: Graph) -> str:
    """The graph and every graph it calls, each distinct one once."""
    graphs = _reached(graph)
    fresh = unique([*OPS, *keyword.kwlist])
    names = {g: fresh(g.name) for g in graphs}
    return "\n\n".join(_one(g, names, canonical=False) for g in graphs) + "\n"


def key(graph: Graph) -> str:
    """Text that is equal for equal programs: names numbered, comments left out."""
    names = {g: f"%{hashlib.sha256(g.key.encode()).hexdigest()}" for g in graph.callees}  # a digest: callees may share callees
    return _one(graph, names, canonical=True)


def _reached(graph: Graph) -> list[Graph]:
    """The graph, then its callees in order of first call."""
    found = [graph]
    for g in found:
        found += [callee for callee in g.callees if callee not in found]
    return found


def unique(taken: Iterable[str] = ()):
    """A function that makes each name given to it unique by numbering."""
    used, last = set(taken), dict[str, int]()

    def fresh(name: str) -> str:
        made, n = name, last.get(name, 0)
        while made in used:
            n += 1
            made = f"{name}{n}" if not name[-1].isdigit() else f"{name}_{n}"
        last[name] = n
        used.add(made)
        return made

    return fresh


def _one(graph: Graph, graphs: dict[Graph, str], *, canonical: bool) -> str:
    names = _value_names(graph, canonical)
    lines = [_line(n, names, graphs) for n in graph.nodes]
    width = min(max((len(x) for x in lines), default=0), 88)
    body = lines if canonical else [f"{x:<{width}}  # {_comment(n)}" for x, n in zip(lines, graph.nodes, strict=True)]
    head = [f"@{graph.role}"] if graph.role != "graph" else []
    returned = ", ".join(names[v] for v in graph.outputs)
    name = "this" if canonical else graphs[graph]
    return "\n".join([*head, _header(graph, names, name), *(f"    {x}" for x in body), f"    return {returned}"])


def _value_names(graph: Graph, canonical: bool) -> dict[Value, str]:
    values = [*graph.inputs, *(v for n in graph.nodes for v in n.outputs)]
    if canonical:
        return {**{v: f"%{i}" for i, v in enumerate(values)}, **{v: v.name for v in graph.params}}
    fresh = unique([*keyword.kwlist, "inf", "nan"])
    params = {v: fresh(v.name) for v in graph.params}  # parameter names are kept: checkpoints know them
    return {**params, **{v: fresh(v.name) for v in values}}


def _header(graph: Graph, names: dict[Value, str], name: str) -> str:
    inputs = [f"{names[v]}: {v.type}" for v in graph.inputs]
    params = [f"{names[v]}: {v.type} = {init}" for v, init in zip(graph.params, graph.inits, strict=True)]
    parts = [*inputs, *(["*"] if params else []), *params]
    flat = f"def {name}({', '.join(parts)}):"
    return flat if len(flat) <= WIDE else f"def {name}(\n" + "".join(f"    {p},\n" for p in parts) + "):"


def _line(node: Node, names: dict[Value, str], graphs: dict[Graph, str]) -> str:
    operands, attrs = [names[v] for v in node.operands], node.attrs
    if isinstance(node.op, OpDef):
        gap = next((i for i, v in enumerate(node.inputs) if v is None), len(node.inputs))
        operands = [names[v] for v in node.operands[:gap]]  # all before the first absent one; the rest by name
        operands += [
            f"{o.name}={names[v]}" for o, v in zip(node.op.inputs[gap:], node.inputs[gap:], strict=True) if v is not None
        ]
        attrs = {k: v for k, v in attrs.items() if v != node.op.attrs[k]}
    callee = node.op.name if isinstance(node.op, OpDef) else graphs[node.op]
    arguments = [*operands, *(f"{k}={v!r}" for k, v in attrs.items())]
    return f"{', '.join(names[v] for v in node.outputs)} = {callee}({', '.join(arguments)})"


def _comment(node: Node) -> str:
    types = ", ".join(str(v.type) for v in node.outputs)
    return f"{types} from {node.loc}" if node.loc else types
