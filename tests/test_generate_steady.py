"""Compiled: after the first steps nothing compiles, and a step allocates next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import plait
import pytest
import torch
from plait.runtime import CompiledModel
from plait.runtime.caches import Cache

from tests.test_generate import WINDOWS, alone, prompts, same

Tensor = torch.Tensor
SMALL: dict[str, Any] = WINDOWS | {"name": "small", "blocks": ["attention"]}
STEPS = 30


def compiled(jit: bool = True) -> CompiledModel:
    # Without passes there is least to compile; what is compiled is keyed the same.
    return plait.compile(SMALL, dtype="f32", mode="infer", seed=1, passes="", jit=jit)


@pytest.fixture(scope="module")
def of() -> CompiledModel:
    return compiled()


def graphs() -> int:
    import torch._dynamo as dynamo

    return dynamo.utils.counters["stats"]["unique_graphs"]


def allocated(stream: Iterator[Tensor]) -> int:
    """Bytes that one step asks the allocator for."""
    with torch.profiler.profile(profile_memory=True) as seen:
        next(stream)
    return sum(max(e.cpu_memory_usage, 0) for e in seen.events() or ())


def steady(of: CompiledModel, rows: list[Tensor], kept: Cache) -> list[Tensor]:
    """What is said, while programs, states and memory stay what they are after three steps."""
    stream = of.stream(rows, STEPS, cache=kept)
    said = [next(stream) for _ in range(3)]
    known, slots = graphs(), [s.data_ptr() for s in kept.states]
    assert allocated(stream) < 2**14 < sum(s.nbytes for s in kept.states)
    said += [*stream]
    assert graphs() == known and slots == [s.data_ptr() for s in kept.states] and len(said) == STEPS - 1
    return said


def test_rows_of_their_own_lengths(of: CompiledModel) -> None:
    rows = prompts(of, (5, 3))
    said = torch.stack(steady(of, rows, of.cache(2, room=128)), 1)
    assert same([*said[:, :3]], [w[-3:] for w in alone(compiled(jit=False), rows, 3)])


def test_rows_in_pages(of: CompiledModel) -> None:
    """Pages are taken on the way, and the table was made for them."""
    rows = prompts(of, (1, 1))
    kept = of.cache(2, room=128, page=4)
    said = torch.stack(steady(of, rows, kept), 1)
    assert same([*said[:, :3]], [w[-3:] for w in alone(compiled(jit=False), rows, 3)])
    assert kept.held is not None and [len(pages) for pages in kept.held.rows] == [8, 8]
