"""The cheapest order of tokens for every op: a cut through the graph, with a reorder wherever two orders meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..ir import Graph, Node, OpDef, PassError, PlacementError, TensorType, Value
from ..ir.orders import Zigzag, parse_order
from ..ir.sizes import Size

SCALE = 1024  # prices are whole numbers, and a node in an order that is not natural costs one: of equals, natural wins


@dataclass(frozen=True)
class Tokens:
    """How to tell the token dim of a value, the order that is not natural, and what a copied byte costs of one that is sent."""

    size: Size
    axis: str
    order: str
    copy: float

    def dim(self, type_: TensorType) -> int | None:
        """The dim of the tokens; rows of experts and the like have none, and know no order."""
        return 1 if len(type_.dims) > 1 and type_.dims[1].size == self.size else None

    def ordered(self, type_: TensorType, zigzag: bool) -> TensorType:
        at = self.dim(type_)
        return type_ if at is None else type_.with_dim(at, replace(type_.dims[at], order=self.order if zigzag else ""))

    def price(self, type_: TensorType) -> int | None:
        """What a reorder of a value costs; None where there is no way."""
        at = self.dim(type_)
        if at is None:
            return 0
        size = SCALE * type_.bytes(dict.fromkeys(type_.symbols, 1))
        axes = type_.dims[at].axes
        return size if axes == (self.axis,) else int(size * self.copy) if not axes else None


Labels = Mapping[Node | Value | str, bool]  # whether it stands in the other order
RESULTS = "results"
Costs = Callable[[Graph, bool], "int | None"]  # what the reorders inside a called graph cost, by its order


def allowed(node: Node, tokens: Tokens, costs: Costs) -> dict[bool, int]:
    """The orders that a node can run in, each with what it costs inside."""
    found = dict[bool, int]()
    for zigzag in (False, True):
        cost = costs(node.op, zigzag) if isinstance(node.op, Graph) else _runs(node, node.op, tokens, zigzag)
        if cost is not None:
            found[zigzag] = cost
    return found


def _runs(node: Node, op: OpDef, tokens: Tokens, zigzag: bool) -> int | None:
    """Types are the judge. A way across a split whose order was chosen for its balance keeps it."""
    attrs = in_order(node, tokens, zigzag)
    if op.name.startswith("attention") and attrs != node.attrs:
        return None
    try:
        made = op.infer([tokens.ordered(v.type, zigzag) if v is not None else None for v in node.inputs], attrs)
    except PlacementError:
        return None
    return 0 if [*made] == [tokens.ordered(v.type, zigzag) for v in node.outputs] else None


def in_order(node: Node, tokens: Tokens, zigzag: bool) -> Mapping[str, Any]:
    """A node's attributes where it runs over tokens in an order."""
    return {**node.attrs, "order": tokens.order if zigzag else ""} if node.attrs.get("over") == tokens.axis else node.attrs


def counts_here(node: Node) -> bool:
    """Whether ranks count for themselves where their tokens stand, in any order alike."""
    return node.is_op("positions") and node.attrs["by"] == "here"


def is_reorder(node: Node) -> bool:
    """Whether it is there only to bring tokens from one order to another."""
    return (
        node.is_op("reorder")
        and node.attrs["dim"] == 1
        and any(isinstance(parse_order(node.attrs[k]), Zigzag) for k in ("order", "was"))
    )


def behind(graph: Graph) -> dict[Value, Value]:
    """What each reorder is a reorder of, through chains of them."""
    found = dict[Value, Value]()
    for node in graph.nodes:
        if is_reorder(node):
            found[node.outputs[0]] = found.get(node.operands[0], node.operands[0])
    return found


def orders(graph: Graph, tokens: Tokens, costs: Costs, ends: bool | None) -> tuple[Labels, int]:
    """Which nodes (and inputs) stand in the other order, and what that costs; inputs and results are in order `ends`, or any.

    A value costs as much as it holds where a reader wants another order than its maker gives: once, for all such readers.
    """
    import networkx as nx  # slow to import, and only placed programs ask for it

    cut, source = nx.DiGraph(), behind(graph)
    cut.add_node("natural")
    cut.add_node("zigzag")
    for node in graph.nodes:
        if not is_reorder(node):
            possible = allowed(node, tokens, costs)
            if not possible:
                raise PassError(f"{graph.name}: {node.op.name} runs in neither order of its tokens (at {node.loc})")
            _alone(cut, node, possible)
    for value in graph.inputs:
        _alone(cut, value, {False: 0, True: 0} if ends is None else {ends: 0})
    _alone(cut, RESULTS, {False: 0, True: 0} if ends is None else {ends: 0})
    for value, readers in _readers(graph, source):
        _between(cut, value, graph.makers.get(value, value), readers, tokens)
    total, (natural, _) = nx.minimum_cut(cut, "natural", "zigzag")
    return {k: k not in natural for k in cut if not isinstance(k, tuple)}, total


def _alone(cut: Any, key: Any, possible: Mapping[bool, int]) -> None:
    """What a node costs in either order; the one that it cannot take costs everything."""
    for zigzag, (a, b) in ((True, ("natural", key)), (False, (key, "zigzag"))):
        if zigzag in possible:
            cut.add_edge(*((a, b)), capacity=possible[zigzag] + zigzag)
        else:
            cut.add_edge(a, b)


def _readers(graph: Graph, source: Mapping[Value, Value]) -> Iterator[tuple[Value, list[Any]]]:
    """Each value with the nodes that read it, behind reorders too."""
    found = dict[Value, list[Any]]()
    for node in graph.nodes:
        for value in () if is_reorder(node) else dict.fromkeys(source.get(v, v) for v in node.operands):
            found.setdefault(value, []).append(node)
    for value in graph.outputs:
        found.setdefault(source.get(value, value), []).append(RESULTS)
    yield from ((v, readers) for v, readers in found.items() if v not in graph.params)


def _between(cut: Any, value: Value, maker: Any, readers: Sequence[Any], tokens: Tokens) -> None:
    """The price of a value where its maker and a reader differ, paid once in each direction."""
    price = tokens.price(value.type)
    if price == 0 or (isinstance(maker, Node) and counts_here(maker)):
        return
    wanted = {} if price is None else {"capacity": price}
    other, same = ("other", value), ("same", value)
    cut.add_edge(maker, other, **wanted)  # cut where the maker is natural and some reader is not
    cut.add_edge(same, maker, **wanted)  # cut where the maker is not natural and some reader is
    for reader in readers:
        cut.add_edge(other, reader)
        cut.add_edge(reader, same)
