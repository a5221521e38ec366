"""The default pipeline on every preset: exact in float64, and with the fusions that each model is known for."""

from __future__ import annotations

import pytest
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.passes import DEFAULT, Pipeline, validate

from tests.programs import TINY, preset


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("task", ["logits", "loss"])
@pytest.mark.parametrize("name", TINY)
def test_the_default_pipeline_is_exact_on_every_preset(name: str, task: str, packed: bool):
    before = preset(name, task, packed)
    after = Pipeline.parse(DEFAULT).run(before)
    report = validate(before, after, "exact")
    assert report.ok and len(report.rows) > 10, report
    assert len(after.layers) <= len(before.layers) + 1


WANTED = {
    "demo": ("norm-gate", "recurrence-preamble", "qkv-prep", "output-gate", "glu", "residual-norm"),
    "qwen3-next-80b-a3b": ("norm-gate", "recurrence-preamble", "qkv-prep", "output-gate", "glu", "residual-norm"),
    "nemotron-3-nano-30b-a3b": ("norm-gate", "recurrence-preamble", "residual-norm"),
    "llama-3-8b": ("qkv-prep", "glu", "residual-norm"),
    "mamba-2-2.7b": ("norm-gate", "recurrence-preamble", "residual-norm"),
}


@pytest.mark.parametrize("name", WANTED)
def test_published_models_get_their_fusions(name: str):
    Pipeline.parse(DEFAULT).run(build(load_spec(name)), verify="types", require=WANTED[name])
