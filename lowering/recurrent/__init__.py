"""Linear recurrences as Triton kernels from one generator: forward, backward and decode step."""

from .faces import faces
from .jobs import Launch, launches
from .launch import Step, backward, decode, final_state, forward
from .op import linear_recurrence
from .run import interpreted, job, launched
from .source import Source, backward_source, decode_source, forward_source
from .traits import Config, Tile, Traits, config

__all__ = [
    "Config", "Launch", "Source", "Step", "Tile", "Traits", "backward", "backward_source", "config", "decode", "decode_source",
    "faces", "final_state", "forward", "forward_source", "interpreted", "job", "launched", "launches", "linear_recurrence",
]  # fmt: skip
