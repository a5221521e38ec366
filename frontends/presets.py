"""Models by name: published sizes, and small ones of the same structure to train and try."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Preset(NamedTuple):
    """A spec that comes with the package."""

    name: str
    about: str


PRESETS = (
    Preset("demo", "5M hybrid of gdn, mamba2, gated attention and moe; trains on bytes in minutes on a CPU"),
    Preset("qwen3-next-80b-a3b", "Qwen3-Next: 3 gated delta nets to 1 gated attention, 512 experts; 80B, 3B active"),
    Preset("qwen3-next-80b-a3b-tiny", "Qwen3-Next's structure for bytes, 2M parameters"),
    Preset("nemotron-h-8b", "Nemotron-H: Mamba-2 and dense MLPs with 4 attention layers; 8B"),
    Preset("nemotron-h-8b-tiny", "Nemotron-H's structure for bytes, 2M parameters"),
    Preset("nemotron-3-nano-30b-a3b", "Nemotron 3 Nano: Mamba-2, 128 experts, 6 attention layers; 31.6B, 3.6B active"),
    Preset("nemotron-3-nano-30b-a3b-tiny", "Nemotron 3 Nano's structure for bytes, 2M parameters"),
    Preset("llama-3-8b", "Llama 3: grouped-query attention and SwiGLU; 8.03B"),
    Preset("llama-3-8b-tiny", "Llama 3's structure for bytes, 1M parameters"),
    Preset("mamba-2-2.7b", "Mamba-2: 64 state space layers and nothing else; 2.7B"),
    Preset("mamba-2-2.7b-tiny", "Mamba-2's structure for bytes, 1M parameters"),
)


def preset_path(name: str) -> Path:
    """The TOML file of a preset."""
    return Path(__file__).with_name("presets") / f"{name}.toml"
