"""Sizes: an int, or a symbolic product plus a constant, kept as canonical text (`4*b*s`, `n+1`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache

from .errors import TypeMismatch

Size = int | str

_SIZE = re.compile(r"^(?P<product>{0}(?:\*{0})*)(?P<offset>[+-]\d+)?$".format(r"(?:\d+|[A-Za-z_]\w*)"), re.ASCII)


def _parts(size: Size) -> tuple[int, list[str], int]:
    """Coefficient, symbols, and constant term of a size."""
    return (size, [], 0) if isinstance(size, int) else _read(size)


@lru_cache(4096)
def _read(size: str) -> tuple[int, list[str], int]:
    found = _SIZE.match(size)
    if not found:
        raise TypeMismatch(f"not a size: {size!r}; a size is a number, or text such as `4*b*s` or `n+1`")
    factors = found["product"].split("*")
    coefficient = math.prod(int(f) for f in factors if f.isdigit())
    return coefficient, [f for f in factors if not f.isdigit()], int(found["offset"] or 0)


def _join(coefficient: int, symbols: list[str], offset: int) -> Size:
    if not symbols or coefficient == 0:
        return coefficient + offset
    product = "*".join([*([str(coefficient)] if coefficient != 1 else []), *sorted(symbols)])
    return f"{product}{offset:+d}" if offset else product


def canonical(size: Size) -> Size:
    """The one spelling of a size."""
    return _join(*_parts(size))


def times(*sizes: Size) -> Size:
    """The product of sizes; a sum such as `n+1` cannot be a factor beside others."""
    if len(sizes) == 1:
        return canonical(sizes[0])
    coefficient, symbols = 1, list[str]()
    for size in sizes:
        c, s, offset = _parts(size)
        if offset:
            raise TypeMismatch(f"cannot multiply the sum {size}; name it by a symbol of its own")
        coefficient, symbols = coefficient * c, symbols + s
    return _join(coefficient, symbols, 0)


def plus(size: Size, offset: int) -> Size:
    c, s, was = _parts(size)
    return _join(c, s, was + offset)


def divide(size: Size, by: Size) -> Size | None:
    """`size / by` where that is exact, else None."""
    c, s, offset = _parts(size)
    by_c, by_s, by_offset = _parts(by)
    if canonical(size) == canonical(by):
        return 1
    if offset or by_offset or by_c == 0 or c % by_c:
        return None
    if c == 0:
        return 0
    rest = list(s)
    for symbol in by_s:
        if symbol not in rest:
            return None
        rest.remove(symbol)
    return _join(c // by_c, rest, 0)


def possible(size: Size) -> bool:
    """Whether its numbers are such as a tensor can have."""
    c, s, offset = _parts(size)
    return 0 <= c < 2**62 and abs(offset) < 2**62 and (bool(s) or offset == 0)


def symbols(size: Size) -> set[str]:
    return set(_parts(size)[1])


def value(size: Size, env: Mapping[str, int]) -> int:
    """The number a size stands for once its symbols are bound."""
    c, s, offset = _parts(size)
    return c * math.prod(env[x] for x in s) + offset
