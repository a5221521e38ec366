"""Gemma 3: of its composite models the text part."""

from __future__ import annotations

from .composite import text_part
from .config import Config
from .plan import Plan
from .variants import gemma3_text

OTHERS = (
    "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index", "boi_token_id",
    "eoi_token_id", "image_token_id",
)  # fmt: skip


# Published configs of the smaller models say little more of their text part than where it differs from this.
USUAL = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
}  # fmt: skip


def gemma3(c: Config) -> Plan:
    return text_part(c, gemma3_text, OTHERS, USUAL)
