"""Short causal convolutions as row forms: each token's neighbours are loads at other rows, 0 where there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...ir import Node
from ...ir.sizes import Size
from .expr import Expr
from .index import Declined, Extent, Index
from .pull import Puller, Where, form, number, sizes


def _taps(node: Node, operand: int = 1) -> int:
    """How many taps there are; packed segments, whose borders are numbers, have no row form."""
    op = node.op
    names = [o.name for o in op.inputs]  # type: ignore[union-attr] # a kernel's nodes are ops
    if node.inputs[names.index("cu")] is not None:
        raise Declined(f"{op.name} has packed segments (cu), whose borders no tile knows")
    if node.is_op("conv1d_taps"):
        return int(node.attrs["k"])
    value = node.inputs[operand]
    assert value is not None
    return number(sizes(value)[-1], op.name)


def _end(size: Size) -> Index:
    """The place behind the last token."""
    return Index(plus=size) if isinstance(size, int) else Index(((Extent(size), 1),))


def _token(pull: Puller, node: Node, operand: int, where: Where) -> Expr:
    """An operand at a token that may not be there: then 0."""
    made, value = pull.operand(node, operand, where), node.inputs[operand]
    assert value is not None
    size = sizes(value)[1]
    if made.op == "load" or all(where[1].within(size)):
        return made
    return pull.pool.make("where", pull.pool.valid(where[1], size), made, 0.0)


def _beside(pull: Puller, node: Node, made: Expr, operand: int, where: Where) -> Expr:
    """Plus an optional operand, which is 0 outside of itself."""
    if node.inputs[operand] is None:
        return made
    extra = pull.operand(node, operand, where)
    if extra.op != "load":
        raise Declined(f"{node.op.name}: its {('', '', 'final', 'state')[operand]} is computed in the same kernel")
    return pull.pool.make("add", made, extra)


def _past(pull: Puller, node: Node, state: int, where: Where, k: int) -> Expr:
    """The input at a token, or what the state has for a token before the first."""
    b, t, c = where
    if node.inputs[state] is None or (t.low is not None and t.low >= 0):
        return _token(pull, node, 0, where)
    return _beside(pull, node, _token(pull, node, 0, where), state, (b, c, t + (k - 1)))


def _weighted(pull: Puller, node: Node, terms: list[tuple[Expr, int]], c: Index) -> Expr:
    """The sum of terms, each times its tap."""
    total: Expr | None = None
    for x, i in terms:
        product = pull.pool.make("mul", x, pull.operand(node, 1, (c, Index(plus=i))))
        total = product if total is None else pull.pool.make("add", total, product)
    assert total is not None
    return total


@form("causal_conv1d")
def _causal(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    k, m, tokens = _taps(node), pull.pool.make, sizes(node.operands[0])[1]
    if out == 1:
        b, c, j = where
        return _past(pull, node, 3, (b, _end(tokens) + j + (1 - k), c), k)
    b, t, c = where
    made = _weighted(pull, node, [(_past(pull, node, 3, (b, t + (i - k + 1), c), k), i) for i in range(k)], c)
    if node.inputs[2] is not None:
        made = m("add", made, pull.operand(node, 2, (c,)))
    return m("mul", made, m("sigmoid", made)) if node.attrs["act"] == "silu" else made


@form("anticausal_conv1d")
def _anticausal(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    k, tokens = _taps(node), sizes(node.operands[0])[1]
    b, c = where[0], where[2] if out == 0 else where[1]
    t = where[1] + (k - 1) if out == 0 else where[2]  # places count from the state's first
    made = _weighted(pull, node, [(_token(pull, node, 0, (b, t + -i, c)), i) for i in range(k)], c)
    return _beside(pull, node, made, 2, (b, c, t + _end(tokens) * -1))


@form("conv1d_taps")
def _tap(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    width = number(sizes(node.operands[1])[2], "conv1d_taps")
    return pull.pool.partial(f"sum{pull.graph.nodes.index(node)}", where[1] * width + where[0])


def tap_sums(node: Node) -> Iterator[tuple[tuple[Size, ...], Callable[[Puller, Where], Expr], Callable[[Where], Index], int]]:
    """One sum over rows per tap: the dims it runs over, what is summed, where it goes, and how many places there are."""
    k = _taps(node)
    dims = tuple(sizes(node.operands[1]))
    width = number(dims[2], "conv1d_taps")

    def at(i: int) -> Callable[[Puller, Where], Expr]:
        def product(pull: Puller, where: Where) -> Expr:
            b, t, c = where
            return pull.pool.make("mul", pull.operand(node, 1, where), _past(pull, node, 2, (b, t + (i - k + 1), c), k))

        return product

    def place(i: int) -> Callable[[Where], Index]:
        return lambda where: where[2] + i * width

    for i in range(k):
        yield dims, at(i), place(i), width * k
