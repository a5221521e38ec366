"""The batch over ranks: every rank runs its own rows, and losses are summed over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir import Graph, Node, PlacementError, TensorType, Value, ops, parse_mesh
from .loss_parts import PARTS
from .registry import Outcome, register
from .samples import readers
from .splitting import Split
from .tensor import check_whole
from .tensor_walk import Notes, Rule, Terms, Walk, placed


@register(numerics="reassociates", model=True)
def split_batch(graph: Graph, *, mesh: str = "dp=2", axis: str = "dp") -> Outcome:
    """Split the batch over a mesh axis: `[b, s]` becomes `[b@dp, s]`, and losses are means over all ranks' tokens.

    Parameters stay whole on every rank, so their gradients come out partial. Nothing else moves.
    """
    whole = parse_mesh(mesh)
    return batches(graph, Split(axis, whole[axis], mesh=whole))


def batches(graph: Graph, split: Split) -> Outcome:
    """`split-batch` over a split that is given."""
    return over_batch(graph, split, "split-batch", RULES)


def over_batch(graph: Graph, split: Split, name: str, rules: Mapping[str, Rule]) -> Outcome:
    """The graph over a split batch, by these rules."""
    check_whole(graph, split, name)
    if split.ranks == 1:
        return graph, ()
    notes = Notes()
    made = placed(graph, batch_types(graph, split), Terms(split, rules), notes)
    return made, tuple(notes.said)


def batch_types(graph: Graph, split: Split) -> list[TensorType]:
    """Every input of batch and tokens, split along its batch."""
    lead = next((v for v in graph.inputs if len(v.type.dims) > 1), None)
    if lead is None:
        raise PlacementError(f"{graph.name}: no input has a batch; one must be [batch, tokens, ...], such as i64[b, s]")
    for value in graph.inputs:
        if any(name == "cu" for _, name in readers(graph, value)):
            must = "packed segments are one row of tokens, which has no batch to split; split its tokens (cp), or do not pack"
            raise PlacementError(f"{graph.name}: {value.name} are borders of packed segments, {split} splits the batch; {must}")
    rows = lead.type.dims[0]
    if not split.divides(rows.size, rows.axes):
        raise PlacementError(f"{graph.name}: {lead.name} is {lead.type}; dim 0 must be a multiple of {split}; change the batch")
    shape = lead.type.shape[:2]
    return [split.over(v.type, 0) if v.type.shape[:2] == shape else v.type for v in graph.inputs]


def dropped(walk: Walk, node: Node) -> Sequence[Value] | None:
    """What is dropped depends on where a row of the batch stands, which every rank knows of its own."""
    x, seed = node.operands
    type_ = walk.type(x)
    if walk.split.dim(type_) != 0 or len(type_.dims) != 3 or node.attrs["over"]:
        return None
    there = walk.at(x)
    rows = ops.rows_of(there, over=walk.split.axis, by="here")
    tokens, count = ops.tokens_of(there)
    return [ops.drop_at(there, walk.at(seed), rows, tokens, count, p=node.attrs["p"])]


RULES: Mapping[str, Rule] = {**PARTS, "dropout": dropped}
