"""Crossings: how an op that must see whole sequences runs over tokens that are split over the ranks of a mesh axis.

A *way* is a generator over one rank's shards. Where it needs other ranks it yields a request and is sent the answer:

    def ring(here: Here, q, k, v, ...):
        for step in range(1, here.ranks):
            k = yield Shift(k)
            ...
        return o

All ranks yield the same requests in the same order, of the same shapes; that is a rule for whoever writes a way, and
`together` checks it. Every request is linear, and its transpose is a request too, so that a backward is the transposed
requests in reverse order. `together` runs all ranks in one process, in lockstep; at run time each process runs its own
generator and torch.distributed answers.

Duality: a rank's cotangent of a split value is split, of a partial one whole, of a whole one partial.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .errors import PlacementError
from .orders import here as natural_index
from .types import Dim, TensorType

if TYPE_CHECKING:
    from .signature import Binding

Tensor = torch.Tensor


# -- requests ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift:
    """x goes `by` ranks on; the answer is what stood `by` ranks before, zeros at the end of the line unless it is a ring."""

    x: Tensor
    by: int = 1
    ring: bool = True


@dataclass(frozen=True)
class Gather:
    """The answer is [ranks, ...]: every rank's x."""

    x: Tensor


@dataclass(frozen=True)
class ScatterSum:
    """x is [ranks, ...]; the answer is the sum over ranks of what they have for this one."""

    x: Tensor


@dataclass(frozen=True)
class Sum:
    """The answer is the ranks' sum."""

    x: Tensor


@dataclass(frozen=True)
class Hop:
    """x goes from rank `source` to rank `target` alone; the answer is x there, zeros elsewhere."""

    x: Tensor
    source: int
    target: int


@dataclass(frozen=True)
class Swap:
    """x is [ranks, ...], a part for each rank; the answer is [ranks, ...], what each rank had for this one."""

    x: Tensor


@dataclass(frozen=True)
class Exchange:
    """Rows of x [n, ...] go to ranks 0, 1, ... in runs of `sizes`; the answer has `expected` rows of each, in rank order."""

    x: Tensor
    sizes: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """Nothing moves; a backward goes behind these values once, when all of their cotangents are there. The answer is `xs`."""

    xs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Keep:
    """Nothing moves; what a way that has a `back` of its own wants to find there again."""

    xs: tuple[Tensor, ...]


Request = Shift | Gather | ScatterSum | Sum | Hop | Swap | Exchange | Cut | Keep
Moving = Shift | Gather | ScatterSum | Sum | Hop | Swap | Exchange
Way = Generator[Request, Any, Any]


def transposed(request: Moving, d: Tensor) -> Moving:
    """The request whose answer is the cotangent of `request.x`, given that of its answer."""
    match request:
        case Shift(by=by, ring=ring):
            return Shift(d, -by, ring)
        case Gather():
            return ScatterSum(d)
        case ScatterSum():
            return Gather(d)
        case Sum():
            return Sum(d)
        case Hop(source=source, target=target):
            return Hop(d, target, source)
        case Swap():
            return Swap(d)
        case Exchange(sizes=sizes, expected=expected):
            return Exchange(d, expected, sizes)


def sent(request: Request, ranks: int, rank: int) -> int:
    """Bytes that a rank sends to others for a request; rings and pairwise exchanges, as the collectives are counted."""
    if isinstance(request, Cut | Keep):
        return 0
    size = request.x.numel() * request.x.element_size()
    match request:
        case Shift(by=by, ring=ring):
            moves = by % ranks != 0 if ring else 0 <= rank + by < ranks
            return size if moves else 0
        case Gather():
            return (ranks - 1) * size
        case ScatterSum() | Swap():
            return (ranks - 1) * (size // ranks)
        case Sum():
            return 2 * (ranks - 1) * size // ranks
        case Hop(source=source, target=target):
            return size if rank == source != target else 0
        case Exchange(sizes=sizes):
            row = size // max(1, request.x.shape[0])
            return row * (sum(sizes) - sizes[rank])


# -- what a way knows of its place ------------------------------------------------------------


@dataclass(frozen=True)
class Here:
    """This rank's place on the axis, the order of the tokens that are split, and what runs ops on its tensors."""

    axis: str
    by: str
    ranks: int
    rank: int
    order: str
    attrs: Mapping[str, Any]  # the op's other attributes
    run: Callable[..., Any]  # run(op, *operands, **attrs) on this rank's tensors: its reference, or a fast form

    @classmethod
    def of(cls, attrs: Mapping[str, Any], ranks: int, rank: int, run: Callable[..., Any]) -> Here:
        """The place that a node's attributes speak of."""
        rest = {k: v for k, v in attrs.items() if k not in ("over", "by", "order")}
        return cls(attrs["over"], attrs["by"], ranks, rank, attrs["order"], rest, run)

    def tokens(self, count: int, cu: Tensor | None = None) -> Tensor:
        """i64[count]: where this rank's tokens stand in the whole sequence."""
        return natural_index(self.order, count * self.ranks, self.ranks, self.rank, cu)


Sent = Callable[[Sequence["TensorType | None"], Mapping[str, Any], int, Mapping[str, int]], int]


@dataclass(frozen=True)
class OneWay:
    """One way across: its generator, the kinds of orders it takes, the bytes that the busiest rank sends, what it is."""

    run: Callable[..., Way]
    sent: Sent  # (types, attributes, ranks, sizes) -> bytes
    orders: tuple[str, ...]  # '' and 'zigzag'
    about: str
    back: Back | None = None  # its gradient, where asking for everything again costs less than keeping every answer
    back_sent: Sent | None = None  # bytes that it sends; as many as forward where there is none

    def sent_back(
        self, types: Sequence[TensorType | None], attrs: Mapping[str, Any], ranks: int, sizes: Mapping[str, int]
    ) -> int:
        """Bytes that the busiest rank sends in the backward."""
        return (self.back_sent or self.sent)(types, attrs, ranks, sizes)


Back = Callable[..., Way]  # (here, operands, what was kept, cotangents of the results) -> cotangents of the operands


@dataclass(frozen=True)
class Crossing:
    """How an op may run over a split of some letters: its ways by name, and what becomes of results without those letters."""

    letters: frozenset[str]
    summed: bool = False  # such results are whole already; else they are partial: ranks hold parts of a sum
    typed: bool = False  # the op's own type rule speaks of the split
    ways: dict[str, OneWay] = field(default_factory=dict[str, OneWay])  # filled by `op.way`

    def crosses(self, letter: str) -> bool:
        return ("..." if letter.startswith("...") else letter) in self.letters


# -- types ------------------------------------------------------------------------------------


def bare(types: Sequence[TensorType | None], crossing: Crossing, bound: Binding, axis: str) -> list[TensorType | None]:
    """Types of operands without the split that is crossed."""
    made = [*types]
    for letter, uses in bound.uses.items():
        for use in uses if crossing.crosses(letter) else ():
            type_ = made[use.operand]
            if type_ is not None and use.dim.axes[-1:] == (axis,):
                made[use.operand] = type_.with_dim(use.position, Dim(type_.dims[use.position].size, use.dim.axes[:-1]))
    return made


def check_split(name: str, crossing: Crossing, bound: Binding, attrs: Mapping[str, Any]) -> None:
    """Refuse a way that there is not, an order that it does not know, and operands that are not split alike."""
    axis, by, order = attrs["over"], attrs["by"], attrs["order"]
    if by not in crossing.ways:
        raise PlacementError(f"{name}: by is {by!r}, must be one of {', '.join(crossing.ways)}")
    known = crossing.ways[by].orders
    if order.partition("(")[0] not in known:
        raise PlacementError(
            f"{name}: {by} runs over tokens in order {' or '.join(o or 'natural' for o in known)}, not {order}"
        )
    crossed = [(x, u) for x, uses in bound.uses.items() if crossing.crosses(x) for u in uses]
    split = [(x, u) for x, u in crossed if axis in u.dim.axes]
    if not split:
        raise PlacementError(f"{name}: it runs over {axis}, but no operand's tokens are split over it")
    ends = {x for x, _ in split}
    for letter, use in crossed:
        fits = use.dim.axes[-1:] == (axis,) and use.dim.order == order
        if not fits and (letter in ends or not letter.startswith("...")):
            must = f"@{axis}{':' + order if order else ''}"
            raise PlacementError(f"{name}: {letter} is {use.dim}, must be split {must} (innermost), as the node says")


# -- in one process ---------------------------------------------------------------------------


def together(ways: Sequence[Way], watch: Callable[[Sequence[Request]], None] | None = None) -> list[Any]:
    """Run the generators of all ranks in lockstep; what each returns. `watch` sees every round of requests."""
    answers: list[Any] = [None] * len(ways)
    results: list[Any] = [None] * len(ways)
    while True:
        asked, done = list[Request](), 0
        for rank, way in enumerate(ways):
            try:
                asked.append(way.send(answers[rank]))
            except StopIteration as end:
                results[rank], done = end.value, done + 1
        if done == len(ways):
            return results
        if done or len({_shape(a) for a in asked}) > 1:
            raise PlacementError(f"ranks ask for different things: {sorted({_shape(a) for a in asked})} and {done} are done")
        if watch:
            watch(asked)
        answers = answered(asked)


def _shape(request: Request) -> str:
    if isinstance(request, Cut | Keep):
        return f"{type(request).__name__} {len(request.xs)}"
    if isinstance(request, Exchange):
        return f"Exchange {[*request.x.shape[1:]]}"
    rest = {k: v for k, v in vars(request).items() if k != "x"}
    return f"{type(request).__name__} {request.x.dtype}{[*request.x.shape]} {rest}"


def answered(asked: Sequence[Request]) -> list[Any]:
    """The answers to one round of requests."""
    xs, ranks = [a.x for a in asked if not isinstance(a, Cut | Keep)], range(len(asked))
    match asked[0]:
        case Shift(by=by, ring=ring):
            return [xs[(r - by) % len(xs)] if ring or 0 <= r - by < len(xs) else torch.zeros_like(xs[r]) for r in ranks]
        case Gather():
            return [torch.stack(xs) for _ in ranks]
        case ScatterSum():
            return [torch.stack([x[r] for x in xs]).sum(0) for r in ranks]
        case Sum():
            return [torch.stack(xs).sum(0) for _ in ranks]
        case Hop(source=source, target=target):
            return [xs[source] if r == target else torch.zeros_like(xs[r]) for r in ranks]
        case Swap():
            return [torch.stack([x[r] for x in xs]) for r in ranks]
        case Exchange():
            runs = [a.x.split(list(a.sizes)) for a in asked if isinstance(a, Exchange)]
            return [torch.cat([run[r] for run in runs]) for r in ranks]
        case Cut() | Keep():
            return [a.xs for a in asked if isinstance(a, Cut | Keep)]


def crossed(way: OneWay, places: Sequence[Here], operands: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Every rank's results of an op that runs over their axis; `operands` are each rank's."""
    made = together([way.run(here, *xs) for here, xs in zip(places, operands, strict=True)])
    return [m if isinstance(m, tuple) else (m,) for m in made]


def crossed_back(
    way: OneWay, places: Sequence[Here], operands: Sequence[Sequence[Any]], cotangents: Sequence[Sequence[Tensor | None]]
) -> list[tuple[Tensor, ...]]:
    """Every rank's cotangents of its float operands; those of a result that is whole are given to the first rank alone."""
    if way.back is not None:
        return _by_back(way.back, way, places, operands, cotangents)
    with torch.enable_grad():
        leaves = [[x.detach().requires_grad_(x.is_floating_point()) if x is not None else None for x in xs] for xs in operands]
        results = crossed(way, places, leaves)
    pairs = [(y, d) for ys, ds in zip(results, cotangents, strict=True) for y, d in zip(ys, ds, strict=True) if d is not None]
    wanted = [[x for x in xs if x is not None and x.requires_grad] for xs in leaves]
    flat = [x for xs in wanted for x in xs]
    ends = [(y, d.to(y.dtype)) for y, d in pairs if y.requires_grad]
    found = iter(torch.autograd.grad([y for y, _ in ends], flat, [d for _, d in ends], materialize_grads=True))
    return [tuple(next(found) for _ in xs) for xs in wanted]


def _by_back(
    back: Back, way: OneWay, places: Sequence[Here], operands: Sequence[Sequence[Any]], cotangents: Sequence[Sequence[Any]]
) -> list[tuple[Tensor, ...]]:
    """A way's own gradient, from what its forward kept."""
    kept: list[tuple[Tensor, ...]] = [() for _ in places]

    def note(asked: Sequence[Request]) -> None:
        kept[:] = [a.xs if isinstance(a, Keep) else k for a, k in zip(asked, kept, strict=True)]

    with torch.no_grad():
        together([way.run(here, *xs) for here, xs in zip(places, operands, strict=True)], note)
        found = together([back(*given) for given in zip(places, operands, kept, cotangents, strict=True)])
    return [tuple(d for d in ds if d is not None) for ds in found]
