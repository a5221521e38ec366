"""Ops that are written as kernels of their own: which they are, and their launches on a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...ir import Node, OpDef, ops
from .aot import Job

FINALS = ("gated_delta_final", "kimi_delta_final")  # recurrences whose state alone is asked for


@dataclass(frozen=True)
class Launch:
    """One launch of an op: in which half of it, what it runs, and as what it is compiled."""

    half: str  # forward (what a backward needs is kept), backward, or step
    step: Any  # source, function, programs and arguments, as the folder that writes the kernel has them
    target: str
    make_job: Callable[[Any, str], Job]
    start: Callable[[Any], None]

    @property
    def name(self) -> str:
        """Of the Triton function."""
        return self.step.function

    @property
    def text(self) -> str:
        """The module that the function stands in."""
        return self.step.source.text

    @property
    def programs(self) -> int:
        """Of the rows and tokens that are listed; of the rows in a step."""
        return self.step.programs

    @property
    def job(self) -> Job:
        """What a launch compiles, which takes Triton."""
        return self.make_job(self.step, self.target)

    def run(self) -> None:
        """Launch it, where the operands are on a device."""
        self.start(self.step)


@dataclass(frozen=True)
class OpKernels:
    """The launches of an op's half, as a table and a text want them."""

    launches: tuple[Launch, ...]

    @property
    def text(self) -> str:
        """Every module that the launches need, each once."""
        return "\n\n".join(dict.fromkeys(x.text for x in self.launches))


def halves(node: Node) -> tuple[str, ...]:
    """What of an op is written as kernels: its forward and its decode step, or its backward; nothing of most ops."""
    if not isinstance(node.op, OpDef):
        return ()
    if node.op in ops.FAMILY or node.is_op("attention"):
        return ("forward", "step")
    of = node.op.gradient_of
    if of is not None and (of in ops.FAMILY or of.name == "attention"):
        return ("backward",)
    return ("forward",) if node.is_op("causal_conv1d", *FINALS) else ()


def op_kernels(node: Node, half: str, target: str, operands: Sequence[Tensor | None]) -> OpKernels:
    """The launches of one half of an op on a target; none where a library or torch code runs it."""
    from ..attending import jobs as attending
    from ..recurrent import jobs as recurrent

    op = node.op
    assert isinstance(op, OpDef)
    if half == "backward":
        assert op.gradient_of is not None
        op = op.gradient_of
        node, operands = replace(node, op=op, inputs=node.inputs[: len(op.inputs)]), operands[: len(op.inputs)]
    home = recurrent if op in ops.FAMILY or op.name in FINALS else attending
    return OpKernels(home.launches(node, target, halves=(half,), operands=operands))


def why_none(node: Node, half: str) -> str:
    """Why an op has no kernels of its own for some half."""
    from ..attending.choice import left, unfit

    if node.is_op("attention"):
        why = unfit(node) if half == "step" else left(node)
        return why or "a step is for causal attention that is not packed"
    return "a library, or torch code, runs it for these sizes and dtypes"
