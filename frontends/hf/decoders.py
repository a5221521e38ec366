"""Families of attention and dense feed-forward layers."""

from __future__ import annotations

from typing import Any

from ..kinds import Attention, Mlp
from ..sequence import Kind
from . import pieces, tables
from .config import Config
from .pieces import FULL, SLIDING, read_attention, read_mlp, with_bias
from .plan import Placed, Plan, make_plan

AT = "model.layers.{}."


def stack(pairs: list[tuple[Kind, str]], per_layer: int = 2, at: str = AT) -> list[Placed]:
    """Blocks in order with their tables, `per_layer` of ours for one of theirs."""
    return [Placed(kind, at.format(i // per_layer), table) for i, (kind, table) in enumerate(pairs)]


def dense(
    c: Config, attention: list[Attention], mlp: Mlp, *, mix: str = tables.ATTENTION, ffn: str = tables.MLP, **fields: Any
) -> Plan:
    """One attention and one feed-forward block a layer."""
    blocks = stack([pair for a in attention for pair in ((a, mix), (mlp, ffn))])
    return make_plan(c, blocks, tables.OUTSIDE, **{**rms(c), **fields})


def rms(c: Config, default: float = 1e-6) -> dict[str, Any]:
    """Width and epsilon under their most common names."""
    return {"hidden": c.size("hidden_size"), "norm_eps": c.number("rms_norm_eps", default)}


def each(kind: Attention, spans: list[int]) -> list[Attention]:
    """One attention per layer, each with its own window."""
    return [kind.model_copy(update={"window": span}) for span in spans]


def llama(c: Config) -> Plan:
    return dense(c, [read_attention(c, **with_bias(c))] * pieces.layers(c), read_mlp(c, bias=c.flag("mlp_bias")))


def mistral(c: Config) -> Plan:
    return dense(c, each(read_attention(c), [pieces.window(c, 4096)] * pieces.layers(c)), read_mlp(c))


def qwen2(c: Config) -> Plan:
    return dense(c, each(read_attention(c, bias=True), pieces.qwen_windows(c, pieces.layers(c))), read_mlp(c))


def qwen3(c: Config) -> Plan:
    attention = read_attention(c, qk_norm=True, **with_bias(c))
    return dense(c, each(attention, pieces.qwen_windows(c, pieces.layers(c))), read_mlp(c))


def phi3(c: Config) -> Plan:
    c.training("resid_pdrop", "embd_pdrop")
    c.idle("original_max_position_embeddings")
    attention = each(read_attention(c), [pieces.window(c)] * pieces.layers(c))
    return dense(c, attention, read_mlp(c), mix=tables.FUSED_ATTENTION, ffn=tables.FUSED_MLP, **rms(c, 1e-5))


def granite_scales(c: Config) -> dict[str, Any]:
    """Granite's multipliers, as a spec has them; the one of attention is the attention's own."""
    return {
        "embed_scale": c.number("embedding_multiplier", 1.0),
        "residual_scale": c.number("residual_multiplier", 1.0),
        "logit_scale": 1 / (c.number("logits_scaling", 1.0) or 1.0),
    }


def granite(c: Config) -> Plan:
    attention = read_attention(c, scale=c.number("attention_multiplier", 1.0), **with_bias(c))
    return dense(c, [attention] * pieces.layers(c), read_mlp(c, bias=c.flag("mlp_bias")), **granite_scales(c))


def olmo2(c: Config) -> Plan:
    attention = read_attention(c, qk_norm=True, qk_norm_whole=True, **with_bias(c))
    after = tables.ATTENTION.replace("norm = input_layernorm", "post_norm = post_attention_layernorm", 1)
    ffn = tables.MLP.replace("norm = post_attention_layernorm", "post_norm = post_feedforward_layernorm", 1)
    return dense(c, [attention] * pieces.layers(c), read_mlp(c), mix=after, ffn=ffn, norm_place="after", **rms(c, 1e-5))


def gemma(c: Config) -> Plan:
    c.must("use_bidirectional_attention", None, False)
    attention = read_attention(c, **with_bias(c))
    c.idle("hidden_activation")
    mlp = Mlp(width=c.size("intermediate_size"), act=c.act("hidden_act", "gelu_pytorch_tanh"))  # type: ignore[arg-type] # a known name
    return dense(c, [attention] * pieces.layers(c), mlp, **gemma_fields(c))


def gemma_fields(c: Config) -> dict[str, Any]:
    """Weights of norms stored minus one, embeddings scaled by the root of their width, a head that is tied by default."""
    scale = pieces.single(c.size("hidden_size") ** 0.5)  # it is kept as a float32 number
    return {"zero_centered": True, "embed_scale": scale, "tied": c.flag("tie_word_embeddings", True)}


def gemma2(c: Config) -> Plan:
    c.must("use_bidirectional_attention", None, False)
    c.idle("hidden_act")
    count = pieces.layers(c)
    scale = c.above("query_pre_attn_scalar", 256) ** -0.5
    attention = read_attention(c, scale=scale, softcap=cap(c, "attn_logit_softcapping", 50.0), **with_bias(c))
    spans = pieces.windows(c, count, [FULL if i % 2 else SLIDING for i in range(count)], pieces.window(c, 4096))
    mlp = Mlp(width=c.size("intermediate_size"), act=c.act("hidden_activation", "gelu_pytorch_tanh"))  # type: ignore[arg-type] # a known name
    fields = {**gemma_fields(c), "norm_place": "both", "logit_softcap": cap(c, "final_logit_softcapping", 30.0)}
    return dense(c, each(attention, spans), mlp, mix=tables.GEMMA_ATTENTION, ffn=tables.GEMMA_MLP, **fields)


def cap(c: Config, name: str, default: float) -> float:
    """A softcap; null is none."""
    return 0.0 if name in c.fields and c.get(name) is None else c.number(name, default)


def gpt2(c: Config) -> Plan:
    c.must("scale_attn_weights", True)
    c.must("scale_attn_by_inverse_layer_idx", False)
    c.must("reorder_and_upcast_attn", False)
    c.must("add_cross_attention", False)
    c.training("resid_pdrop", "embd_pdrop", "attn_pdrop")
    c.idle("n_ctx")
    hidden, heads = c.size("n_embd", 768), c.size("n_head", 12)
    attention = Attention(heads=heads, head_dim=hidden // heads, bias=True, out_bias=True)
    act: Any = c.act("activation_function", "gelu_new")
    mlp = Mlp(width=c.size("n_inner", 4 * hidden), act=act, glu=False, bias=True)
    pairs: list[tuple[Kind, str]] = [(attention, tables.GPT2_ATTENTION), (mlp, tables.GPT2_MLP)]
    return make_plan(
        c, stack(pairs * c.size("n_layer", 12), at="transformer.h.{}."), tables.GPT2_OUTSIDE, prefix="transformer.",
        derived=(r".*\.attn\.(masked_)?bias",), hidden=hidden, norm="layer", norm_eps=c.number("layer_norm_epsilon", 1e-5),
        learned_positions=True, max_length=c.size("n_positions", 1024), tied=c.flag("tie_word_embeddings", True),
    )  # fmt: skip
