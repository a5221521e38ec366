"""Machines: what they can move and compute, and what Triton calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import PlaitError


@dataclass(frozen=True)
class Target:
    """What a kernel is compiled for."""

    name: str
    backend: str
    arch: int | str
    warp: int  # threads
    shared: int  # bytes that one block may have


@dataclass(frozen=True)
class Machine:
    """One processor as it is sold; `measured` is what a plain copy reaches on it, where that is known."""

    name: str
    target: str
    bandwidth: float  # bytes per second
    bf16: float  # flops per second, dense
    f32: float
    shared: int  # bytes per block
    processors: int  # streaming multiprocessors, compute units
    measured: float | None = None

    @property
    def sustained(self) -> float:
        """The bandwidth to compare with."""
        return self.measured or self.bandwidth


# Shared memory per block: CUDA C++ programming guide, "Technical specifications per compute capability"; the 64 KiB
# of local data share in AMD's CDNA 3 instruction set guide.
TARGETS: Mapping[str, Target] = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 163 << 10),
        Target("sm_90", "cuda", 90, 32, 227 << 10),
        Target("sm_100", "cuda", 100, 32, 227 << 10),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10),
    )
}

# Vendors' data sheets, without sparsity: NVIDIA A100 80GB SXM, H100 SXM, H200 SXM, one GPU of HGX B200; AMD MI300X.
# Measured: a copy of large tensors on an H200.
MACHINES: Mapping[str, Machine] = {
    m.name: m
    for m in (
        Machine("A100", "sm_80", 2.039e12, 312e12, 19.5e12, TARGETS["sm_80"].shared, 108),
        Machine("H100", "sm_90", 3.35e12, 989e12, 67e12, TARGETS["sm_90"].shared, 132),
        Machine("H200", "sm_90", 4.8e12, 989e12, 67e12, TARGETS["sm_90"].shared, 132, measured=4.3e12),
        Machine("B200", "sm_100", 8.0e12, 2250e12, 75e12, TARGETS["sm_100"].shared, 148),
        Machine("MI300X", "gfx942", 5.3e12, 1307e12, 163.4e12, TARGETS["gfx942"].shared, 304),
    )
}


def gpu_target(name: str) -> Any:
    """Triton's own target."""
    from triton.backends.compiler import GPUTarget

    target = find_target(name)
    return GPUTarget(target.backend, target.arch, target.warp)


def find_target(name: str) -> Target:
    if name not in TARGETS:
        raise PlaitError(f"target {name!r} is not known; it must be one of {', '.join(TARGETS)}")
    return TARGETS[name]


def predicted_seconds(moved: float, flops: float, machine: Machine, *, dtype: str = "f32") -> float:
    """The roofline: as long as the slower of memory and arithmetic takes."""
    return max(moved / machine.sustained, flops / (machine.bf16 if dtype == "bf16" else machine.f32))


def target_of(device: torch.device) -> str:
    """The known target that a device's code is chosen as for."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")
