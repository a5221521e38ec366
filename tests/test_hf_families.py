"""Every family's folders: what transformers computes in float64, gradients, decoding, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.frontends import build, dump_spec, load_spec, parameter_count, shrink
from plait.frontends.hf import FAMILIES, hf_names, hf_tensors, load_hf, read_plan
from plait.ir import evaluate
from safetensors.torch import load_file

from tests.hf_adapter import Steps
from tests.hf_cases import CASES, config, product, tokens, weight, write
from tests.hf_cases_third import CASES as ENCODED

Tensor = torch.Tensor
ALONE = [name for name in CASES if name not in ENCODED]  # those without an encoder
GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("hf_golden.json").read_text())


def folder(path: Path, name: str, **changes: Any) -> Path:
    """A case as a folder."""
    shapes = GOLDEN[name]["shapes"]
    return write(path / name, {**config(name), **changes}, {n: weight(n, tuple(s)) for n, s in shapes.items()})


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def labels() -> Tensor:
    return torch.cat([tokens()[:, 1:], torch.full((2, 1), -100)], 1)


def test_every_family_has_a_case() -> None:
    assert {c["model_type"] for c in CASES.values()} == set(FAMILIES)
    assert set(CASES) == set(GOLDEN)


@pytest.mark.parametrize("name", ALONE)
def test_a_folder_means_what_transformers_computes(name: str, tmp_path: Path) -> None:
    spec, weights = load_hf(folder(tmp_path, name))
    params = {k: v.double().requires_grad_() for k, v in weights.items()}
    golden = GOLDEN[name]
    with torch.no_grad():
        logits = evaluate(build(spec, dtype="f64"), tokens(), params=params)
    assert apart(logits[:, ::6, ::13].flatten(), torch.tensor(golden["logits"], dtype=torch.float64)) < 1e-12
    loss = evaluate(build(spec, task="loss", dtype="f64"), tokens(), labels(), params=params)
    assert float(loss.detach()) == pytest.approx(golden["loss"], rel=1e-12)
    loss.backward()
    flowed = {k: p.grad for k, p in params.items() if p.grad is not None}
    found = dict(hf_tensors(config(name), flowed, golden["gradients"]))
    most = max(map(abs, golden["gradients"].values()))
    for gradient, wanted in golden["gradients"].items():
        assert abs(float(product(found[gradient])) - wanted) < 1e-10 * most, gradient


@pytest.mark.parametrize("name", ALONE)
def test_a_compiled_folder_decodes_what_it_computes_and_is_written_back(name: str, tmp_path: Path) -> None:
    source = folder(tmp_path, name)
    model = plait.compile(source, jit=False, mode="infer")
    logits = model(tokens())
    wanted = torch.tensor(GOLDEN[name]["logits"], dtype=torch.float64)
    assert apart(logits[:, ::6, ::13].flatten(), wanted) < 2e-5
    steps = Steps(model, 2, 19)
    cached = torch.cat([steps(tokens()[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 19))], 1)
    assert apart(cached, logits) < 1e-5
    plait.save_hf(model, tmp_path / "back")
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == (read_plan(config(name)).config or config(name))


@pytest.mark.parametrize("name", CASES)
def test_its_spec_is_a_spec_like_any_other(name: str, tmp_path: Path) -> None:
    spec = load_spec(folder(tmp_path, name))
    _, weights = load_hf(tmp_path / name)
    assert parameter_count(spec) == sum(w.numel() for w in weights.values())
    text = tmp_path / "spec.toml"
    text.write_text(dump_spec(spec))
    assert load_spec(text) == spec
    assert {type(b) for b in shrink(spec).blocks} == {type(b) for b in spec.blocks}


def test_names_are_a_bijection() -> None:
    for name in CASES:
        names = [n for parts in hf_names(config(name)).values() for n in parts]
        assert len(names) == len(set(names))
        assert set(names) == set(GOLDEN[name]["shapes"])


def test_experts_may_be_stacked_in_one_tensor(tmp_path: Path) -> None:
    """Newer files have all experts of a layer in one tensor; both ways are one model."""
    source = folder(tmp_path, "qwen3_moe")
    spec, weights = load_hf(source)
    stacked = [n for n in GOLDEN["qwen3_moe"]["gradients"] if "experts" in n]
    names = [*(n for n in GOLDEN["qwen3_moe"]["shapes"] if "experts" not in n), *stacked]
    tensors = dict(hf_tensors(config("qwen3_moe"), weights, names))
    assert set(tensors) == set(names)
    other, same = load_hf(write(tmp_path / "stacked", config("qwen3_moe"), tensors))
    assert other == spec
    assert all(torch.equal(same[n], weights[n]) for n in weights)


def test_a_bare_model_leaves_the_prefix_out(tmp_path: Path) -> None:
    whole = load_file(folder(tmp_path, "gpt2") / "model.safetensors")
    bare = {n.removeprefix("transformer."): t for n, t in whole.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4).tril()  # a mask that says nothing
    _, weights = load_hf(write(tmp_path / "bare", config("gpt2"), bare))
    assert torch.equal(weights["layers.0.w_in"], whole["transformer.h.0.attn.c_attn.weight"].T)


def test_old_configs_say_the_same(tmp_path: Path) -> None:
    """rope_theta and rope_scaling beside the rest, torch_dtype for dtype."""
    fields = config("llama_tied")
    rope = dict(fields.pop("rope_parameters"))
    theta = rope.pop("rope_theta")
    old = {**fields, "rope_theta": theta, "rope_scaling": rope, "torch_dtype": fields.pop("dtype")}
    old.pop("dtype")
    tensors = load_file(folder(tmp_path, "llama_tied") / "model.safetensors")
    assert load_spec(write(tmp_path / "old", old, tensors)) == load_spec(tmp_path / "llama_tied")
