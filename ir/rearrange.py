"""Rearrangements: the patterns of `reshape` as data that composes, so that views of views become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .ops.shape import sides
from .signature import Operand, bind, spread
from .sizes import Size, divide, times
from .types import TensorType

LETTERS = "abcdefghijklmnop"
UNITS = ("u", "v", "w", "x", "y", "z")


@dataclass(frozen=True, eq=False)
class Atom:
    """A factor of a dim that moves as one; which one it is, is its identity."""

    size: Size


Groups = tuple[tuple[Atom, ...], ...]  # the atoms of each dim; a dim of one element has none


@dataclass(frozen=True)
class Rearrangement:
    """The dims of an operand, and those of the result, in the same atoms."""

    left: Groups
    right: Groups

    @property
    def nothing(self) -> bool:
        return self.left == self.right


def viewed(was: Sequence[Size], now: Sequence[Size]) -> Rearrangement | None:
    """The rearrangement that only groups and parts dims, or None where sizes do not say how."""
    flat = [[Atom(n) for n in shape if n != 1] for shape in (was, now)]
    fine = _refined(flat[0], flat[1])
    if fine is None:
        return None
    left, right = (iter(side) for side in flat)
    return Rearrangement(
        tuple(fine[next(left)] if n != 1 else () for n in was), tuple(fine[next(right)] if n != 1 else () for n in now)
    )


def permuted(shape: Sequence[Size], order: Sequence[int]) -> Rearrangement:
    """The rearrangement that moves whole dims."""
    groups = tuple((Atom(n),) if n != 1 else () for n in shape)
    return Rearrangement(groups, tuple(groups[i] for i in order))


def read(pattern: str, type_: TensorType) -> Rearrangement:
    """A pattern on values of this type."""
    left, right = sides(pattern)
    known = {y: int(y.split("=")[1]) for a in (*left, *right) for y in a.letters if "=" in y}
    bound = bind("reshape", [Operand("x", left)], [type_], known)
    atoms = {x: Atom(n) for x, n in bound.size.items() if n != 1}
    groups = [tuple(tuple(atoms[x] for x in a.letters if x in atoms) for a in spread(s, bound.rest)) for s in (left, right)]
    return Rearrangement(groups[0], groups[1])


def composed(first: Rearrangement, second: Rearrangement) -> Rearrangement | None:
    """One rearrangement that does both, or None where the dims between do not share factors."""
    fine = dict[Atom, tuple[Atom, ...]]()
    for made, taken in zip(first.right, second.left, strict=True):
        found = _refined(made, taken)
        if found is None:
            return None
        fine |= found
    left, right = (tuple(tuple(y for x in g for y in fine[x]) for g in side) for side in (first.left, second.right))
    return _merged(Rearrangement(left, right))


def text(made: Rearrangement) -> str | None:
    """The pattern, or None where a dim would have to be parted into several symbols."""
    names = dict[Atom, str]()
    for atom in (x for g in made.left for x in g):
        names[atom] = LETTERS[len(names) % len(LETTERS)]
    units = iter(UNITS)
    left = [_parted(g, names, units) for g in made.left]
    if None in left or len(names) > len(LETTERS) or sum(not g for g in made.left) > len(UNITS):
        return None
    right = [_shown([names[x] for x in g]) if g else "u=1" for g in made.right]
    return f"{' '.join(x for x in left if x)} -> {' '.join(right)}"


def _refined(a: Sequence[Atom], b: Sequence[Atom]) -> dict[Atom, tuple[Atom, ...]] | None:
    """Both lists, outermost first, in common factors."""
    found: dict[Atom, tuple[Atom, ...]] = dict.fromkeys((*a, *b), ())
    left, right = [(x, x.size) for x in reversed(a)], [(x, x.size) for x in reversed(b)]
    while left and right:
        (x, m), (y, n) = left.pop(), right.pop()
        piece = m if divide(n, m) is not None else n
        rest = [divide(size, piece) for size in (m, n)]
        if None in rest:
            return None
        shared = Atom(piece)
        found[x] += (shared,)
        found[y] += (shared,)
        for stack, owner, more in ((left, x, rest[0]), (right, y, rest[1])):
            if more is not None and more != 1:
                stack.append((owner, more))
    return None if left or right else found


def _merged(made: Rearrangement) -> Rearrangement:
    """Atoms that stand side by side on both sides are one."""
    follows = {x: y for g in made.right for x, y in pairwise(g)}
    one = dict[Atom, Atom]()
    for group in made.left:
        i = 0
        while i < len(group):
            run = [group[i]]
            while i + len(run) < len(group) and follows.get(run[-1]) is group[i + len(run)]:
                run.append(group[i + len(run)])
            one[run[0]] = run[0] if len(run) == 1 else Atom(times(*(x.size for x in run)))
            i += len(run)
    return Rearrangement(*(tuple(tuple(one[x] for x in g if x in one) for g in s) for s in (made.left, made.right)))


def _parted(group: tuple[Atom, ...], names: dict[Atom, str], units: object) -> str | None:
    """One dim of the left side, with sizes for all letters but the first, or but the one that is no number."""
    if not group:
        return f"{next(units)}=1"  # type: ignore[call-overload] # an iterator over names
    free = next((x for x in group if not isinstance(x.size, int)), group[0])
    if sum(not isinstance(x.size, int) for x in group) > 1:
        return None
    return _shown([names[x] if x is free else f"{names[x]}={x.size}" for x in group])


def _shown(letters: list[str]) -> str:
    return letters[0] if len(letters) == 1 else f"({' '.join(letters)})"
