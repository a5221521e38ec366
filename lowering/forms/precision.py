"""Kernels of opaque ops choose their own precision; autocast speaks to what is around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def own_precision(kernel: Callable[..., Result]) -> Callable[..., Result]:
    """The kernel with autocast off inside it: its products have operands of types it chose."""

    @wraps(kernel)
    def run(*args: Any, **options: Any) -> Result:
        devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
        if not devices:
            return kernel(*args, **options)
        with torch.autocast(devices[0], enabled=False):
            return kernel(*args, **options) if len(devices) == 1 else run(*args, **options)

    return run


def opaque(kernel: Callable[..., Result]) -> Callable[..., Result]:
    """A kernel registered by hand: as `torch.library.custom_op` does for its own, Dynamo stays off inside; autocast too."""
    # torch.compiler.disable would import all of Dynamo at once.
    quiet: Any = torch._disable_dynamo  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return quiet(own_precision(kernel))
