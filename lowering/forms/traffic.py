"""What moves between the ranks of a mesh axis: ops that count their bytes, and say where they stand when ranks are lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist

from ...ir import PlacementError, PlaitError

Tensor = torch.Tensor
_C10D: Any = torch.ops._c10d_functional  # its functions are found by name when called


class MeshError(PlaitError):
    """Processes that cannot run one program together."""


@dataclass(frozen=True)
class AxisGroup:
    """The ranks that differ in one mesh axis alone, and where this rank stands among them."""

    name: str  # of the process group
    size: int
    rank: int


@dataclass(frozen=True)
class Traffic:
    """How often ranks of an axis exchanged something, and the bytes that this rank sent to others."""

    calls: int = 0
    bytes: int = 0


_AXES = dict[str, AxisGroup]()
_COUNTED = dict[str, Traffic]()


def use_axes(axes: Mapping[str, AxisGroup]) -> None:
    """Say which process group each mesh axis is, from here on."""
    _AXES.clear()
    _AXES.update(axes)


def axis_group(axis: str) -> AxisGroup:
    """This rank's group along a mesh axis."""
    if axis not in _AXES:
        known = ", ".join(_AXES) or "none, as no mesh is in use"
        raise PlacementError(f"a collective runs over mesh axis {axis}; this process has axes: {known}; init a mesh with it")
    return _AXES[axis]


def process_group(group: AxisGroup) -> Any:
    """The process group of an axis, found by name as functional collectives do."""
    return dist.distributed_c10d._resolve_process_group(group.name)  # type: ignore[reportPrivateUsage] # it has no public name


def traffic() -> Mapping[str, Traffic]:
    """What was counted since `count_anew`, by axis."""
    return dict(_COUNTED)


def count_anew() -> None:
    """Forget what was counted."""
    _COUNTED.clear()


def tally(axis: str, sent: int) -> None:
    """Count one exchange in which this rank sent so many bytes to others."""
    before = _COUNTED.get(axis, Traffic())
    _COUNTED[axis] = Traffic(before.calls + 1, before.bytes + sent)


def moved(what: str, axis: str, at: str, sent: int, step: Callable[[], Any]) -> Any:
    """Run an exchange and count it; where it breaks, MeshError says which one it was."""
    made = guarded(what, axis, at, step)
    tally(axis, sent)
    return made


def guarded(what: str, axis: str, at: str, step: Callable[[], Any]) -> Any:
    """Run a step of an exchange; where it breaks, MeshError says which one it was."""
    try:
        return step()
    except RuntimeError as error:  # what every backend raises when a peer has died or is late
        where = f" at {at}" if at else ""
        rank = _AXES[axis].rank if axis in _AXES else "?"
        first = (str(error).splitlines() or [""])[0][:300]
        why = "another rank stopped or is late: see what it says"
        raise MeshError(f"{what} over {axis}{where} did not end on rank {rank} of {axis}: {first}; {why}") from error


def behind(at: str) -> str:
    """Where the transpose of an exchange stands."""
    return f"the backward of {at}" if at else "a backward"


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _ended(x: Tensor) -> Tensor:
    return cast(Tensor, _C10D.wait_tensor(x))


@torch.library.custom_op("plait::exchanged", mutates_args=(), schema="(Tensor x, int ranks, str axis, str at) -> Tensor")
def _exchanged(x: Tensor, ranks: int, axis: str, at: str) -> Tensor:
    ones, group = [1] * ranks, axis_group(axis).name
    sent = (ranks - 1) * (_size(x) // ranks)
    return moved("all_to_all", axis, at, sent, lambda: _ended(_C10D.all_to_all_single(x, ones, ones, group)))


@torch.library.custom_op("plait::collected", mutates_args=(), schema="(Tensor x, int ranks, str axis, str at) -> Tensor")
def _collected(x: Tensor, ranks: int, axis: str, at: str) -> Tensor:
    group, sent = axis_group(axis).name, (ranks - 1) * _size(x)
    return moved("all_gather", axis, at, sent, lambda: _ended(_C10D.all_gather_into_tensor(x, ranks, group)))


@torch.library.custom_op("plait::scattered", mutates_args=(), schema="(Tensor x, int ranks, str axis, str at) -> Tensor")
def _scattered(x: Tensor, ranks: int, axis: str, at: str) -> Tensor:
    group, sent = axis_group(axis).name, (ranks - 1) * (_size(x) // ranks)
    return moved("reduce_scatter", axis, at, sent, lambda: _ended(_C10D.reduce_scatter_tensor(x, "sum", ranks, group)))


@torch.library.custom_op("plait::summed", mutates_args=(), schema="(Tensor x, int ranks, str axis, str at) -> Tensor")
def _summed(x: Tensor, ranks: int, axis: str, at: str) -> Tensor:
    group, sent = axis_group(axis).name, 2 * (ranks - 1) * _size(x) // ranks
    return moved("all_reduce", axis, at, sent, lambda: _ended(_C10D.all_reduce(x, "sum", group)))


@_exchanged.register_fake
def _(x: Tensor, ranks: int, axis: str, at: str) -> Tensor:
    return torch.empty_like(x)


@_collected.register_fake
def _(x: Tensor, ranks: int, axis: str, at: str) -> Tensor:
    return x.new_empty((x.shape[0] * ranks, *x.shape[1:]))


@_scattered.register_fake
def _(x: Tensor, ranks: int, axis: str, at: str) -> Tensor:
    return x.new_empty((x.shape[0] // ranks, *x.shape[1:]))


@_summed.register_fake
def _(x: Tensor, ranks: int, axis: str, at: str) -> Tensor:
    return torch.empty_like(x)


def exchanged(slices: Tensor, axis: str, at: str = "") -> Tensor:
    """[ranks, ...]: slice r goes to rank r; the answer has in place r what rank r had for this one."""
    return _exchanged(slices, axis_group(axis).size, axis, at)


def collected(x: Tensor, axis: str, at: str = "") -> Tensor:
    """[n, ...] of every rank, one after another."""
    return _collected(x, axis_group(axis).size, axis, at)


def scattered(slices: Tensor, axis: str, at: str = "") -> Tensor:
    """[ranks * n, ...]: this rank's [n, ...] of the ranks' sum."""
    return _scattered(slices, axis_group(axis).size, axis, at)


def summed(x: Tensor, axis: str, at: str = "") -> Tensor:
    """The ranks' sum."""
    return _summed(x, axis_group(axis).size, axis, at)
