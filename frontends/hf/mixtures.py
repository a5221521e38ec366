"""Families with mixtures of experts."""

from __future__ import annotations

from typing import Any

from ..kinds import Attention
from ..sequence import Kind
from . import pieces, tables
from .config import Config
from .decoders import each, rms, stack
from .pieces import read_attention, read_mlp, read_moe, with_bias
from .plan import Plan, make_plan


def mixed(c: Config, attention: list[Attention], ffn: list[tuple[Kind, str]], **fields: Any) -> Plan:
    """One attention and one feed-forward block a layer, experts or dense."""
    pairs: list[tuple[Kind, str]] = [p for a, f in zip(attention, ffn, strict=True) for p in ((a, tables.ATTENTION), f)]
    return make_plan(c, stack(pairs), tables.OUTSIDE, **{**rms(c), **fields})


ROUTING = (
    "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "num_experts_per_tok", "output_router_logits",
    "router_aux_loss_coef",
)  # fmt: skip


def mixtral(c: Config) -> Plan:
    c.must("router_jitter_noise", 0.0, 0)
    attention = each(read_attention(c, theta=1e6), [pieces.window(c)] * pieces.layers(c))
    moe = read_moe(c, "num_local_experts", "intermediate_size")
    return mixed(c, attention, [(moe, tables.MIXTRAL_MOE)] * len(attention), **rms(c, 1e-5))


def qwen_ffn(c: Config, count: int, **more: Any) -> list[tuple[Kind, str]]:
    """Qwen's feed-forward layers: experts, and dense ones where the config says so."""
    mlp = read_mlp(c)
    if c.get("num_experts") == 0:
        c.idle(*ROUTING)
        return [(mlp, tables.MLP)] * count
    moe = read_moe(c, "num_experts", "moe_intermediate_size", **more)
    return [(moe, tables.QWEN_MOE) if is_sparse else (mlp, tables.MLP) for is_sparse in pieces.sparse(c, count)]


def qwen2_moe(c: Config) -> Plan:
    attention = each(read_attention(c, bias=c.flag("qkv_bias", True)), pieces.qwen_windows(c, pieces.layers(c)))
    shared = {"shared_width": c.size("shared_expert_intermediate_size"), "shared_gate": True}
    return mixed(c, attention, qwen_ffn(c, len(attention), renormalize=c.flag("norm_topk_prob"), **shared))


def qwen3_moe(c: Config) -> Plan:
    span = pieces.window(c, 4096) if c.flag("use_sliding_window") else 0
    c.idle("sliding_window", "max_window_layers")
    attention = each(read_attention(c, qk_norm=True, **with_bias(c)), [span] * pieces.layers(c))
    return mixed(c, attention, qwen_ffn(c, len(attention), renormalize=c.flag("norm_topk_prob")))
