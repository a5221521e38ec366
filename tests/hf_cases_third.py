"""Small models of families with an encoder: relative bias and learned positions, tied and not, gated and plain."""

from __future__ import annotations

from typing import Any

import torch

T5 = {
    "vocab_size": 61, "d_model": 24, "d_kv": 5, "d_ff": 36, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 11, "decoder_start_token_id": 3,
    "eos_token_id": None, "dtype": "float32", "dropout_rate": 0.0,
}  # fmt: skip
BART = {
    "vocab_size": 61, "d_model": 24, "max_position_embeddings": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_ffn_dim": 36, "decoder_ffn_dim": 36, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "forced_eos_token_id": None, "decoder_start_token_id": 2,
    "dtype": "float32",
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", **T5},
    "t5_gated": {
        "model_type": "t5", **T5, "feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False, "num_decoder_layers": 3,
    },
    "t5_untied": {"model_type": "t5", **T5, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    "bart": {"model_type": "bart", **BART},
    "bart_scaled": {
        "model_type": "bart", **BART, "scale_embedding": True, "activation_function": "relu", "decoder_attention_heads": 3,
        "encoder_layers": 1, "decoder_ffn_dim": 20,
    },
}  # fmt: skip


def source() -> torch.Tensor:
    """What the encoder reads; none of it is 0, as in `tokens`."""
    return (torch.arange(2 * 13).reshape(2, 13) * 11 + 3) % 60 + 1
