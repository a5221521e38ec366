"""Small models of every family: configs, and weights that follow from their names alone."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests import hf_cases_first, hf_cases_second, hf_cases_third

Tensor = torch.Tensor
SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64, "dtype": "float32"}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 36}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 1.7, "residual_multiplier": 0.4, "attention_multiplier": 0.15}
MAMBA = {"expand": 2, "head_dim": 8, "num_heads": 6, "state_size": 10, "n_groups": 2, "conv_kernel": 4}
SSD = {
    "mamba_num_heads": 6, "mamba_head_dim": 8, "ssm_state_size": 10, "n_groups": 2, "conv_kernel": 4, "expand": 2,
    "time_step_min": 0.3,
}  # fmt: skip
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5}
LATENT = {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10, "kv_lora_rank": 12}
FALCON = {
    "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 10, "mamba_d_conv": 4,
    "ssm_multipliers": [0.7, 0.8, 0.9, 1.1, 1.2], "mlp_multipliers": [0.9, 0.7], "key_multiplier": 0.6, "pad_token_id": 0,
    "attention_in_multiplier": 1.1, "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.75,
    "embedding_multiplier": 2.0, "lm_head_multiplier": 0.8,
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **HEADS, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
    "llama_tied": {"model_type": "llama", **HEADS, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "mistral": {"model_type": "mistral", **HEADS, "sliding_window": 5},
    "qwen2": {
        "model_type": "qwen2", **HEADS, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {"model_type": "qwen3", **HEADS, "head_dim": 10},
    "phi3": {"model_type": "phi3", **HEADS, "head_dim": 8, "pad_token_id": 0,
             "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    "granite": {"model_type": "granite", **HEADS, **GRANITE},
    "olmo2": {"model_type": "olmo2", **HEADS, "pad_token_id": 0},
    "gemma": {"model_type": "gemma", **HEADS, "head_dim": 10, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"model_type": "gemma2", **HEADS, "head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 5,
               "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "gpt2": {"model_type": "gpt2", "vocab_size": 61, "n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 64,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dtype": "float32"},
    "mixtral": {"model_type": "mixtral", **HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"model_type": "qwen2_moe", **HEADS, **EXPERTS, "shared_expert_intermediate_size": 20,
                  "mlp_only_layers": [0]},
    "qwen3_moe": {"model_type": "qwen3_moe", **HEADS, **EXPERTS, "head_dim": 10, "norm_topk_prob": True},
    "qwen3_next": {
        "model_type": "qwen3_next", **HEADS, **EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 20,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mamba2": {"model_type": "mamba2", **MAMBA, "time_step_limit": [0.2, 0.9]},
    "nemotron_h": {
        "model_type": "nemotron_h", **HEADS, "head_dim": 8, **SSD, **ROUTED, "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 20,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3", **HEADS, "num_key_value_heads": 4, **LATENT, **ROUTED, "q_lora_rank": 14,
        "moe_intermediate_size": 12, "first_k_dense_replace": 1, "n_shared_experts": 2,
    },
    "deepseek_v3_plain": {
        "model_type": "deepseek_v3", **HEADS, "num_key_value_heads": 4, **LATENT, **ROUTED, "q_lora_rank": None,
        "moe_intermediate_size": 12, "first_k_dense_replace": 0, "rope_interleave": False, "norm_topk_prob": False,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", "num_attention_heads": 4, "intermediate_size": 36,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.34},
    },
    "gpt_neox_sequential": {
        "model_type": "gpt_neox", "num_attention_heads": 3, "intermediate_size": 36, "use_parallel_residual": False,
    },
    "starcoder2": {"model_type": "starcoder2", **HEADS, "sliding_window": 5},
    "cohere": {"model_type": "cohere", **HEADS, "logit_scale": 0.3},
    "cohere2": {
        "model_type": "cohere2", **HEADS, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
    },
    "smollm3": {"model_type": "smollm3", **HEADS, "pad_token_id": 0, "no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "gemma3_text": {
        "model_type": "gemma3_text", **HEADS, "head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "glm4": {"model_type": "glm4", **HEADS, "head_dim": 8, "pad_token_id": 0, "attention_bias": True},
    "granitemoe": {
        "model_type": "granitemoe", **HEADS, **GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "falcon_h1": {
        "model_type": "falcon_h1", **HEADS, "head_dim": 8, **FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
        "time_step_limit": [0.2, 0.9],
    },
    "falcon_h1_first": {"model_type": "falcon_h1", **HEADS, **FALCON, "mamba_rms_norm": True},
    "falcon_h1_bare": {"model_type": "falcon_h1", **HEADS, **FALCON, "mlp_bias": True},
    "kimi_linear": {
        "model_type": "kimi_linear", **HEADS, "num_key_value_heads": 4, **LATENT, "q_lora_rank": None, "pad_token_id": 0,
        "num_experts": 8, "num_experts_per_token": 2, "num_expert_group": 1, "topk_group": 1, "num_shared_experts": 1,
        "moe_renormalize": True, "moe_intermediate_size": 12, "routed_scaling_factor": 1.5,
        "linear_num_heads": 3, "linear_head_dim": 6, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-3,
        "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
    },
    "granitemoehybrid": {
        "model_type": "granitemoehybrid", **HEADS, **GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 20, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 10, "mamba_n_groups": 1,
        "mamba_expand": 2, "layer_types": ["linear_attention", "full_attention"], "position_embedding_type": "rope",
    },
}  # fmt: skip
CASES |= hf_cases_first.CASES | hf_cases_second.CASES | hf_cases_third.CASES


def config(name: str) -> dict[str, Any]:
    """A case's config.json."""
    own = CASES[name]
    if own["model_type"] in ("gpt2", "t5", "bart") or "text_config" in own:
        return own
    unknown = ("max_position_embeddings",) if own["model_type"] == "mamba2" else ()
    return {k: v for k, v in {**SIZES, **own}.items() if k not in unknown}


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that follow from a tensor's name and shape, exact in float32."""
    n = int(torch.Size(shape).numel())
    wave = torch.sin(torch.arange(n, dtype=torch.float64) * 1.37 + zlib.crc32(name.encode()) % 1000)
    wave = wave * torch.cos(torch.arange(n, dtype=torch.float64) * 0.0173 + len(name))
    made = wave * (1.5 / shape[-1] ** 0.5) if len(shape) > 1 else 0.6 + 0.4 * wave
    return made.float().reshape(shape)


def tokens() -> Tensor:
    """None of them is 0: the reference gives the row of its padding token no gradient."""
    return (torch.arange(2 * 19).reshape(2, 19) * 17 + 5) % 60 + 1


def write(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """A Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def product(x: Tensor) -> Tensor:
    """One number that depends on every number of a tensor, and on where it stands."""
    flat = x.double().flatten()
    return (flat * torch.cos(0.7 * torch.arange(flat.numel(), dtype=torch.float64) + 0.3)).sum()
