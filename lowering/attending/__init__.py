"""Softmax attention and the short convolution as generated Triton kernels: forward, backward and decode step."""

from . import conv_launch
from .choice import left, needs, taken
from .faces import faces
from .launch import Operands, backward, decode, forward
from .op import kernel_attention
from .run import Step, interpreted, job, launched
from .source import backward_source, decode_source, forward_source
from .traits import Config, Tile, Traits, config

__all__ = [
    "Config", "Operands", "Step", "Tile", "Traits", "backward", "backward_source", "config", "conv_launch", "decode",
    "decode_source", "faces", "forward", "forward_source", "interpreted", "job", "kernel_attention", "launched", "left",
    "needs", "taken",
]  # fmt: skip
