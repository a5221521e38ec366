"""Linear recurrences as Triton kernels from one generator: forward, backward and decode step."""

from .faces import faces
from .launch import Step, backward, decode, forward
from .op import linear_recurrence
from .run import interpreted, job, launched
from .source import Source, backward_source, decode_source, forward_source
from .traits import Config, Tile, Traits, config

__all__ = [
    "Config", "Source", "Step", "Tile", "Traits", "backward", "backward_source", "config", "decode", "decode_source",
    "faces", "forward", "forward_source", "interpreted", "job", "launched", "linear_recurrence",
]  # fmt: skip
