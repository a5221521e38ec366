"""Measured launch configurations: every key of a program's kernels, tried on the device that is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from plait.ir import PassError, PlaitError
from plait.ir.gradient import backward

if TYPE_CHECKING:
    from plait.ir import Graph
    from plait.lowering.gpu.jobs import Use
    from plait.lowering.gpu.tuning import Chosen, Work

Tensor = torch.Tensor
SPREAD = 0.02  # of the numbers that timed calls work on: small, so that nothing overflows


def kernels_of(graph: Graph, note: Callable[[str], None] = lambda text: None) -> tuple[Use, ...]:
    """The kernels that training runs: those of the program and of its gradient."""
    from plait.lowering.gpu.jobs import is_backward, op_uses, uses
    from plait.passes import differentiate

    forward = uses(graph) + op_uses(graph)
    if not forward or any(is_backward(u.graph) for u in forward):
        return forward
    try:
        if graph.role == "kernel":
            return forward + uses(backward(graph).graph)
        both = differentiate(graph)[0]
        return uses(both) + op_uses(both)
    except PassError as error:
        note(f"{graph.name}: forward kernels alone: {error}")
        return forward


def tuned_kernels(
    graphs: Sequence[Graph], target: str, *, budget: float, measured: bool, say: Callable[[str], None]
) -> Generator[Chosen]:
    """A choice for every key of these programs that the table of configurations lacks, until `budget` seconds are spent.

    Without `measured` the static gates alone are told. Raises PlaitError where tuning is forbidden (`PLAIT_TUNE=off`).
    """
    from plait.lowering.gpu.tuned import table
    from plait.lowering.gpu.tuning import device_seconds, tune

    if os.environ.get("PLAIT_TUNE", "").lower() in ("off", "0", "no"):
        raise PlaitError("PLAIT_TUNE forbids tuning here; unset it, or ship a table of configurations (PLAIT_TUNED=FILE)")
    works = [made for graph in graphs for use in kernels_of(graph) if (made := work(use, target)) is not None]
    yield from tune(works, target, budget=budget, clock=device_seconds if measured else None, say=say, known=table())


def tune_here(graphs: Sequence[Graph], budget: float, say: Callable[[str], None]) -> Mapping[tuple[str, str], Any]:
    """Tunes for the CUDA device of this process, keeps what was chosen in the table, and returns it.

    Raises PlaitError where there is no such device.
    """
    from plait.lowering.gpu.machine import target_of
    from plait.lowering.gpu.tuned import keep

    if not torch.cuda.is_available():
        raise PlaitError("tune: there is no CUDA device here, and configurations are chosen by timing; leave it out")
    found = dict[tuple[str, str], Any]()
    for chosen in tuned_kernels(graphs, target_of(torch.device("cuda")), budget=budget, measured=True, say=say):
        say(chosen.told)
        found[chosen.name] = chosen.best
        keep({chosen.name: chosen.best})
    return found


def save(chosen: Mapping[tuple[str, str], Any], path: Path | None) -> Path:
    """Adds choices to a table's file, the default one for None."""
    from plait.lowering.gpu.tuned import keep

    return keep(chosen, path)


def work(use: Use, target: str) -> Work | None:
    """A kernel as what is tuned; None where there is none."""
    from plait.lowering.gpu.report import jobs_of
    from plait.lowering.gpu.tuning import Work

    return Work(use.name, partial(jobs_of, use), partial(_call, use, target)) if jobs_of(use, target) else None


def _call(use: Use, target: str) -> Callable[[], object]:
    """One call of a kernel on the device, on numbers of no meaning, with the configurations in force."""
    from plait.lowering.gpu.report import launched

    operands = [None if x is None else _numbers(x) for x in use.operands]
    return launched(use, operands, target)


def _numbers(like: Tensor) -> Tensor:
    """A tensor on the device with an operand's sizes and strides."""
    size = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    flat = torch.zeros(max(1, size), dtype=like.dtype, device="cuda")
    if like.is_floating_point():
        flat = flat.normal_(std=SPREAD).abs_().neg_()  # decays are at most zero
    return flat.as_strided(like.shape, like.stride())
