"""Running a step: launched on a device, interpreted on the CPU, or as a job for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..gpu import Job
from ..gpu import run as interpret
from ..gpu.sources import load
from ..recurrent.run import named
from ..recurrent.source import Source


@dataclass(frozen=True)
class Step:
    """One launch."""

    source: Source
    function: str
    programs: int
    arguments: Mapping[str, Any]
    warps: int  # of 32 threads
    stages: int


Run = Callable[[Step], None]


def function_of(step: Step) -> Any:
    """The step's @triton.jit function."""
    return getattr(load(step.source.text, step.source.name), step.function)


def interpreted(step: Step) -> None:
    """Run on CPU tensors, every access checked."""
    interpret(function_of(step), (step.programs,), **named(step.arguments))


def launched(step: Step) -> None:
    """Launch on the device that the tensors are on."""
    grid = function_of(step)[(step.programs,)]
    warps = waves(step, "sm_90" if torch.version.hip is None else "gfx942")
    grid(**named(step.arguments), num_warps=warps, num_stages=step.stages)


def job(step: Step, target: str) -> Job:
    """What a launch would compile for a target."""
    return Job(function_of(step), (), named(step.arguments), target, num_warps=waves(step, target), num_stages=step.stages)


def waves(step: Step, target: str) -> int:
    """A step's warps as a target counts them: AMD's have 64 threads."""
    return step.warps if target.startswith("sm_") else max(1, step.warps // 2)
