"""Text parts of composite models, positions stretched for long texts, defaults, and what configs get wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.frontends import build, load_spec
from plait.frontends.hf import hf_names, load_hf, read_plan
from plait.frontends.kinds import Attention, Kda, Mla, Moe
from plait.frontends.kinds_lightning import Lightning
from plait.frontends.spec import ModelSpec
from plait.ir import evaluate
from plait.ir.errors import SpecError
from safetensors.torch import load_file

from tests.hf_cases import CASES, config, tokens, weight, write

Tensor = torch.Tensor
GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("hf_golden.json").read_text())


def tensors(name: str) -> dict[str, Tensor]:
    return {n: weight(n, tuple(s)) for n, s in GOLDEN[name]["shapes"].items()}


def logits(spec: ModelSpec, weights: Mapping[str, Tensor], ids: Tensor | None = None, **named: Any) -> Tensor:
    params = {n: w.double() for n, w in weights.items()}
    given = [tokens() if ids is None else ids, *named.values()]
    return evaluate(build(spec, dtype="f64", packed="cu" in named), *given, params=params)


def spec_of(fields: Mapping[str, Any]) -> ModelSpec:
    return read_plan(fields).spec


# -- composite models ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "gemma3"])
@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_part_is_read_under_any_name(name: str, prefix: str, tmp_path: Path) -> None:
    own = tensors(name)
    wrapped = {n.replace("model.", prefix, 1) if n.startswith("model.") else f"language_model.{n}": t for n, t in own.items()}
    wrapped |= {"model.visual.patch.weight": torch.ones(3), "vision_tower.a.bias": torch.ones(2)}
    if "lm_head.weight" in own and prefix.startswith("model."):
        wrapped["lm_head.weight"] = wrapped.pop("language_model.lm_head.weight")
    with pytest.warns(UserWarning, match="only the text model is read"):
        spec, found = load_hf(write(tmp_path / "whole", config(name), wrapped))
    _, plain = load_hf(write(tmp_path / "plain", config(name), own))
    assert all(torch.equal(found[n], plain[n]) for n in plain)
    assert spec == spec_of(read_plan(config(name)).config)


def test_a_written_folder_holds_the_text_model_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "whole", config("qwen3_5"), tensors("qwen3_5"))
    model = plait.compile(source, jit=False)
    plait.save_hf(model, tmp_path / "text")
    fields = json.loads((tmp_path / "text" / "config.json").read_text())
    assert fields["model_type"] == "qwen3_5_text" and "vision_config" not in fields and fields["dtype"] == "float32"
    assert load_file(tmp_path / "text" / "model.safetensors").keys() == tensors("qwen3_5").keys()
    assert load_spec(tmp_path / "text").blocks == load_spec(source).blocks


def test_published_gemmas_say_little_of_their_text_part() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 7,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
    spec = spec_of(
        {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 3}, "mm_tokens_per_image": 256}
    )
    near, far = (b for i, b in enumerate(spec.blocks) if i in (0, 10) and isinstance(b, Attention))
    assert spec.tied and (spec.vocab, near.heads, near.kv_heads, near.head_dim, near.window, far.window) == (
        262208,
        8,
        4,
        256,
        1024,
        0,
    )
    assert near.rope and far.rope and far.rope.scaling and far.rope.scaling.factor == 8
    assert (near.rope.theta, far.rope.theta, near.rope.scaling) == (1e4, 1e6, None)


# -- stretched positions -----------------------------------------------------------------------------

# transformers, in float64, of texts of 19 tokens beyond these lengths: four of the logits of the last token.
BEYOND: dict[str, tuple[str, dict[str, Any], list[float]]] = {
    "long divisors": (
        "phi3_longrope",
        {"original_max_position_embeddings": 8},
        [-0.079230383861486, 0.410922140908046, 0.577304537908185, 0.320363602053306],
    ),
    "a grown base": (
        "llama_dynamic",
        {"max_position_embeddings": 12},
        [-0.050974993639738, 0.706645498852946, 0.974228072342322, 0.511724341636744],
    ),
}


def exact(spec: ModelSpec) -> ModelSpec:
    """The same with frequencies that are not rounded: transformers makes those of longer texts as it runs."""
    blocks = [
        b.model_copy(update={"rope": b.rope.model_copy(update={"rounded": False})})
        if isinstance(b, Attention) and b.rope
        else b
        for b in spec.blocks
    ]
    return spec.model_copy(update={"blocks": tuple(blocks)})


@pytest.mark.parametrize("case", BEYOND)
def test_texts_beyond_the_original_context(case: str, tmp_path: Path) -> None:
    name, changes, wanted = BEYOND[case]
    spec, weights = load_hf(write(tmp_path / "far", {**config(name), **changes}, tensors(name)))
    found = logits(exact(spec), weights)[:, ::6, ::13].flatten()
    golden = torch.tensor(wanted, dtype=torch.float64)
    assert float((found[15:19] - golden).norm() / golden.norm()) < 1e-12
    short = torch.tensor(GOLDEN[name]["logits"], dtype=torch.float64)
    assert float((found - short).norm() / short.norm()) > 0.01, "a longer context is another model"


def test_up_to_the_original_context_nothing_else_is_read(tmp_path: Path) -> None:
    """Rows of different lengths are side by side in no batch, so a short text says the same before and beyond."""
    name = "phi3_longrope"
    _, weights = load_hf(write(tmp_path / "a", config(name), tensors(name)))
    near = spec_of({**config(name), "original_max_position_embeddings": 8})
    table = {**CASES[name]["rope_parameters"], "attention_factor": near.blocks[0].rope.amplitude}  # type: ignore[union-attr]
    far = spec_of({**config(name), "rope_parameters": table})
    short = tokens()[:, :8]
    assert torch.equal(logits(near, weights, short), logits(far, weights, short))
    assert not torch.equal(logits(near, weights), logits(far, weights))


def rope_of(**table: Any) -> Any:
    """What a llama with these positions has."""
    block = spec_of({**config("llama"), "attention_bias": False, "rope_parameters": table}).blocks[0]
    assert isinstance(block, Attention)
    return block.rope


def test_yarn_infers_what_a_config_leaves_out() -> None:
    inferred = rope_of(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    ratio = rope_of(rope_type="yarn", original_max_position_embeddings=16)  # 64 positions of 16
    assert inferred == ratio and inferred.amplitude == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)
    both = rope_of(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
    assert both.amplitude == 1.0 and both.ramp == inferred.ramp
    # a head of 10: pairs turn once and 32 times in 16 tokens at -0.7 and -0.5 of them: the ramp begins at 0 and ends at 1
    assert (inferred.ramp.low, inferred.ramp.high) == (0.0, 1.0)


def test_deepseek_scores_grow_with_the_context() -> None:
    wide, plain = (spec_of(config(n)).blocks[0] for n in ("deepseek_v3_yarn", "deepseek_v3"))
    assert isinstance(wide, Mla) and isinstance(plain, Mla)
    grown = 0.1 * torch.tensor(4.0, dtype=torch.float64).log().item() + 1
    assert wide.scale == pytest.approx(14**-0.5 * grown**2, rel=1e-15) and plain.scale is None


# -- defaults, constants and other names -----------------------------------------------------------------


def test_gpt_oss_without_positions_has_its_own() -> None:
    bare = {k: v for k, v in config("gpt_oss").items() if k != "rope_parameters"}
    old = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
           "original_max_position_embeddings": 4096}  # fmt: skip
    assert spec_of(bare) == spec_of({**bare, "rope_theta": 150000, "rope_scaling": old})
    assert spec_of(bare).blocks[0].rope.ramp.factor == 32  # type: ignore[union-attr]


def test_slopes_follow_from_the_layer_and_are_not_trained(tmp_path: Path) -> None:
    stored = {"model.layers.0.self_attn.slope_rate": torch.ones(4, 1, 1), "model.layers.0.self_attn.query_decay": torch.ones(3)}
    folder = write(tmp_path / "m", config("minimax"), {**tensors("minimax"), **stored})
    spec, weights = load_hf(folder)
    assert isinstance(spec.blocks[0], Lightning) and spec.blocks[0].norm_place == "stream"
    wanted = -torch.tensor([0.25, 0.0625, 0.015625, 0.00390625], dtype=torch.float64) * (1 + 1e-5)
    assert torch.allclose(weights["layers.0.slope"], wanted, rtol=1e-12)
    model = plait.compile(folder, jit=False)
    model.loss(tokens(), tokens()).backward()
    assert {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()} == {"layers.0.slope"}
    assert hf_names(config("minimax"))["layers.0.slope"] == ()


def test_ling_names_things_in_its_own_words_too() -> None:
    ours = config("bailing_hybrid")
    names = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_token", "n_group": "num_expert_group"}
    theirs = {names.get(k, k): v for k, v in ours.items()}
    assert spec_of(theirs) == spec_of(ours)
    kda, mla = spec_of(ours).blocks[0], spec_of(ours).blocks[2]
    assert isinstance(kda, Kda) and kda.full_rank and kda.decay_floor == -2
    assert isinstance(mla, Mla) and mla.gate


def test_olmo_hybrid_has_positions_where_they_have_a_base() -> None:
    bare = {k: v for k, v in config("olmo_hybrid").items() if k != "rope_parameters"}
    ropes = [{}, {"rope_parameters": None}, {"rope_theta": None}, {"rope_theta": None, "rope_parameters": None}]
    blocks = [spec_of({**bare, **rope}).blocks[2] for rope in ropes]
    assert [isinstance(b, Attention) and b.rope is not None for b in blocks] == [True, True, False, False]
    assert [b.norm_place for b in spec_of(bare).blocks] == ["", "", "after", "after"]


def test_groups_score_by_their_best_expert() -> None:
    moe = spec_of(config("deepseek_v2")).blocks[3]
    assert isinstance(moe, Moe) and (moe.groups, moe.group_limit, moe.group_best, moe.renormalize) == (2, 1, 1, False)


# -- packed ------------------------------------------------------------------------------------------------

PACKED = ["gpt_oss", "olmo_hybrid", "minimax", "bailing_hybrid", "deepseek_v2", "qwen3_5_moe_text", "phi3_longrope"]


@pytest.mark.parametrize("name", PACKED)
def test_packed_texts_are_texts_alone(name: str, tmp_path: Path) -> None:
    spec, weights = load_hf(write(tmp_path / "m", config(name), tensors(name)))
    flat = tokens().reshape(1, -1)
    found = logits(spec, weights, flat, cu=torch.tensor([0, 5, 6, 38]))
    alone = torch.cat([logits(spec, weights, flat[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 38))], 1)
    assert float((found - alone).norm() / alone.norm()) < 1e-12


# -- mistakes ----------------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_5", {"text_config": None}, "text_config: is None; must be a table"),
    ("qwen3_5", {"audio_config": {"depth": 1}}, "audio_config: is {'depth': 1}, which is not honoured"),
    ("qwen3_5_moe", {"tie_word_embeddings": False}, "tie_word_embeddings: is not what text_config says"),
    ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate: is False; True is what is supported"),
    ("qwen3_5_text", {"output_gate_type": "tanh"}, "output_gate_type: is 'tanh', which is not honoured"),
    ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act: is 'gelu'; 'silu' is what is supported"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: is 0.5; llama turns whole heads"),
    ("minimax", {"rope_parameters": {"rope_theta": 10.0, "partial_rotary_factor": 0.5}}, "minimax turns whole heads"),
    ("qwen3_5_moe_text", {"norm_topk_prob": False}, "norm_topk_prob: is False; True is what is supported"),
    ("olmo", {"clip_qkv": "8"}, "clip_qkv: is '8'; must be a number"),
    ("olmo_hybrid", {"layer_types": ["linear_attention", "sliding_attention"]}, "names 'sliding_attention'"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method: is 'noaux_tc'"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: is True; False is what is supported"),
    ("deepseek_v2", {"n_group": 3}, "groups: is 3; must divide experts = 8"),
    ("minimax", {"rotary_dim": 4}, "rotary_dim: is 4"),
    ("minimax", {"linear_attn_alpha_factor": -1}, "skip_scale: is -1"),
    ("bailing_hybrid", {"num_local_experts": 4}, "num_local_experts: is 4, and num_experts is 8; they mean the same"),
    ("bailing_hybrid", {"q_lora_rank": 8}, "q_lora_rank: is 8"),
    ("bailing_hybrid", {"kda_lower_bound": 2.0}, "decay_floor"),
    ("llama_yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta": 3}}, "beta is 3, which is not honoured"),
    ("phi3_longrope", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "long_factor: is None; must be"),
    ("phi3_longrope", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
     "rope.divisors: has 1; must have one for each of 3 pairs"),
    ("gemma3", {"text_config": {**CASES["gemma3"]["text_config"], "rope_parameters": {"full_attention": {"rope_type": "x"}}}},
     "rope_type is 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "says"), MISTAKES, ids=[f"{n}-{next(iter(c))}" for n, c, _ in MISTAKES])
def test_what_cannot_be_honoured_is_named(name: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=re.escape(says)):
        read_plan({**config(name), **changes})
