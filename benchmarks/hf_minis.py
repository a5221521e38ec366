"""Small Hugging Face folders of eight families, made by transformers with random weights, and both sides' ways to run them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor, nn

VOCAB, HIDDEN, LAYERS = 4096, 512, 4
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1408, "max_position_embeddings": 8192}
DELTA = {
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"],
}  # fmt: skip
LATENT = {
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "kv_lora_rank": 128, "q_lora_rank": None,
    "linear_num_heads": 8, "linear_head_dim": 64, "linear_conv_kernel_dim": 4, "num_key_value_heads": 8,
}  # fmt: skip
ROUTED = {
    "num_experts": 8, "num_experts_per_token": 2, "num_shared_experts": 1, "moe_intermediate_size": 352, "num_expert_group": 1,
    "topk_group": 1, "mlp_layer_types": ["dense", *["sparse"] * 3],
}  # fmt: skip
SSD = {"mamba_num_heads": 16, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 1, "conv_kernel": 4, "expand": 2}
FALCON = {
    "mamba_d_ssm": 1024, "mamba_n_heads": 16, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_d_conv": 4,
    "head_dim": 64,
}  # fmt: skip

MINIS: dict[str, dict[str, Any]] = {
    "llama": {**BASE, **HEADS},
    "mixtral": {**BASE, **HEADS, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 704},
    "qwen3_next": {
        **BASE, **HEADS, **DELTA, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "num_experts": 0,
    },
    "olmo_hybrid": {**BASE, **HEADS, **DELTA, "linear_num_key_heads": 8, "pad_token_id": 0},
    "kimi_linear": {
        **BASE, **HEADS, **LATENT, **ROUTED, "pad_token_id": 0, "layer_types": [*["linear_attention"] * 3, "full_attention"],
    },
    "mamba2": {**BASE, "num_heads": 16, "head_dim": 64, "state_size": 128, "n_groups": 1, "expand": 2, "conv_kernel": 4},
    "falcon_h1": {**BASE, **HEADS, **FALCON, "pad_token_id": 0, "mamba_expand": 2},
    "nemotron_h": {
        **BASE, **HEADS, **SSD, "head_dim": 64,
        "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention"],
    },
}  # fmt: skip


def write_folder(name: str, folder: Path) -> None:
    """A mini as a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **MINIS[name]))
    made.save_pretrained(folder)


def peer(folder: Path) -> peers.Peer:
    """The folder by transformers, as it runs by default."""
    from transformers import AutoModelForCausalLM

    return peers.Peer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def mask_free(of: peers.Peer, tokens: Tensor) -> peers.Peer | None:
    """The peer without its causal mask, where its layers can be called so and then say the same."""
    made = peers.mask_free(of)
    if made is None or not hasattr(of.model.model, "rotary_emb"):
        return None
    with torch.no_grad():
        try:
            same = torch.allclose(made(tokens), of(tokens), atol=1e-3)
        except (AttributeError, TypeError, RuntimeError, ValueError):
            return None
    return made if same else None


def ours(folder: Path, mode: str, *, jit: bool = True) -> nn.Module:
    """The folder by Plait."""
    import plait

    return plait.compile(folder, mode=mode, jit=jit)


def decode(of: peers.Peer, prompt: Tensor, count: int) -> Tensor:
    """Greedy continuation with the peer's cache: the loop inside `generate` without its bookkeeping."""
    takes: Callable[..., Any] = of.model.forward
    key = "cache_params" if "cache_params" in inspect.signature(takes).parameters else "past_key_values"
    tokens, cache, said = prompt, None, list[Tensor]()
    for _ in range(count):
        out: Any = of.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **({} if cache is None else {key: cache}))
        cache, tokens = getattr(out, key), out.logits[:, -1:].argmax(-1)
        said.append(tokens)
    return torch.cat(said, 1)
