"""Tables of rules of families with an encoder (see `rules` for how to read a line)."""

from __future__ import annotations

T5_OUTSIDE = """
    embed = shared.weight[vocab hidden]
    encoder_relative = encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight[{buckets} {heads}]
    relative = decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight[{buckets} {heads}]
    encoder.final.norm = encoder.final_layer_norm.weight[hidden]
    final.norm = decoder.final_layer_norm.weight[hidden]
    head = lm_head.weight[vocab hidden]
"""
T5_ATTENTION = """
    norm = layer.0.layer_norm.weight[hidden]
    w_in = layer.0.SelfAttention.q.weight[query_width hidden] layer.0.SelfAttention.k.weight[kv_width hidden] \
layer.0.SelfAttention.v.weight[kv_width hidden]
    w_out = layer.0.SelfAttention.o.weight[hidden query_width]
"""
T5_CROSS = """
    norm = layer.1.layer_norm.weight[hidden]
    w_q = layer.1.EncDecAttention.q.weight[query_width hidden]
    w_kv = layer.1.EncDecAttention.k.weight[kv_width hidden] layer.1.EncDecAttention.v.weight[kv_width hidden]
    w_out = layer.1.EncDecAttention.o.weight[hidden query_width]
"""
T5_MLP = """
    norm = {at}layer_norm.weight[hidden]
    w_in = {at}DenseReluDense.wi.weight[width hidden]
    w_out = {at}DenseReluDense.wo.weight[hidden width]
"""
T5_GATED_MLP = T5_MLP.replace(
    "{at}DenseReluDense.wi.weight[width hidden]",
    "{at}DenseReluDense.wi_0.weight[width hidden] {at}DenseReluDense.wi_1.weight[width hidden]",
)

BART_OUTSIDE = """
    embed = model.shared.weight[vocab hidden]
    encoder_positions = model.encoder.embed_positions.weight[position_rows hidden]
    positions = model.decoder.embed_positions.weight[position_rows hidden]
    encoder.final.norm = {encoder}weight[hidden]
    encoder.final.norm_bias = {encoder}bias[hidden]
    final.norm = {decoder}weight[hidden]
    final.norm_bias = {decoder}bias[hidden]
    final.head_bias = final_logits_bias[1 vocab]
    head = lm_head.weight[vocab hidden]
"""
# The norm behind a sublayer is the one in front of the next: `{norm}` is where the block before, or the embedding, has it.
BART_ATTENTION = """
    norm = {norm}weight[hidden]
    norm_bias = {norm}bias[hidden]
    w_in = {at}q_proj.weight[query_width hidden] {at}k_proj.weight[kv_width hidden] {at}v_proj.weight[kv_width hidden]
    w_in_bias = {at}q_proj.bias[query_width] {at}k_proj.bias[kv_width] {at}v_proj.bias[kv_width]
    w_out = {at}out_proj.weight[hidden query_width]
    w_out_bias = {at}out_proj.bias[hidden]
"""
BART_CROSS = """
    norm = {norm}weight[hidden]
    norm_bias = {norm}bias[hidden]
    w_q = {at}q_proj.weight[query_width hidden]
    w_q_bias = {at}q_proj.bias[query_width]
    w_kv = {at}k_proj.weight[kv_width hidden] {at}v_proj.weight[kv_width hidden]
    w_kv_bias = {at}k_proj.bias[kv_width] {at}v_proj.bias[kv_width]
    w_out = {at}out_proj.weight[hidden query_width]
    w_out_bias = {at}out_proj.bias[hidden]
"""
BART_MLP = """
    norm = {norm}weight[hidden]
    norm_bias = {norm}bias[hidden]
    w_in = {at}fc1.weight[width hidden]
    w_in_bias = {at}fc1.bias[width]
    w_out = {at}fc2.weight[hidden width]
    w_out_bias = {at}fc2.bias[hidden]
"""
