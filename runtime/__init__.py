"""Program -> a module that runs, trains, generates and is saved."""

from ..ir.files import write_atomic, write_text
from .checkpoint import read_metadata, read_tensors, save_tensors
from .encoded import EncoderDecoder, Memory
from .module import CompiledModel, Variant
from .runner import Runner

__all__ = [
    "CompiledModel", "EncoderDecoder", "Memory", "Runner", "Variant", "read_metadata", "read_tensors", "save_tensors",
    "write_atomic", "write_text",
]  # fmt: skip
