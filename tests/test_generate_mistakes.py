"""What is wrong with a prompt, an option, a cache or a length is said in one error, before anything is read."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import plait
import pytest
import torch
from plait.ir import DataError
from plait.runtime import CompiledModel

from tests.test_generate import EMPTY, ONE, WINDOWS, filled, greedy, model, prompts

MISTAKES: list[tuple[Callable[[CompiledModel], object], str]] = [
    (lambda m: m.generate([ONE, EMPTY], 3), "prompt 1 is empty; give at least one token"),
    (lambda m: m.generate([], 3), "there are no prompts"),
    (lambda m: m.generate(torch.zeros(0, 4, dtype=torch.int64), 3), "at least one row"),
    (lambda m: m.generate(torch.zeros(2, 0, dtype=torch.int64), 3), "prompt 0 is empty"),
    (lambda m: m.generate(ONE[None], -1), "max_new_tokens is -1, must be 0 or more"),
    (lambda m: m.generate(ONE[None], 1, prefill_chunk=-2), "prefill_chunk is -2"),
    (lambda m: m.generate(torch.tensor([[61]]), 1), "tokens holds the token 61; tokens are from 0 to 60"),
    (lambda m: m.generate(torch.tensor([[0.5]]), 1), "tokens is torch.float32"),
    (lambda m: m.generate([ONE[None]], 1), r"a row of the prompts is \[1, 1\], must be \[length\]"),
    (lambda m: m.generate(ONE, 1), r"prompts is \[1\], must be \[batch, length\]"),
    (lambda m: m.generate([ONE], 1, mask=ONE), "mask is for prompts in one tensor"),
    (lambda m: m.generate(torch.ones(1, 3).long(), 1, mask=torch.tensor([[1, 0, 1]])), "padding between tokens"),
    (lambda m: m(torch.ones(1, 3).long(), mask=torch.ones(1, 4)), r"mask is \[1, 4\], must be as tokens are, \[1, 3\]"),
    (lambda m: m(torch.ones(1, 3).long(), mask=torch.zeros(1, 3)), "mask leaves no token"),
    (lambda m: m(torch.ones(1, 3).long(), torch.tensor([0, 3]), mask=torch.ones(1, 3)), "mask and cu both say"),
    (lambda m: m.generate([ONE], 1, cache=m.cache(2)), "there are 1 prompts; the cache has 2 rows"),
    (lambda m: m.generate([EMPTY], 1, cache=m.cache(1)), "prompt 0 is empty"),
    (lambda m: m.generate([ONE], 1, seed=[1, 2]), "there are 2 seeds and 1 rows"),
    (lambda m: m.generate([ONE], 1, stop=[[1], [2]]), "stop has tokens for 2 rows, there are 1"),
    (lambda m: m.cache(0), "a cache's rows is 0, must be 1 or more"),
    (lambda m: m.cache(1, page=-1), "a cache's page is -1"),
    (lambda m: m.cache(1).rollback(0), "nothing was tried"),
    (lambda m: m.cache(1).read(), "no token is waiting"),
    (lambda m: m.cache(2).add([ONE]), "there are 1 rows of tokens; the cache has 2"),
    (lambda m: m.cache(1).add([ONE[None]]), r"row 0 of the tokens is torch.int64\[1, 1\], must be int64 \[length\]"),
    (lambda m: m.cache(1).add([torch.tensor([0.5])]), r"row 0 of the tokens is torch.float32\[1\]"),
    (lambda m: m.cache(1).add([torch.tensor([-1])]), "tokens holds the token -1; tokens are from 0 to 60"),
    (lambda m: m.generate([ONE], 1, seed=-1), r"a seed is -1, must be from 0 to 2\*\*63 - 1"),
    (lambda m: m.generate([ONE], 1, seed=[2**63]), "a seed is 9223372036854775808"),
    (lambda m: m.generate(torch.ones(2, 3).long(), 1, mask=torch.ones(2, 4)),
     r"mask is \[2, 4\], must be as tokens are, \[2, 3\]"),
    (lambda m: m.generate([ONE], 1, cache=model("learned").cache(1)), "the cache was made by another model"),
    (lambda m: m.verify(model("learned").cache(1), ONE[None]), "the cache was made by another model"),
    (lambda m: m.verify(m.cache(2), ONE[None]), "there are 1 rows of tokens; the cache has 2"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "what"), MISTAKES, ids=[what for _, what in MISTAKES])
def test_a_mistake_is_said(call: Callable[[CompiledModel], object], what: str) -> None:
    with pytest.raises(DataError, match=what):
        call(model())


def test_more_than_was_tried_cannot_be_accepted() -> None:
    kept = filled(model(), [ONE])
    model().verify(kept, torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(DataError, match=r"accepted is \[3\]; it must be from 0 to 2 for each of 1 rows"):
        kept.rollback(3)
    kept.rollback(2)
    with pytest.raises(DataError, match="nothing was tried"):
        kept.rollback(0)


def test_positions_that_are_learned_end() -> None:
    of = model("learned")
    row = prompts(of, (10,))[0]
    assert of.generate(row[None], 3).shape == (1, 13)  # the last token is given out, not read
    with pytest.raises(DataError, match="prompt 0 with 4 new tokens would have 13 tokens; the model has a table of 12"):
        of.generate(row[None], 4)
    with pytest.raises(DataError, match="a row of tokens would have 13 tokens"):
        of(torch.zeros(1, 13, dtype=torch.int64))
    assert of(torch.zeros(1, 20, dtype=torch.int64), torch.tensor([0, 9, 20])).shape[1] == 20
    kept = filled(of, [row])
    with pytest.raises(DataError, match="row 0 would have 13 tokens"):
        of.verify(kept, torch.zeros(1, 3, dtype=torch.int64))


def test_positions_that_are_turned_are_warned_of_once() -> None:
    """The model goes on, as it does elsewhere; Python says the same words once."""
    of = plait.compile(WINDOWS | {"max_length": 9}, dtype="f64", mode="infer", jit=False, seed=5)
    (row,) = prompts(of, (6,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of.generate(row[None], 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        got = [of.generate(row[None], n)[0] for n in (4, 7)]
    assert [str(w.message) for w in said] == [
        "the model is meant for 9 tokens, and a longer text is asked for: what it says beyond may be poor"
    ]
    assert torch.equal(got[1], greedy(of, row, 7)) and torch.equal(got[0], got[1][:10])
    kept = filled(of, [row])
    with pytest.warns(UserWarning, match="meant for 9 tokens"):
        of.generate([ONE], 3, cache=kept)


def test_what_knows_no_positions_has_no_length() -> None:
    of = plait.compile(WINDOWS | {"max_length": 9, "blocks": ["gdn", "mlp"]}, dtype="f64", mode="infer", jit=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of.generate(ONE[None], 20)


def test_on_a_mesh_it_is_said_where_to_generate() -> None:
    from plait.runtime.placed import PlacedModel

    placed = PlacedModel.__new__(PlacedModel)
    what = "generation runs in one process; save the model, and load the file in a process of its own"
    for call in (lambda: placed.generate(ONE[None], 3), lambda: placed.stream([ONE], 3), lambda: placed.cache(1)):
        with pytest.raises(plait.PlaitError, match=what):
            call()
