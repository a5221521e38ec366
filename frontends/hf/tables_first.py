"""Tables of rules of the families whose attention or feed-forward layers are stored in ways of their own (see `rules`)."""

from __future__ import annotations

from .tables import ATTENTION, DEEPSEEK_MOE, LATENT_KEYS, MLP, OUTSIDE

# A gated delta net with its projections apart; `{at}` is its module.
APART_GDN = """
    norm = input_layernorm.weight[hidden]
    w_in = linear_attn.in_proj_qkv.weight[conv_width hidden] linear_attn.in_proj_z.weight[value_width hidden] \
linear_attn.in_proj_b.weight[value_heads hidden] linear_attn.in_proj_a.weight[value_heads hidden]
    conv = linear_attn.conv1d.weight[conv_width 1 conv]
    dt_bias = linear_attn.dt_bias[value_heads]
    A_log = linear_attn.A_log[value_heads]
    out_norm = linear_attn.norm.weight[value_dim]
    w_out = linear_attn.out_proj.weight[hidden value_width]
"""
GPT_OSS_ATTENTION = ATTENTION + "sinks = self_attn.sinks[heads]\n"
# Gate and up of an expert are stored in turn, and its matrices transposed.
GPT_OSS_MOE = """
    norm = post_attention_layernorm.weight[hidden]
    w_router = mlp.router.weight[experts hidden]
    w_router_bias = mlp.router.bias[experts]
    w_in = mlp.experts.gate_up_proj[experts hidden 2*width].T{width: 1 1}
    w_in_bias = mlp.experts.gate_up_proj_bias[experts 2*width].V{width: 1 1}
    w_out = mlp.experts.down_proj[experts width hidden].T
    w_out_bias = mlp.experts.down_proj_bias[experts hidden]
"""
# Files call the norms of layers with delta nets by names of their own, and transformers writes one of them for attention too.
_NAMED = {"input_layernorm": "attention_layer_norm", "post_attention_layernorm": "feedforward_layer_norm"}


def _either(table: str, target: str, name: str) -> str:
    """The table with a norm under its own name, or under the one that files have."""
    line = f"{target} = {name}.weight[hidden]"
    return f"{line.replace(name, _NAMED[name])}\n    {line}" + table.partition("[hidden]")[2]


OLMO_ATTENTION = _either(ATTENTION, "post_norm", "post_attention_layernorm")
OLMO_MLP = MLP.replace("norm = post_attention_layernorm", "post_norm = post_feedforward_layernorm", 1)
OLMO_NEAR_MLP = _either(MLP, "norm", "post_attention_layernorm")
OLMO_GDN = """
    norm = attention_layer_norm.weight[hidden]
    norm = input_layernorm.weight[hidden]
    w_in = linear_attn.q_proj.weight[key_width hidden] linear_attn.k_proj.weight[key_width hidden] \
linear_attn.v_proj.weight[value_width hidden] linear_attn.g_proj.weight[value_width hidden] \
linear_attn.b_proj.weight[value_heads hidden] linear_attn.a_proj.weight[value_heads hidden]
    conv = linear_attn.q_conv1d.weight[key_width 1 conv] linear_attn.k_conv1d.weight[key_width 1 conv] \
linear_attn.v_conv1d.weight[value_width 1 conv]
    conv = linear_attn.conv1d.weight[conv_width 1 conv]
    dt_bias = linear_attn.dt_bias[value_heads]
    A_log = linear_attn.A_log[value_heads]
    out_norm = linear_attn.o_norm.weight[value_dim]
    w_out = linear_attn.o_proj.weight[hidden value_width]
"""
LIGHTNING = """
    norm = input_layernorm.weight[hidden]
    w_in = self_attn.qkv_proj.weight[3*width hidden]{heads: head_dim head_dim head_dim} \
self_attn.output_gate.weight[width hidden]
    out_norm = self_attn.norm.weight[width]
    w_out = self_attn.out_proj.weight[hidden width]
"""
# Ling's files call attention and the embedding by other names than its modules.
LING_OUTSIDE = "embed = model.word_embeddings.weight[vocab hidden]\n" + OUTSIDE
_GATED_LATENT = LATENT_KEYS.replace(
    "kv_a_proj_with_mqa.weight[kv_rank+shared_dim hidden]",
    "kv_a_proj_with_mqa.weight[kv_rank+shared_dim hidden] self_attn.g_proj.weight[heads hidden]",
)
LING_LATENT = _GATED_LATENT.replace("self_attn.o_proj", "attention.dense").replace("self_attn.", "attention.") + _GATED_LATENT
LING_MOE = "route_bias = mlp.gate.expert_bias[experts]\n" + DEEPSEEK_MOE
LING_KDA = """
    norm = input_layernorm.weight[hidden]
    w_in = attention.q_proj.weight[width hidden] attention.k_proj.weight[width hidden] attention.v_proj.weight[width hidden] \
attention.f_proj.weight[width hidden] attention.g_proj.weight[width hidden] attention.b_proj.weight[heads hidden]
    w_in = self_attn.q_proj.weight[width hidden] self_attn.k_proj.weight[width hidden] self_attn.v_proj.weight[width hidden] \
self_attn.forget_gate.f_proj.weight[width hidden] self_attn.g_proj.weight[width hidden] self_attn.b_proj.weight[heads hidden]
    conv = attention.q_conv1d.weight[width 1 conv] attention.k_conv1d.weight[width 1 conv] \
attention.v_conv1d.weight[width 1 conv]
    conv = self_attn.conv1d.weight[3*width 1 conv]
    dt_bias = attention.dt_bias[width]
    dt_bias = self_attn.forget_gate.dt_bias[width]
    A_log = attention.A_log[heads]
    A_log = self_attn.forget_gate.A_log[heads]
    out_norm = attention.o_norm.weight[head_dim]
    out_norm = self_attn.o_norm.weight[head_dim]
    w_out = attention.dense.weight[hidden width]
    w_out = self_attn.o_proj.weight[hidden width]
"""
