"""Features over ranks: projections in columns and rows, so that ranks share heads, widths and the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir import Graph, Node, OpDef, PassError, TensorType, Value, ops, parse_mesh
from .registry import Outcome, register
from .remarks import Remark
from .splitting import Split
from .tensor_rules import RULES
from .tensor_walk import Notes, Rule, Terms, Walk, placed
from .verify import reached


@dataclass(frozen=True)
class Weight:
    """Where a projection has its weight, and which dims of it are what comes out and what goes in."""

    operand: int
    out: int
    inner: int


PROJECTIONS = {"linear": Weight(1, 0, 1), "grouped_linear": Weight(1, 1, 2)}


@register(numerics="reassociates", model=True)
def split_features(graph: Graph, *, mesh: str = "tp=2", axis: str = "tp", sequence: bool = False) -> Outcome:
    """Split features over a mesh axis: projections into columns, then rows, of which every rank has a part.

    Heads, widths and the vocabulary are shared out: `w_in: [6144@tp:sections(2,4096,1024,1024), 2048]`,
    `w_out: [2048, 4096@tp]`, whose results are summed over ranks. With `sequence`, norms and residuals run on tokens that
    are split over the axis too: sums leave each rank its tokens, which are gathered in front of the columns.
    """
    return features(graph, Split(axis, parse_mesh(mesh)[axis], mesh=parse_mesh(mesh)), sequence=sequence)


def features(graph: Graph, split: Split, *, sequence: bool = False) -> Outcome:
    """`split-features` over a split that is given."""
    check_whole(graph, split, "split-features")
    if split.ranks == 1:
        return graph, ()
    notes = Notes()
    terms = Terms(split, {**RULES, **PROJECTED}, tokens=sequence, wants=_wanted)
    made = placed(graph, [v.type for v in graph.inputs], terms, notes)
    return made, tuple(notes.said)


def check_whole(graph: Graph, split: Split, name: str) -> None:
    """Refuse a program some of which is split over the axis already."""
    for part in reached(graph):
        for value in (*part.inputs, *part.params, *(v for n in part.nodes for v in n.outputs)):
            if split.lives(value.type):
                why = f"{value.name} is {value.type}, split over {split.axis} already"
                raise PassError(f"{graph.name}: {why}; {name} takes a program that is whole along {split.axis}")


def _wanted(layer: Graph, value: Value, split: Split) -> TensorType:
    """How a layer would have a parameter that it is handed: a head's words are shared out."""
    users = layer.uses.get(value, ())
    alone = users and all(n.is_op("linear", "linear_cross_entropy") and n.inputs[1] is value for n in users)
    size = value.type.dims[0].size if value.type.dims else 1
    return split.over(value.type, 0) if alone and split.divides(size, value.type.dims[0].axes) else value.type


# -- projections --------------------------------------------------------------------------


def project(walk: Walk, node: Node) -> Sequence[Value] | None:
    """A projection in rows where its features are split and nothing is projected behind it, in columns otherwise."""
    weight = PROJECTIONS[node.op.name]
    x, w = node.inputs[0], node.inputs[weight.operand]
    assert x is not None and w is not None
    if not walk.fresh(w):
        return _by_given_weight(walk, node)
    if walk.terms.plain:
        return _gathered(walk, node) if _features_split(walk, x) else None
    if _features_split(walk, x):
        return _rows(walk, node) if last(walk.graph, node) else _columns(walk, node)
    return _columns(walk, node) if not last(walk.graph, node) else None


def _features_split(walk: Walk, x: Value) -> bool:
    type_ = walk.type(x)
    return walk.split.dim(type_) == len(type_.dims) - 1


def _by_given_weight(walk: Walk, node: Node) -> Sequence[Value] | None:
    """A weight that has its placement already: tokens are made whole where its words are split."""
    w = node.inputs[1]
    assert w is not None
    if not walk.split.lives(walk.type(w)):
        return None
    types = [walk.type(v) if v is not None else None for v in node.inputs]
    return walk.plain(node, [walk.split.whole(t) if i != 1 and t is not None else t for i, t in enumerate(types)])


def _gathered(walk: Walk, node: Node) -> Sequence[Value]:
    types = [walk.type(v) if v is not None else None for v in node.inputs]
    return walk.plain(node, [walk.split.whole(t) if t is not None else None for t in types])


def _rows(walk: Walk, node: Node) -> Sequence[Value]:
    """Every rank adds its features' part; a bias is added once, behind the sum."""
    if node.is_op("grouped_linear") or node.inputs[2] is None:
        return walk.plain(node)
    x, w, bias = (v for v in node.inputs if v is not None)
    there = walk.at(w, walk.placed(walk.type(w), 1, walk.type(x).dims[-1].order))
    made = walk.b.emit(ops.linear, [walk.at(x), there, None], {}, ["y"], node.loc)[0]
    return [ops.add_bias(walk.moved(made, walk.rest(made.type)), walk.at(bias))]


def _columns(walk: Walk, node: Node) -> Sequence[Value] | None:
    """Every rank makes its share of every section; what it reads is whole. None where no share is of use."""
    weight, split = PROJECTIONS[node.op.name], walk.split
    x, w = node.inputs[0], node.inputs[weight.operand]
    assert x is not None and w is not None
    sizes, made = sections(walk.graph, node.outputs[0]), node.outputs[0]
    axes = walk.type(w).dims[weight.out].axes
    odd = next((n for n in sizes if not split.divides(n, axes)), 0)
    if odd or not _taken(walk, made):
        if odd and _taken(walk, made, parts=True):
            why = f"sections {sizes} of {w.name}; {odd} must be a multiple of {split}; every rank has all of it"
            walk.notes.said.append(Remark("missed", "columns", node.loc, why))
        return _gathered(walk, node) if _features_split(walk, x) else None
    walk.notes.said.append(Remark("passed", "columns", node.loc, f"{w.name}: every rank makes its share of {sizes}"))
    types = [walk.type(v) if v is not None else None for v in node.inputs]
    types = [split.whole(t) if t is not None else None for t in types]
    types[weight.operand] = walk.placed(walk.type(w), weight.out, ops.in_sections(split.ranks, sizes))
    return walk.plain(node, types)


def _taken(walk: Walk, value: Value, *, parts: bool = False) -> bool:
    """Whether any reader can take a value whose last dim is split."""
    if value in walk.graph.outputs:
        return True
    return any(_takes(walk.split, n, value) for n in walk.graph.uses.get(value, ()))


def _takes(split: Split, node: Node, value: Value) -> bool:
    if node.is_op("split") or node.op in (ops.reshape, *ops.COLLECTIVES):
        return True
    if not isinstance(node.op, OpDef):
        return False
    whole = [v.type if v is not None else None for v in node.inputs]
    last_dim = len(value.type.dims) - 1
    bound = node.op.bind(whole, node.attrs)
    places = {(i, last_dim) for i, v in enumerate(node.inputs) if v is value}
    return any(
        node.op.role(x) in ("map", "sum") and (u.operand, u.position) in places for x, us in bound.uses.items() for u in us
    )


def last(graph: Graph, node: Node) -> bool:
    """Whether nothing is projected again of what a projection makes."""
    ends, leads = set[Node](), set[Value]()  # values from which a later projection is reached
    for each in reversed(graph.nodes):
        onward = not leads.isdisjoint(each.outputs)
        projects = each.op.name in PROJECTIONS or (each.callee is not None and each.callee.role == "layer")
        if projects and not onward:
            ends.add(each)
        if projects or onward:
            leads.update(each.operands)
    return node in ends


def sections(graph: Graph, value: Value) -> tuple[int, ...]:
    """The parts that a value's last dim is cut into by the ops behind it, finest first known."""
    width = int(value.type.dims[-1].size)
    for node in graph.uses.get(value, ()):
        if node.is_op("split"):
            return tuple(n for part in node.outputs for n in sections(graph, part))
        keeps = isinstance(node.op, OpDef) and (node.op.row or node.is_op("causal_conv1d", "grouped_linear"))
        if keeps and node.op.name not in PROJECTIONS and node.outputs[0].type.shape == value.type.shape:
            found = sections(graph, node.outputs[0])
            if len(found) > 1:
                return found
    return (width,)


PROJECTED: Mapping[str, Rule] = dict.fromkeys(PROJECTIONS, project)
