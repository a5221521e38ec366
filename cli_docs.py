"""`plait docs`: the kernel and traffic tables of every preset as pages of text, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from plait.cli_kernels import Kernels, compiling_bar, failed, fused, gpu_targets, presets, tables, tables_of
from plait.cli_output import fail_cleanly, note, size, write_out
from plait.cli_report import bindings

if TYPE_CHECKING:
    from plait.ir import Graph, Node
    from plait.lowering.gpu.report import Row

TOKENS = 8192
UNFUSED = "canonicalize,carry-residual,dce"  # the usual passes without those that fuse


@dataclass(frozen=True)
class Cost:
    """Bytes for all tokens before and after fusion, forward and backward, of a layer or of a region in it."""

    name: str
    where: str
    forward: tuple[int, int]
    backward: tuple[int, int]


def mount(app: typer.Typer) -> None:
    """Add `docs`."""
    app.command("docs")(docs_command)


@fail_cleanly
def docs_command(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Where kernels.md and traffic.md are written.")] = "docs",
) -> None:
    """Write the kernel and traffic tables of every preset of a published size, and of demo."""
    with compiling_bar() as told:
        kernels = tables_of({name: fused(name) for name in presets()}, gpu_targets(None), TOKENS, "", told)
    write_out(traffic_page(), f"{folder}/traffic.md")
    write_out(kernel_page(kernels), f"{folder}/kernels.md")
    note(f"plait: wrote {folder}/traffic.md and {folder}/kernels.md")


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table in Markdown; all but the first `left` columns stand right."""
    rule = ["---" if i < left else "---:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows)) + "\n"


# -- traffic ------------------------------------------------------------------------------


def costs(name: str) -> tuple[list[Cost], list[Cost]]:
    """The distinct layers of a preset, and the distinct regions that fusion made."""
    from plait.api import program
    from plait.lowering.gpu.jobs import uses
    from plait.passes import Pipeline

    after = fused(name)
    before = Pipeline.parse(UNFUSED).run(program(name))
    return _layers(before, after), [_region(u.graph, u.name, ", ".join(u.calls)) for u in uses(after)]


def _layers(before: Graph, after: Graph) -> list[Cost]:
    old, new = _halves(before), _halves(after)
    found: dict[tuple[tuple[Graph, ...], tuple[Graph, ...]], list[str]] = {}
    for prefix, halves in new.items():
        found.setdefault((old[prefix], halves), []).append(prefix)
    made = list[Cost]()
    for (was, now), prefixes in found.items():
        pairs = [(_bytes(a.nodes), _bytes(b.nodes)) for a, b in zip(was, now, strict=True)]
        name = now[0].name.removesuffix("_forward")
        made.append(Cost(name, f"x{len(prefixes)}", pairs[0], pairs[1] if pairs[1:] else (0, 0)))
    return made


def _halves(graph: Graph) -> dict[str, tuple[Graph, ...]]:
    """The forward and the backward layer of every prefix."""
    from plait.passes import differentiate

    found: dict[str, tuple[Graph, ...]] = {}
    for node in differentiate(graph)[0].nodes:
        if node.callee is not None and node.callee.role == "layer":
            prefix = str(node.attrs["params"])
            found[prefix] = (*found.get(prefix, ()), node.callee)
    return found


def _region(kernel: Graph, name: str, where: str) -> Cost:
    """A region as one kernel, and as the ops that it is made of."""
    from plait.ir.gradient import backward
    from plait.lowering.gpu.report import kernel_bytes
    from plait.passes import dce, differentiate

    back = backward(kernel).graph
    alone = dce(differentiate(replace(kernel, role="graph"))[0])[0]
    forward, gradient = _bytes(kernel.nodes), _bytes(alone.nodes[len(kernel.nodes) :])
    sizes = bindings({*kernel.symbols, *back.symbols}, TOKENS)
    return Cost(name, where, (forward, kernel_bytes(kernel, sizes)), (gradient, kernel_bytes(back, sizes)))


def _bytes(nodes: Iterable[Node]) -> int:
    """What ops and kernels move, each on its own."""
    from plait.cli_report import traffic

    return sum(traffic(n, TOKENS) for n in nodes)


def traffic_page() -> str:
    parts = [TRAFFIC]
    for name in presets():
        layers, regions = costs(name)
        parts += [f"## {name}\n", _cost_table("layer", "calls", layers), _cost_table("region", "in", regions)]
    return "\n".join(parts)


def _cost_table(what: str, where: str, found: Sequence[Cost]) -> str:
    columns = (what, where, "forward", "fused", "ratio", "backward", "fused", "ratio")
    return grid(columns, [(c.name, c.where, *_side(c.forward), *_side(c.backward)) for c in found], 2)


def _side(pair: tuple[int, int]) -> tuple[str, str, str]:
    before, after = pair
    return f"{before / TOKENS:,.0f}", f"{after / TOKENS:,.0f}", f"{before / after:.2f}" if after else "-"


# -- kernels ------------------------------------------------------------------------------


def kernel_page(found: Sequence[Kernels]) -> str:
    """Both tables of every preset."""
    import triton

    parts = [KERNELS.format(tokens=TOKENS, triton=triton.__version__)]
    for made in found:
        parts += [f"## {made.name}\n", cost_table(made), _code_table(made)]
    return "\n".join(parts)


def cost_table(made: Kernels) -> str:
    """What is arithmetic alone."""
    table = tables(made, (), TOKENS)[0]
    return grid(table.columns, table.rows, 3)


def _code_table(made: Kernels) -> str:
    targets = gpu_targets(None)
    return grid(("kernel", *targets), [(r.use.name, *(_cell(r, t) for t in targets)) for r in made.rows], 1)


def _cell(row: Row, target: str) -> str:
    """`73, 512 B, 10 of 14`."""
    used: Any = row.used.get(target)
    if failed(used):
        return row.declined or "does not compile"
    spilled = f", {used.spills} spills" if used.spills or used.stack else ""
    return f"{used.registers}, {size(used.shared)}, {used.wide_loads} of {used.loads}{spilled}"


TRAFFIC = f"""# Traffic before and after fusion

Bytes a token that ops and kernels move between memory and the processor, for one row of {TOKENS} tokens, weights included.
Written by `make docs`; it is arithmetic on types, so no machine is needed and none is measured.

*Before*: every op of the IR on its own reads its operands and writes its results, and views are free. Its gradient is what
the op's text says (`plait compile SPEC -p differentiate` prints it), every equation on its own, in float32 where the text
widens. A library runs some of these as one kernel, so the ratios are about the IR and no speedups over a library.

*Fused*: a kernel reads every distinct operand once, only the parts of it that it needs, and writes every result once; a sum
over rows writes and reads its partial sums; gradients of kernels recompute what they need instead of reading it. Matrix
products, attention, recurrences and routing move the same before and after, and count in the layers; so do ops that stand
alone, whose gradients are no kernels.

A result that is a part of an operand stays a view and moves nothing; its cotangent is written with the others'.
"""
KERNELS = """# Kernels

Every distinct kernel of the presets, forward and backward, generated by `plait` and compiled ahead of time with
Triton {triton}. Written by `make docs`; `plait kernels SPEC` prints the same with more columns, `plait compile SPEC
--emit=triton` the source, `--emit=ptx --target sm_90` the code.

First what is arithmetic: bytes and FLOPs for {tokens} tokens, and microseconds at the roofline: the slower of memory (the
published bandwidth; on H200 the measured 4.3 TB/s of a copy) and float32 arithmetic. Nothing here is timed. Then what the code
says, its launches together: registers a thread, shared memory a block, and how many of its load instructions are 128 bits wide.
Kernels are compiled for 4 rows of 2048 tokens, with operands strided as they are in the model. What spills would say so.
"""
