"""From tensors to launches: sizes, strides, results, partial sums, and how many programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...ir import DTYPES, TypeMismatch
from ...ir.sizes import value as size_value
from .kernel import Launch, RowKernel
from .tiles import LEAST, PARTS, REPEATS, Section

Tensor = torch.Tensor
LIMIT = 2**31  # units of one launch: their number is counted in 32 bits, addresses in 64
Run = Callable[[str, int, Mapping[str, Any], int], None]  # function, programs, arguments, warps


def launch(kernel: RowKernel, operands: Sequence[Tensor], run: Run) -> tuple[Tensor, ...]:
    """Compute a kernel's results with `run`, which launches one of its functions. Raises TypeMismatch for wrong operands.

    Results are in the graph's order; an operand that is returned as it is stands for itself.
    """
    sizes = bound(kernel, operands)
    results = made(kernel, operands, sizes)
    values = dict[str, Any]()
    for i, x in enumerate(operands):
        values[f"p_x{i}"] = x
        values |= {f"s_x{i}_{d}": s for d, s in enumerate(x.stride())}
    values |= {f"p_y{i}": y for i, y in enumerate(results)}
    values |= {f"n_{i}": sizes[size] for i, size in enumerate(kernel.sizes)}
    values["g"] = shared(kernel, sizes)
    if kernel.sums:
        parts: Any = torch.sym_max(1, values["g"])
        values["p_s"] = torch.empty(parts, kernel.sums, dtype=torch.float32, device=operands[0].device)
    for step in kernel.launches:
        _step(step, values, sizes, run)
    return results


def _step(step: Launch, values: Mapping[str, Any], sizes: Mapping[str, int], run: Run) -> None:
    ends, total = dict[str, int](), 0
    for i, section in enumerate(step.sections):
        total += programs(section, sizes, values["g"])
        ends[f"e_{i}"] = total
    if total:
        every = {**values, **ends}
        run(step.function, total, {name: every[name] for name in step.arguments}, step.warps)


def blocks(section: Section, sizes: Mapping[str, int]) -> int:
    """How many blocks of units a section has."""
    units = math.prod(a.size if isinstance(a.size, int) else sizes[a.size] for a in section.outer)
    if units >= LIMIT:
        raise TypeMismatch(f"{units} rows in one launch, must be fewer than {LIMIT}; split the batch")
    return (units + section.units - 1) // section.units


def shared(kernel: RowKernel, sizes: Mapping[str, int]) -> int:
    """How many programs share the sums over rows: as many as have rows, at most PARTS.

    Where programs share the columns too, fewer do: partial sums are traffic.
    """
    summing = [s for s in kernel.launches[0].sections if s.summing]
    limit = max(LEAST, min(PARTS, 2 * PARTS // min([s.chunks for s in summing], default=1)))
    symbolic: Any = torch
    most = 0
    for section in summing:
        most = symbolic.sym_max(most, blocks(section, sizes))  # sizes may be symbols, which a comparison would fix
    return symbolic.sym_min(limit, most)


def programs(section: Section, sizes: Mapping[str, int], parts: int) -> int:
    if section.summing:
        return parts * section.chunks
    return -(-blocks(section, sizes) // (REPEATS if section.repeats else 1)) * section.chunks


def bound(kernel: RowKernel, operands: Sequence[Tensor]) -> dict[str, int]:
    """The number each row size stands for; a TypeMismatch names an operand that does not fit."""
    graph = kernel.graph
    if len(operands) != len(graph.inputs):
        raise TypeMismatch(f"{graph.name} takes {len(graph.inputs)} operands, got {len(operands)}")
    env, first = dict[str, int](), operands[0]
    for value, x in zip(graph.inputs, operands, strict=True):
        if x.device != first.device:
            raise TypeMismatch(f"{graph.name}: {value.name} is on {x.device}, must be on {first.device} as the others are")
        if x.dim() != len(value.type.dims) or x.dtype != DTYPES[value.type.dtype]:
            raise TypeMismatch(f"{graph.name}: {value.name} is {x.dtype}{list(x.shape)}, must be {value.type}")
        for dim, n in zip(value.type.dims, x.shape, strict=True):
            if (env.setdefault(dim.size, n) if isinstance(dim.size, str) else dim.size) != n:
                must = env[dim.size] if isinstance(dim.size, str) else dim.size
                raise TypeMismatch(f"{graph.name}: {value.name} is {list(x.shape)}, its {dim.size} must be {must}")
    return {**env, **{s: size_value(s, env) for s in kernel.sizes if s not in env}}


def made(kernel: RowKernel, operands: Sequence[Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
    """Room for the results; an operand that is returned, or a result that is returned twice, is itself."""
    graph, device = kernel.graph, operands[0].device
    out = list[Tensor]()
    for value in graph.outputs:
        if value not in graph.makers:
            out.append(operands[graph.inputs.index(value)])
            continue
        if value in graph.outputs[: len(out)]:
            out.append(out[graph.outputs.index(value)])
            continue
        shape = [d.size if isinstance(d.size, int) else sizes[d.size] for d in value.type.dims]
        out.append(torch.empty(shape, dtype=DTYPES[value.type.dtype], device=device))
    return tuple(out)
