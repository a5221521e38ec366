"""Where an element stands: affine indices over a section's axes, divided and offset symbolically."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from ...ir.sizes import Size


class Declined(Exception):
    """This graph has no row kernel; the text says why, and the reference runs."""


@dataclass(frozen=True)
class Axis:
    """One axis of a section, by its place among rows or columns: a row's size is a symbol's text, a column's a number."""

    place: int
    size: Size

    @property
    def name(self) -> str:
        return f"{'r' if isinstance(self.size, str) else 'c'}{self.place}"

    @property
    def last(self) -> int | None:
        """The largest place on it, where that is known."""
        return self.size - 1 if isinstance(self.size, int) else None


@dataclass(frozen=True)
class Extent:
    """The size of a row axis as a term of an index: what stands at the end of the tokens."""

    size: str

    @property
    def last(self) -> None:
        return None


@dataclass(frozen=True)
class Swapped:
    """Place `of` with the first two runs of `half` places swapped."""

    of: Index
    half: int
    size: int

    @property
    def last(self) -> int:
        return self.size - 1


@dataclass(frozen=True)
class Modulo:
    """Place `of` modulo `by`."""

    of: Index
    by: int
    size: int

    @property
    def last(self) -> int:
        return self.size - 1


Term = Axis | Extent | Swapped | Modulo


class NeedSplit(Exception):
    """An index needs this axis in two: `inner` places within each."""

    def __init__(self, axis: Axis, inner: int) -> None:
        super().__init__(f"{axis.name} in groups of {inner}")
        self.axis, self.inner = axis, inner


class NeedCut(Exception):
    """What is computed changes at this place of the axis, so the two parts are separate."""

    def __init__(self, axis: Axis, at: int) -> None:
        super().__init__(f"{axis.name} at {at}")
        self.axis, self.at = axis, at


@dataclass(frozen=True)
class Index:
    """sum of factor * term, plus a number."""

    terms: tuple[tuple[Term, int], ...] = ()
    plus: int = 0

    def __add__(self, other: Index | int) -> Index:
        if isinstance(other, int):
            return Index(self.terms, self.plus + other)
        return combined([*self.terms, *other.terms], self.plus + other.plus)

    def __mul__(self, factor: int) -> Index:
        return combined([(t, f * factor) for t, f in self.terms], self.plus * factor)

    @cached_property
    def low(self) -> int | None:
        """The smallest value, where it is known; no axis is below 0."""
        spans = [0 if f > 0 else (None if t.last is None else f * t.last) for t, f in self.terms]
        return None if None in spans else self.plus + sum(x for x in spans if x is not None)

    @cached_property
    def high(self) -> int | None:
        """The largest value, where it is known."""
        spans = [(None if t.last is None else f * t.last) if f > 0 else 0 for t, f in self.terms]
        return None if None in spans else self.plus + sum(x for x in spans if x is not None)

    @cached_property
    def axes(self) -> frozenset[Axis]:
        """The axes that it runs along."""
        found = set[Axis]()
        for term, _ in self.terms:
            found |= {term} if isinstance(term, Axis) else term.of.axes if isinstance(term, Swapped | Modulo) else set()
        return frozenset(found)

    def within(self, size: Size) -> tuple[bool, bool]:
        """Whether it is surely 0 or more, and surely less than `size`."""
        if isinstance(size, int):
            return self.low is not None and self.low >= 0, self.high is not None and self.high < size
        axis = self.terms[0][0] if len(self.terms) == 1 and self.terms[0][1] == 1 else None
        whole = isinstance(axis, Axis) and axis.size == size and self.plus <= 0
        return self.low is not None and self.low >= 0, whole

    def divided(self, by: int) -> tuple[Index, Index]:
        """Quotient and remainder; NeedSplit or NeedCut where an axis straddles, Declined where nothing helps."""
        whole, rest = list[tuple[Term, int]](), list[tuple[Term, int]]()
        for term, factor in self.terms:
            if factor % by == 0:
                whole.append((term, factor // by))
            elif term.last is not None and 0 < factor * term.last < by:
                rest.append((term, factor))
            else:
                raise _split(term, factor, by)
        quotient, remainder = combined(whole, self.plus // by), combined(rest, self.plus % by)
        if remainder.high is not None and remainder.high >= by:
            raise _cut(remainder, by)
        return quotient, remainder


def _split(term: Term, factor: int, by: int) -> Exception:
    inner = by // factor if factor > 0 else 0
    if isinstance(term, Axis) and isinstance(term.size, int) and inner and by % factor == 0 and term.size % inner == 0:
        return NeedSplit(term, inner)
    return Declined(f"a dim is parted into groups of {by} that its index does not respect")


def _cut(rest: Index, at: int) -> Exception:
    """The one axis of `rest` that steps by one is cut where the sum reaches `at`."""
    if len(rest.terms) == 1 and isinstance(rest.terms[0][0], Axis) and rest.terms[0][1] == 1:
        return NeedCut(rest.terms[0][0], at - rest.plus)
    return Declined(f"a dim is parted at {at}, in the middle of a group")


def combined(terms: Iterable[tuple[Term, int]], plus: int) -> Index:
    """Terms with equal factors merged; axes of one place are no terms."""
    total = dict[Term, int]()
    for term, factor in terms:
        if term.last != 0:
            total[term] = total.get(term, 0) + factor
    return Index(tuple((t, f) for t, f in total.items() if f), plus)


def along(axis: Axis) -> Index:
    """The index that is the place on an axis."""
    return combined([(axis, 1)], 0)


def side_of(index: Index, border: int) -> bool:
    """Whether an index is below `border` everywhere; NeedCut where it is on both sides."""
    if index.high is not None and index.high < border:
        return True
    if index.low is not None and index.low >= border:
        return False
    if len(index.terms) == 1 and isinstance(index.terms[0][0], Axis) and index.terms[0][1] == 1:
        raise NeedCut(index.terms[0][0], border - index.plus)
    raise _straddling(index, border)


def _straddling(index: Index, border: int) -> Exception:
    """An axis of groups is cut where the border is between groups; a border within a group needs the groups joined."""
    steps = sorted(((f, t) for t, f in index.terms if isinstance(t, Axis)), key=lambda x: -x[0])
    if steps and len(steps) == len(index.terms):
        factor, axis = steps[0]
        if (border - index.plus) % factor == 0:
            return NeedCut(axis, (border - index.plus) // factor)
    return Declined(f"parts meet at {border}, in the middle of a group")
