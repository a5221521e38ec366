"""Families with latent attention."""

from __future__ import annotations

from typing import Any

from ..kinds import Kda, Mla, Moe, Rope
from ..sequence import Kind
from . import pieces, tables
from .config import Config, read_rope
from .decoders import rms, stack
from .pieces import FULL, LINEAR, layer_types, read_mlp
from .plan import Plan, make_plan

Pair = tuple[Kind, str]


def read_latent(c: Config, rope: Rope | None) -> Pair:
    """Latent attention, its queries from a latent of their own or not, and its table."""
    heads = c.size("num_attention_heads")
    c.must("num_key_value_heads", heads)
    c.must("attention_bias", False)
    c.training("attention_dropout")
    c.idle("head_dim", "qk_head_dim")
    rank = c.get("q_lora_rank")
    kind = Mla(
        heads=heads, own_dim=c.size("qk_nope_head_dim", 128), shared_dim=c.size("qk_rope_head_dim", 64),
        value_dim=c.size("v_head_dim", 128), kv_rank=c.size("kv_lora_rank", 512),
        q_rank=c.size("q_lora_rank") if rank else 0, rope=rope,
    )  # fmt: skip
    return kind, tables.LATENT if rank else tables.LATENT_KEYS


def read_routed(c: Config, names: dict[str, str]) -> Moe:
    """Sigmoid scores with a correction bias, groups, and shared experts that are one wide one."""
    c.must("output_router_logits", False)
    c.must("scoring_func", "sigmoid")
    c.must("topk_method", "noaux_tc")
    c.idle("router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size", "moe_layer_freq")
    width, act = c.size("moe_intermediate_size"), c.act("hidden_act")
    chosen: Any = {"act": act, "score": "sigmoid", "route_bias": True}
    return Moe(
        experts=c.size(names["experts"]), top_k=c.size(names["top_k"]), width=width,
        renormalize=c.flag(names["renormalize"], True), route_scale=c.number("routed_scaling_factor", 1.0),
        groups=c.size(names["groups"], 1), group_limit=c.size("topk_group", 1),
        shared_width=width * c.size(names["shared"], 1), **chosen,
    )  # fmt: skip


DEEPSEEK = {
    "experts": "n_routed_experts", "top_k": "num_experts_per_tok", "renormalize": "norm_topk_prob", "groups": "n_group",
    "shared": "n_shared_experts",
}  # fmt: skip


def deepseek_v3(c: Config) -> Plan:
    rope = read_rope(c).model_copy(update={"interleaved": c.flag("rope_interleave", True)})
    attention, count = read_latent(c, rope), pieces.layers(c)
    dense = int(c.number("first_k_dense_replace", 3))
    moe: Pair = (read_routed(c, DEEPSEEK), tables.DEEPSEEK_MOE)
    mlp: Pair = (read_mlp(c), tables.MLP)
    pairs = [pair for i in range(count) for pair in (attention, mlp if i < dense else moe)]
    # A layer that predicts more tokens stands behind the others; generation does without it.
    c.idle("num_nextn_predict_layers", "num_mtp_layers")
    return make_plan(c, stack(pairs), tables.OUTSIDE, derived=(rf"model\.layers\.{count}\..*",), **rms(c))


KIMI = {
    "experts": "num_experts", "top_k": "num_experts_per_token", "renormalize": "moe_renormalize",
    "groups": "num_expert_group", "shared": "num_shared_experts",
}  # fmt: skip


def kimi_linear(c: Config) -> Plan:
    """Kimi delta attention and latent attention without positions."""
    for name, value in (("hidden_act", "silu"), ("mla_use_nope", True), ("moe_router_activation_func", "sigmoid")):
        c.must(name, value)
    c.must("num_nextn_predict_layers", 0)
    c.idle("use_grouped_topk", "rope_theta")
    linear: Any = c.get("linear_attn_config", {})
    kda = Kda(
        heads=c.size("linear_num_heads", linear.get("num_heads", 32)),
        head_dim=c.size("linear_head_dim", linear.get("head_dim", 128)),
        conv=c.size("linear_conv_kernel_dim", linear.get("short_conv_kernel_size", 4)),
    )
    count = pieces.layers(c)
    kinds = layer_types(c, "layer_types", count, _kimi_layers(linear, count), FULL, LINEAR)
    dense = int(c.number("first_k_dense_replace", 1))
    default = ["dense" if i < dense else "sparse" for i in range(count)]
    sparse = c.names("mlp_layer_types", count, default, ("dense", "sparse"))
    mixer: dict[str, Pair] = {FULL: read_latent(c, None), LINEAR: (kda, tables.KDA)}
    ffn: dict[str, Pair] = {"dense": (read_mlp(c), tables.KIMI_MLP), "sparse": (read_routed(c, KIMI), tables.KIMI_MOE)}
    pairs = [p for mix, f in zip(kinds, sparse, strict=True) for p in (mixer.get(mix, mixer[FULL]), ffn.get(f, ffn["dense"]))]
    length = c.size("model_max_length", c.size("max_position_embeddings", 2**20))
    return make_plan(c, stack(pairs), tables.OUTSIDE, max_length=length, **rms(c, 1e-5))


def _kimi_layers(linear: dict[str, Any], count: int) -> list[str]:
    """What each layer is: as published configs say it, counted from one, or every fourth with full attention."""
    if "full_attn_layers" not in linear:
        return [FULL if i and i % 4 == 0 else LINEAR for i in range(count)]
    return [FULL if i + 1 in linear["full_attn_layers"] else LINEAR for i in range(count)]
