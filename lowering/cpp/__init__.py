"""C++ for the CPU, generated from traits: linear recurrences and the short convolution."""

from .build import Unbuilt, begin, compiler, load, remark
from .sources import sources

__all__ = ["Unbuilt", "begin", "compiler", "load", "remark", "sources"]
