"""What the functions of libdevice mean on a CPU; importing this imports Triton."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice as any_libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.language.extra.hip import libdevice as hip_libdevice

from ...ir import PlaitError
from .interpret_ops import Array, interpreter, tensor

MODULES: tuple[ModuleType, ...] = (any_libdevice, cuda_libdevice, hip_libdevice)


def _by_torch(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Array]:
    def call(x: Array) -> Array:
        return function(torch.from_numpy(np.ascontiguousarray(x))).numpy()

    return call


def _round(x: Array) -> Array:
    """Halves away from zero."""
    return np.copysign(np.floor(np.abs(x) + 0.5), x)


def _rsqrt(x: Array) -> Array:
    return (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype)


def _fma(x: Array, y: Array, z: Array) -> Array:
    return x * y + z


FUNCTIONS: Mapping[str, Callable[..., Array]] = {  # in float64; a float32 result is rounded once
    "abs": np.abs, "acos": np.arccos, "acosh": np.arccosh, "asin": np.arcsin, "asinh": np.arcsinh, "atan": np.arctan,
    "atan2": np.arctan2, "atanh": np.arctanh, "cbrt": np.cbrt, "ceil": np.ceil, "copysign": np.copysign, "cos": np.cos,
    "cosh": np.cosh, "div_rn": np.divide, "erf": _by_torch(torch.special.erf), "erfc": _by_torch(torch.special.erfc),
    "erfinv": _by_torch(torch.special.erfinv), "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "fast_cosf": np.cos,
    "fast_dividef": np.divide, "fast_expf": np.exp, "fast_log2f": np.log2, "fast_logf": np.log, "fast_powf": np.power,
    "fast_sinf": np.sin, "fast_tanhf": np.tanh, "floor": np.floor, "fma": _fma, "fmod": np.fmod, "hypot": np.hypot,
    "isinf": np.isinf, "isnan": np.isnan, "lgamma": _by_torch(torch.special.gammaln), "log": np.log, "log10": np.log10,
    "log1p": np.log1p, "log2": np.log2, "pow": np.power, "rcp_rn": np.reciprocal, "rint": np.rint, "round": _round,
    "rsqrt": _rsqrt, "sin": np.sin, "sinh": np.sinh, "sqrt": np.sqrt, "sqrt_rn": np.sqrt, "tan": np.tan, "tanh": np.tanh,
    "trunc": np.trunc,
}  # fmt: skip


def _call(name: str, operands: tuple[Any, ...]) -> Any:
    """One function on Triton tensors, typed as the GPU's is: float32 or float64, no bf16."""
    if name not in FUNCTIONS:
        raise PlaitError(f"libdevice.{name} has no meaning on a CPU yet; there are {', '.join(FUNCTIONS)}")
    values: list[Any] = [interpreter.interpreter_semantic.to_tensor(x) for x in operands]
    first = values[0].dtype
    if first not in (tl.float32, tl.float64):
        raise PlaitError(f"libdevice.{name} takes float32 or float64, its operand is {first}; cast it with .to(tl.float32)")
    out = FUNCTIONS[name](*[v.handle.data.astype(np.float64) for v in values])
    dtype, kind = (tl.float64, np.float64) if tl.float64 in [v.dtype for v in values] else (tl.float32, np.float32)
    if out.dtype == np.bool_:
        dtype, kind = tl.int32, np.int32
    return tensor(out.astype(kind), dtype, any(v.type.is_block() for v in values))


def _stand_in(name: str) -> Callable[..., Any]:
    def called(*operands: Any, _semantic: Any = None) -> Any:
        return _call(name, operands)

    return called


def stand_ins() -> dict[Any, Callable[..., Any]]:
    """What to call in place of each function of each libdevice module."""
    return {
        function: _stand_in(name)
        for module in MODULES
        for name, function in vars(module).items()
        if inspect.isfunction(function) and not name.startswith("_")
    }
