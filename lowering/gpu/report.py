"""What kernels move, compute and use: rows for a table, one per distinct kernel of a program."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from ...ir import Graph, Node, OpDef, Value
from ...ir.sizes import value as size_value
from ...ir.types import BYTES
from ..kernels import layout
from ..rows import Declined, RowKernel, row_kernel
from ..rows.launch import launch, shared
from ..rows.tiles import shifted
from .aot import Compiled, CompileError, Job, compile_all
from .jobs import Use, job_key, jobs, waves
from .machine import Machine, find_target, predicted_seconds
from .op_jobs import OpKernels, op_kernels, why_none
from .resources import Resources, resources
from .sources import load
from .tuned import row_warps

VIEWS = ("split", "reshape")  # other ways to see the same memory
WIDE = 16  # bytes of the widest load of a thread
WARP = 32  # threads: a row that gives each of them a wide load is worth one
HGMMA_ROWS = 64
DECODED = 64  # rows of the decode step that is counted
AT_ONCE = 24  # jobs of one batch for each core: progress is told between batches
Sizes = Mapping[str, int]
Told = Callable[[int, int], None]  # how many of how many are done
T = TypeVar("T")


# -- bytes and FLOPs ----------------------------------------------------------------------


def moved(node: Node, sizes: Sizes) -> int:
    """Bytes that an op on its own, or a kernel, reads and writes; a view moves none, an embedding reads the rows it gives."""
    if node.callee is not None:
        return kernel_bytes(node.callee, sizes)
    if node.is_op(*VIEWS):
        return 0
    results = [v.type.bytes({**sizes}) for v in node.outputs]
    operands = [v.type.bytes({**sizes}) for v in dict.fromkeys(_read(node))]
    if node.is_op("embedding"):
        operands = [operands[-1], *results]
    return sum(operands) + sum(results)


def _read(node: Node) -> list[Value]:
    """Operands whose numbers an op reads, not their shape alone."""
    if not isinstance(node.op, OpDef):
        return [*node.operands]
    pairs = zip(node.op.inputs, node.inputs, strict=True)
    return [v for o, v in pairs if v is not None and o.name not in node.op.shapes]


def kernel_bytes(kernel: Graph, sizes: Sizes) -> int:
    """Bytes that a kernel reads and writes: every operand once, every result once, and its sums over rows out and in."""
    kernel = layout(kernel).computed
    read = sum(_elements_read(kernel, v, sizes) * BYTES[v.type.dtype] for v in kernel.inputs)
    written = sum(v.type.bytes({**sizes}) for v in dict.fromkeys(kernel.outputs) if v in kernel.makers)
    return read + written + _partial_bytes(kernel, sizes)


def _elements_read(kernel: Graph, value: Value, sizes: Sizes) -> int:
    """Elements of a value that the kernel reads; through views, the parts that are read or returned behind them."""
    users = [n for n in kernel.uses.get(value, ()) if value in _read(n)]
    whole = value.type.count({**sizes})
    if any(not n.is_op(*VIEWS) for n in users) or (value in kernel.outputs and value in kernel.makers):
        return whole
    return min(whole, sum(_elements_read(kernel, v, sizes) for n in users for v in n.outputs))


def _partial_bytes(kernel: Graph, sizes: Sizes) -> int:
    """The partial sums over rows, written by the programs that share them and read by the second stage."""
    made = generated(kernel)
    if isinstance(made, Declined) or not made.sums:
        return 0
    rows = {**sizes, **{s: size_value(s, sizes) for s in made.sizes}}
    return 2 * 4 * made.sums * shared(made, rows)


def flops(node: Node, sizes: Sizes) -> int:
    """Floating-point operations of an op, or of all ops in the graph it calls."""
    if isinstance(node.op, Graph):
        return sum(flops(n, sizes) for n in node.op.nodes)
    return node.op.flops([v.type if v is not None else None for v in node.inputs], node.attrs, sizes)


# -- rows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A distinct kernel: what it moves and computes, and what its code uses on each target."""

    use: Use
    declined: str  # why there is no kernel; empty where there is one
    launches: int
    bytes: int  # an op's operands and results, each once
    flops: int
    product: str  # dtype of its matrix products; float32 where it has none
    wide: bool  # whether rows are long and aligned, so that 128-bit loads are due
    hopper: bool  # whether products are large enough for HGMMA, so that it is due where there is it
    used: Mapping[str, Resources | CompileError]  # by target, launches together

    def seconds(self, machine: Machine) -> float:
        return predicted_seconds(self.bytes, self.flops, machine, dtype=self.product)

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / max(1, self.bytes)

    @property
    def faults(self) -> tuple[str, ...]:
        """What must not be."""
        return tuple(f"{self.use.name} for {t}: {why}" for t, used in self.used.items() if (why := self._fault(t, used)))

    def _fault(self, target: str, used: Resources | CompileError) -> str:
        if isinstance(used, CompileError):
            return f"does not compile: {used}"
        if used.spills or used.stack:
            return f"spills registers: {used.spills} times, {used.stack} bytes a thread"
        if target == "sm_90" and self.hopper and "HMMA" in used.tensor_core:
            return "has products by HMMA, which reach half of what HGMMA does"
        return "has no 128-bit load, though its rows are long and aligned" if self.wide and not used.wide_loads else ""


def generated(graph: Graph) -> RowKernel | Declined:
    """The row kernel of what a graph computes, or why there is none; results that are parts of operands cost nothing."""
    try:
        return row_kernel(layout(graph).computed)
    except Declined as reason:
        return reason


def kernels(use: Use, target: str) -> RowKernel | OpKernels | Declined:
    """What runs a use: a row kernel, which is the same for every target, or an op's own kernels."""
    if use.node is None:
        return generated(use.graph)
    made = op_kernels(use.node, use.half, target, use.operands)
    return made if made.launches else Declined(why_none(use.node, use.half))


def jobs_of(use: Use, target: str) -> list[Job]:
    """What the launches of a use compile for a target."""
    made = kernels(use, target)
    if isinstance(made, OpKernels):
        return [x.job for x in made.launches]
    return [] if isinstance(made, Declined) else jobs(made, use.operands, target)


def launched(use: Use, operands: Sequence[Tensor | None], target: str) -> Callable[[], object]:
    """What launches a use on the device that its operands are on, again and again into the same results."""
    if use.node is not None:
        made = op_kernels(use.node, use.half, target, operands).launches
        return lambda: [x.run() for x in made]
    kernel, calls = generated(use.graph), list[tuple[str, int, Mapping[str, Any], int]]()
    assert isinstance(kernel, RowKernel)

    def note(function: str, programs: int, arguments: Mapping[str, Any], warps: int) -> None:
        calls.append((function, programs, arguments, warps))

    launch(kernel, [x for x in operands if x is not None], note)
    module = load(kernel.source, kernel.name)

    def run() -> None:
        for function, programs, arguments, warps in calls:
            warps = waves(row_warps(target, function, kernel.source, warps), find_target(target).warp)
            getattr(module, function)[(programs,)](**arguments, num_warps=warps)

    return run


def rows(found: Sequence[Use], targets: Sequence[str], sizes: Sizes, told: Told) -> list[Row]:
    """A row for every kernel; equal code is compiled once."""
    work = {(u, t): batch for u in found for t in targets if (batch := jobs_of(u, t))}
    known = outcomes([j for batch in work.values() for j in batch], resources, told)
    used = {key: together([known[job_key(j)] for j in batch]) for key, batch in work.items()}
    return [_row(u, {t: used[u, t] for t in targets if (u, t) in used}, sizes) for u in found]


def _row(use: Use, used: Mapping[str, Resources | CompileError], sizes: Sizes) -> Row:
    made = kernels(use, "sm_90")
    declined = str(made) if isinstance(made, Declined) else ""
    wide = isinstance(made, RowKernel) and wide_rows(use, made)
    launches = 0 if isinstance(made, Declined) else len(made.launches)
    if use.node is None:
        cost = kernel_bytes(use.graph, sizes), sum(flops(n, sizes) for n in use.graph.nodes)
        return Row(use, declined, launches, *cost, "f32", wide, False, used)
    if use.half == "step":
        sizes = {**sizes, "b": DECODED, "s": 1}
    read = _state(use.node, sizes) if use.half == "step" else 0
    product, cost = _product(use.node), (moved(use.node, sizes) + read, flops(use.node, sizes))
    return Row(use, declined, launches, *cost, product, wide, product == "bf16" and _large(use.node), used)


def _product(node: Node) -> str:
    """What the matrix products of an op are counted as."""
    return "bf16" if all(v.type.dtype in ("bf16", "f16") for v in node.operands[:3]) else "f32"


def _large(node: Node) -> bool:
    """Whether heads fill the 64 rows that HGMMA multiplies; narrower ones stand in HMMA's."""
    widths = [v.type.dims[-1].size for v in node.operands[:3] if len(v.type.dims) == 4]
    return bool(widths) and all(isinstance(n, int) and n >= HGMMA_ROWS for n in widths)


def _state(node: Node, sizes: Sizes) -> int:
    """Bytes of the state that a decode step reads, which the node of a whole sequence does not have."""
    return node.outputs[-1].type.bytes({**sizes}) if len(node.outputs) > 1 else 0


def wide_rows(use: Use, kernel: RowKernel) -> bool:
    """Whether an operand has rows that a warp's 128-bit loads fit in, at places that Triton knows to be aligned.

    A stencil is not asked: it holds many rows of few columns, so that rows are read once from memory. Nor is a kernel whose
    views part rows into runs that no wide load ends with, as rope does with heads of 56 columns.
    """
    first = kernel.launches[0].sections
    if any(shifted(s.piece) for s in first) or not any(s.inner and int(s.inner[-1].size) % (WIDE // 2) == 0 for s in first):
        return False
    read = [x for v, x in zip(use.graph.inputs, use.operands, strict=True) if x is not None and use.graph.uses.get(v)]
    return any(
        x.dim() > 1 and x.stride(-1) == 1 and x.data_ptr() % WIDE == 0
        and all(s % WIDE == 0 for s in x.stride()[:-1]) and x.shape[-1] * x.element_size() >= WIDE * WARP
        for x in read
    )  # fmt: skip


# -- compiling ----------------------------------------------------------------------------


def outcomes(wanted: Sequence[Job], keep: Callable[[Compiled], T], told: Told) -> dict[Hashable, T | CompileError]:
    """What is kept of each distinct job, by its key; over all cores."""
    distinct = {job_key(j): j for j in wanted}
    cores = len(os.sched_getaffinity(0))
    keys = sorted(distinct, key=lambda k: (distinct[k].target, -len(distinct[k].fn.src)))  # the longest first: no core waits
    found = dict[Hashable, T | CompileError]()
    told(0, len(keys))
    with ThreadPoolExecutor(cores) as pool:
        for start in range(0, len(keys), AT_ONCE * cores):
            batch = keys[start : start + AT_ONCE * cores]
            made = compile_all([distinct[k] for k in batch])
            found.update(zip(batch, pool.map(partial(_kept, keep), made), strict=True))
            told(len(found), len(keys))
    return found


def _kept(keep: Callable[[Compiled], T], made: Compiled | CompileError) -> T | CompileError:
    return made if isinstance(made, CompileError) else keep(made)


def together(parts: Sequence[Resources | CompileError]) -> Resources | CompileError:
    """The launches of one kernel as one: counts added, what they take at once at its most."""
    if error := next((p for p in parts if isinstance(p, CompileError)), None):
        return error
    each = [p for p in parts if isinstance(p, Resources)]
    cores = {name: sum(r.tensor_core.get(name, 0) for r in each) for r in each for name in r.tensor_core}
    return Resources(
        max(r.registers for r in each), sum(r.spills for r in each), max(r.stack for r in each), max(r.shared for r in each),
        dict(sorted(cores.items())), sum(r.loads for r in each), sum(r.wide_loads for r in each),
        sum(r.stores for r in each), sum(r.wide_stores for r in each),
    )  # fmt: skip
