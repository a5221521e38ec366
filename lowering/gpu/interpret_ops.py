"""What Triton's operations mean on a CPU: its own interpreter, with bf16, NaN, masks and reductions as on a GPU.

Importing this imports Triton.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton._C.libtriton import interpreter as memory
from triton._C.libtriton import ir
from triton.runtime import interpreter as triton_interpreter

from .trap import Launch

Array = NDArray[Any]
interpreter: Any = triton_interpreter  # Triton's own annotations are partial and wrong
Handle = interpreter.TensorHandle
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
PRECISIONS = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")


def widen(bits: Array) -> Array:
    """bf16, which numpy holds as 16 bits, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Array) -> Array:
    """float32 as bf16 bits, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def wide(handle: Any) -> Any:
    return Handle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def like(handle: Any, result: Any) -> Any:
    """A float32 result in the dtype of the operand that it came from."""
    return Handle(narrow(result.data), tl.bfloat16) if is_bf16(handle) else result


def poison(dtype: Any, shape: tuple[int, ...]) -> Array:
    """What a masked-off lane without `other` holds: on a GPU it is undefined, so a sum over it must show."""
    kind = np.dtype(interpreter._get_np_dtype(dtype))
    if dtype.is_floating() and kind.kind == "f":
        return np.full(shape, np.nan, kind)
    if dtype.is_floating():
        return np.full(shape, 0x7FC0 if kind.itemsize == 2 else 0x7F, kind)
    return np.ones(shape, kind) if kind.kind == "b" else np.full(shape, np.iinfo(kind.name).max, kind)


class Builder(interpreter.InterpreterBuilder):
    """Runs one launch: arithmetic in numpy, memory through the launch's checks."""

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self.launch = launch
        self.options = dataclasses.replace(self.options, sanitize_overflow=False, allowed_dot_input_precisions=PRECISIONS)

    def get_bf16(self, value: float) -> Any:
        return Handle(narrow(np.array([value])), tl.bfloat16)

    # -- arithmetic -----------------------------------------------------------------------

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Array]) -> Any:
        if not (is_bf16(lhs) and is_bf16(rhs)) or op in BITWISE:
            out = super().binary_op(lhs, rhs, op)
            return Handle(out.data, tl.int1) if out.data.dtype == np.bool_ else out
        out = super().binary_op(wide(lhs), wide(rhs), op)
        return Handle(out.data, tl.int1) if out.data.dtype == np.bool_ else like(lhs, out)

    def unary_op(self, arg: Any, op: Callable[..., Array]) -> Any:
        return like(arg, super().unary_op(wide(arg), op))

    def create_erf(self, arg: Any) -> Any:
        values = wide(arg).data
        out = torch.special.erf(torch.from_numpy(values.astype(np.float64))).numpy().astype(values.dtype)
        return like(arg, Handle(out, wide(arg).dtype.scalar))

    def create_rsqrt(self, arg: Any) -> Any:
        """One rounding, as libdevice's has; the machine's own instruction is within two."""
        values = wide(arg).data
        return like(arg, Handle((1 / np.sqrt(values.astype(np.float64))).astype(values.dtype), wide(arg).dtype.scalar))

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        """One rounding: the product of two float32 is exact in float64."""
        a, b, c = (wide(h).data for h in (x, y, z))
        out = a.astype(np.float64) * b + c if c.dtype.kind == "f" else a * b + c
        return like(z, Handle(out.astype(c.dtype), wide(z).dtype.scalar))

    # a NaN operand gives the other one, except where the caller asks for it to propagate
    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(self, arg: Any, low: Any, high: Any, propagate_nan: Any) -> Any:
        every = propagate_nan == ir.PROPAGATE_NAN.ALL
        raised = self.binary_op(arg, low, np.maximum if every else np.fmax)
        return self.binary_op(raised, high, np.minimum if every else np.fmin)

    def create_dot(self, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return super().create_dot(wide(a), wide(b), d, *options)

    # -- casts ----------------------------------------------------------------------------

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return super().cast_impl(src, dst_type)
        if source == tl.bfloat16:
            return Handle(widen(src.data).astype(interpreter._get_np_dtype(dst_type)), target)
        return Handle(narrow(src.data.astype(np.float32)), target)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding: Any) -> Any:
        nearest = rounding in (None, ir.ROUNDING_MODE.RTNE)
        if nearest and min(src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth) >= 16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding)

    # -- memory ---------------------------------------------------------------------------

    def _real(self, kind: str, pointers: Any, mask: Array) -> Array:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        return self.launch.touch(kind, pointers.data, mask, width)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *hints: Any, **named: Any) -> Any:
        dtype = ptrs.get_element_ty()
        on = np.ascontiguousarray(np.broadcast_to(mask.data, ptrs.data.shape))
        real = self._real("loads", ptrs, on)
        rest = poison(dtype, real.shape) if other is None else np.ascontiguousarray(np.broadcast_to(other.data, real.shape))
        return Handle(memory.load(real, on, rest, interpreter._get_np_dtype(dtype)), dtype)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *hints: Any, **named: Any) -> None:
        on = np.ascontiguousarray(np.broadcast_to(mask.data, ptrs.data.shape))
        memory.store(self._real("stores", ptrs, on), np.ascontiguousarray(value.data), on)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, *rest: Any) -> Any:
        real = self._real("updates", ptr, np.ones(ptr.data.shape, bool))
        return super().create_atomic_cas(Handle(real, ptr.dtype), cmp, val, *rest)

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        checked = Handle(self._real("updates", ptr, mask.data), ptr.dtype)
        if is_bf16(val) and op == ir.ATOMIC_OP.FADD:
            return Handle(_add_bf16(checked.data, val.data, mask.data), tl.bfloat16)
        return super().create_atomic_rmw(op, checked, val, mask, *rest)


def _add_bf16(addresses: Array, values: Array, mask: Array) -> Array:
    """One element after the other, since a block may hold one address twice; what was there before."""
    before, on, none = np.zeros_like(values), np.ones(1, bool), np.zeros(1, np.uint16)
    for index in zip(*np.nonzero(mask), strict=True):
        address = addresses[index].reshape(1)
        old = memory.load(address, on, none, np.dtype(np.uint16))
        memory.store(address, narrow(widen(old) + widen(values[index].reshape(1))), on)
        before[index] = old[0]
    return before


# -- reductions and scans ---------------------------------------------------------------------


def tensor(data: Array, dtype: Any, block: bool) -> Any:
    return tl.tensor(Handle(data, dtype), tl.block_type(dtype, [*data.shape]) if block else dtype)


def through_f32(reduce: Callable[..., Any], x: Any, *args: Any) -> Any:
    """Reduce bf16 in float32 and round what comes out."""
    if x.dtype != tl.bfloat16:
        return reduce(x, *args)
    out = reduce(tensor(widen(x.handle.data), tl.float32, x.type.is_block()), *args)
    results = [r if r.dtype != tl.float32 else tensor(narrow(r.handle.data), tl.bfloat16, r.type.is_block())
               for r in (out if isinstance(out, tuple) else (out,))]  # fmt: skip
    return tuple(results) if isinstance(out, tuple) else results[0]


def steps(combine: Callable[..., Any], inputs: Sequence[Any], axis: int) -> Iterator[tuple[Any, ...]]:
    """The accumulators after each step along an axis; a step combines whole slices."""
    so_far: tuple[Any, ...] = ()
    for i in range(inputs[0].handle.data.shape[axis]):
        slices = [np.take(x.handle.data, [i], axis) for x in inputs]
        now = tuple(tensor(s, x.dtype, True) for s, x in zip(slices, inputs, strict=True))
        out = combine(*so_far, *now) if so_far else now
        so_far = out if isinstance(out, tuple) else (out,)
        yield so_far


class Reduce(interpreter.ReduceOps):
    """Reductions with bf16 in float32, and one combine per step instead of one per element."""

    def sum(self, input: Any) -> Any:
        return through_f32(super().sum, input)

    def min_max(self, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        first = input[0] if isinstance(input, tuple) else input
        return through_f32(super().min_max, first, val_reduce_op, idx_reduce_op)

    def generic_reduce(self, input: Any) -> list[Any]:
        rank = input[0].handle.data.ndim
        flat = [x if self.axis is not None else tensor(x.handle.data.reshape(-1), x.dtype, True) for x in input]
        axis = self.axis or 0
        *_, last = steps(self.combine_fn, flat, axis)
        data = [x.handle.data for x in last]
        if self.keep_dims:
            data = [d.reshape((1,) * rank) if self.axis is None else d for d in data]
            return [self.to_tensor(d, x.dtype) for d, x in zip(data, input, strict=True)]
        shapes = [d.reshape(-1)[0] if d.ndim == 1 else np.squeeze(d, axis) for d in data]
        return [self.to_tensor(d, x.dtype) for d, x in zip(shapes, input, strict=True)]


class Scan(interpreter.ScanOps):
    """Scans with one combine per step instead of one per element."""

    def generic_scan(self, input: Any) -> list[Any]:
        rows = [*steps(self.combine_fn, input, self.axis)]
        joined = [np.concatenate([row[k].handle.data for row in rows], self.axis) for k in range(len(input))]
        return [self.to_tensor(data, x.dtype) for data, x in zip(joined, input, strict=True)]
