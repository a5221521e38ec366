"""Families with mixers side by side."""

from __future__ import annotations

from typing import Any

from ..kinds import Attention
from ..parallel import Parallel
from . import pieces, tables
from .config import Config
from .decoders import rms
from .pieces import read_attention, read_mamba2, read_mlp, single
from .plan import Placed, Plan, make_plan

FALCON_NAMES = {
    "heads": "mamba_n_heads", "head_dim": "mamba_d_head", "state": "mamba_d_state", "groups": "mamba_n_groups",
    "conv": "mamba_d_conv", "conv_bias": "mamba_conv_bias",
}  # fmt: skip


def falcon_h1(c: Config) -> Plan:
    """Attention beside Mamba-2, then a feed-forward layer, all with multipliers."""
    for name in ("mamba_proj_bias", "projectors_bias", "attention_bias"):
        c.must(name, False)
    c.must("hidden_act", "silu")
    c.idle("mamba_expand")
    attention, reach = _attention(c)
    inside = c.number("ssm_in_multiplier", 1.0)
    normed = {"out_norm": c.flag("mamba_rms_norm"), "norm_first": c.flag("mamba_norm_before_gate", True)}
    scales = tuple(inside * single(x) for x in c.numbers("ssm_multipliers", [1.0] * 5))
    mamba = read_mamba2(c, FALCON_NAMES, dt_limit=pieces.step_limit(c), in_scales=scales, **normed)
    if mamba.inner != c.size("mamba_d_ssm", mamba.inner):
        c.problems.append(f"mamba_d_ssm: is {c.get('mamba_d_ssm')}; heads make {mamba.inner}")
    mixers = Parallel(parts=(attention, mamba), scales=(reach, c.number("ssm_out_multiplier", 1.0)))
    gate, down = c.numbers("mlp_multipliers", [1.0, 1.0])
    ffn = Parallel(parts=(read_mlp(c, bias=c.flag("mlp_bias"), gate_scale=gate),), scales=(down,))
    blocks: list[Placed] = []
    for i in range(pieces.layers(c)):
        at = f"model.layers.{i}."
        blocks.append(Placed(mixers, at, tables.FALCON_NORM, (tables.ATTENTION, tables.GRANITE_MAMBA)))
        blocks.append(Placed(ffn, at, tables.FALCON_MLP_NORM, (tables.FALCON_MLP,)))
    fields = {"embed_scale": c.number("embedding_multiplier", 1.0), "logit_scale": c.number("lm_head_multiplier", 1.0)}
    return make_plan(c, blocks, tables.FALCON_OUTSIDE, **fields, **rms(c, 1e-5))


def _attention(c: Config) -> tuple[Attention, float]:
    """Attention and what its result is multiplied by; multipliers of its input and keys are the scores' and the values'."""
    inside = c.number("attention_in_multiplier", 1.0)
    plain = read_attention(c)
    scale: Any = plain.multiplier * inside * inside * c.number("key_multiplier", 1.0)
    return plain.model_copy(update={"scale": scale}), inside * c.number("attention_out_multiplier", 1.0)
