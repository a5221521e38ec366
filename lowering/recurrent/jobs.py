"""From a node of a program to its recurrence's launches and compile jobs, without a GPU and without numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...ir import DTYPES, Node, OpDef, TensorType, ops
from ...ir.sizes import value as size_value
from ..forms.chunked import Operands
from ..gpu.op_jobs import Launch
from .launch import Step, backward, decode, final_state, forward, promoted
from .run import job, launched
from .traits import unfit

Tensor = torch.Tensor
BATCH, LENGTH = 4, 2048  # rows and tokens of the listed launches: nothing that is compiled depends on them
HALVES = ("forward", "backward", "step")
FINALS = (ops.gated_delta_final, ops.kimi_delta_final)


def launches(
    node: Node, target: str = "sm_90", *, halves: Sequence[str] = HALVES, operands: Sequence[Tensor | None] | None = None
) -> tuple[Launch, ...]:
    """Every launch that a node of the recurrence family makes on a target, half by half, in order; none where torch runs it.

    A node that asks for the final state alone has a forward.

    `operands` are the node's inputs as tensors without numbers, where strides matter; dense ones otherwise.
    `launch.job` goes to `gpu.compile_all`; equal launches of two nodes have equal `gpu.jobs.job_key(launch.job)`.
    """
    x = described(node, operands)
    if x is None or unfit(promoted(x), x.k.shape[3], x.v.shape[3]):
        return ()
    made = list[Launch]()
    for half in halves:
        steps = list[Step]()
        if node.op in ops.FAMILY:
            _launch(half, x, steps, target)
        elif half == "forward":
            final_state(x, steps.append, target=target)
        made += [Launch(half, s, target, job, launched) for s in steps]
    return tuple(made)


def described(node: Node, operands: Sequence[Tensor | None] | None = None) -> Operands | None:
    """A node's operands without numbers; None where it is no member of the family."""
    if not isinstance(node.op, OpDef) or node.op not in (*ops.FAMILY, *FINALS):
        return None
    given = [None if v is None else _blank(v.type) for v in node.inputs] if operands is None else operands
    x = dict(zip((o.name for o in node.op.inputs), given, strict=True))
    k, v = _there(x["k"]), _there(x["v"])
    q = x.get("q", k)
    decay = x.get("decay")
    if (slope := x.get("slope")) is not None:
        decay = slope.expand(*v.shape[:2], -1)
    delta = node.op in FINALS or ops.FAMILY[node.op].update == "delta"
    return Operands(
        _there(q), k, v, decay, x.get("beta"), x.get("state"), x.get("cu"), float(node.attrs.get("scale", 1.0)), delta
    )


def _launch(half: str, x: Operands, steps: list[Step], target: str) -> None:
    if half == "step":
        first = {name: None if (y := getattr(x, name)) is None else y[:, :1] for name in ("q", "k", "v", "decay", "beta")}
        state = x.v.new_empty((x.v.shape[0], x.v.shape[2], x.k.shape[3], x.v.shape[3]), dtype=torch.float32)
        decode(replace(x, **first, state=state, cu=None), steps.append, final=state, target=target)
        return
    unused = list[Step]()
    o, final, saved = forward(x, (steps if half == "forward" else unused).append, keep=True, target=target)
    if half == "backward":
        backward(x, saved, o, final, steps.append, target=target)


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _blank(type_: TensorType) -> Tensor:
    sizes = {s: BATCH if s == "b" else LENGTH for s in type_.symbols}
    return torch.empty([size_value(d.size, sizes) for d in type_.dims], dtype=DTYPES[type_.dtype], device="meta")
