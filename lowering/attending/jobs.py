"""From a node of a program to its attention's or convolution's launches and compile jobs, without a GPU and without numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...ir import DTYPES, Node, TensorType
from ...ir.sizes import value as size_value
from ..gpu.op_jobs import Launch
from . import conv_launch, launch
from .choice import left, unfit
from .run import Run, Step, job, launched
from .traits import HALF

Tensor = torch.Tensor
Maybe = Tensor | None
BATCH, LENGTH = 4, 2048  # rows and tokens of the listed launches: nothing that is compiled depends on them
HALVES = ("forward", "backward", "step")
CONVOLUTIONS = ("causal_conv1d", "anticausal_conv1d", "conv1d_taps")


def launches(
    node: Node, target: str = "sm_90", *, halves: Sequence[str] = HALVES, operands: Sequence[Maybe] | None = None
) -> tuple[Launch, ...]:
    """Every launch that an attention or a short convolution makes on a target, half by half; none where torch runs it.

    `operands` are the node's inputs as tensors without numbers, where strides matter; dense ones otherwise.
    """
    given = [None if v is None else _blank(v.type) for v in node.inputs] if operands is None else list(operands)
    made = list[Launch]()
    for half in halves:
        steps = list[Step]()
        # A step has keys before its query, whatever the whole sequence has.
        if node.is_op("attention") and not (unfit(node) if half == "step" else left(node)):
            _attention(half, _described(node, given), steps.append, target)
        elif node.is_op(*CONVOLUTIONS) and _fits(given):
            _convolution(node, half, given, steps.append)
        made += [Launch(half, s, target, job, launched) for s in steps]
    return tuple(made)


def _described(node: Node, given: Sequence[Maybe]) -> launch.Operands:
    q, k, v, sinks, cu, at = given
    assert q is not None and k is not None and v is not None
    attrs, scale = node.attrs, node.attrs.get("scale")
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    options = bool(attrs.get("causal", True)), int(attrs.get("window", 0)), float(attrs.get("softcap", 0.0))
    return launch.Operands(q, k, v, sinks, cu, at, *options, factor)


def _attention(half: str, x: launch.Operands, run: Run, target: str) -> None:
    if half == "step":
        if x.cu is None and x.causal:  # one more token, where the cache says
            at = x.q.new_empty((), dtype=torch.int64) if x.at is None else x.at
            launch.decode(replace(x, q=x.q[:, :1], at=at), run, target=target)
        return
    unused = list[Step]()
    o, lse = launch.forward(x, run if half == "forward" else unused.append, target=target)
    if half == "backward":
        launch.backward(x, o, lse, torch.empty_like(o), run, target=target)


def _fits(given: Sequence[Maybe]) -> bool:
    x = given[0]
    return x is not None and x.dtype in (*HALF, torch.float32)


def _convolution(node: Node, half: str, given: Sequence[Maybe], run: Run) -> None:
    """A step's one token is torch's; what is a gradient already has no half behind it."""
    first, second, *rest = given
    assert first is not None and second is not None
    if half == "forward" and node.is_op("anticausal_conv1d"):
        conv_launch.transposed(first, second, rest[0], rest[1], run)
    elif half == "forward" and node.is_op("conv1d_taps"):
        conv_launch.taps(first, second, rest[0], rest[1], run, k=int(node.attrs["k"]))
    elif half == "forward":
        conv_launch.forward(first, second, rest[0], rest[1], rest[2], run, act=str(node.attrs.get("act", "none")))
    elif half == "backward" and node.is_op("causal_conv1d"):
        _back(first, second, rest, run, str(node.attrs.get("act", "none")))


def _back(x: Tensor, w: Tensor, rest: Sequence[Maybe], run: Run, act: str) -> None:
    bias, state, cu = rest
    dz = conv_launch.taps(x, torch.empty_like(x), state, cu, run, k=w.shape[1], w=w, bias=bias, act=act)[2]
    conv_launch.transposed(dz, w, None, cu, run, state=state is not None, dtype=x.dtype)


def _blank(type_: TensorType) -> Tensor:
    sizes = {s: BATCH if s == "b" else LENGTH for s in type_.symbols}
    return torch.empty([size_value(d.size, sizes) for d in type_.dims], dtype=DTYPES[type_.dtype], device="meta")
