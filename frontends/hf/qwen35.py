"""Qwen 3.5: gated delta nets and gated attention, dense or with experts; of its composite models the text part."""

from __future__ import annotations

from typing import Any

from ..kinds import Gdn
from ..sequence import Kind
from . import pieces, tables, tables_first
from .composite import text_part
from .config import Config
from .decoders import rms, stack
from .pieces import FULL, LINEAR, layer_types, read_attention, read_mlp, with_bias
from .plan import Plan, make_plan
from .ropes import read_rope

Pair = tuple[Kind, str]
# How images would share out the pairs: a text's three positions are one.
THREE = ("mrope_section", "mrope_interleaved")
VISION = (
    "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "image_token_index",
    "video_token_index",
)  # fmt: skip


def read_gdn(c: Config) -> Gdn:
    """A gated delta net under Qwen's names."""
    return Gdn(
        key_heads=c.size("linear_num_key_heads", 16), value_heads=c.size("linear_num_value_heads", 32),
        key_dim=c.size("linear_key_head_dim", 128), value_dim=c.size("linear_value_head_dim", 128),
        conv=c.size("linear_conv_kernel_dim", 4),
    )  # fmt: skip


def _text(c: Config, ffn: list[Pair]) -> Plan:
    c.must("hidden_act", "silu")  # it is the convolution's too
    c.must("attn_output_gate", True)
    c.must("mamba_ssm_dtype", "float32")
    c.idle("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mlp_only_layers", "full_attention_interval")
    count, every = pieces.layers(c), c.size("full_attention_interval", 4)
    kinds = layer_types(c, "layer_types", count, [LINEAR if (i + 1) % every else FULL for i in range(count)], FULL, LINEAR)
    plain = read_attention(c, rope=False, qk_norm=True, gate=True, **with_bias(c))
    rope = read_rope(c, fraction=0.25, width=plain.head_dim, idle=THREE)
    attention = plain.model_copy(update={"rope": rope})
    mixer: dict[str, Pair] = {
        FULL: (attention, tables.GATED_ATTENTION),
        LINEAR: (read_gdn(c), tables_first.APART_GDN),
    }
    pairs = [pair for kind, f in zip(kinds, ffn, strict=True) for pair in (mixer.get(kind, mixer[FULL]), f)]
    derived = (r"mtp\..*", r"model\.visual\..*")
    return make_plan(c, stack(pairs), tables.OUTSIDE, derived=derived, zero_centered=True, **rms(c))


def qwen3_5_text(c: Config) -> Plan:
    return _text(c, [(read_mlp(c), tables.MLP)] * pieces.layers(c))


def qwen3_5_moe_text(c: Config) -> Plan:
    """Experts in every layer, their weights made to sum to one, beside a gated shared one."""
    c.must("norm_topk_prob", True)
    c.must("decoder_sparse_step", 1)
    c.idle("intermediate_size")
    shared: dict[str, Any] = {"shared_width": c.size("shared_expert_intermediate_size", 512), "shared_gate": True}
    moe = pieces.read_moe(c, "num_experts", "moe_intermediate_size", **shared)
    return _text(c, [(moe, tables.QWEN_MOE)] * pieces.layers(c))


def qwen3_5(c: Config) -> Plan:
    return text_part(c, qwen3_5_text, VISION)


def qwen3_5_moe(c: Config) -> Plan:
    return text_part(c, qwen3_5_moe_text, VISION)
