"""Choosing tokens: every filter against a loop that says what it means, draws against chances, rows against each other."""

from __future__ import annotations

import math

import plait
import pytest
import torch
from plait.ir import DataError
from plait.runtime.sampling import Chooser, Sampling, filtered, penalized

Tensor = torch.Tensor


def by_hand(logits: list[float], seen: set[int], how: Sampling) -> list[float]:
    """The chances of one row, a token at a time, by transformers' order: penalty, temperature, top k, top p, min p."""
    own = [x * how.repetition_penalty if x < 0 else x / how.repetition_penalty for x in logits]
    row = [own[i] if i in seen else x for i, x in enumerate(logits)]
    row = [x / how.temperature for x in row]
    if how.top_k:
        least = sorted(row, reverse=True)[min(how.top_k, len(row)) - 1]
        row = [x if x >= least else -math.inf for x in row]
    if how.top_p < 1:
        order, total = sorted(range(len(row)), key=lambda i: row[i]), 0.0
        chances = soft(row)
        for i in order[:-1]:
            total += chances[i]
            if total <= 1 - how.top_p:
                row[i] = -math.inf
    if how.min_p:
        chances = soft(row)
        row = [x if c >= how.min_p * max(chances) else -math.inf for x, c in zip(row, chances, strict=True)]
    return soft(row)


def soft(row: list[float]) -> list[float]:
    top = max(row)
    parts = [math.exp(x - top) for x in row]
    return [p / sum(parts) for p in parts]


HOWS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=4),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=99),
    Sampling(temperature=0.9, top_p=0.6),
    Sampling(temperature=0.9, top_p=1e-9),
    Sampling(temperature=2.0, min_p=0.2),
    Sampling(temperature=2.0, min_p=1.0),
    Sampling(repetition_penalty=1.7, temperature=0.8),
    Sampling(repetition_penalty=0.6, temperature=1.5, top_k=9, top_p=0.8, min_p=0.1),
    Sampling(repetition_penalty=1.3, temperature=0.5, top_k=7, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_filters_mean_what_the_loop_means(how: Sampling) -> None:
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 13, generator=rng, dtype=torch.float64)
    seen = torch.rand(5, 13, generator=rng) < 0.4
    got = torch.softmax(filtered(penalized(logits, seen, how.repetition_penalty), how), -1)
    rows = [{i for i, x in enumerate(s) if x} for s in seen.tolist()]
    want = [by_hand(x, s, how) for x, s in zip(logits.tolist(), rows, strict=True)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_equal_logits_are_all_kept_by_top_k() -> None:
    kept = filtered(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), Sampling(temperature=1.0, top_k=2))
    assert kept.isfinite().tolist() == [[False, True, True, True, False]]


def test_draws_follow_chances() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(4000, 1)
    choose = Chooser(Sampling(temperature=1.0), range(4000), [torch.tensor([0])] * 4000, 4)
    found = torch.bincount(choose(logits), minlength=4) / 4000
    torch.testing.assert_close(found, torch.softmax(logits[0], -1), atol=0.03, rtol=0)


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([[4.0, 3.0, -1.0], [-1.0, -1.5, -9.0]])
    choose = Chooser(Sampling(repetition_penalty=2.0), [0, 1], [torch.tensor([0]), torch.tensor([0, 2])], 3)
    assert choose(logits).tolist() == [1, 1]  # 4 / 2 is below 3; -1 * 2 is below -1.5
    assert choose(logits).tolist() == [0, 0]  # what was chosen is penalized as well


@pytest.fixture(scope="module")
def of() -> plait.CompiledModel:
    return plait.compile("llama-3-8b-tiny", dtype="f32", mode="infer", jit=False, seed=2)


def test_a_row_draws_by_itself(of: plait.CompiledModel) -> None:
    rows = [torch.tensor(x) for x in ([5, 6, 7], [9], [1, 2, 3, 4, 5])]
    how = {"temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.2}
    one = of.generate(rows, 6, seed=7, **how)
    again = of.generate(rows, 6, seed=7, **how)
    other = of.generate(rows, 6, seed=8, **how)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for i, row in enumerate(rows):
        assert torch.equal(of.generate([row], 6, seed=7 + i, **how)[0], one[i])
    turned = of.generate(rows[::-1], 6, seed=[9, 8, 7], **how)
    assert all(torch.equal(a, b) for a, b in zip(turned[::-1], one, strict=True))


def test_stop_tokens_end_rows_one_by_one(of: plait.CompiledModel) -> None:
    rows = torch.tensor([[5, 6], [9, 8]])
    free = of.generate(rows, 8, temperature=1.5, seed=3)[:, 2:]
    first, second = int(free[0, 2]), int(free[1, 4])
    assert first not in free[0, :2] and second not in free[1, :4], "another seed would serve"
    own = of.generate(rows, 8, temperature=1.5, seed=3, stop=[[first], [second]])[:, 2:]
    assert own.shape == (2, 5) and torch.equal(own[1], free[1, :5])
    assert own[0].tolist() == [*free[0, :3].tolist(), first, first]
    several = of.generate([*rows], 8, temperature=1.5, seed=3, stop=[first, second])
    assert [int(r[-1]) in (first, second) for r in several] == [True, True]
    assert all(t not in (first, second) for r in several for t in r[2:-1].tolist())


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, must be 0 or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1, must be 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0, must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1, must be from 0 to 1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, must be above 0"),
    ],
)
def test_an_option_out_of_range_is_refused(of: plait.CompiledModel, how: dict[str, float], what: str) -> None:
    with pytest.raises(DataError, match=what):
        of.generate(torch.tensor([[1]]), 1, **how)  # type: ignore[arg-type] # numbers of either kind


def test_logits_that_are_no_numbers_draw_nothing() -> None:
    choose = Chooser(Sampling(temperature=1.0), [0], [torch.tensor([0])], 3)
    with pytest.raises(DataError, match="logits are not finite, so that no token can be drawn"):
        choose(torch.tensor([[0.0, math.nan, 1.0]]))
