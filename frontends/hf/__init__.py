"""Hugging Face folders: config.json and safetensors to a spec and its weights, and back."""

from .families import FAMILIES, read_plan
from .folder import is_folder, read_config
from .load import load_hf, read_spec
from .save import hf_names, hf_tensors, write_folder
from .text import Words, end_tokens, read_words

__all__ = [
    "FAMILIES", "Words", "end_tokens", "hf_names", "hf_tensors", "is_folder", "load_hf", "read_config", "read_plan",
    "read_spec", "read_words", "write_folder",
]  # fmt: skip
