"""Program -> a module that runs, trains, generates and is saved."""

from ..ir.files import write_atomic, write_text
from .checkpoint import read_metadata, read_tensors, save_tensors
from .module import CompiledModel, Variant
from .runner import Runner

__all__ = ["CompiledModel", "Runner", "Variant", "read_metadata", "read_tensors", "save_tensors", "write_atomic", "write_text"]
