"""Families' states: rows of their own lengths, tokens tried and taken back, say what the whole program says."""

from __future__ import annotations

import warnings

import plait
import pytest
import torch
from plait.frontends.build import build
from plait.frontends.hf import read_plan
from plait.frontends.spec import ModelSpec
from plait.ir import evaluate

from tests.hf_cases import CASES, config

# One family for each thing that a block can remember, and for each way in which it does.
CHOSEN = (
    "gpt2", "gpt_neox", "mistral", "cohere2", "gemma2", "gemma3", "gpt_oss", "deepseek_v3", "qwen3_next", "olmo_hybrid",
    "mamba2", "nemotron_h", "falcon_h1", "zamba2", "kimi_linear", "bailing_hybrid_free", "minimax", "jamba", "mamba_bias",
    "lfm2", "recurrent_gemma",
)  # fmt: skip
FORMS = ("window", "sinks", "softcap", "conv", "qk_norm", "rope", "gate", "lower_bound", "layout")


def spec(name: str) -> ModelSpec:
    with warnings.catch_warnings(action="ignore"):  # what a config says that changes nothing
        return read_plan(config(name)).spec


def remembered(name: str) -> set[str]:
    """What a family's blocks remember, and what of their fields bears on it."""
    found = set[str]()
    for block in spec(name).blocks:
        kind = type(block).__name__
        found |= {kind, *(f"{kind}.{field}" for field in FORMS if getattr(block, field, None))}
    return found


def test_the_chosen_families_have_all_that_families_remember() -> None:
    own = [name for name in CASES if not spec(name).encoder]  # a cache is for models without
    assert set().union(*map(remembered, CHOSEN)) == set().union(*map(remembered, own))


@pytest.mark.parametrize("name", CHOSEN)
def test_rows_and_tried_tokens(name: str) -> None:
    of = plait.compile(spec(name), dtype="f64", mode="infer", jit=False, seed=1)
    params = {name: p.data for name, p in of.named_parameters()}
    graph = build(spec(name), dtype="f64")
    rng = torch.Generator().manual_seed(0)
    first, second = (torch.randint(of.vocab, (n,), generator=rng) for n in (7, 2))
    kept = of.cache(2)
    kept.add([first, second])
    got = [kept.read(), of.verify(kept, torch.tensor([[1, 2], [3, 4]]))[:, 1]]
    kept.rollback([1, 0])
    kept.add([torch.tensor([5]), torch.tensor([6])])
    got.append(kept.read())
    whole = [evaluate(graph, torch.tensor([t]), params=params)[0] for t in ([*first, 1, 2], [*second, 3, 4])]
    after = [evaluate(graph, torch.tensor([t]), params=params)[0, -1] for t in ([*first, 1, 5], [*second, 6])]
    want = [[whole[0][6], whole[1][1]], [whole[0][8], whole[1][3]], after]
    for mine, rows in zip(got, want, strict=True):
        torch.testing.assert_close(mine, torch.stack(rows), rtol=1e-9, atol=1e-11)
