"""Ops that are written as kernels of their own: which they are, and their launches on a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ...ir import Node, OpDef, ops

if TYPE_CHECKING:
    from ..recurrent.jobs import Launch


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
    if node.op in ops.FAMILY:
        return ("forward", "step")
    return ("backward",) if node.op.gradient_of in ops.FAMILY else ()


def op_kernels(node: Node, half: str, target: str, operands: Sequence[Tensor | None]) -> OpKernels:
    """The launches of one half of an op on a target; none where a library or torch code runs it."""
    from ..recurrent.jobs import launches

    op = node.op
    assert isinstance(op, OpDef)
    if half == "backward":
        assert op.gradient_of is not None
        count = len(op.gradient_of.inputs)
        node, operands = replace(node, op=op.gradient_of, inputs=node.inputs[:count]), operands[:count]
    return OpKernels(launches(node, target, halves=(half,), operands=operands))
