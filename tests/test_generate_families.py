"""Every family's states: rows of their own lengths, tokens tried and taken back, say what the whole program says."""

from __future__ import annotations

import plait
import pytest
import torch
from plait.frontends.hf import read_plan

from tests.hf_cases import CASES, config


@pytest.mark.filterwarnings("ignore:config.json")
@pytest.mark.parametrize("name", CASES)
def test_rows_and_tried_tokens(name: str) -> None:
    of = plait.compile(read_plan(config(name)).spec, dtype="f64", mode="infer", jit=False, seed=1)
    rng = torch.Generator().manual_seed(0)
    first, second = (torch.randint(of.vocab, (n,), generator=rng) for n in (7, 2))
    kept = of.cache(2)
    kept.add([first, second])
    got = [kept.read(), of.verify(kept, torch.tensor([[1, 2], [3, 4]]))[:, 1]]
    kept.rollback([1, 0])
    got.append(of.verify(kept, torch.tensor([[5], [6]]))[:, 0])
    told = [(first, second), ([*first, 1, 2], [*second, 3, 4]), ([*first, 1, 5], [*second, 6])]
    for mine, rows in zip(got, told, strict=True):
        whole = [of(torch.tensor([[int(t) for t in row]]))[0, -1] for row in rows]
        torch.testing.assert_close(mine, torch.stack(whole), rtol=1e-9, atol=1e-11)
