"""Tables of rules for families with selective scans, gated convolutions, Griffin's unit and shared blocks (see `rules`)."""

from __future__ import annotations

from .tables import ATTENTION, FALCON_NORM, FALCON_OUTSIDE, MIXER_NORM, MLP, PROJECTIONS, SSD, STACKED_EXPERTS

FEED_FORWARD = MLP.replace("mlp.", "feed_forward.").replace("post_attention_layernorm", "pre_ff_layernorm")
SELECTIVE = """
    w_in = {at}in_proj.weight[2*width hidden]
    w_in_bias = {at}in_proj.bias[2*width]
    conv = {at}conv1d.weight[width 1 conv]
    conv_bias = {at}conv1d.bias[width]
    w_read = {at}x_proj.weight[read_width width]
    step_norm = {at}dt_layernorm.weight[rank]
    b_norm = {at}b_layernorm.weight[state]
    c_norm = {at}c_layernorm.weight[state]
    w_step = {at}dt_proj.weight[width rank]
    dt_bias = {at}dt_proj.bias[width]
    A_log = {at}A_log[width state]
    D = {at}D[width]
    w_out = {at}out_proj.weight[hidden width]
    w_out_bias = {at}out_proj.bias[hidden]
"""
MAMBA_1 = MIXER_NORM + SELECTIVE.replace("{at}", "mixer.")
JAMBA_OUTSIDE = FALCON_OUTSIDE
JAMBA_MAMBA = FALCON_NORM + SELECTIVE.replace("{at}", "mamba.")
JAMBA_MOE = """
    norm = pre_ff_layernorm.weight[hidden]
    w_router = feed_forward.router.weight[experts hidden]
    w_in = feed_forward.experts.{e}.gate_proj.weight[width hidden] feed_forward.experts.{e}.up_proj.weight[width hidden]
    w_out = feed_forward.experts.{e}.down_proj.weight[hidden width]
""" + STACKED_EXPERTS.replace("{at}", "feed_forward.")

LFM_OUTSIDE = """
    embed = model.embed_tokens.weight[vocab hidden]
    final.norm = model.embedding_norm.weight[hidden]
    head = lm_head.weight[vocab hidden]
"""
LFM_ATTENTION = (
    ATTENTION.replace("input_layernorm", "operator_norm")
    .replace("q_norm.weight", "q_layernorm.weight")
    .replace("k_norm.weight", "k_layernorm.weight")
    .replace("o_proj", "out_proj")
)
LFM_CONV = """
    norm = operator_norm.weight[hidden]
    w_in = conv.in_proj.weight[3*width hidden]
    w_in_bias = conv.in_proj.bias[3*width]
    conv = conv.conv.weight[width 1 conv]
    conv_bias = conv.conv.bias[width]
    w_out = conv.out_proj.weight[hidden width]
    w_out_bias = conv.out_proj.bias[hidden]
"""
LFM_MLP = """
    norm = ffn_norm.weight[hidden]
    w_in = feed_forward.w1.weight[width hidden] feed_forward.w3.weight[width hidden]
    w_out = feed_forward.w2.weight[hidden width]
"""

GRIFFIN_OUTSIDE = LFM_OUTSIDE.replace("embedding_norm", "final_norm")
GRIFFIN_ATTENTION = "norm = temporal_pre_norm.weight[hidden]\n" + PROJECTIONS.replace("{at}", "temporal_block.")
GRIFFIN_MLP = MLP.replace("mlp.", "mlp_block.").replace("post_attention_layernorm", "channel_pre_norm")
GRIFFIN_UNIT = """
    norm = temporal_pre_norm.weight[hidden]
    w_in = temporal_block.linear_y.weight[width hidden] temporal_block.linear_x.weight[width hidden]
    w_in_bias = temporal_block.linear_y.bias[width] temporal_block.linear_x.bias[width]
    conv = temporal_block.conv_1d.weight[width 1 conv]
    conv_bias = temporal_block.conv_1d.bias[width]
    w_input_gate = temporal_block.rg_lru.input_gate_weight[heads block block].T
    input_gate_bias = temporal_block.rg_lru.input_gate_bias[heads block]
    w_decay_gate = temporal_block.rg_lru.recurrent_gate_weight[heads block block].T
    decay_gate_bias = temporal_block.rg_lru.recurrent_gate_bias[heads block]
    rate = temporal_block.rg_lru.recurrent_param[width]
    w_out = temporal_block.linear_out.weight[hidden width]
    w_out_bias = temporal_block.linear_out.bias[hidden]
"""

ZAMBA_HYBRID = """
    norm = mamba_decoder.input_layernorm.weight[hidden]
    w_aside = linear.weight[hidden hidden]
"""
ZAMBA_MAMBA = SSD.replace("{at}", "mamba_decoder.mamba.")
_ZAMBA = "model.layers.{first}.shared_transformer."
_Q, _K, _V = (_ZAMBA + f"self_attn.linear_{x}_adapter_list.{{use}}." for x in "qkv")
_WIDE = _ZAMBA + "feed_forward.gate_up_proj_adapter_list.{use}."
ZAMBA_SHARED = f"""
    shared.{{which}}.attention_norm = {_ZAMBA}input_layernorm.weight[{{twice}}]
    shared.{{which}}.attention_w_in = {_ZAMBA}self_attn.q_proj.weight[{{query}} {{twice}}] \
{_ZAMBA}self_attn.k_proj.weight[{{kv}} {{twice}}] {_ZAMBA}self_attn.v_proj.weight[{{kv}} {{twice}}]
    shared.{{which}}.attention_w_out = {_ZAMBA}self_attn.o_proj.weight[{{hidden}} {{query}}]
    shared.{{which}}.mlp_norm = {_ZAMBA}pre_ff_layernorm.weight[{{hidden}}]
    shared.{{which}}.mlp_w_in = {_ZAMBA}feed_forward.gate_up_proj.weight[{{wide}} {{hidden}}]
    shared.{{which}}.mlp_w_out = {_ZAMBA}feed_forward.down_proj.weight[{{hidden}} {{width}}]
"""
ZAMBA_ADAPTERS = f"""
    adapters_{{at}}_attention_w_in_down = {_Q}0.weight[{{rank}} {{twice}}] {_K}0.weight[{{rank}} {{twice}}] \
{_V}0.weight[{{rank}} {{twice}}]
    adapters_{{at}}_attention_w_in_up0 = {_Q}1.weight[{{query}} {{rank}}]
    adapters_{{at}}_attention_w_in_up1 = {_K}1.weight[{{kv}} {{rank}}]
    adapters_{{at}}_attention_w_in_up2 = {_V}1.weight[{{kv}} {{rank}}]
    adapters_{{at}}_mlp_w_in_down = {_WIDE}0.weight[{{rank}} {{hidden}}]
    adapters_{{at}}_mlp_w_in_up0 = {_WIDE}1.weight[{{wide}} {{rank}}]
"""
