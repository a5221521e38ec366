"""Row kernels: Triton source generated from the bodies of `@kernel` graphs."""

from .index import Declined
from .kernel import Launch, RowKernel, row_kernel

__all__ = ["Declined", "Launch", "RowKernel", "row_kernel"]
