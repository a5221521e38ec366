"""How known mistakes are planted in placed programs: in their text, in a way across a split, in a function of the compiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from plait.ir import OpDef, ops
from plait.ir.crossing import Here, Keep, Request, Sum, Way
from plait.ir.ways import recurrence

Tensor = torch.Tensor
Run = Callable[..., Way]
Ask = Callable[[Here, Any], Request]
Hear = Callable[[Here, Any, Any], Any]
Planted = AbstractContextManager[Any]


class Lost(Exception):
    """A mutant that changes nothing any more."""


# -- in the text ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """The text of the placed program, changed in one place: a pattern, and what stands there then."""

    pattern: str
    new: str

    def __call__(self, text: str) -> str:
        made, count = re.subn(self.pattern, self.new, text, count=1, flags=re.MULTILINE)
        if not count or made == text:
            raise Lost(f"{self.pattern!r} is not in\n{text}")
        return made


@dataclass(frozen=True)
class Left:
    """The text without the first equation of an op (of an operand): what it would move is read as it is."""

    op: str
    of: str = r"\w+"

    def __call__(self, text: str) -> str:
        found = re.search(rf"^    (\w+) = {self.op}\(({self.of})\b[^\n]*\n", text, re.MULTILINE)
        if found is None:
            raise Lost(f"{self.op} is not in\n{text}")
        return text[: found.start()] + re.sub(rf"\b{found[1]}\b(?!')", found[2], text[found.end() :])


# -- in the compiler --------------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """One attribute of a module, a class or an op, replaced by what `make` makes of it."""

    where: Any
    name: str
    make: Callable[[Any], Any]

    def __call__(self) -> Planted:
        return mock.patch.object(self.where, self.name, self.make(getattr(self.where, self.name)))


@dataclass(frozen=True)
class Entry:
    """One entry of a table, replaced."""

    table: Any
    key: str
    new: Any

    def __call__(self) -> Planted:
        if self.key not in self.table:
            raise Lost(f"{self.key} is not in {self.table}")
        return mock.patch.dict(self.table, {self.key: self.new})


@dataclass(frozen=True)
class OtherWay:
    """One way of an op, replaced by what `make` makes of its generator."""

    op: OpDef
    by: str
    make: Callable[[Run], Run]

    def __call__(self) -> Planted:
        assert self.op.crossing
        way = self.op.crossing.ways[self.by]
        return mock.patch.dict(self.op.crossing.ways, {self.by: replace(way, run=self.make(way.run))})


Plant = Edit | Left | Patch | Entry | OtherWay


def asks(change: Ask, kind: type = object) -> Callable[[Run], Run]:
    """The way with other requests, of one kind."""
    return _talks(lambda here, asked: change(here, asked) if _moves(asked, kind) else asked, _as_it_is)


def hears(change: Hear, kind: type = object) -> Callable[[Run], Run]:
    """The way with other answers, to one kind of request."""
    return _talks(
        lambda here, asked: asked,
        lambda here, asked, reply: change(here, asked, reply) if _moves(asked, kind) else reply,
    )


def _moves(asked: Request, kind: type) -> bool:
    """Whether a request is of the kind; what is only kept is of none."""
    return isinstance(asked, kind) and not isinstance(asked, Keep)


def _as_it_is(here: Here, asked: Request, reply: Any) -> Any:
    return reply


def _talks(ask: Ask, hear: Hear) -> Callable[[Run], Run]:
    def make(run: Run) -> Run:
        def way(here: Here, *operands: Any) -> Way:
            steps, reply = run(here, *operands), None
            while True:
                try:
                    asked = steps.send(reply)
                except StopIteration as end:
                    return end.value
                reply = hear(here, asked, (yield ask(here, asked)))

        return way

    return make


# -- mistakes in ways -------------------------------------------------------------------------


def nothing(here: Here, asked: Any, reply: Tensor) -> Tensor:
    return torch.zeros_like(reply)


def own(here: Here, asked: Any, reply: Tensor) -> Tensor:
    return asked.x


def own_of_all(here: Here, asked: Any, reply: Tensor) -> Tensor:
    return torch.stack([asked.x] * here.ranks)


def turned(here: Here, asked: Any, reply: Tensor) -> Tensor:
    return reply.flip(0)


def nearer(here: Here, asked: Any, reply: Tensor) -> Tensor:
    """Only the rank's own part of what is gathered has a gradient."""
    return torch.stack([asked.x if r == here.rank else x.detach() for r, x in enumerate(reply)])


def backwards(here: Here, asked: Any) -> Request:
    return replace(asked, by=-asked.by)


def backwards_but_first(here: Here, asked: Any) -> Request:
    return backwards(here, asked) if here.rank else asked


def halved(here: Here, asked: Any) -> Request:
    """One rank sends fewer bytes."""
    return replace(asked, x=asked.x.float()) if here.rank else asked


def further(here: Here, asked: Any) -> Request:
    return replace(asked, target=(asked.target + 1) % here.ranks)


def alone(run: Run) -> Run:
    """A rank takes its own tokens for the whole sequence."""
    return lambda here, *operands: run(replace(here, ranks=1, rank=0, order=""), *operands)


def as_first(run: Run) -> Run:
    """Every rank takes itself for the first."""
    return lambda here, *operands: run(replace(here, rank=0), *operands)


def first_alone(run: Run) -> Run:
    """The first rank, which needs nothing of others, asks for nothing."""
    return lambda here, *operands: run(here if here.rank else replace(here, ranks=1), *operands)


def means(run: Run) -> Run:
    """Ranks' own means, averaged."""

    def way(here: Here, *operands: Tensor) -> Way:
        return (yield Sum(here.run(ops.linear_cross_entropy, *operands, **here.attrs))) / here.ranks

    return way


def all_labels(run: Run) -> Run:
    """Ranks' own means, weighed by all their tokens."""

    def way(here: Here, x: Tensor, w: Tensor, labels: Tensor) -> Way:
        local = here.run(ops.linear_cross_entropy, x, w, labels, **here.attrs)
        return (yield Sum(local * labels.numel())) / (here.ranks * labels.numel())

    return way


def balanced_alone(run: Run) -> Run:
    """Ranks' own products of shares and scores, averaged."""

    def way(here: Here, *operands: Tensor) -> Way:
        return (yield Sum(here.run(ops.load_balance_loss, *operands, **here.attrs))) / here.ranks

    return way


STATES = recurrence.EXCHANGES["states"]


def inclusive(here: Here, runs: Any, summary: Any) -> Any:
    """What enters a place has passed it already."""
    enters = yield from STATES(here, runs, summary)
    return torch.stack([summary.place(i).of(x) for i, x in enumerate(enters)])


# -- mistakes in functions --------------------------------------------------------------------


def tiled(real: Any) -> Callable[..., Tensor]:
    def reference(x: Tensor, *, r: int) -> Tensor:
        return x.repeat(1, 1, r, *[1] * (x.dim() - 3))

    return reference


def in_slices(real: Callable[..., Any]) -> Callable[..., Any]:
    """Taps are cut as they stand, while channels are packed by section."""

    def packed(self: Any, x: Any) -> Any:
        taps = len(x.type.dims) == 2
        return ops.reshape(x, pattern=f"... (g e={sum(self.sizes)}) -> ... g e") if taps else real(self, x)

    return packed


def late_first(real: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    return lambda *args: [x.roll(len(x) // 2) for x in real(*args)]


def side_by_side(real: Any) -> Callable[..., Tensor]:
    """Shares of sections as they follow each other in one plain slice."""
    return lambda made, length: torch.arange(length)


def counted_here(real: Any) -> Callable[..., Tensor]:
    """Tokens counted from 0 on every rank."""
    return lambda here, count, cu=None: torch.arange(count)


def whole_or_nothing(real: Any) -> Callable[..., bool]:
    """A part is skipped unless the queries see all of it."""
    return lambda asked, places: len(places) == 0 or bool(places.max() <= asked.places.min())


def mean_of_parts(real: Any) -> Callable[..., Any]:
    """Parts count alike, whatever their denominators."""
    return lambda a, b: ((a[0] + b[0]) / 2, torch.logaddexp(a[1], b[1])) if not a[1].isinf().all() else b


def divided(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda here, batch, tokens, cu: real(here, batch, tokens, cu // here.ranks)


def cut_borders(real: Callable[..., Any]) -> Callable[..., Any]:
    """Borders within a rank's tokens, as if segments ended there."""

    def runs_of(here: Here, batch: int, tokens: int, cu: Tensor) -> Any:
        return real(replace(here, ranks=1, rank=0), batch, tokens, (cu - here.rank * tokens).clamp(0, tokens))

    return runs_of


def the_other_way_round(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: real(b, a)


def of_transposed(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda through, state: real(through.mT, state)


def unfaded(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x: torch.ones_like(real(x))


def called_whole(crossing: Any) -> Any:
    """Results that ranks hold parts of count as whole."""
    return replace(crossing, summed=True)


def added_by_all(real: Any) -> Callable[..., list[Any]]:
    """Every rank adds the whole cotangent of a whole result."""
    return lambda of, cotangents, rank: [*cotangents]
