"""Signatures: the letters of an op's operands, bound to the sizes and placements of actual types."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import sizes
from .errors import TypeMismatch
from .sizes import Size
from .types import Dim, TensorType

_OPERAND = re.compile(r"(\w+)(?::(\w+))?\[([^\]]*)\](\?)?")
_AXIS = re.compile(r"\(([^)]*)\)|(\.\.\.)|(\w+?)([+-]\d+)?(?=\s|$)")


@dataclass(frozen=True)
class Axis:
    """One dim of an operand: `t`, a composite `(g r)`, or a shifted `n+1`."""

    letters: tuple[str, ...]
    offset: int = 0

    def __str__(self) -> str:
        text = " ".join(self.letters)
        return f"({text})" if len(self.letters) > 1 else f"{text}{self.offset:+d}" if self.offset else text


@dataclass(frozen=True)
class Operand:
    name: str
    axes: tuple[Axis, ...]
    dtype: str = ""  # empty: as the first operand; `acc`: at least f32; an operand's name: as that one
    optional: bool = False

    def __str__(self) -> str:
        dtype = f":{self.dtype}" if self.dtype else ""
        return f"{self.name}{dtype}[{' '.join(map(str, self.axes))}]" + "?" * self.optional

    @property
    def fixed(self) -> int:
        """How many dims it has beside an ellipsis."""
        return sum(a.letters != ("...",) for a in self.axes)


@dataclass(frozen=True)
class Use:
    """Where a letter stands: an operand's dim, with the placement that the letter gets from it."""

    operand: int
    position: int
    dim: Dim


@dataclass(frozen=True)
class Binding:
    """What each letter is: its size, and every place it stands in."""

    uses: Mapping[str, tuple[Use, ...]]
    size: Mapping[str, Size]
    rest: int  # dims an ellipsis stands for

    def dim(self, letter: str) -> Dim:
        """The letter's size, with the placement of its first use; a number is itself."""
        if letter.isdigit():
            return Dim(int(letter))
        first = self.uses.get(letter)
        return Dim(self.size[letter], first[0].dim.axes, first[0].dim.order) if first else Dim(self.size[letter])


def parse_signature(text: str) -> tuple[tuple[Operand, ...], tuple[Operand, ...]]:
    left, _, right = text.partition("->")
    return _operands(left), _operands(right)


def _operands(text: str) -> tuple[Operand, ...]:
    return tuple(
        Operand(name, _axes(inside), dtype, bool(optional)) for name, dtype, inside, optional in _OPERAND.findall(text)
    )


def _axes(text: str) -> tuple[Axis, ...]:
    found = list[Axis]()
    for composite, ellipsis, letter, offset in _AXIS.findall(text.strip()):
        letters = tuple(composite.split()) if composite else ("...",) if ellipsis else (letter,)
        found.append(Axis(letters, int(offset or 0)))
    return tuple(found)


def rest_letters(count: int) -> tuple[str, ...]:
    """The ellipsis, spelled out: one letter per dim it stands for."""
    return tuple(f"...{i}" for i in range(count))


def spread(axes: Sequence[Axis], rest: int) -> list[Axis]:
    """Replace an ellipsis by as many letters as it stands for."""
    if not any("..." in axis.letters for axis in axes):
        return [*axes]
    out = list[Axis]()
    for axis in axes:
        if axis.letters == ("...",):
            out += [Axis((x,)) for x in rest_letters(rest)]
        else:
            out.append(Axis(tuple(y for x in axis.letters for y in (rest_letters(rest) if x == "..." else (x,))), axis.offset))
    return out


def alias(operand: Operand, same: Mapping[str, str]) -> Operand:
    """The operand with each letter replaced by the one it equals."""
    if not same:
        return operand
    axes = tuple(Axis(tuple(same.get(x, x) for x in a.letters), a.offset) for a in operand.axes)
    return Operand(operand.name, axes, operand.dtype, operand.optional)


def bind(op: str, operands: Sequence[Operand], types: Sequence[TensorType | None], known: Mapping[str, Size]) -> Binding:
    """Match the dims of `types` with the letters of `operands`; a TypeMismatch names what does not fit."""
    rest = _rest(op, operands, types)
    uses, size = dict[str, list[Use]](), dict[str, Size](known)
    later = list[tuple[Axis, Operand, int, int, Dim]]()
    for i, (operand, type_) in enumerate(zip(operands, types, strict=True)):
        if type_ is None:
            continue
        for position, (axis, dim) in enumerate(zip(spread(operand.axes, rest), type_.dims, strict=True)):
            if len(axis.letters) > 1:
                later.append((axis, operand, i, position, dim))
                continue
            letter = next(iter(axis.letters))
            first = f" as in {operands[uses[letter][0].operand].name}" if letter in uses else ""
            _agree(op, operand, letter, sizes.plus(dim.size, -axis.offset), size, first)
            uses.setdefault(letter, []).append(Use(i, position, dim))
    for axis, operand, i, position, dim in sorted(later, key=lambda x: sum(y not in size for y in x[0].letters)):
        _bind_composite(op, operand, axis, dim, size)
        for n, letter in enumerate(axis.letters):  # a split of (g r) is a split of g
            placed = Dim(size[letter], dim.axes, dim.order) if n == 0 else Dim(size[letter])
            uses.setdefault(letter, []).append(Use(i, position, placed))
    return Binding({k: tuple(v) for k, v in uses.items()}, size, rest)


def _rest(op: str, operands: Sequence[Operand], types: Sequence[TensorType | None]) -> int:
    rest: int | None = None
    for operand, type_ in zip(operands, types, strict=True):
        if type_ is None:
            continue
        open_ended = operand.fixed < len(operand.axes)
        spare = len(type_.dims) - operand.fixed
        expected = rest if open_ended and rest is not None else spare if open_ended else 0
        if spare < 0 or spare != expected:
            raise TypeMismatch(f"{op}: {operand.name} is {type_}, must be {operand}")
        rest = spare if open_ended else rest
    return rest or 0


def _agree(op: str, operand: Operand, letter: str, found: Size, size: dict[str, Size], first: str) -> None:
    if letter.isdigit():
        size[letter] = int(letter)
    if size.setdefault(letter, found) != found:
        raise TypeMismatch(f"{op}: {operand.name}.{letter} is {found}, must be {size[letter]}{first}")


def _bind_composite(op: str, operand: Operand, axis: Axis, dim: Dim, size: dict[str, Size]) -> None:
    unknown = [x for x in axis.letters if x not in size]
    known = sizes.times(1, *(size[x] for x in axis.letters if x in size))
    if not unknown:
        if known != dim.size:
            raise TypeMismatch(f"{op}: {operand.name}.{axis} is {dim.size}, must be {known}")
        return
    left = sizes.divide(dim.size, known)
    if left is None or len(unknown) > 1:
        raise TypeMismatch(f"{op}: {operand.name}.{axis} is {dim.size}, must be a multiple of {known}")
    size[unknown[0]] = left
