"""Families with recurrent layers."""

from __future__ import annotations

from typing import Any

from ..kinds import Attention, Gdn, Mamba2, Mlp, Moe
from ..sequence import Kind
from . import pieces, tables
from .config import Config
from .decoders import granite_scales, rms, stack
from .mixtures import qwen_ffn
from .pieces import FULL, LINEAR, NO_LIMIT, layer_types, read_attention, read_mamba2, with_bias
from .plan import Plan, make_plan

Pair = tuple[Kind, str]


def qwen3_next(c: Config) -> Plan:
    count = pieces.layers(c)
    every = c.size("full_attention_interval", 4)
    kinds = layer_types(c, "layer_types", count, [LINEAR if (i + 1) % every else FULL for i in range(count)], FULL, LINEAR)
    attention = read_attention(c, fraction=0.25, qk_norm=True, gate=True, **with_bias(c))
    c.must("hidden_act", "silu")  # it is the convolution's too
    c.must("use_sliding_window", False)
    gdn = Gdn(
        key_heads=c.size("linear_num_key_heads", 16), value_heads=c.size("linear_num_value_heads", 32),
        key_dim=c.size("linear_key_head_dim", 128), value_dim=c.size("linear_value_head_dim", 128),
        conv=c.size("linear_conv_kernel_dim", 4),
    )  # fmt: skip
    shared = {"shared_width": c.size("shared_expert_intermediate_size", 512), "shared_gate": True}
    ffn = qwen_ffn(c, count, renormalize=c.flag("norm_topk_prob", True), **shared)
    mixer: dict[str, Pair] = {FULL: (attention, tables.GATED_ATTENTION), LINEAR: (gdn, tables.QWEN_GDN)}
    pairs = [pair for kind, f in zip(kinds, ffn, strict=True) for pair in (mixer.get(kind, mixer[FULL]), f)]
    # Layers of multi-token prediction stand beside the model in published files; generation does without them.
    return make_plan(c, stack(pairs), tables.OUTSIDE, derived=(r"mtp\..*",), zero_centered=True, **rms(c))


MAMBA_NAMES = {
    "heads": "num_heads", "head_dim": "head_dim", "state": "state_size", "groups": "n_groups", "conv": "conv_kernel",
    "conv_bias": "use_conv_bias",
}  # fmt: skip


def mamba2(c: Config) -> Plan:
    c.must("hidden_act", "silu")
    c.must("use_bias", False)
    c.must("rms_norm", True)
    c.idle("time_step_min", "norm_before_gate")
    kind = read_mamba2(c, MAMBA_NAMES, dt_limit=pieces.step_limit(c))
    hidden = c.size("hidden_size")
    _fills(c, "expand", hidden, kind)
    eps = c.number("layer_norm_epsilon", 1e-5)
    blocks = stack([(kind, tables.MAMBA)] * pieces.layers(c), 1, "backbone.layers.{}.")
    return make_plan(c, blocks, tables.BACKBONE, prefix="backbone.", hidden=hidden, norm_eps=eps, max_length=2**20)


def _fills(c: Config, name: str, hidden: int, kind: Mamba2) -> None:
    """Heads have to make up the expanded width, where a config says that too."""
    factor = c.number(name, kind.inner / hidden)
    if factor * hidden != kind.inner:
        c.problems.append(f"{name}: is {factor:g}, which makes {factor * hidden:g} columns; heads make {kind.inner}")


NEMOTRON_NAMES = {
    "heads": "mamba_num_heads", "head_dim": "mamba_head_dim", "state": "ssm_state_size", "groups": "n_groups",
    "conv": "conv_kernel", "conv_bias": "use_conv_bias",
}  # fmt: skip
LETTERS = {"M": LINEAR, "*": FULL, "-": "mlp", "E": "moe"}


def nemotron_h(c: Config) -> Plan:
    """Blocks of one mixer each; attention has no positions."""
    for name in ("use_bias", "mamba_proj_bias"):
        c.must(name, False)
    c.must("mamba_hidden_act", "silu")
    c.must("moe_latent_size", None)
    c.must("num_nextn_predict_layers", 0)
    c.training("hidden_dropout")
    c.idle("expand", "mtp_layers_block_type", "moe_shared_expert_overlap", "num_hidden_layers", "hybrid_override_pattern")
    pattern = str(c.fields.get("hybrid_override_pattern", ""))
    default = [LETTERS.get(letter, letter) for letter in pattern]
    said = c.listed("layers_block_type", default)
    kinds = layer_types(c, "layers_block_type", len(said), default, FULL, LINEAR, "mlp", "moe")
    tables_of = {FULL: tables.NEMOTRON_ATTENTION, LINEAR: tables.MAMBA, "mlp": tables.NEMOTRON_MLP, "moe": tables.NEMOTRON_MOE}
    mixer: dict[str, Kind] = {kind: _nemotron(c, kind) for kind in dict.fromkeys(kinds) if kind in tables_of}
    _idle_kinds(c)
    blocks = stack([(mixer[kind], tables_of[kind]) for kind in kinds if kind in mixer], 1, "backbone.layers.{}.")
    eps = c.number("layer_norm_epsilon", 1e-5)
    fields = {"hidden": c.size("hidden_size"), "norm_eps": eps}
    return make_plan(c, blocks, tables.BACKBONE, prefix="backbone.", derived=(r"mtp\..*",), **fields)


def _nemotron(c: Config, kind: str) -> Kind:
    """One kind of block. Steps are bounded below as the parallel form of the reference does, in decoding too."""
    act: Any = c.act("mlp_hidden_act", "relu2")
    match kind:
        case "full_attention":
            return read_attention(c, rope=False, window=pieces.window(c), **with_bias(c))
        case "linear_attention":
            if pieces.step_limit(c) is not None:
                c.must("time_step_limit", None)
            return read_mamba2(c, NEMOTRON_NAMES, dt_limit=(c.number("time_step_min", 0.001), NO_LIMIT))
        case "mlp":
            return Mlp(width=c.size("intermediate_size"), act=act, glu=False, bias=c.flag("mlp_bias"))
        case _:
            return _nemotron_moe(c, act)


def _nemotron_moe(c: Config, act: Any) -> Moe:
    c.must("n_shared_experts", 1)
    c.must("mlp_bias", False)
    c.must("output_router_logits", False)
    return Moe(
        experts=c.size("n_routed_experts"), top_k=c.size("num_experts_per_tok"), width=c.size("moe_intermediate_size"),
        act=act, glu=False, score="sigmoid", route_bias=True, renormalize=c.flag("norm_topk_prob", True),
        route_scale=c.number("routed_scaling_factor", 1.0), groups=c.size("n_group", 1), group_limit=c.size("topk_group", 1),
        shared_width=c.size("moe_shared_expert_intermediate_size"),
    )  # fmt: skip


def _idle_kinds(c: Config) -> None:
    """Sizes of kinds that this model has no block of."""
    c.idle(
        "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "attention_dropout", "sliding_window",
        "intermediate_size", "mlp_bias", "mlp_hidden_act", *NEMOTRON_NAMES.values(), "time_step_min", "time_step_limit",
        "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
        "num_experts_per_tok", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob", "output_router_logits",
    )  # fmt: skip


GRANITE_NAMES = {
    "heads": "mamba_n_heads", "head_dim": "mamba_d_head", "state": "mamba_d_state", "groups": "mamba_n_groups",
    "conv": "mamba_d_conv", "conv_bias": "mamba_conv_bias",
}  # fmt: skip


def granitemoehybrid(c: Config) -> Plan:
    """Mamba-2 or attention, then experts beside a shared feed-forward layer, or that alone."""
    c.must("mamba_proj_bias", False)
    c.must("hidden_act", "silu")
    c.must("position_embedding_type", None, "rope", "nope")
    c.training("attention_dropout")
    count = pieces.layers(c)
    kinds = layer_types(c, "layer_types", count, [LINEAR] * count, FULL, LINEAR)
    rope, scale = c.get("position_embedding_type") == "rope", c.number("attention_multiplier", 1.0)
    attention: Attention = read_attention(c, rope=rope, scale=scale, **with_bias(c))
    c.idle("rope_parameters", "rope_theta", "rope_scaling", "normalization_function", "init_method", "logits_to_keep")
    mamba = read_mamba2(c, GRANITE_NAMES, dt_limit=pieces.step_limit(c))
    _fills(c, "mamba_expand", c.size("hidden_size"), mamba)
    mixer: dict[str, Pair] = {FULL: (attention, tables.ATTENTION), LINEAR: (mamba, tables.GRANITE_MAMBA)}
    ffn = _granite_ffn(c)
    pairs = [pair for kind in kinds for pair in (mixer.get(kind, mixer[FULL]), ffn)]
    return make_plan(c, stack(pairs), tables.OUTSIDE, **granite_scales(c), **rms(c))


def _granite_ffn(c: Config) -> Pair:
    shared = c.size("shared_intermediate_size", 1024)
    if not c.get("num_local_experts", 8):
        c.idle("num_experts_per_tok", "intermediate_size", "router_aux_loss_coef", "output_router_logits")
        return Mlp(width=shared), tables.GRANITE_MLP
    return pieces.read_moe(c, "num_local_experts", "intermediate_size", shared_width=shared), tables.GRANITE_MOE
