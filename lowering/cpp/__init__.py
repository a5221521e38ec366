"""C++ for the CPU, generated from traits: linear recurrences and the short convolution."""

from .build import Unbuilt, compiler, load, remark
from .sources import sources

__all__ = ["Unbuilt", "compiler", "load", "remark", "sources"]
