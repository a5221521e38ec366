"""Families with latent attention."""

from __future__ import annotations

from typing import Any

from ..kinds import Kda, Mla, Moe, Rope
from ..sequence import Kind
from . import pieces, tables
from .config import Config
from .decoders import rms, stack
from .pieces import FULL, LINEAR, layer_types, read_mlp
from .plan import Plan, make_plan
from .ropes import mscale, read_rope

Pair = tuple[Kind, str]


def read_latent(c: Config, rope: Rope | None, usual: int | None = None, **more: Any) -> Pair:
    """Latent attention, its queries from a latent of their own or not, and its table.

    `usual` is the family's rank of queries where a config does not say it, `more` what the family adds.
    """
    heads = c.size("num_attention_heads")
    c.must("num_key_value_heads", heads)
    c.must("attention_bias", False)
    c.training("attention_dropout")
    c.idle("head_dim", "qk_head_dim")
    rank = c.get("q_lora_rank") if "q_lora_rank" in c.fields else usual
    kind = Mla(
        heads=heads, own_dim=c.size("qk_nope_head_dim", 128), shared_dim=c.size("qk_rope_head_dim", 64),
        value_dim=c.size("v_head_dim", 128), kv_rank=c.size("kv_lora_rank", 512),
        q_rank=c.size("q_lora_rank", usual) if rank else 0, rope=rope, **more,
    )  # fmt: skip
    return kind, tables.LATENT if rank else tables.LATENT_KEYS


def read_routed(c: Config, names: dict[str, str], groups: int = 1, limit: int = 1, scale: float = 1.0) -> Moe:
    """Sigmoid scores with a correction bias, groups, and shared experts that are one wide one.

    `groups`, `limit` and `scale` are the family's own where a config does not say them.
    """
    c.must("output_router_logits", False)
    c.must("scoring_func", "sigmoid")
    c.must("topk_method", "noaux_tc")
    c.idle("router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size", "moe_layer_freq")
    width, act = c.size("moe_intermediate_size"), c.act("hidden_act")
    chosen: Any = {"act": act, "score": "sigmoid", "route_bias": True}
    return Moe(
        experts=c.size(names["experts"]), top_k=c.size(names["top_k"]), width=width,
        renormalize=c.flag(names["renormalize"], True), route_scale=c.number("routed_scaling_factor", scale),
        groups=c.size(names["groups"], groups), group_limit=c.size("topk_group", limit),
        shared_width=width * c.size(names["shared"], 1), **chosen,
    )  # fmt: skip


DEEPSEEK = {
    "experts": "n_routed_experts", "top_k": "num_experts_per_tok", "renormalize": "norm_topk_prob", "groups": "n_group",
    "shared": "n_shared_experts",
}  # fmt: skip


def stretched_latent(c: Config, interleaved: bool) -> Pair:
    """Latent attention whose scores grow as YaRN has them where its positions are stretched."""
    shared = c.size("qk_rope_head_dim", 64)
    rope = read_rope(c, width=shared).model_copy(update={"interleaved": interleaved})
    kind, table = read_latent(c, rope, usual=1536)
    said: dict[str, Any] = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    down: Any = said.get("mscale_all_dim")
    if not down or said.get("rope_type", said.get("type", "default")) == "default":
        return kind, table
    scale = kind.head_dim**-0.5 * mscale(said.get("factor", 1.0), down) ** 2  # type: ignore[union-attr] # latent attention
    return kind.model_copy(update={"scale": scale}), table


def deepseek_v2(c: Config) -> Plan:
    """Softmax scores, chosen from all experts or from groups with the best one; weights do not sum to one."""
    c.must("mlp_bias", False)
    c.must("scoring_func", "softmax")
    c.must("norm_topk_prob", False)  # what is read as true by some and passed over by others
    count, first = pieces.layers(c), int(c.number("first_k_dense_replace", 0))
    moe: Pair = (_softmax_routed(c), tables.DEEPSEEK_MOE)
    attention, mlp = stretched_latent(c, interleaved=True), (read_mlp(c), tables.MLP)
    pairs = [pair for i in range(count) for pair in (attention, mlp if i < first else moe)]
    return make_plan(c, stack(pairs), tables.OUTSIDE, **rms(c))


def _softmax_routed(c: Config) -> Moe:
    c.must("output_router_logits", False)
    c.idle("router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size")
    c.must("moe_layer_freq", 1)
    c.must("topk_method", "greedy", "group_limited_greedy")
    groups, limit = c.size("n_group", 1), c.size("topk_group", 1)
    if c.get("topk_method", "greedy") == "greedy":
        groups = limit = 1
    width = c.size("moe_intermediate_size", 1407)
    return Moe(
        experts=c.size("n_routed_experts", 64), top_k=c.size("num_experts_per_tok"), width=width,
        act=c.act("hidden_act"),  # type: ignore[arg-type] # a known name
        renormalize=False, route_scale=c.number("routed_scaling_factor", 1.0),
        groups=groups, group_limit=limit, group_best=1 if groups > 1 else 2, shared_width=width * c.size("n_shared_experts", 2),
    )  # fmt: skip


def deepseek_v3(c: Config) -> Plan:
    attention, count = stretched_latent(c, c.flag("rope_interleave", True)), pieces.layers(c)
    dense = int(c.number("first_k_dense_replace", 3))
    moe: Pair = (read_routed(c, DEEPSEEK, groups=8, limit=4, scale=2.5), tables.DEEPSEEK_MOE)
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
    linear = c.table("linear_attn_config")
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
    routed = read_routed(c, KIMI, scale=2.446)
    ffn: dict[str, Pair] = {"dense": (read_mlp(c), tables.KIMI_MLP), "sparse": (routed, tables.KIMI_MOE)}
    pairs = [p for mix, f in zip(kinds, sparse, strict=True) for p in (mixer.get(mix, mixer[FULL]), ffn.get(f, ffn["dense"]))]
    length = c.size("model_max_length", c.size("max_position_embeddings", 2**20))
    return make_plan(c, stack(pairs), tables.OUTSIDE, max_length=length, **rms(c, 1e-5))


def _kimi_layers(linear: dict[str, Any], count: int) -> list[str]:
    """What each layer is: as published configs say it, counted from one, or every fourth with full attention."""
    if "full_attn_layers" not in linear:
        return [FULL if i and i % 4 == 0 else LINEAR for i in range(count)]
    return [FULL if i + 1 in linear["full_attn_layers"] else LINEAR for i in range(count)]
