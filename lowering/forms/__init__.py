"""Fast torch implementations of ops, each with its op's own call shape."""

from .cache import cache_write
from .conv import causal_conv1d

__all__ = ["cache_write", "causal_conv1d"]
