"""Row kernels: Triton source generated from the bodies of `@kernel` graphs."""

from collections.abc import Callable
from typing import Any

from .forms import POINTWISE
from .index import Declined
from .kernel import Launch, RowKernel, row_kernel
from .pull import FORMS


def row_form(op: str) -> Callable[..., Any] | None:
    """What says an op of this name for one element, or None where it has no row form."""
    return POINTWISE.get(op) or FORMS.get(op)


__all__ = ["Declined", "Launch", "RowKernel", "row_form", "row_kernel"]
