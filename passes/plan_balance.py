"""Balance: how much attention each rank has, dense or packed, in either order of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir import TypeMismatch

ORDERS = ("natural", "zigzag")


def seen(start: int, end: int, causal: bool = True, window: int = 0, length: int = 0) -> int:
    """Keys that the queries at start, ..., end - 1 of a sequence see, added up; all `length` of them unless causal."""
    if not causal:
        behind = _triangle(end - window) - _triangle(start - window) if window else 0  # keys that a window has left
        return (end - start) * length - behind
    full = min(end, max(start, window)) if window else end  # queries before see everything before them
    return _triangle(full) - _triangle(start) + (end - full) * window


def _triangle(n: int) -> int:
    """1 + 2 + ... + n, nothing where n is negative."""
    return n * (n + 1) // 2 if n > 0 else 0


def work(lengths: Sequence[int], ranks: int, order: str, causal: bool = True, window: int = 0) -> tuple[int, ...]:
    """Pairs of a query and a key that each rank has, of segments that follow each other; zigzag is in each of them by itself.

    Raises TypeMismatch where the ranks do not divide the tokens.
    """
    if order == "zigzag":
        runs = [_chunks(length, ranks, causal, window) for length in lengths]
        return tuple(sum(run[r] for run in runs) for r in range(ranks))
    total = sum(lengths)
    if total % ranks:
        raise TypeMismatch(f"{total} tokens do not divide over {ranks} ranks; pad to a multiple of {ranks}")
    share, found = total // ranks, [0] * ranks
    at = 0
    for length in lengths:
        for rank in range(at // share if share else 0, -(-(at + length) // share) if share else 0):
            a, b = max(at, rank * share) - at, min(at + length, (rank + 1) * share) - at
            found[rank] += seen(a, b, causal, window, length)
        at += length
    return tuple(found)


def _chunks(length: int, ranks: int, causal: bool, window: int) -> list[int]:
    if length % (2 * ranks):
        must = f"pad to a multiple of {2 * ranks}"
        raise TypeMismatch(f"zigzag over {ranks} ranks: {length} tokens do not divide into {2 * ranks} chunks; {must}")
    size = length // (2 * ranks)
    chunks = [seen(c * size, (c + 1) * size, causal, window, length) for c in range(2 * ranks)]
    return [chunks[r] + chunks[2 * ranks - 1 - r] for r in range(ranks)]


def balance(found: Sequence[int]) -> float:
    """The busiest rank's work over the mean; 1 is even, and so is no work at all."""
    return max(found) * len(found) / sum(found) if sum(found) else 1.0
