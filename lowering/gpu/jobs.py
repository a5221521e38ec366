"""From a program to compile jobs: which kernels it calls, on what operands, and what each launch of them would get.

A kernel is a region that fusion made, or an op that is written as kernels of its own: a recurrence, attention, a convolution.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import DTYPES, OPS, Builder, Graph, Node, OpDef, TensorType, Value
from ...ir.dump import unique
from ...ir.sizes import value as size_value
from ..reshape import view_steps
from ..rows import RowKernel
from ..rows.launch import launch
from .aot import Job
from .machine import find_target
from .op_jobs import halves
from .sources import load
from .tuned import row_warps

Tensor = torch.Tensor
BATCH, LENGTH = 4, 2048  # rows and tokens of the launch that kernels are compiled for: no size of it is 1
HALF = re.compile(r"_(forward|backward|gradients)(?=\d*$)")  # what `differentiate` adds to names


@dataclass(frozen=True, eq=False)
class Use:
    """A distinct kernel of a program: its name there, operands as its first call has them, and who calls it how often."""

    name: str
    graph: Graph  # the kernel; of an op, a graph that holds it alone
    operands: tuple[Tensor | None, ...]  # without numbers: only sizes, strides and alignment count
    calls: Mapping[str, int]  # layer -> calls in the whole program
    half: str = ""  # of an op: forward, backward or step

    @property
    def direction(self) -> str:
        """`forward`, `backward`, or `step`, which is a decode step."""
        return self.half or ("backward" if is_backward(self.graph) else "forward")

    @property
    def node(self) -> Node | None:
        """The op that is written as kernels of its own; None for a region."""
        return self.graph.nodes[0] if self.half else None


def is_backward(graph: Graph) -> bool:
    """Whether `differentiate` made it, as its name says."""
    half = HALF.search(graph.name)
    return half is not None and half[1] == "backward"


def uses(program: Graph) -> tuple[Use, ...]:
    """Every distinct region that a program calls, or is, in order of first call."""
    found, calls = dict[Graph, tuple[Tensor | None, ...]](), dict[Graph, Counter[str]]()

    def seen(caller: Graph, node: Node, operands: Sequence[Tensor | None]) -> None:
        if isinstance(node.op, Graph):
            note(caller, node.op, operands)

    def note(caller: Graph, kernel: Graph, operands: Sequence[Tensor | None]) -> None:
        found.setdefault(kernel, tuple(operands))
        calls.setdefault(kernel, Counter())[HALF.sub("", caller.name)] += 1

    inputs = [_blank(v.type) for v in program.inputs]
    if program.role == "kernel":
        note(program, program, inputs)
    _walk(program, inputs, seen)
    fresh = unique([*OPS, *keyword.kwlist])
    return tuple(Use(fresh(g.name), g, operands, calls[g]) for g, operands in found.items())


def op_uses(program: Graph) -> tuple[Use, ...]:
    """Every distinct op of a program that is written as kernels of its own, half by half, in order of first call."""
    found, calls = dict[tuple[Graph, str], tuple[Tensor | None, ...]](), dict[tuple[Graph, str], Counter[str]]()

    def seen(caller: Graph, node: Node, operands: Sequence[Tensor | None]) -> None:
        for half in halves(node):
            key = alone(node), half
            found.setdefault(key, tuple(operands))
            calls.setdefault(key, Counter())[HALF.sub("", caller.name)] += 1

    _walk(program, [_blank(v.type) for v in program.inputs], seen)
    fresh = unique([])
    return tuple(
        Use(fresh(f"{g.name}_step" if half == "step" else g.name), g, operands, calls[g, half], half)
        for (g, half), operands in found.items()
    )


def alone(node: Node) -> Graph:
    """A graph of one op."""
    assert isinstance(node.op, OpDef)
    b = Builder(node.op.name)
    given = {v: b.input(f"x{i}", v.type) for i, v in enumerate(dict.fromkeys(node.operands))}
    return b.finish(b.emit(node.op, [None if v is None else given[v] for v in node.inputs], node.attrs))


def _walk(graph: Graph, inputs: Sequence[Tensor], seen: Any) -> list[Tensor]:
    """Results of a graph as tensors without numbers: a view shares its operand's memory, all else is memory of its own."""
    env = dict(zip(graph.inputs, inputs, strict=True)) | {v: _blank(v.type) for v in graph.params}
    for node in graph.nodes:
        given = [env[v] for v in node.operands]
        if node.callee is not None and node.callee.role != "kernel":
            made: Sequence[Tensor] = _walk(node.callee, given, seen)
        else:
            seen(graph, node, [None if v is None else env[v] for v in node.inputs])
            made = _made(node, env)
        env.update(zip(node.outputs, made, strict=True))
    return [env[v] for v in graph.outputs]


def _made(node: Node, env: Mapping[Value, Tensor]) -> Sequence[Tensor]:
    """What an op or a kernel gives."""
    if node.is_op("split"):
        return env[node.operands[0]].split([*node.attrs["sizes"]], -1)
    if node.is_op("reshape"):
        y = env[node.operands[0]]
        for method, arguments in view_steps(node):
            y = getattr(y, method)(*arguments)
        return [y]
    if node.callee is None:
        return [_blank(v.type) for v in node.outputs]
    same = dict(zip(node.callee.inputs, node.operands, strict=True))
    return [env[same[v]] if v in same else _blank(out.type) for v, out in zip(node.callee.outputs, node.outputs, strict=True)]


def _blank(type_: TensorType) -> Tensor:
    sizes = {s: BATCH if s == "b" else LENGTH for s in type_.symbols}
    shape = [size_value(d.size, sizes) for d in type_.dims]
    return torch.empty(shape, dtype=DTYPES[type_.dtype], device="meta")


def jobs(kernel: RowKernel, operands: Sequence[Tensor | None], target: str) -> list[Job]:
    """The functions of one kernel, as a launch on these operands would compile them."""
    module, made = load(kernel.source, kernel.name), list[Job]()

    def note(function: str, programs: int, arguments: Mapping[str, Any], warps: int) -> None:
        warps = row_warps(target, function, kernel.source, warps)
        made.append(Job(getattr(module, function), (), arguments, target, num_warps=waves(warps, find_target(target).warp)))

    launch(kernel, [x for x in operands if x is not None], note)
    return made


def waves(warps: int, threads: int) -> int:
    """Warps of 32 threads, as a machine whose warps have so many counts them."""
    return max(1, warps * 32 // threads)


def job_key(job: Job) -> Hashable:
    """Equal for jobs that compile to the same code."""
    compiled_in = {p.name for p in job.fn.params if p.is_constexpr}
    kinds = tuple((k, v if k in compiled_in else _kind(v)) for k, v in job.meta.items())
    return job.fn, job.target, job.num_warps, job.num_stages, kinds


def _kind(argument: Any) -> Hashable:
    """What a launch specialises an argument by."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if not isinstance(argument, int):
        return type(argument)
    return argument if argument == 1 else (argument % 16 == 0, abs(argument) >= 2**31)
