"""Small models of families with gated delta nets of their own kinds, sinks, lightning attention, and stretched positions."""

from __future__ import annotations

from typing import Any

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 36, "pad_token_id": 0}
GDN = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
SECTIONS = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 1, 0], "mrope_interleaved": True}
QWEN = {**HEADS, **GDN, "head_dim": 16, "rope_parameters": {**SECTIONS, "partial_rotary_factor": 0.25}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
SMALL = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64}
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LATENT = {"qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10, "kv_lora_rank": 12, "num_key_value_heads": 4}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 2}
SCALED = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.3, 4.0], "long_factor": [1.1, 2.0, 9.0]}
SLOWER = {"rope_theta": 100.0, "factor": 3.0}
HYBRID = {**HEADS, "head_dim": 6, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2, "n_group": 2}

CASES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"model_type": "qwen3_5_text", **QWEN},
    "qwen3_5_moe_text": {
        "model_type": "qwen3_5_moe_text", **{k: v for k, v in QWEN.items() if k != "intermediate_size"}, **EXPERTS,
    },
    "qwen3_5": {
        "model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", **SMALL, **QWEN}, "dtype": "float32",
        "vision_config": {"depth": 1}, "image_token_id": 5,
    },
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe", "dtype": "float32", "tie_word_embeddings": True,
        "text_config": {"model_type": "qwen3_5_moe_text", "tie_word_embeddings": True, **SMALL, **QWEN, **EXPERTS},
    },
    "gpt_oss": {
        "model_type": "gpt_oss", **HEADS, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": YARN, "swiglu_limit": 0.4,
    },
    "gpt_oss_plain": {
        "model_type": "gpt_oss", **HEADS, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5,
        "attention_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "swiglu_alpha": 1.2,
    },
    # transformers parts the convolution of other sizes wrongly as it writes them
    "olmo_hybrid": {
        "model_type": "olmo_hybrid", **HEADS, **GDN, "linear_key_head_dim": 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "rms_norm_eps": 1e-3,
    },
    "olmo_hybrid_nope": {
        "model_type": "olmo_hybrid", **HEADS, **GDN, "linear_key_head_dim": 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": None},
        "linear_allow_neg_eigval": False, "linear_conv_kernel_dim": 3,
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2", **HEADS, **LATENT, **ROUTED, "q_lora_rank": 14, "first_k_dense_replace": 1,
        "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5,
        "rope_parameters": {**SCALED, "mscale": 0.7, "mscale_all_dim": 0.9},
    },
    "deepseek_v2_plain": {
        "model_type": "deepseek_v2", **HEADS, **LATENT, **ROUTED, "q_lora_rank": None, "first_k_dense_replace": 0,
        "topk_method": "greedy",
    },
    "deepseek_v3_yarn": {
        "model_type": "deepseek_v3", **HEADS, **LATENT, **ROUTED, "q_lora_rank": 14, "first_k_dense_replace": 1,
        "n_group": 2, "topk_group": 1, "rope_parameters": {**SCALED, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "olmo": {"model_type": "olmo", **HEADS, "clip_qkv": 0.5},
    "olmo_free": {"model_type": "olmo", **HEADS, "tie_word_embeddings": True},
    "minimax": {
        "model_type": "minimax", **HEADS, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8,
        "layer_types": ["linear_attention", "full_attention"], "full_attn_alpha_factor": 1.3, "full_attn_beta_factor": 0.8,
        "linear_attn_alpha_factor": 1.2, "linear_attn_beta_factor": 0.7, "mlp_alpha_factor": 1.1, "mlp_beta_factor": 0.9,
    },
    "bailing_hybrid": {
        "model_type": "bailing_hybrid", **HYBRID, **{**LATENT, "qk_rope_head_dim": 4}, "moe_intermediate_size": 12,
        "topk_group": 1, "layer_group_size": 2, "first_k_dense_replace": 1, "kda_lower_bound": -2.0,
    },
    "bailing_hybrid_free": {
        "model_type": "bailing_hybrid", **HYBRID, **{**LATENT, "qk_rope_head_dim": 4}, "moe_intermediate_size": 12,
        "topk_group": 2, "layer_types": ["full_attention", "linear_attention"], "mlp_layer_types": ["sparse", "dense"],
        "kda_safe_gate": False, "norm_topk_prob": False,
    },
    "llama_linear": {"model_type": "llama", **HEADS, "rope_parameters": {**SLOWER, "rope_type": "linear"}},
    "llama_yarn": {"model_type": "llama", **HEADS, "rope_parameters": {**SCALED, "attention_factor": 1.2}},
    "qwen3_yarn": {"model_type": "qwen3", **HEADS, "head_dim": 8, "rope_parameters": {**SCALED, "beta_fast": 2.0}},
    "llama_dynamic": {"model_type": "llama", **HEADS, "rope_parameters": {**SLOWER, "rope_type": "dynamic"}},
    "phi3_longrope": {
        "model_type": "phi3", **HEADS, "original_max_position_embeddings": 32, "rope_parameters": LONG,
    },
    "gemma3": {
        "model_type": "gemma3", "dtype": "float32", "tie_word_embeddings": True,
        "text_config": {
            "model_type": "gemma3_text", **SMALL, **HEADS, "head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
            },
        },
    },
}  # fmt: skip
