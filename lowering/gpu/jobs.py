"""From a program to compile jobs: which kernels it calls, on what operands, and what each launch of them would get."""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import DTYPES, OPS, Graph, Node, TensorType, Value
from ...ir.dump import unique
from ...ir.sizes import value as size_value
from ..reshape import view_steps
from ..rows import RowKernel
from ..rows.launch import launch
from .aot import Job
from .machine import find_target
from .sources import load

Tensor = torch.Tensor
BATCH, LENGTH = 4, 2048  # rows and tokens of the launch that kernels are compiled for: no size of it is 1
HALF = re.compile(r"_(forward|backward|gradients)(?=\d*$)")  # what `differentiate` adds to names


@dataclass(frozen=True, eq=False)
class Use:
    """A distinct kernel of a program: its name there, operands as its first call has them, and who calls it how often."""

    name: str
    graph: Graph
    operands: tuple[Tensor, ...]  # without numbers: only sizes, strides and alignment count
    calls: Mapping[str, int]  # layer -> calls in the whole program

    @property
    def backward(self) -> bool:
        return is_backward(self.graph)


def is_backward(graph: Graph) -> bool:
    """Whether `differentiate` made it, as its name says."""
    half = HALF.search(graph.name)
    return half is not None and half[1] == "backward"


def uses(program: Graph) -> tuple[Use, ...]:
    """Every distinct kernel that a program calls, or is, in order of first call."""
    found, calls = dict[Graph, tuple[Tensor, ...]](), dict[Graph, Counter[str]]()

    def seen(caller: Graph, kernel: Graph, operands: Sequence[Tensor]) -> None:
        found.setdefault(kernel, tuple(operands))
        calls.setdefault(kernel, Counter())[HALF.sub("", caller.name)] += 1

    inputs = [_blank(v.type) for v in program.inputs]
    if program.role == "kernel":
        seen(program, program, inputs)
    _walk(program, inputs, seen)
    fresh = unique([*OPS, *keyword.kwlist])
    return tuple(Use(fresh(g.name), g, operands, calls[g]) for g, operands in found.items())


def _walk(graph: Graph, inputs: Sequence[Tensor], seen: Any) -> list[Tensor]:
    """Results of a graph as tensors without numbers: a view shares its operand's memory, all else is memory of its own."""
    env = dict(zip(graph.inputs, inputs, strict=True)) | {v: _blank(v.type) for v in graph.params}
    for node in graph.nodes:
        given = [env[v] for v in node.operands]
        if node.callee is not None and node.callee.role == "kernel":
            seen(graph, node.callee, given)
        made = _walk(node.callee, given, seen) if node.callee is not None and node.callee.role != "kernel" else _made(node, env)
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


def jobs(kernel: RowKernel, operands: Sequence[Tensor], target: str) -> list[Job]:
    """The functions of one kernel, as a launch on these operands would compile them."""
    module, made = load(kernel.source, kernel.name), list[Job]()

    def note(function: str, programs: int, arguments: Mapping[str, Any], warps: int) -> None:
        made.append(Job(getattr(module, function), (), arguments, target, num_warps=waves(warps, find_target(target).warp)))

    launch(kernel, operands, note)
    return made


def waves(warps: int, threads: int) -> int:
    """Warps of 32 threads, as a machine whose warps have so many counts them."""
    return max(1, warps * 32 // threads)


def job_key(job: Job) -> Hashable:
    """Equal for jobs that compile to the same code."""
    return job.fn, job.target, job.num_warps, tuple((k, _kind(v)) for k, v in job.meta.items())


def _kind(argument: Any) -> Hashable:
    """What a launch specialises an argument by."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument if argument == 1 else (argument % 16 == 0, abs(argument) >= 2**31)
