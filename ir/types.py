"""Types: what a value is and where it lives on the device mesh."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch

from . import sizes
from .errors import PlacementError, TypeMismatch
from .sizes import Size

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16,
    "i64": torch.int64, "i32": torch.int32, "bool": torch.bool,
}  # fmt: skip
FLOATS = ("f64", "f32", "bf16", "f16")
BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "i64": 8, "i32": 4, "bool": 1}


@dataclass(frozen=True)
class Dim:
    """One dimension of a global (unsharded) shape."""

    size: Size  # a str is symbolic, bound when the module runs
    axes: tuple[str, ...] = ()  # the mesh axes it is split over, outermost first
    order: str = ""  # token order after a balancing permutation, `zigzag(4)`; empty is natural

    def __str__(self) -> str:
        size = f"({self.size})" if self.axes and ("+" in str(self.size) or "-" in str(self.size)) else str(self.size)
        text = "@".join([size, *self.axes])
        return f"{text}:{self.order}" if self.order else text

    @property
    def bare(self) -> Dim:
        return Dim(self.size)


@dataclass(frozen=True)
class TensorType:
    """`bf16[b, s@cp:zigzag(2), 1024]+tp`: dtype, dims, and axes still to be summed over."""

    dtype: str
    dims: tuple[Dim, ...]
    partial: frozenset[str] = frozenset()

    def __str__(self) -> str:
        dims = ", ".join(map(str, self.dims)) or "()"
        return f"{self.dtype}[{dims}]" + "".join(f"+{a}" for a in sorted(self.partial))

    def with_dim(self, index: int, dim: Dim) -> TensorType:
        dims = list(self.dims)
        dims[index] = dim
        return replace(self, dims=tuple(dims))

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(d.size for d in self.dims)

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def symbols(self) -> set[str]:
        return {s for d in self.dims for s in sizes.symbols(d.size)}

    def count(self, env: dict[str, int]) -> int:
        """Elements of the global tensor, its symbols bound by `env`."""
        total = 1
        for d in self.dims:
            total *= sizes.value(d.size, env)
        return total

    def bytes(self, env: dict[str, int]) -> int:
        return self.count(env) * BYTES[self.dtype]


def tensor_type(dtype: str, *dims: Size | Dim) -> TensorType:
    """`tensor_type("f32", "b", "s", 64)` is `f32[b, s, 64]`."""
    return TensorType(dtype, tuple(d if isinstance(d, Dim) else Dim(sizes.canonical(d)) for d in dims))


def checked(type_: TensorType, where: str) -> TensorType:
    """Refuse a type that no value can have: a size past all bounds, or a mesh axis used twice."""
    if bad := next((d for d in type_.dims if not sizes.possible(d.size)), None):
        raise TypeMismatch(f"{where}: size {str(bad.size)[:40]} of {type_.dtype} must be at least 0 and under 2**62")
    axes = [*(a for d in type_.dims for a in d.axes), *sorted(type_.partial)]
    if twice := next((a for i, a in enumerate(axes) if a in axes[:i]), None):
        raise PlacementError(f"{where}: {type_} uses mesh axis {twice} twice; it may be split over one dim, or partial")
    return type_


@dataclass(frozen=True)
class Mesh:
    """Named axes of devices; ranks count through the last axis fastest."""

    axes: tuple[tuple[str, int], ...]

    def __getitem__(self, axis: str) -> int:
        sizes_of = dict(self.axes)
        if axis not in sizes_of:
            raise PlacementError(f"the mesh has no axis called {axis}; it has {', '.join(sizes_of) or 'none'}")
        return sizes_of[axis]

    def __contains__(self, axis: str) -> bool:
        return axis in dict(self.axes)

    @property
    def ranks(self) -> list[dict[str, int]]:
        """The coordinates of every rank, in rank order."""
        names = [name for name, _ in self.axes]
        return [dict(zip(names, at, strict=True)) for at in product(*(range(n) for _, n in self.axes))]

    def groups(self, axis: str) -> list[list[int]]:
        """Ranks that differ in `axis` alone, in the order of that axis."""
        found: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for rank, at in enumerate(self.ranks):
            rest = tuple((k, v) for k, v in at.items() if k != axis)
            found.setdefault(rest, []).append(rank)
        assert all(len(group) == self[axis] for group in found.values())
        return list(found.values())
