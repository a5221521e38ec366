"""Small models of families with selective scans, gated convolutions, Griffin's unit and shared blocks."""

from __future__ import annotations

from typing import Any

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 36, "pad_token_id": 0}
BAMBA = {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 10, "mamba_n_groups": 2, "mamba_expand": 2}
JAMBA = {"mamba_d_state": 5, "mamba_expand": 2, "mamba_dt_rank": 3, "num_experts": 4, "num_experts_per_tok": 2}
PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0}
ZAMBA = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 36, "pad_token_id": 0, "n_mamba_heads": 6,
    "mamba_d_state": 10, "mamba_ngroups": 2, "mamba_expand": 2,
}  # fmt: skip
ENDLESS = {"max_position_embeddings": None}  # no such attribute

CASES: dict[str, dict[str, Any]] = {
    "bamba": {"model_type": "bamba", **HEADS, "head_dim": 8, **BAMBA, "attn_layer_indices": [1], "time_step_limit": [0.2, 0.9]},
    "bamba_plain": {
        "model_type": "bamba", **HEADS, **BAMBA, "num_attention_heads": 3, "num_key_value_heads": 3, "mlp_bias": True,
        "attn_layer_indices": [0], "mamba_d_head": "auto", "attention_bias": True, "tie_word_embeddings": True,
    },
    "jamba": {"model_type": "jamba", **HEADS, **JAMBA, **PERIODS},
    "jamba_dense": {
        "model_type": "jamba", **HEADS, **JAMBA, **PERIODS, "num_experts": 1, "mamba_proj_bias": True, "mamba_dt_rank": "auto",
        "mamba_conv_bias": False, "tie_word_embeddings": True,
    },
    "mamba": {"model_type": "mamba", **ENDLESS, "state_size": 5, "time_step_rank": 3, "conv_kernel": 4},
    "mamba_bias": {
        "model_type": "mamba", **ENDLESS, "state_size": 4, "expand": 3, "use_bias": True, "use_conv_bias": False,
        "conv_kernel": 3, "tie_word_embeddings": False,
    },
    "lfm2": {
        "model_type": "lfm2", **HEADS, "block_multiple_of": 10, "full_attn_idxs": [1], "conv_bias": True,
        "block_ffn_dim_multiplier": 1.3,
    },
    "lfm2_plain": {
        "model_type": "lfm2", **HEADS, "block_auto_adjust_ff_dim": False, "layer_types": ["full_attention", "conv"],
        "conv_L_cache": 4, "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "recurrent_gemma": {
        "model_type": "recurrent_gemma", **ENDLESS, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 32,
        "intermediate_size": 72, "pad_token_id": 0, "lru_width": 28, "attention_window_size": 5, "logits_soft_cap": 2.0,
        "block_types": ["recurrent", "attention"], "num_hidden_layers": 3,
    },
    "zamba2": {
        "model_type": "zamba2", **ZAMBA, "num_hidden_layers": 5, "num_mem_blocks": 2,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
        "use_shared_attention_adapter": True, "use_mem_rope": True,
        "adapter_rank": 3, "time_step_min": 0.3,
    },
    "zamba2_plain": {
        "model_type": "zamba2", **ZAMBA, "layers_block_type": ["hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 3,
        "num_mem_blocks": 1, "adapter_rank": 5, "hidden_act": "silu",
    },
}  # fmt: skip
