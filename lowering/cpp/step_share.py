"""How threads share a decode step: which instructions are many units of work, and which wait for what others have done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from .step_record import Step, Tensor, key

BLOCK, GROUP, STRETCH = 64, 8, 64  # outputs of a product, query heads, channels of a scan in a unit, as C++ has them
SMALL = 1 << 15  # products that one thread does sooner than two meet
PASSED = 1 << 13  # numbers of a pointwise op, likewise
WRITES = {"CACHE_WRITE", "PAGE_WRITE"}  # what they write is their first operand


def units(step: Step) -> int:
    """In how many parts an instruction can be done, a function of sizes alone; one where sharing is not worth it."""
    size, kind = (*(1,) * (4 - len(step.size)), *step.size), step.kind
    found, work, small = _counted(kind, size, step.whole)
    return max(found, 1) if work > small else 1


def _counted(kind: str, size: Sequence[int], whole: Sequence[int]) -> tuple[int, int, int]:
    """Units, how much there is to do, and up to where one thread does it."""
    match kind:
        case "LINEAR":
            return -(-size[1] // BLOCK), size[0] * size[1] * size[2], SMALL
        case "GROUPED":
            return -(-size[1] // BLOCK), size[0] * size[1] * size[2], SMALL
        case "HEADS":
            return size[1], prod(size), SMALL
        case "RECURRENCE":
            return size[0] * size[2], size[0] * size[2] * whole[0] * whole[1], SMALL
        case "ATTENTION":
            return size[0] * size[1] * -(-size[2] // GROUP), SMALL + 1, SMALL  # how far a text is nobody knows
        case "SELECTIVE_SCAN":
            return size[0] * -(-size[2] // STRETCH), size[0] * size[2] * size[3], PASSED
        case "RG_LRU":
            return size[2], size[2] * size[3], PASSED
        case "CONV":
            return size[0], prod(size) * whole[0], SMALL
        case "ROPE":
            return size[0] * size[2], prod(size), PASSED
        case "ROUTE":
            return size[2], size[2] * size[3] * whole[0], SMALL
        case "COMBINE":
            return size[2], size[2] * size[3] * whole[0], SMALL
        case "EMBEDDING" | "POSITIONS" | "TURNS" | "CACHE_WRITE" | "PAGE_WRITE" | "DISPATCH" | "SPREAD":
            return 1, 0, 0
        case _:
            return size[0] * size[1] * size[2], prod(size), PASSED


@dataclass(frozen=True)
class Touch:
    """Memory that an instruction reads or writes: some of the arena, or a tensor."""

    where: int  # the key of a tensor, -1 for the arena
    first: int
    end: int
    written: bool
    shared: bool  # by any thread; else by the first


def waits(steps: Sequence[Step], places: Mapping[int, int], over: Mapping[int, int]) -> list[bool]:
    """Whether each instruction is begun only when all threads are there: what it touches was touched by another thread."""
    found, since = list[bool](), list[Touch]()
    for step in steps:
        own = _touched(step, places, over)
        wait = any(_meet(a, b) for a in own for b in since)
        since = own if wait else [*since, *own]
        found.append(wait)
    return found


def _meet(a: Touch, b: Touch) -> bool:
    apart = a.where != b.where or a.end <= b.first or b.end <= a.first
    return not apart and (a.written or b.written) and (a.shared or b.shared)


def _touched(step: Step, places: Mapping[int, int], over: Mapping[int, int]) -> list[Touch]:
    shared, first = units(step) > 1, step.kind in WRITES
    read, written = step.operands[first:], (*step.operands[:first], *step.results)
    some = [*((x, False) for x in read), *((x, True) for x in written)]
    return [_touch(x, write, shared, places, over) for x, write in some if x is not None]


def _touch(x: Tensor, written: bool, shared: bool, places: Mapping[int, int], over: Mapping[int, int]) -> Touch:
    own = key(x)
    if own in places:
        return Touch(-1, places[own], places[own] + x.untyped_storage().nbytes(), written, shared)
    return Touch(over.get(own, own), 0, 1, written, shared)
