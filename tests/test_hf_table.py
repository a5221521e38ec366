"""docs/families.md is about the families there are, and says of them what is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plait.frontends.hf import FAMILIES

from tests.hf_cases import CASES
from tests.hf_checks import CHECKS, cases_of, generation, outcomes, packed, padded, reached, run_logits, subject
from tests.hf_table import NOTED, NOTES, PAGE, RECURRENT, cell, page, rows_of, worst

CHEAP = ("logits", "run_logits", "generation", "packed")


def test_the_page_has_every_family_and_all_is_reached() -> None:
    text = PAGE.read_text()
    rows = rows_of(text)
    assert list(rows) == sorted(FAMILIES), "a family came or went: run `make families`"
    assert sum(len(cases_of(f)) for f in rows) == len(CASES)
    assert all(f"| {f} | {len(cases_of(f))} |" in text for f in rows), "a case came or went: run `make families`"
    assert all(set(found) == set(CHECKS) for found in rows.values())
    assert "**" not in text, "a figure is not reached"
    assert {*NOTED, *RECURRENT} <= set(FAMILIES) and max(n for ns in NOTED.values() for n in ns) == len(NOTES)


@pytest.mark.parametrize("name", ["llama_tied", "mamba2", "t5"])
def test_the_page_says_what_is_measured(name: str) -> None:
    found = outcomes(name, CHEAP)
    assert all(reached(check, value) for check, value in found.items()), found
    shown = rows_of(PAGE.read_text())[str(CASES[name]["model_type"])]
    for check, value in found.items():
        if CHECKS[check].counts or value != value:
            assert shown[check] == cell(check, value)
        else:
            assert float(shown[check]) <= CHECKS[check].most


def test_a_page_shows_what_is_not_reached() -> None:
    bad = {check: (2.0 if CHECKS[check].counts else 1e-3) for check in CHECKS}
    text = page({"gpt2": worst([bad, dict.fromkeys(CHECKS, 0.0)])})
    wrong = " | ".join(["**1e-3**"] * 4 + ["**2 differ**"] + ["**1e-3**"] * 2 + ["**2 differ**"])
    assert f"| gpt2 | 1 | {wrong} |  |" in text
    assert rows_of(text) == {"gpt2": dict(zip(CHECKS, wrong.split(" | "), strict=True))}


@pytest.mark.parametrize("check", [run_logits, padded, packed, generation])
def test_a_mistake_in_a_model_is_measured(check: object, tmp_path: Path) -> None:
    """One parameter of the compiled model is a little off."""
    of = subject("llama_tied", tmp_path)
    with torch.no_grad():
        of.model.get_parameter("layers.0.w_in").mul_(1.02 if check is not generation else -1)
    name = getattr(check, "__name__", "")
    assert not reached(name, CHECKS[name].measure(of))


def test_a_mistake_in_a_case_is_measured(tmp_path: Path) -> None:
    """A folder that means something else than transformers computed."""
    of = subject("llama_tied", tmp_path)
    other = replace(of)
    vars(other)["parameters"] = {n: (p.detach() * (1.001 if n == "layers.0.norm" else 1)).requires_grad_() for n, p in
                                 of.parameters.items()}  # fmt: skip
    for name in ("logits", "gradients"):
        assert reached(name, CHECKS[name].measure(of)) and not reached(name, CHECKS[name].measure(other))
