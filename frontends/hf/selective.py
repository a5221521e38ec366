"""Families of state space layers: Bamba (Mamba-2 and attention), Jamba (Mamba-1, attention, experts), Mamba itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...ir.errors import SpecError
from ..kinds import Attention, Mlp, Moe
from ..kinds_scan import Mamba1
from ..problems import shown
from . import pieces, tables, tables_second
from .config import Config
from .decoders import rms, stack
from .hybrids import GRANITE_NAMES, Pair
from .pieces import read_attention, read_mamba2, read_mlp, with_bias
from .plan import Plan, make_plan


def bamba(c: Config) -> Plan:
    """Mamba-2, or attention that turns half of each head, then a feed-forward layer."""
    c.must("mamba_proj_bias", False)
    c.must("hidden_act", "silu")
    c.must("partial_rotary_factor", 0.5)  # the reference overwrites any other
    c.training("z_loss_coefficient")
    attention = read_attention(c, fraction=0.5, **with_bias(c))
    hidden, heads = c.size("hidden_size"), c.size("mamba_n_heads", 128)
    inner = expanded(c, "mamba_expand", hidden)
    if c.fields.get("mamba_d_head") in (None, "auto"):
        c = replace(c, fields={**c.fields, "mamba_d_head": inner // heads})
    mamba = read_mamba2(c, GRANITE_NAMES, dt_limit=pieces.step_limit(c))
    if mamba.inner != inner:
        c.problems.append(f"mamba_d_head: is {mamba.head_dim}; {heads} heads must make up {inner} columns")
    mixers: tuple[Pair, Pair] = (mamba, tables.GRANITE_MAMBA), (attention, tables.ATTENTION)
    chosen = listed(c, "attn_layer_indices", pieces.layers(c))
    ffn: Pair = (read_mlp(c, bias=c.flag("mlp_bias")), tables_second.FEED_FORWARD)
    pairs: list[Pair] = [pair for i in range(pieces.layers(c)) for pair in (mixers[i in chosen], ffn)]
    return make_plan(c, stack(pairs), tables.FALCON_OUTSIDE, **rms(c, 1e-5))


def expanded(c: Config, name: str, hidden: int) -> int:
    """The columns of a state space layer, as a multiple of the model's."""
    factor = c.number(name, 2.0)
    if (inner := factor * hidden) != int(inner) or inner < 1:
        raise SpecError(f"config.json: {name}: is {factor:g}, which makes {inner:g} columns; must make a whole number")
    return int(inner)


def listed(c: Config, name: str, count: int) -> set[int]:
    """Layers that are listed by number."""
    value: Any = c.get(name, [])
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < count for i in value):
        raise SpecError(f"config.json: {name}: is {shown(value)}; must be a list of layers from 0 to {count - 1}")
    return set(value)


def jamba(c: Config) -> Plan:
    """Mamba-1 with normed steps, B and C, or attention without positions; then experts or one feed-forward layer."""
    count = pieces.layers(c)
    c.idle("use_mambapy", "use_associative_scan")
    attention: Attention = read_attention(c, rope=False)
    names = {"state": "mamba_d_state", "conv": "mamba_d_conv", "conv_bias": "mamba_conv_bias", "bias": "mamba_proj_bias"}
    mamba = _mamba1(c, names, "mamba_expand", "mamba_dt_rank", norms=True)
    mixers: tuple[Pair, Pair] = (mamba, tables_second.JAMBA_MAMBA), (attention, tables.ATTENTION)
    full, routed = _every(c, "attn_layer", count, 8, 4), _every(c, "expert_layer", count, 2, 1)
    feeds = _jamba_feeds(c, any(routed))
    pairs = [pair for i in range(count) for pair in (mixers[full[i]], feeds[routed[i]])]
    return make_plan(c, stack(pairs), tables_second.JAMBA_OUTSIDE, **rms(c))


def _every(c: Config, name: str, count: int, period: int, offset: int) -> list[bool]:
    """Which layers come up: one in a period, the first at its offset."""
    period, at = c.size(f"{name}_period", period), c.get(f"{name}_offset", offset)
    if type(at) is not int or not 0 <= at < period:
        raise SpecError(f"config.json: {name}_offset: is {shown(at)}; must be from 0 to {name}_period - 1 = {period - 1}")
    return [i % period == at for i in range(count)]


def _jamba_feeds(c: Config, routed: bool) -> tuple[Pair, Pair]:
    """The layer without experts, and the one with them; one expert is none."""
    dense: Mlp = read_mlp(c)
    plain: Pair = (dense, tables_second.FEED_FORWARD)
    if c.size("num_experts", 16) == 1 or not routed:
        c.idle("num_experts_per_tok", "router_aux_loss_coef", "output_router_logits")
        return plain, plain
    moe: Moe = pieces.read_moe(c, "num_experts", "intermediate_size", renormalize=False)
    return plain, (moe, tables_second.JAMBA_MOE)


def _mamba1(c: Config, names: dict[str, str], expand: str, rank: str, **more: Any) -> Mamba1:
    """Mamba-1 under the family's names for state, conv and the two biases."""
    c.must("hidden_act", "silu")
    hidden = c.size("hidden_size")
    columns: Any = -(-hidden // 16) if c.get(rank, "auto") == "auto" else c.size(rank)
    return Mamba1(
        width=expanded(c, expand, hidden), state=c.size(names["state"], 16), rank=columns, conv=c.size(names["conv"], 4),
        conv_bias=c.flag(names["conv_bias"], True), bias=c.flag(names["bias"]), **more,
    )  # fmt: skip


def mamba(c: Config) -> Plan:
    names = {"state": "state_size", "conv": "conv_kernel", "conv_bias": "use_conv_bias", "bias": "use_bias"}
    kind, hidden = _mamba1(c, names, "expand", "time_step_rank"), c.size("hidden_size")
    # How first weights are drawn, and how others run it; the rest are older names of the same.
    c.idle("time_step_min", "time_step_scale", "time_step_init_scheme", "use_mambapy", "use_associative_scan")
    c.idle("fused_add_norm", "pad_vocab_size_multiple")
    for name, value in {"d_model": hidden, "d_inner": kind.width, "intermediate_size": kind.width}.items():
        c.must(name, value)
    c.must("n_layer", pieces.layers(c))
    c.must("rms_norm", True)
    c.must("ssm_cfg", {})
    blocks = stack([(kind, tables_second.MAMBA_1)] * pieces.layers(c), 1, "backbone.layers.{}.")
    fields: dict[str, Any] = {"hidden": hidden, "norm_eps": c.number("layer_norm_epsilon", 1e-5), "max_length": 2**20}
    tied = c.flag("tie_word_embeddings", True)
    return make_plan(c, blocks, tables.BACKBONE, prefix="backbone.", tied=tied, **fields)
