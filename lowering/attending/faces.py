"""Forms that run generated kernels: on the device, or interpreted on the CPU."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

from .conv_op import kernel_conv, kernel_taps, kernel_transposed
from .op import kernel_attention

_FACES = {
    "attention": kernel_attention,
    "causal_conv1d": kernel_conv,
    "anticausal_conv1d": kernel_transposed,
    "conv1d_taps": kernel_taps,
}


def faces(*, interpreted: bool) -> dict[str, Any]:
    """Every form by its op's name."""
    return {name: _named(name, partial(run, interpreted=interpreted)) for name, run in _FACES.items()}


def _named(name: str, run: Any) -> Any:
    @wraps(run.func)
    def form(*operands: Any, **options: Any) -> Any:
        return run(*operands, **options)

    form.__name__, form.__module__ = name, __package__ or ""
    return form
