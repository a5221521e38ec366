"""Orders: which number stands where in a dim that is not in its natural order.

zigzag(n)          tokens in 2n chunks, rank r of n holding chunks r and 2n - 1 - r: even causal work (Megatron-core's layout)
zigzag(n,packed)   the same in every packed segment by itself
sections(n,a,b)    features a | b, of which rank r of n finds its share of each in one slice: a_0 b_0 | a_1 b_1 | ...
sections(n,a,-h,b) the same of features a | h | b, with h whole behind all shares: it stays where it is
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from .errors import TypeMismatch

Tensor = torch.Tensor
_ZIGZAG = re.compile(r"zigzag\(([1-9]\d{0,8})(,packed)?\)", re.ASCII)
_SECTIONS = re.compile(r"sections\(([1-9]\d{0,8})((?:,-?[1-9]\d{0,17})+)\)", re.ASCII)


@dataclass(frozen=True)
class Zigzag:
    """Chunks from both ends of a sequence meet on a rank."""

    parts: int
    packed: bool = False

    def __str__(self) -> str:
        return f"zigzag({self.parts}{',packed' if self.packed else ''})"


@dataclass(frozen=True)
class Sections:
    """Every rank's share of each section stands together; one of a size below 0 stands whole behind all shares."""

    parts: int
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"sections({self.parts},{','.join(map(str, self.sizes))})"

    @property
    def share(self) -> tuple[int, ...]:
        """A rank's part of each section that is shared."""
        return tuple(n // self.parts for n in self.sizes if n > 0)

    @property
    def total(self) -> int:
        return sum(map(abs, self.sizes))


@lru_cache(maxsize=1024)
def parse_order(text: str) -> Zigzag | Sections | None:
    """What an order's text says; the natural one, '', says nothing."""
    if not text:
        return None
    if found := _ZIGZAG.fullmatch(text):
        return Zigzag(int(found[1]), bool(found[2]))
    if found := _SECTIONS.fullmatch(text):
        made = Sections(int(found[1]), tuple(int(n) for n in found[2][1:].split(",")))
        if odd := next((n for n in made.sizes if n > 0 and n % made.parts), None):
            raise TypeMismatch(f"{text}: a section of {odd} has no equal share for {made.parts} ranks")
        return made
    raise TypeMismatch(f"no order called {text}; there is '' (natural), zigzag(n), zigzag(n,packed) and sections(n,a,b,...)")


def multiple(order: str) -> int:
    """What the length of a dim in this order must be a multiple of."""
    made = parse_order(order)
    return 2 * made.parts if isinstance(made, Zigzag) else made.total if made else 1


def permutation(order: str, length: int, cu: Tensor | None = None) -> Tensor:
    """i64[length]: the natural index of what stands at each place; `cu` are the borders of packed segments.

    Raises TypeMismatch where the length (or a segment's) does not divide into the chunks, or sections do not add up to it.
    """
    made = parse_order(order)
    if made is None:
        return torch.arange(length)
    if isinstance(made, Sections):
        return _of_sections(made, length)
    if not made.packed:
        return torch.cat(_chunks(made.parts, 0, length, order))
    if cu is None:
        raise TypeMismatch(f"{order} is an order of packed segments; it needs their borders, cu")
    borders = [int(x) for x in cu]
    parts = [_chunks(made.parts, a, b, order) for a, b in pairwise(borders)]
    return torch.cat([p[r] for r in range(made.parts) for p in parts] or [torch.arange(0)])


def _chunks(parts: int, start: int, end: int, order: str) -> list[Tensor]:
    """Each rank's two chunks of the tokens from start to end."""
    if (end - start) % (2 * parts):
        must = f"pad to a multiple of {2 * parts}"
        raise TypeMismatch(f"{order}: {end - start} tokens do not divide into {2 * parts} chunks; {must}")
    chunks = torch.arange(start, end).reshape(2 * parts, -1)
    return [torch.cat([chunks[r], chunks[2 * parts - 1 - r]]) for r in range(parts)]


def _of_sections(made: Sections, length: int) -> Tensor:
    if made.total != length:
        raise TypeMismatch(f"{made}: the sections add up to {made.total}, must add up to {length}")
    found = torch.arange(length).split([abs(n) for n in made.sizes])
    shared = [x.reshape(made.parts, -1) for x, n in zip(found, made.sizes, strict=True) if n > 0]
    kept = [x for x, n in zip(found, made.sizes, strict=True) if n < 0]
    return torch.cat([*([torch.cat(shared, 1).flatten()] if shared else []), *kept])


def here(order: str, length: int, ranks: int, rank: int, cu: Tensor | None = None) -> Tensor:
    """i64[length / ranks]: the natural indices of what a rank holds of a dim that is split in this order."""
    if length % ranks:
        raise TypeMismatch(f"{length} places do not divide over {ranks} ranks; pad to a multiple of {ranks}")
    return permutation(order, length, cu).reshape(ranks, -1)[rank]
