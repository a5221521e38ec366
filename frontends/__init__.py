"""From what people write to IR: specs, Megatron patterns, presets."""

from .build import build, ways_of
from .count import active_parameter_count, parameter_count
from .load import dump_spec, load_spec
from .pattern import parse_pattern
from .presets import PRESETS
from .shrink import shrink
from .spec import ModelSpec, named_kinds

__all__ = [
    "PRESETS", "ModelSpec", "active_parameter_count", "build", "dump_spec", "load_spec", "named_kinds", "parameter_count",
    "parse_pattern", "shrink", "ways_of",
]  # fmt: skip
