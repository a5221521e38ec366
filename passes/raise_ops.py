"""Raising: the ops that an eager module's arithmetic is, found by rules; views between them become few."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir import Graph, Node, Replay, Value
from ..ir.rearrange import composed, read, text
from .cleanup import canonicalize, dce
from .raise_rules import rules_of
from .registry import Outcome, register
from .remarks import Remark
from .rewrite import rewrite

FAMILIES = ("tidy", "norm", "activation", "flat", "rope", "attention", "heads", "conv", "experts", "rows")
TABLES = ("rope_table", "visible_table")


@register(numerics="changes-precision", choices={"only": FAMILIES, "without": FAMILIES})
def raise_ops(graph: Graph, *, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Outcome:
    """Norms, rotations and attention that are written out in small ops become the ops that they are."""
    remarks = list[Remark]()
    for family in FAMILIES:
        if (not only or family in only) and family not in without:
            graph, said = raise_family(graph, family)
            remarks += said
    return graph, tuple(remarks)


def raise_families() -> tuple[str, ...]:
    """Families in the order in which they are raised; each sees what those before it made."""
    return FAMILIES


def raise_family(graph: Graph, family: str, *, only: tuple[str, ...] = ()) -> Outcome:
    """One family's rules, or some of them, on a tidy graph; the views that they leave behind are put together."""
    rules = [r for r in rules_of(graph, family) if not only or r.name in only]
    graph, said = rewrite(
        own_views(canonicalize(graph)[0], (*TABLES, "reshape") if family in ("flat", "rows") else TABLES), rules
    )
    graph = canonicalize(graph)[0]
    return (joined_views(graph) if family in ("attention", "heads", "conv", "rows") else graph), said


def own_views(graph: Graph, shared: tuple[str, ...] = TABLES) -> Graph:
    """Every reader of a table or a view gets its own: a rule takes what it matches away from nobody else."""
    replay = Replay(graph)

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
        names = (*shared, "positions") if node.is_op("aten") else shared
        if not any(m is not None and m.is_op(*names) for m in (graph.makers.get(v) for v in node.operands)):
            return None
        own = list(inputs)
        for i, value in enumerate(node.inputs):
            maker = graph.makers.get(value) if value is not None else None
            if maker is not None and maker.is_op(*names):
                own[i] = _copied(graph, maker, replay, shared)
        return replay.builder.emit(node.op, own, node.attrs, [v.name for v in node.outputs], node.loc)

    return dce(replay.run(visit))[0]


def _copied(graph: Graph, maker: Node, replay: Replay, shared: tuple[str, ...]) -> Value:
    """Its result again, over copies of the tables and views that it is made of."""
    inputs = list[Value | None]()
    for value in maker.inputs:
        above = graph.makers.get(value) if value is not None else None
        copied = above is not None and above.is_op(*shared)
        inputs.append(_copied(graph, above, replay, shared) if copied and above else replay.env.get(value) if value else None)
    return replay.builder.emit(maker.op, inputs, maker.attrs, [o.name for o in maker.outputs], maker.loc)[0]


@register(numerics="exact")
def join_views(graph: Graph) -> Outcome:
    """A reshape of a reshape is one reshape, or none where the second undoes the first."""
    remarks, replay, made = list[Remark](), Replay(graph), dict[Value, Node]()

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
        if not node.is_op("reshape"):
            return None
        found = _joined(node, inputs[0], made, replay)
        if found is not None:
            remarks.append(Remark("passed", "join-views", node.loc, "two reshapes are one"))
            return found
        kept = replay.keep(node)
        made[kept[0]] = replay.builder.nodes[-1]
        return kept

    return replay.run(visit), tuple(remarks)


def _joined(node: Node, operand: Value | None, made: dict[Value, Node], replay: Replay) -> tuple[Value, ...] | None:
    """The one view that a view of a view is."""
    assert operand is not None
    second = read(node.attrs["pattern"], operand.type)
    before = made.get(operand)
    if second.nothing:
        return (operand,)
    if before is None:
        return None
    source = before.operands[0]
    both = composed(read(before.attrs["pattern"], source.type), second)
    if both is not None and both.nothing:
        return (source,)
    pattern = text(both) if both is not None else None
    if pattern is None:
        return None
    kept = replay.builder.emit(node.op, [source], {"pattern": pattern}, [v.name for v in node.outputs], node.loc)
    made[kept[0]] = replay.builder.nodes[-1]
    return kept


def joined_views(graph: Graph) -> Graph:
    """Views joined, and what is not read any more gone."""
    return canonicalize(join_views(graph)[0])[0]
