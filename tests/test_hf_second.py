"""State spaces, gated convolutions, Griffin's unit, shared blocks: packed, placed, differentiated, trained, refused by name."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.frontends import ModelSpec, build, dump_spec, load_spec, parameter_count, shrink, ways_of
from plait.frontends.hf import hf_names
from plait.frontends.hf.families import read_plan
from plait.ir import Graph, PlaitError, dump, evaluate, parameters, parse
from plait.passes import DEFAULT, Pipeline, validate

from tests.hf_cases import config, tokens
from tests.hf_cases_second import CASES
from tests.test_hf_families import apart, folder

Tensor = torch.Tensor
# One of each layer there is, and two places with the same shared weights.
MIXED = ("mamba", "jamba", "lfm2", "recurrent_gemma", "zamba2")
PROGRAMS = (DEFAULT, "differentiate,recompute", "place{mesh='cp=2'}", "place{mesh='cp=2 tp=2'},differentiate")
WAYS = ("states", "scan", "chain", "gather")


@cache
def spec_of_case(name: str) -> ModelSpec:
    return read_plan(config(name)).spec


@cache
def program(name: str, packed: bool = False) -> Graph:
    return build(shrink(spec_of_case(name)), task="loss", dtype="f64", packed=packed)


def draw(graph: Graph) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    shapes = {n: [int(d.size) for d in t.dims] for n, (t, _) in parameters(graph).items()}
    return {n: torch.randn(shape, generator=rng, dtype=torch.float64) * 0.3 for n, shape in shapes.items()}


@pytest.mark.parametrize("name", CASES)
def test_packed_segments_are_sequences_of_their_own(name: str) -> None:
    """Where the reference mixes them (its recurrent layers take no borders), the mathematics is followed."""
    spec, borders = spec_of_case(name), [0, 1, 8, 8, 19]
    apart_graph, packed = (build(spec, dtype="f64", packed=p) for p in (False, True))
    params, row = draw(packed), tokens()[:1]
    found = evaluate(packed, row, torch.tensor(borders), params=params)
    parts = [evaluate(apart_graph, row[:, a:b], params=params) for a, b in pairwise(borders) if a < b]
    assert apart(found, torch.cat(parts, 1)) < 1e-12


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("text", PROGRAMS)
def test_programs_stay_what_they_are(name: str, text: str) -> None:
    graph = program(name)
    assert parse(dump(graph)) == graph
    made = Pipeline.parse(text).run(graph, verify="types")
    report = validate(graph, made, "reassociates", gradients="differentiate" in text)
    assert report.ok and max(r.error for r in report.rows) < 1e-12, report


@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma"])
@pytest.mark.parametrize("way", WAYS)
def test_states_of_channels_cross_ranks_by_every_way(name: str, way: str) -> None:
    for packed in (False, True):
        graph = program(name, packed)
        made = Pipeline.parse(f"place{{mesh='cp=2' order=zigzag recurrence={way}}}").run(graph, verify="types")
        report = validate(graph, made, "reassociates")
        assert report.ok and max(r.error for r in report.rows) < 1e-12, report
        crossed = {n.attrs["by"] for layer in made.layers for n in layer.nodes if n.is_op("selective_scan", "rg_lru")}
        assert crossed == {"" if way == "gather" else way}


def test_channels_are_exchanged_where_ranks_divide_them() -> None:
    made = Pipeline.parse("place{mesh='cp=2'}").run(program("mamba"), verify="types")
    moved = [n.op.name for layer in made.layers for n in layer.nodes if n.is_op("all_to_all", "selective_scan")]
    assert "selective_scan" in moved and moved.count("all_to_all") >= 2


KINDS: dict[str, Any] = {
    "name": "kinds", "vocab": 61, "hidden": 20, "blocks": ["mamba1", "lru", "gated_conv", "shared", "kinds_2", "shared"],
    "mamba1": {"width": 14, "state": 5, "rank": 2, "norms": True, "bias": True, "cp": "scan"},
    "lru": {"width": 12, "heads": 3, "act": "silu", "cp": "chain"},
    "gated_conv": {"width": 9, "conv": 4, "bias": True},
    "shared": {
        "attention": {"heads": 4, "kv_heads": 2, "head_dim": 6, "rope": {}}, "mlp": {"width": 11, "glu": False, "act": "relu"},
        "mixer": {"kind": "mamba1", "width": 10, "state": 3, "rank": 2}, "attention_rank": 2, "mlp_rank": 3,
    },
    "kinds": {
        "kinds_2": {
            "kind": "shared", "weights": 1, "mixer": {"kind": "lru", "width": 8, "heads": 2},
            "attention": {"heads": 2, "head_dim": 5}, "mlp": {"width": 7},
        },
    },
}  # fmt: skip


def test_kinds_are_spec_text_like_any_other(tmp_path: Path) -> None:
    spec = load_spec(KINDS)
    (tmp_path / "spec.toml").write_text(dump_spec(spec))
    assert load_spec(tmp_path / "spec.toml") == spec
    assert ways_of(spec) == "mamba1=scan lru=chain"
    for one in (spec, shrink(spec), load_spec({**KINDS, "norm": "layer"})):
        shapes = [t for t, _ in parameters(build(one)).values()]
        assert parameter_count(one) == sum(t.count({}) for t in shapes)
        assert shrink(shrink(one)) == shrink(one)


def test_shared_weights_stand_once_and_have_one_gradient() -> None:
    graph = build(load_spec(KINDS), task="loss", dtype="f64")
    names = list(parameters(graph))
    assert sum(n.endswith("attention_w_in") for n in names) == 2
    params = {n: x.requires_grad_() for n, x in draw(graph).items()}
    evaluate(graph, tokens(), tokens(), params=params).backward()
    gradients = Pipeline.parse("differentiate").run(graph, verify="types")
    report = validate(graph, gradients, "reassociates", gradients=True)
    assert report.ok and all(params[n].grad is not None for n in names)


def test_ways_are_asked_for_inside_shared_weights_too() -> None:
    mixer = {**KINDS["shared"]["mixer"], "cp": "states"}
    shared = {**KINDS["shared"], "weights": 2, "mixer": mixer, "attention": {"heads": 4, "head_dim": 6, "cp": "ring"}}
    spec = load_spec({**KINDS, "shared": shared})
    assert ways_of(spec) == "mamba1=scan lru=chain shared=states shared_weights_2=ring"
    graph = build(spec, task="loss", dtype="f64")
    assert parse(dump(graph)) == graph
    made = Pipeline.parse(f"place{{mesh='cp=2' ways='{ways_of(spec)}'}}").run(graph, verify="types")
    found = {n.attrs["by"] for layer in made.layers for n in layer.nodes if n.is_op("attention", "selective_scan", "rg_lru")}
    assert {"ring", "states", "scan", "chain"} <= found


def test_a_compiled_model_of_all_kinds_trains_and_decodes() -> None:
    model = plait.compile(load_spec(KINDS), dtype="f32", jit=False, mode="train")
    before = model.loss(tokens(), tokens())
    before.backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p -= 0.05 * p.grad
    assert float(model.loss(tokens(), tokens()).detach()) < float(before.detach())
    model.eval()
    made = model.generate(tokens()[:, :5], 4)
    again = model(made[:, :-1])[:, 4:].argmax(-1)
    assert torch.equal(made[:, 5:], again)


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("bamba", {"mamba_d_head": 7}, "mamba_d_head: is 7; 6 heads must make up 48 columns"),
    ("bamba", {"attn_layer_indices": [2]}, "attn_layer_indices: is .*layers from 0 to 1"),
    ("bamba", {"partial_rotary_factor": 0.25}, "partial_rotary_factor: is 0.25; 0.5"),
    ("bamba", {"mamba_proj_bias": True}, "mamba_proj_bias: is True; False"),
    ("jamba", {"attn_layer_offset": 2}, "attn_layer_offset: is 2; must be from 0 to attn_layer_period - 1 = 1"),
    ("jamba", {"sliding_window": 5}, "sliding_window: is 5, which is not honoured for jamba"),
    ("jamba", {"mamba_expand": 0.7}, "mamba_expand: is 0.7, which makes 16.8 columns"),
    ("mamba", {"hidden_act": "gelu"}, "hidden_act: is 'gelu'; 'silu'"),
    ("mamba", {"d_inner": 40}, "d_inner: is 40; 48"),
    ("lfm2", {"use_pos_enc": False}, "use_pos_enc: is False; True"),
    ("lfm2", {"layer_types": ["conv", "window"]}, "layer_types: names 'window'"),
    ("lfm2", {"full_attn_idxs": "all"}, "full_attn_idxs: is 'all'"),
    ("recurrent_gemma", {"block_types": ["mamba"]}, "block_types: is .*recurrent and attention"),
    ("recurrent_gemma", {"lru_width": 30}, "heads: is 4; must divide width = 30"),
    ("recurrent_gemma", {"sliding_window": 9}, "sliding_window: is 9; 5"),
    ("zamba2", {"time_step_limit": [0.1, 0.2]}, "time_step_limit: is .* None"),
    ("zamba2", {"tie_word_embeddings": False}, "tie_word_embeddings: is False; True"),
    ("zamba2", {"layers_block_type": ["attention"] * 5}, "layers_block_type: names full_attention"),
    ("zamba2", {"rms_norm_eps": 1e-6}, "rms_norm_eps: is 1e-06; 1e-05"),
]


@pytest.mark.parametrize(("name", "changes", "said"), MISTAKES)
def test_what_is_not_honoured_is_named(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlaitError, match=said):
        read_plan({**config(name), **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kinds": {"kinds_2": {**KINDS["kinds"]["kinds_2"], "weights": 0}}}, "blocks.4: shares weights 0 with blocks.3"),
        ({"lru": {"width": 10, "heads": 3}}, "heads: is 3; must divide width = 10"),
        ({"mamba1": {"width": 10, "state": 3}}, "rank"),
        ({"mamba1": {**KINDS["mamba1"], "dt_min": 0.2}}, "dt_min: is 0.2; must be at most dt_max"),
    ],
)  # fmt: skip
def test_a_spec_that_cannot_be_is_said(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlaitError, match=said):
        load_spec({**KINDS, **changes})


def test_older_configs_say_the_same(tmp_path: Path) -> None:
    """Names that published files have beside, or in place of, today's."""
    older: dict[str, dict[str, Any]] = {
        "mamba": {"d_model": 24, "d_inner": 48, "n_layer": 2, "rms_norm": True, "ssm_cfg": {}, "fused_add_norm": True,
                  "intermediate_size": 48, "pad_vocab_size_multiple": 8, "time_step_init_scheme": "random"},
        "lfm2": {"block_dim": 24, "conv_dim": 24, "conv_dim_out": 24, "block_norm_eps": 1e-5, "num_heads": 4,
                 "block_use_swiglu": True, "block_mlp_init_scale": 1.0, "use_pos_enc": True, "block_ff_dim": 36},
        "recurrent_gemma": {"_block_types": ["recurrent", "attention"], "embeddings_scale_by_sqrt_dim": True, "head_dim": 8},
        "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid"], "hybrid_layer_ids": [1, 3, 4],
                   "mamba_headdim": 8, "attention_head_dim": 12, "kv_channels": 6, "num_query_groups": 4},
    }  # fmt: skip
    for name, fields in older.items():
        assert read_plan({**config(name), **fields}).spec == spec_of_case(name)
        assert hf_names({**config(name), **fields}) == hf_names(config(name))
    assert load_spec(folder(tmp_path, "mamba")) == spec_of_case("mamba")
