"""Running a step: launched on a device, interpreted on the CPU, or as a job for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..gpu import Job
from ..gpu import run as interpret
from ..gpu.machine import target_of
from ..gpu.sources import load
from .launch import Step


def named(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as Triton knows them: dtypes by its own names."""
    import triton.language as tl

    names = {getattr(torch, name): getattr(tl, name) for name in ("bfloat16", "float16", "float32", "float64")}
    return {k: names[v] if isinstance(v, torch.dtype) else v for k, v in arguments.items()}


def function_of(step: Step) -> Any:
    """The step's @triton.jit function."""
    return getattr(load(step.source.text, step.source.name), step.function)


def interpreted(step: Step) -> None:
    """Run on CPU tensors, every access checked."""
    interpret(function_of(step), (step.programs,), **named(step.arguments))


def launched(step: Step) -> None:
    """Launch on the device that the tensors are on."""
    warps = step.tile.warps if torch.version.hip is None else max(1, step.tile.warps // 2)
    grid = function_of(step)[(step.programs,)]
    grid(**named(step.arguments), num_warps=warps, num_stages=step.tile.stages)


def job(step: Step, target: str) -> Job:
    """What a launch would compile for a target."""
    warps = step.tile.warps if target.startswith("sm_") else max(1, step.tile.warps // 2)
    return Job(function_of(step), (), named(step.arguments), target, num_warps=warps, num_stages=step.tile.stages)


__all__ = ["function_of", "interpreted", "job", "launched", "named", "target_of"]
