"""Presets: published sizes reproduced, small siblings of the same structure, counts against real checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
from plait.frontends.count import active_parameter_count, block_parameters, parameter_count
from plait.frontends.kinds import Attention, Gdn, Kda, Mamba2, Mlp, Moe
from plait.frontends.load import load_spec
from plait.frontends.presets import PRESETS, Preset, preset_path
from plait.frontends.sequence import Kind
from plait.frontends.shrink import shrink
from plait.frontends.spec import ModelSpec, named_kinds

PUBLISHED = {
    "qwen3-next-80b-a3b": (79_674_391_296, 3_874_929_408),
    "nemotron-h-8b": (8_100_000_000, 8_100_000_000),
    "nemotron-3-nano-30b-a3b": (31_577_937_344, 3_580_000_000),
    "llama-3-8b": (8_030_261_248, 8_030_261_248),
    "mamba-2-2.7b": (2_702_599_680, 2_702_599_680),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_match_the_published_totals(name: str) -> None:
    spec = load_spec(name)
    total, active = PUBLISHED[name]
    assert parameter_count(spec) == pytest.approx(total, rel=1e-3)
    assert active_parameter_count(spec) == pytest.approx(active, rel=1e-3)


def test_counts_without_a_doubt_are_exact() -> None:
    for name in ("qwen3-next-80b-a3b", "llama-3-8b", "mamba-2-2.7b"):
        spec = load_spec(name)
        assert (parameter_count(spec), active_parameter_count(spec)) == PUBLISHED[name]
    # The published total leaves out the routers' correction biases: 128 in each of 23 layers.
    nano = parameter_count(load_spec("nemotron-3-nano-30b-a3b"))
    assert nano - PUBLISHED["nemotron-3-nano-30b-a3b"][0] == 23 * 128


@pytest.mark.parametrize(
    ("block", "hidden", "tensors"),
    [
        # in_proj, conv, A_log, D, dt_bias, norm, out_proj of a small Nemotron-H checkpoint.
        (
            Mamba2(heads=8, head_dim=16, state=16, groups=2),
            64,
            [(328, 64), (192, 4), (192,), (8,), (8,), (8,), (128,), (64, 128)],
        ),
        # q with its gate, k, v, o, q_norm, k_norm of a small Qwen3-Next checkpoint.
        (
            Attention(heads=4, kv_heads=2, head_dim=32, qk_norm=True, gate=True),
            64,
            [(256, 64), (64, 64), (64, 64), (64, 128), (32,), (32,)],
        ),
        # qkvz, ba, conv, A_log, dt_bias, norm, out of the same.
        (
            Gdn(key_heads=2, value_heads=4, key_dim=16, value_dim=24),
            64,
            [(256, 64), (8, 64), (160, 4), (4,), (4,), (24,), (64, 96)],
        ),
        # q, k, v, o, f_a, f_b, g_a, g_b, b, A_log, dt_bias, norm and three convolutions of a small Kimi-Linear checkpoint.
        (
            Kda(heads=4, head_dim=16),
            64,
            [*[(64, 64)] * 4, (16, 64), (64, 16), (16, 64), (64, 16), (4, 64), (4,), (64,), (16,), *[(64, 4)] * 3],
        ),
        # router, experts, shared expert and its gate of a small Qwen3-Next checkpoint.
        (
            Moe(experts=8, top_k=3, width=24, shared_width=40, shared_gate=True),
            64,
            [(8, 64), *[(24, 64)] * 24, *[(40, 64)] * 3, (1, 64)],
        ),
        # router and bias, ungated experts, shared expert of a small Nemotron-H checkpoint.
        (
            Moe(experts=8, top_k=2, width=32, act="relu2", glu=False, score="sigmoid", route_bias=True, shared_width=48),
            64,
            [(8, 64), (8,), *[(32, 64)] * 16, *[(48, 64)] * 2],
        ),
        (Mlp(width=9, bias=True), 5, [(9, 5), (9,), (9, 5), (9,), (5, 9), (5,)]),
        (Attention(heads=2, head_dim=3, bias=True, out_bias=True, sinks=True), 5, [*[(6, 5), (6,)] * 3, (5, 6), (5,), (2,)]),
    ],
)
def test_block_counts_match_the_tensors_of_checkpoints(block: Kind, hidden: int, tensors: list[tuple[int, ...]]) -> None:
    want = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in tensors)
    assert block_parameters(block, hidden) == want


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_load_under_their_name(preset: Preset) -> None:
    spec = load_spec(preset.name)
    assert spec.name == preset.name and preset.about
    if preset.name.endswith("-tiny"):
        big = load_spec(preset.name.removesuffix("-tiny"))
        assert 1e6 <= parameter_count(spec) <= 3e6 and spec.vocab == 256
        assert list(named_kinds(spec)) == list(named_kinds(big))
        assert choices(spec) == choices(big)


def choices(spec: ModelSpec) -> list[Any]:
    """Everything of a spec that is no size: its flags and names, kind by kind."""
    records = [spec, *named_kinds(spec).values()]
    return [{k: v for k, v in r.model_dump().items() if isinstance(v, (bool, str)) and k != "name"} for r in records]


def test_every_preset_file_is_listed() -> None:
    files = {path.stem for path in preset_path("demo").parent.glob("*.toml")}
    assert files == {preset.name for preset in PRESETS}
    assert {f"{name}-tiny" for name in PUBLISHED} <= files


def test_the_demo_is_a_small_hybrid() -> None:
    spec = load_spec("demo")
    assert 4e6 < parameter_count(spec) < 6e6 and spec.vocab == 256
    assert {b.kind for b in spec.blocks} == {"gdn", "mamba2", "attention", "moe"}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("qwen3-next-80b-a3b", "gdn moe gdn moe attention"),
        ("nemotron-h-8b", "mamba2 mlp mamba2 mlp attention"),
        ("llama-3-8b", "attention mlp attention mlp"),
        ("mamba-2-2.7b", "mamba2 mamba2"),
    ],
)
def test_shrunk_presets(name: str, kinds: str) -> None:
    spec = shrink(load_spec(name))
    assert [block.kind for block in spec.blocks] == kinds.split()
    assert parameter_count(spec) < 60_000
    assert shrink(spec) == spec
