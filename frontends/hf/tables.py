"""Tables of rules: where each kind's parameters are in the files of the families (see `rules` for how to read a line)."""

from __future__ import annotations

OUTSIDE = """
    embed = model.embed_tokens.weight[vocab hidden]
    final.norm = model.norm.weight[hidden]
    head = lm_head.weight[vocab hidden]
"""
BACKBONE = """
    embed = backbone.embeddings.weight[vocab hidden]
    final.norm = backbone.norm_f.weight[hidden]
    head = lm_head.weight[vocab hidden]
"""
GPT2_OUTSIDE = """
    embed = transformer.wte.weight[vocab hidden]
    positions = transformer.wpe.weight[max_length hidden]
    final.norm = transformer.ln_f.weight[hidden]
    final.norm_bias = transformer.ln_f.bias[hidden]
    head = lm_head.weight[vocab hidden]
"""

PROJECTIONS = """
    w_in = {at}q_proj.weight[query_width hidden] {at}k_proj.weight[kv_width hidden] {at}v_proj.weight[kv_width hidden]
    w_in_bias = {at}q_proj.bias[query_width] {at}k_proj.bias[kv_width] {at}v_proj.bias[kv_width]
    q_norm = {at}q_norm.weight[q_norm_width]
    k_norm = {at}k_norm.weight[k_norm_width]
    w_out = {at}o_proj.weight[hidden query_width]
    w_out_bias = {at}o_proj.bias[hidden]
"""
ATTENTION = "norm = input_layernorm.weight[hidden]\n" + PROJECTIONS.replace("{at}", "self_attn.")
GATED_ATTENTION = ATTENTION.replace(
    "self_attn.q_proj.weight[query_width hidden]",
    "self_attn.q_proj.weight[2*query_width hidden]{heads: head_dim head_dim}",
).replace("self_attn.q_proj.bias[query_width]", "self_attn.q_proj.bias[2*query_width]{heads: head_dim head_dim}")
FUSED_ATTENTION = """
    norm = input_layernorm.weight[hidden]
    w_in = self_attn.qkv_proj.weight[query_width+2*kv_width hidden]
    w_out = self_attn.o_proj.weight[hidden query_width]
"""
GPT2_ATTENTION = """
    norm = ln_1.weight[hidden]
    norm_bias = ln_1.bias[hidden]
    w_in = attn.c_attn.weight[hidden query_width+2*kv_width].T
    w_in_bias = attn.c_attn.bias[query_width+2*kv_width]
    w_out = attn.c_proj.weight[query_width hidden].T
    w_out_bias = attn.c_proj.bias[hidden]
"""
LATENT = """
    norm = input_layernorm.weight[hidden]
    w_in = self_attn.q_a_proj.weight[q_rank hidden] self_attn.kv_a_proj_with_mqa.weight[kv_rank+shared_dim hidden]
    q_norm = self_attn.q_a_layernorm.weight[q_rank]
    w_q = self_attn.q_b_proj.weight[query_width q_rank]
    kv_norm = self_attn.kv_a_layernorm.weight[kv_rank]
    w_kv = self_attn.kv_b_proj.weight[kv_width kv_rank]
    w_out = self_attn.o_proj.weight[hidden value_width]
"""
LATENT_KEYS = LATENT.replace("q_a_proj.weight[q_rank hidden]", "q_proj.weight[query_width hidden]")
KDA = """
    norm = input_layernorm.weight[hidden]
    w_in = self_attn.q_proj.weight[width hidden] self_attn.k_proj.weight[width hidden] self_attn.v_proj.weight[width hidden] \
self_attn.f_a_proj.weight[head_dim hidden] self_attn.g_a_proj.weight[head_dim hidden] self_attn.b_proj.weight[heads hidden]
    w_in = self_attn.q_proj.weight[width hidden] self_attn.k_proj.weight[width hidden] self_attn.v_proj.weight[width hidden] \
self_attn.forget_gate.f_a_proj.weight[head_dim hidden] self_attn.g_a_proj.weight[head_dim hidden] \
self_attn.b_proj.weight[heads hidden]
    conv = self_attn.q_conv1d.weight[width 1 conv] self_attn.k_conv1d.weight[width 1 conv] \
self_attn.v_conv1d.weight[width 1 conv]
    conv = self_attn.conv1d.weight[3*width 1 conv]
    dt_bias = self_attn.dt_bias[width]
    dt_bias = self_attn.forget_gate.dt_bias[width]
    A_log = self_attn.A_log[1 1 heads 1]
    A_log = self_attn.forget_gate.A_log[1 1 heads 1]
    w_decay = self_attn.f_b_proj.weight[width head_dim]
    w_decay = self_attn.forget_gate.f_b_proj.weight[width head_dim]
    w_gate = self_attn.g_b_proj.weight[width head_dim]
    out_norm = self_attn.o_norm.weight[head_dim]
    w_out = self_attn.o_proj.weight[hidden width]
"""

MLP = """
    norm = post_attention_layernorm.weight[hidden]
    w_in = mlp.gate_proj.weight[width hidden] mlp.up_proj.weight[width hidden]
    w_in_bias = mlp.gate_proj.bias[width] mlp.up_proj.bias[width]
    w_out = mlp.down_proj.weight[hidden width]
    w_out_bias = mlp.down_proj.bias[hidden]
"""
FUSED_MLP = """
    norm = post_attention_layernorm.weight[hidden]
    w_in = mlp.gate_up_proj.weight[2*width hidden]
    w_out = mlp.down_proj.weight[hidden width]
"""
GPT2_MLP = """
    norm = ln_2.weight[hidden]
    norm_bias = ln_2.bias[hidden]
    w_in = mlp.c_fc.weight[hidden width].T
    w_in_bias = mlp.c_fc.bias[width]
    w_out = mlp.c_proj.weight[width hidden].T
    w_out_bias = mlp.c_proj.bias[hidden]
"""

# As newer files have experts: all of a layer in one tensor.
STACKED_EXPERTS = """
    w_in = {at}experts.gate_up_proj[experts 2*width hidden]
    w_out = {at}experts.down_proj[experts hidden width]
"""
MIXTRAL_MOE = """
    norm = post_attention_layernorm.weight[hidden]
    w_router = block_sparse_moe.gate.weight[experts hidden]
    w_router = mlp.gate.weight[experts hidden]
    w_in = block_sparse_moe.experts.{e}.w1.weight[width hidden] block_sparse_moe.experts.{e}.w3.weight[width hidden]
    w_out = block_sparse_moe.experts.{e}.w2.weight[hidden width]
""" + STACKED_EXPERTS.replace("{at}", "mlp.")
QWEN_MOE = """
    norm = post_attention_layernorm.weight[hidden]
    w_router = mlp.gate.weight[experts hidden]
    w_in = mlp.experts.{e}.gate_proj.weight[width hidden] mlp.experts.{e}.up_proj.weight[width hidden]
    w_out = mlp.experts.{e}.down_proj.weight[hidden width]
    w_shared_in = mlp.shared_expert.gate_proj.weight[shared_width hidden] mlp.shared_expert.up_proj.weight[shared_width hidden]
    w_shared_out = mlp.shared_expert.down_proj.weight[hidden shared_width]
    w_shared_gate = mlp.shared_expert_gate.weight[1 hidden]
""" + STACKED_EXPERTS.replace("{at}", "mlp.")
GRANITE_MOE = """
    norm = post_attention_layernorm.weight[hidden]
    w_router = block_sparse_moe.router.layer.weight[experts hidden]
    w_router = block_sparse_moe.router.weight[experts hidden]
    w_in = block_sparse_moe.input_linear.weight[experts 2*width hidden]
    w_out = block_sparse_moe.output_linear.weight[experts hidden width]
    w_shared_in = shared_mlp.input_linear.weight[2*shared_width hidden]
    w_shared_out = shared_mlp.output_linear.weight[hidden shared_width]
""" + STACKED_EXPERTS.replace("{at}", "block_sparse_moe.")
GRANITE_MLP = """
    norm = post_attention_layernorm.weight[hidden]
    w_in = shared_mlp.input_linear.weight[2*width hidden]
    w_out = shared_mlp.output_linear.weight[hidden width]
"""
QWEN_GDN = """
    norm = input_layernorm.weight[hidden]
    w_in = linear_attn.in_proj_qkvz.weight[2*key_width+2*value_width hidden]{key_heads: key_dim key_dim value_width/key_heads \
value_width/key_heads} linear_attn.in_proj_ba.weight[2*value_heads hidden]{key_heads: value_heads/key_heads \
value_heads/key_heads}
    conv = linear_attn.conv1d.weight[conv_width 1 conv]
    dt_bias = linear_attn.dt_bias[value_heads]
    A_log = linear_attn.A_log[value_heads]
    out_norm = linear_attn.norm.weight[value_dim]
    w_out = linear_attn.out_proj.weight[hidden value_width]
"""
SSD = """
    w_in = {at}in_proj.weight[in_width hidden]
    conv = {at}conv1d.weight[conv_width 1 conv]
    conv_bias = {at}conv1d.bias[conv_width]
    dt_bias = {at}dt_bias[heads]
    A_log = {at}A_log[heads]
    D = {at}D[heads]
    out_norm = {at}norm.weight[inner]
    w_out = {at}out_proj.weight[hidden inner]
"""
MIXER_NORM = "norm = norm.weight[hidden]\n"
MAMBA = MIXER_NORM + SSD.replace("{at}", "mixer.")
GRANITE_MAMBA = "norm = input_layernorm.weight[hidden]\n" + SSD.replace("{at}", "mamba.")
NEMOTRON_ATTENTION = MIXER_NORM + PROJECTIONS.replace("{at}", "mixer.")
NEMOTRON_MLP = """
    norm = norm.weight[hidden]
    w_in = mixer.up_proj.weight[width hidden]
    w_in_bias = mixer.up_proj.bias[width]
    w_out = mixer.down_proj.weight[hidden width]
    w_out_bias = mixer.down_proj.bias[hidden]
"""
NEMOTRON_MOE = """
    norm = norm.weight[hidden]
    w_router = mixer.gate.weight[experts hidden]
    route_bias = mixer.gate.e_score_correction_bias[experts]
    w_in = mixer.experts.{e}.up_proj.weight[width hidden]
    w_in = mixer.experts.up_proj[experts width hidden]
    w_out = mixer.experts.{e}.down_proj.weight[hidden width]
    w_out = mixer.experts.down_proj[experts hidden width]
    w_shared_in = mixer.shared_experts.up_proj.weight[shared_width hidden]
    w_shared_out = mixer.shared_experts.down_proj.weight[hidden shared_width]
"""
DEEPSEEK_MOE = """
    norm = post_attention_layernorm.weight[hidden]
    w_router = mlp.gate.weight[experts hidden]
    route_bias = mlp.gate.e_score_correction_bias[experts]
    w_in = mlp.experts.{e}.gate_proj.weight[width hidden] mlp.experts.{e}.up_proj.weight[width hidden]
    w_out = mlp.experts.{e}.down_proj.weight[hidden width]
    w_shared_in = mlp.shared_experts.gate_proj.weight[shared_width hidden] \
mlp.shared_experts.up_proj.weight[shared_width hidden]
    w_shared_out = mlp.shared_experts.down_proj.weight[hidden shared_width]
""" + STACKED_EXPERTS.replace("{at}", "mlp.")
# Kimi's files say block_sparse_moe of dense layers too, and have their experts as Mixtral has; its modules say mlp.
KIMI_MLP = MLP.replace("mlp.", "block_sparse_moe.") + MLP
KIMI_MOE = (
    DEEPSEEK_MOE.replace("mlp.", "block_sparse_moe.")
    .replace("{e}.gate_proj", "{e}.w1")
    .replace("{e}.up_proj", "{e}.w3")
    .replace("{e}.down_proj", "{e}.w2")
) + DEEPSEEK_MOE
FALCON_OUTSIDE = OUTSIDE.replace("model.norm", "model.final_layernorm")
FALCON_NORM = "norm = input_layernorm.weight[hidden]\n"
FALCON_MLP_NORM = "norm = pre_ff_layernorm.weight[hidden]\n"
FALCON_MLP = MLP.replace("mlp.", "feed_forward.")
NEOX_OUTSIDE = """
    embed = gpt_neox.embed_in.weight[vocab hidden]
    final.norm = gpt_neox.final_layer_norm.weight[hidden]
    final.norm_bias = gpt_neox.final_layer_norm.bias[hidden]
    head = embed_out.weight[vocab hidden]
    head = lm_head.weight[vocab hidden]
"""
NEOX_ATTENTION = """
    norm = input_layernorm.weight[hidden]
    norm_bias = input_layernorm.bias[hidden]
    w_in = attention.query_key_value.weight[3*query_width hidden]{heads: head_dim head_dim head_dim}
    w_in_bias = attention.query_key_value.bias[3*query_width]{heads: head_dim head_dim head_dim}
    w_out = attention.dense.weight[hidden query_width]
    w_out_bias = attention.dense.bias[hidden]
"""
NEOX_MLP = """
    norm = post_attention_layernorm.weight[hidden]
    norm_bias = post_attention_layernorm.bias[hidden]
    w_in = mlp.dense_h_to_4h.weight[width hidden]
    w_in_bias = mlp.dense_h_to_4h.bias[width]
    w_out = mlp.dense_4h_to_h.weight[hidden width]
    w_out_bias = mlp.dense_4h_to_h.bias[hidden]
"""
STARCODER_OUTSIDE = OUTSIDE + "final.norm_bias = model.norm.bias[hidden]\n"
STARCODER_ATTENTION = ATTENTION + "norm_bias = input_layernorm.bias[hidden]\n"
STARCODER_MLP = """
    norm = post_attention_layernorm.weight[hidden]
    norm_bias = post_attention_layernorm.bias[hidden]
    w_in = mlp.c_fc.weight[width hidden]
    w_in_bias = mlp.c_fc.bias[width]
    w_out = mlp.c_proj.weight[hidden width]
    w_out_bias = mlp.c_proj.bias[hidden]
"""
GEMMA_ATTENTION = ATTENTION + "post_norm = post_attention_layernorm.weight[hidden]\n"
GEMMA_MLP = (
    MLP.replace("post_attention_layernorm", "pre_feedforward_layernorm")
    + "post_norm = post_feedforward_layernorm.weight[hidden]\n"
)
GLM_ATTENTION = ATTENTION + "post_norm = post_self_attn_layernorm.weight[hidden]\n"
GLM_MLP = FUSED_MLP + "post_norm = post_mlp_layernorm.weight[hidden]\n"
