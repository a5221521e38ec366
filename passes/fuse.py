"""Named fusions by outlining: find each one's regions, turn them into kernels, and say what was missed and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..ir import Graph, Node, OpDef, Value, each_layer
from .fusions import FUSIONS, NAMES, PATTERNS, FlowFusion, Fusion, TextFusion
from .match import Match
from .outline import Region, compatible, convex, outline_all, region
from .registry import Outcome, register
from .remarks import Remark, check_required
from .structure import bytes_saved, is_view, row_wise


@dataclass(frozen=True)
class Miss:
    """A place that looks like a fusion and is none."""

    where: str
    why: str


@register(numerics="exact", model=True, choices={"only": NAMES, "without": NAMES, "require": NAMES})
def fuse(graph: Graph, *, only: tuple[str, ...] = (), without: tuple[str, ...] = (), require: tuple[str, ...] = ()) -> Outcome:
    """Norms, gates, activations, rotations and what is around them become one kernel each."""
    wanted = [f for f in FUSIONS if (not only or f.name in only) and f.name not in without]
    remarks = list[Remark]()

    def change(part: Graph) -> Graph:
        for fusion in wanted:
            part, said = apply_fusion(part, fusion)
            remarks.extend(said)
        return part

    fused = each_layer(graph, change)
    seen = {r.what for r in remarks}
    absent = [Remark("note", n, graph.name, "no match") for n in dict.fromkeys(f.name for f in wanted) if n not in seen]
    check_required(require, [*remarks, *absent])
    return fused, (*remarks, *absent)


def apply_fusion(graph: Graph, fusion: Fusion) -> Outcome:
    """One fusion wherever it fits in one graph."""
    found = list(_text_regions(graph, fusion) if isinstance(fusion, TextFusion) else _flow_regions(graph, fusion))
    regions = compatible(graph, [r for r in found if isinstance(r, Region)])
    misses = [Remark("missed", fusion.name, m.where, m.why) for m in found if isinstance(m, Miss)]
    clash = [r for r in found if isinstance(r, Region) and r not in regions]
    misses += [Remark("missed", fusion.name, r.loc, "each of two regions needs the other's result") for r in clash]
    if not regions:
        return graph, tuple(misses)
    return outline_all(graph, regions), (*(_passed(graph, fusion, r) for r in regions), *misses)


def _passed(graph: Graph, fusion: Fusion, made: Region) -> Remark:
    saved = bytes_saved(made.nodes, made.operands, made.results(graph))
    why = f"{len(made.nodes)} ops become one kernel, {saved} bytes a token less memory traffic"
    return Remark("passed", fusion.name, made.loc, why)


def _text_regions(graph: Graph, fusion: TextFusion) -> Iterator[Region | Miss]:
    taken = set[Node]()
    misses = dict[Node, Miss]()
    for text in fusion.texts:
        pattern = PATTERNS[text]
        for root in graph.nodes:
            if not root.is_op(*pattern.root_ops) or root in taken:
                continue
            for found in pattern.find(root, graph.makers):
                made = _text_region(graph, fusion, found, taken)
                if isinstance(made, Miss):
                    misses.setdefault(root, made)
                    continue
                taken.update(made.nodes)
                yield made
                break
    yield from (m for root, m in misses.items() if root not in taken)


def _text_region(graph: Graph, fusion: TextFusion, found: Match, taken: set[Node]) -> Region | Miss:
    """The region of a match, or why there is none."""
    root = found.members[-1]
    why = _obstacle(graph, fusion, found, taken) or (fusion.when(graph, found) if fusion.when else "")
    if why:
        return Miss(root.loc, why)
    nodes = set(found.members)
    if fusion.reshapes:
        _absorb_before(graph, nodes, taken)
        _absorb_behind(graph, nodes, root, taken)
    if not convex(graph, nodes):
        return Miss(root.loc, "not convex: a value leaves it and comes back")
    made = region(graph, nodes, fusion.name.replace("-", "_"))
    return made if made.results(graph) else Miss(root.loc, "nothing reads its result; run dce first")


def _obstacle(graph: Graph, fusion: TextFusion, found: Match, taken: set[Node]) -> str:
    members, root = set(found.members), found.members[-1]
    if overlap := next((n for n in found.members if n in taken), None):
        return f"{overlap.op.name} is in another kernel already"
    if bad := next((n for n in found.members if not row_wise(n)), None):
        return f"{bad.op.name} is not row-wise"
    kept = {found.values[n] for n in fusion.kept}
    for node in found.members:
        shared = [v for v in node.outputs if node is not root and v not in kept and not _only_in(graph, v, members)]
        if shared:
            return f"the result of {node.op.name} is used elsewhere"
    return ""


def _only_in(graph: Graph, value: Value, nodes: set[Node]) -> bool:
    return value not in graph.outputs and all(n in nodes for n in graph.uses.get(value, ()))


def _absorb_before(graph: Graph, nodes: set[Node], taken: set[Node]) -> None:
    """Take in the reshapes that make operands and serve nothing else."""
    waiting = [v for n in nodes for v in n.operands]
    while waiting:
        maker = graph.makers.get(waiting.pop())
        if maker is None or maker in nodes or maker in taken or not maker.is_op("reshape") or not row_wise(maker):
            continue
        if all(_only_in(graph, v, nodes) for v in maker.outputs):
            nodes.add(maker)
            waiting += maker.operands


def _absorb_behind(graph: Graph, nodes: set[Node], root: Node, taken: set[Node]) -> None:
    """Take in the reshape that alone reads the result."""
    while True:
        users = graph.uses.get(root.outputs[0], ())
        if len(users) != 1 or root.outputs[0] in graph.outputs:
            return
        if users[0] in taken or not users[0].is_op("reshape") or not row_wise(users[0]):
            return
        root = users[0]
        nodes.add(root)


def _flow_regions(graph: Graph, fusion: FlowFusion) -> Iterator[Region | Miss]:
    taken = set[Node]()
    for root in graph.nodes:
        if not root.is_op(*fusion.into):
            continue
        nodes, why = _flow(graph, fusion, root, taken)
        if nodes and all(is_view(n) for n in nodes):
            why = why or "nothing to compute: its split and reshapes stay views"
        elif not convex(graph, nodes):
            why = "not convex: a value leaves it and comes back"
        elif nodes:
            nodes = _with_beside(graph, fusion, root, nodes, taken)
            taken |= nodes
            yield region(graph, nodes, fusion.kernel or fusion.name.replace("-", "_"))
            continue
        if nodes or why:
            yield Miss(root.loc, why)


def _with_beside(graph: Graph, fusion: FlowFusion, root: Node, nodes: set[Node], taken: set[Node]) -> set[Node]:
    """The nodes, and those of the flow beside them unless that would leave them without a kernel of rows.

    Rows that segments part are no such kernel's; a step has none, and one launch less.
    """
    if fusion.beside is None or any(_parted(n) for n in nodes):
        return nodes
    more = nodes | _flow(graph, fusion.beside, root, taken)[0]
    return more if convex(graph, more) else nodes


def _parted(node: Node) -> bool:
    """Whether it reads where segments begin."""
    op = node.op
    return isinstance(op, OpDef) and any(o.name == "cu" and v is not None for o, v in zip(op.inputs, node.inputs, strict=True))


def _flow(graph: Graph, fusion: FlowFusion, root: Node, taken: set[Node]) -> tuple[set[Node], str]:
    """The nodes upstream of a root's operands, and the first reason to stop early."""
    nodes, why, waiting = set[Node](), "", _roots(graph, fusion, root)
    while waiting:
        maker = graph.makers.get(waiting.pop())
        if maker is None or maker in nodes or maker in taken or not maker.is_op(*fusion.through):
            continue
        if not row_wise(maker) and not maker.is_op(*fusion.stops):
            why = why or f"{maker.op.name} is not row-wise"
            continue
        nodes.add(maker)
        if not maker.is_op(*fusion.stops):
            waiting += maker.operands
    return nodes, why


def _roots(graph: Graph, fusion: FlowFusion, root: Node) -> list[Value]:
    """The operands that the fusion follows; what goes into a cache counts as what is read from it."""
    op = root.op
    assert isinstance(op, OpDef)
    named = zip(op.inputs, root.inputs, strict=True)
    values: Sequence[Value] = [v for o, v in named if v is not None and o.name in fusion.operands]
    return [_written(graph, v) for v in values]


def _written(graph: Graph, value: Value) -> Value:
    """What went into the cache that this is read from, or the value itself."""
    maker = graph.makers.get(value)
    return maker.operands[1] if maker is not None and maker.is_op("cache_write", "cached_write", "page_write") else value
