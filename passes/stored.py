"""Parameters kept in the order in which they are read, so that nothing is permuted when a program runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir import Graph, Node, Replay, TensorType, Value
from .registry import Outcome, register
from .remarks import Remark
from .verify import reached

Stored = dict[str, TensorType]  # a graph's parameters of other types, by name


@register(numerics="exact", model=True)
def fold_orders(graph: Graph) -> Outcome:
    """A parameter that is only read in another order is kept in that order: the reorder is done once, when it is loaded.

    Users see parameters and their gradients in natural order, whatever their types say.
    """
    said = list[Remark]()
    wanted = {part: _stored(part) for part in reached(graph)}
    for part, name in _disputed(graph, wanted):
        if name in wanted[part]:
            del wanted[part][name]
            said.append(Remark("missed", "fold-orders", part.name, f"{name} is read in another order by another layer"))
    made = _rebuilt(graph, wanted, said, {})
    return made, tuple(said)


def _stored(graph: Graph) -> Stored:
    """Parameters of which every reader is the same reorder."""
    found = Stored()
    for value in graph.params:
        readers = graph.uses.get(value, ())
        types = {n.outputs[0].type for n in readers if n.is_op("reorder") and not n.attrs["over"] and len(n.operands) == 1}
        if readers and all(n.is_op("reorder") for n in readers) and len(types) == 1 and value not in graph.outputs:
            found[value.name] = types.pop()
    return found


def _disputed(graph: Graph, wanted: Mapping[Graph, Stored]) -> list[tuple[Graph, str]]:
    """Parameters that two graphs share under one full name and would keep in different orders."""
    types, owners = dict[str, set[TensorType]](), dict[str, list[tuple[Graph, str]]]()

    def walk(part: Graph, prefix: str) -> None:
        for value in part.params:
            types.setdefault(prefix + value.name, set()).add(wanted[part].get(value.name, value.type))
            owners.setdefault(prefix + value.name, []).append((part, value.name))
        for node in part.nodes:
            if node.callee is not None and "params" in node.attrs:
                walk(node.callee, f"{prefix}{node.attrs['params']}.")

    walk(graph, "")
    return list(dict.fromkeys(owner for name, found in types.items() if len(found) > 1 for owner in owners[name]))


def _rebuilt(graph: Graph, wanted: Mapping[Graph, Stored], said: list[Remark], done: dict[Graph, Graph]) -> Graph:
    """The graph and all it calls over parameters of the new types."""
    if graph in done:
        return done[graph]
    kept = wanted[graph]
    replay = Replay(graph, params=[kept.get(v.name, v.type) for v in graph.params])

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
        if node.callee is not None:
            made = _rebuilt(node.callee, wanted, said, done)
            return replay.builder.emit(made, inputs, node.attrs, [v.name for v in node.outputs], node.loc)
        first = node.operands[0] if node.operands else None
        return inputs[:1] if first in graph.params and first.name in kept else None  # type: ignore[return-value,union-attr] # its reorders

    done[graph] = replay.run(visit)
    said += [Remark("passed", "fold-orders", graph.name, f"{name} is kept as {type_}") for name, type_ in kept.items()]
    return done[graph]
