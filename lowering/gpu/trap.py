"""Memory checks: every address that an interpreted kernel touches, against the elements of its operands."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...ir import PlaitError

Array = NDArray[Any]
# Operands get addresses of their own, far apart, so that an index that leaves one can never land in another.
# Addresses that user programs hold have 47 bits, so bit 62 tells the two kinds apart.
REGION, FLAG = 44, 1 << 62
NOBODY, SEVERAL = -1, -2  # who read or wrote an element


class AccessError(PlaitError):
    """A kernel that touches memory which is not one of its operands' elements."""


@dataclass(frozen=True)
class Count:
    """What kernels did to one operand, in elements; masked-off lanes do nothing."""

    loads: int = 0
    stores: int = 0
    atomics: int = 0
    distinct_loads: int = 0  # different elements that a program loads, summed over programs
    distinct_stores: int = 0  # different elements stored, by whichever program
    stored_twice: bool = False  # an element was stored more than once
    raced: bool = False  # an element was stored by one program and touched by another of the same launch


class Operand:
    """One tensor: which byte offsets are elements of it, and what was done to them."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.base, self.size = tensor.data_ptr(), tensor.element_size()
        sizes = list(zip(tensor.shape, tensor.stride(), strict=True))
        self.span = 1 + sum((n - 1) * stride for n, stride in sizes) if tensor.numel() else 0
        self.present = _present(tensor, self.span)
        self.loads = self.stores = self.atomics = self.distinct = 0
        self.raced = False
        self.loaded = list[Array]()  # by the program that runs now
        self.written = np.zeros(self.span, np.int32)
        self.writer, self.reader = np.full((2, self.span), NOBODY)

    def holds(self, addresses: Array, width: int) -> Array:
        """Which accesses of `width` bytes are whole elements of the tensor."""
        offsets = (addresses - np.uint64(self.base)).view(np.int64)
        first, last = offsets // self.size, (offsets + width - 1) // self.size
        inside = (first >= 0) & (last < self.span) & (offsets % min(width, self.size) == 0)
        if self.present is not None and self.span:
            inside &= self.present[first.clip(0, self.span - 1)] & self.present[last.clip(0, self.span - 1)]
        return inside

    def elements(self, addresses: Array) -> Array:
        return (addresses - np.uint64(self.base)).view(np.int64) // self.size

    def place(self, address: int) -> str:
        """`x[5, 3]` for an address, inside or not."""
        offset = address - self.base
        if offset < 0:
            return f"{self.name}, {-offset} bytes before its first element"
        element, part = divmod(offset, self.size)
        index = [0] * self.tensor.ndim
        for dim in sorted(range(self.tensor.ndim), key=lambda d: -self.tensor.stride(d)):
            if stride := self.tensor.stride(dim):
                index[dim], element = divmod(element, stride)
        return f"{self.name}{index}{f' and {part} bytes' if part else ''}"

    def load(self, elements: Array, program: int) -> None:
        self.loads += elements.size
        self.loaded.append(elements)
        self.raced |= bool(_others(self.writer[elements], program).any())
        seen = self.reader[elements]
        self.reader[elements] = np.where((seen == NOBODY) | (seen == program), program, SEVERAL)

    def store(self, elements: Array, program: int) -> None:
        self.stores += elements.size
        self.raced |= bool((_others(self.writer[elements], program) | _others(self.reader[elements], program)).any())
        self.writer[elements] = program
        np.add.at(self.written, elements, 1)

    def end_program(self) -> None:
        if self.loaded:
            self.distinct += np.unique(np.concatenate(self.loaded)).size
            self.loaded.clear()

    def begin_launch(self) -> None:
        """Launches run one after the other: what an earlier one wrote is there."""
        self.end_program()
        self.writer.fill(NOBODY)
        self.reader.fill(NOBODY)

    def count(self) -> Count:
        distinct, twice = int((self.written > 0).sum()), bool((self.written > 1).any())
        return Count(self.loads, self.stores, self.atomics, self.distinct, distinct, twice, self.raced)


def _present(tensor: Tensor, span: int) -> Array | None:
    """Which elements from the first to the last are the tensor's own; None where all are."""
    if tensor.numel() == span:
        return None
    mask = torch.zeros(span, dtype=torch.bool)
    torch.as_strided(mask, tensor.shape, tensor.stride()).fill_(True)
    return mask.numpy()


def _others(who: Array, program: int) -> Array:
    return (who != NOBODY) & (who != program)


class Traffic:
    """What each operand saw, by name; tensors that nobody named appear as `kernel.parameter`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.named = {name: Operand(name, tensor) for name, tensor in tensors.items()}
        self.operands = dict(self.named)

    def __getitem__(self, name: str) -> Count:
        if name not in self.operands:
            raise PlaitError(f"traffic of {name!r}: no such operand; there are {', '.join(self.operands) or 'none'}")
        return self.operands[name].count()

    def __iter__(self) -> Iterator[str]:
        return iter(self.operands)


class Launch:
    """One launch of one kernel: hands out checked addresses and turns them back into real ones."""

    def __init__(self, kernel: str, traffic: Traffic) -> None:
        self.kernel, self.traffic, self.program = kernel, traffic, -1
        self.regions = list[tuple[int, tuple[Operand, ...]]]()  # real address, and the operands that a pointer may meet
        for operand in traffic.operands.values():
            operand.begin_launch()

    def begin_program(self) -> None:
        self.program += 1

    def end_program(self) -> None:
        for operand in self.traffic.operands.values():
            operand.end_program()

    def pointer(self, tensor: Tensor, parameter: str) -> int:
        """The address that the kernel sees; the low bits stay, and with them the alignment."""
        self.regions.append((tensor.data_ptr(), self._operands(tensor, parameter)))
        return self._virtual(len(self.regions) - 1)

    def _virtual(self, region: int) -> int:
        real = self.regions[region][0]
        return FLAG + (region << REGION) + (1 << (REGION - 1)) + (real & 0xFFF)

    def _operands(self, tensor: Tensor, parameter: str) -> tuple[Operand, ...]:
        """The named tensor that this is, else those it is a view of, else one for the parameter."""
        known = [o for o in self.traffic.operands.values() if o.base == tensor.data_ptr() and o.size == tensor.element_size()]
        for operand in known:
            if operand.tensor.shape == tensor.shape and operand.tensor.stride() == tensor.stride():
                return (operand,)
        storage = tensor.untyped_storage().data_ptr()
        views = [o for o in self.traffic.named.values() if o.tensor.untyped_storage().data_ptr() == storage]
        if views and storage:
            return tuple(views)
        name = f"{self.kernel}.{parameter}"
        return (self.traffic.operands.setdefault(name, Operand(name, tensor)),)

    def touch(self, kind: str, addresses: Array, mask: Array, width: int) -> Array:
        """Check and count the lanes that are on; real addresses for them, zero for the others."""
        mask = np.broadcast_to(mask, addresses.shape)
        lanes = np.ascontiguousarray(addresses[mask], np.uint64)
        real = np.zeros(addresses.shape, np.uint64)
        regions = (lanes.view(np.int64) - FLAG) >> REGION
        found = np.empty_like(lanes)
        for region in np.unique(regions):
            here = regions == region
            found[here] = self._touch(kind, lanes[here], int(region), width)
        real[mask] = found
        return real

    def _touch(self, kind: str, lanes: Array, region: int, width: int) -> Array:
        if 0 <= region < len(self.regions):
            base, operands = self.regions[region]
            lanes = lanes - np.uint64(self._virtual(region) - base)
        else:  # an address that the kernel read from memory
            operands = tuple(self.traffic.operands.values())
        left = np.ones(lanes.shape, bool)
        for operand in operands:
            here = left & operand.holds(lanes, width)
            self._record(kind, operand, operand.elements(lanes[here]))
            left &= ~here
        if left.any():
            raise AccessError(_violation(kind, int(lanes[left][0]), operands, int(left.sum())))
        return lanes

    def _record(self, kind: str, operand: Operand, elements: Array) -> None:
        if kind == "loads":
            operand.load(elements, self.program)
        elif kind == "stores":
            operand.store(elements, self.program)
        else:
            operand.atomics += elements.size


def _violation(kind: str, address: int, operands: tuple[Operand, ...], lanes: int) -> str:
    if not operands:
        return f"{kind} address {address:#x}, which belongs to no operand"
    operand = operands[0]
    form = f"shape {[*operand.tensor.shape]} and strides {[*operand.tensor.stride()]}"
    more = f" ({lanes} lanes do)" if lanes > 1 else ""
    return f"{kind} {operand.place(address)}, which is no element of it: it has {form}{more}; mask the lane off"


_WATCHED: ContextVar[Traffic | None] = ContextVar("watched", default=None)


@contextmanager
def watch(tensors: Mapping[str, Tensor]) -> Generator[Traffic]:
    """Count what interpreted launches in here do to these tensors, under these names."""
    traffic = Traffic(tensors)
    token = _WATCHED.set(traffic)
    try:
        yield traffic
    finally:
        _WATCHED.reset(token)


def watched() -> Traffic:
    """The traffic of the innermost `watch`; a fresh one outside of all, since launches are always checked."""
    traffic = _WATCHED.get()
    return Traffic({}) if traffic is None else traffic
