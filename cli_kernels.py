"""`plait kernels`: what the generated kernels of a program move and use on every GPU target, none needed; and their text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from plait.cli_compile import Json, Output, names, read_source
from plait.cli_output import Table, count, fail_cleanly, note, problem, show, size, suggestion, write_json, write_out
from plait.cli_report import bindings

if TYPE_CHECKING:
    from plait.ir import Graph
    from plait.lowering.gpu import Compiled
    from plait.lowering.gpu.jobs import Use
    from plait.lowering.gpu.report import Row, Told

GPUS = ("H100", "H200", "B200", "MI300X")  # whose rooflines are told
STAGES = {"ttgir": "Triton's GPU IR", "ptx": "PTX"}


@dataclass(frozen=True)
class Kernels:
    """The distinct kernels of one program, forward and backward."""

    name: str
    rows: tuple[Row, ...]


def mount(app: typer.Typer) -> None:
    """Add `kernels`."""
    app.command("kernels")(kernels_command)


@fail_cleanly
def kernels_command(
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SPEC]...", help="Presets, .toml, .json or .ir files; all presets but tiny ones if none."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="TARGETS", help="Of sm_80,sm_90,sm_100,gfx942; all when absent.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="That bytes and FLOPs are counted for.")] = 8192,
    only: Annotated[str, typer.Option(metavar="NAMES", help="These kernels alone, such as norm_gate,glu.")] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Fail where a kernel spills, does not compile, or lacks wide loads; no tables.")
    ] = False,
    output: Output = "-",
    as_json: Json = False,
) -> None:
    """Compile every distinct kernel, forward and backward, for GPUs that need not be here: bytes, registers, wide loads."""
    wanted = gpu_targets(target)
    programs = {name: fused(name) for name in dict.fromkeys(specs or presets())}
    with compiling_bar() as told:
        found = tables_of(programs, wanted, tokens, only, told)
    if as_json:
        write_json({"tokens": tokens, "targets": wanted, "programs": [facts(k) for k in found]}, output)
    elif check:
        write_out("".join(f"{_summary(k, wanted)}\n" for k in found), output)
    else:
        show([t for k in found for t in tables(k, wanted, tokens)], output)
    if check:
        _fail_for([f"{k.name}: {fault}" for k in found for row in k.rows for fault in row.faults])


def _summary(made: Kernels, targets: Sequence[str]) -> str:
    declined = sum(bool(r.declined) for r in made.rows)
    return f"{made.name}: {len(made.rows) - declined} generated, {declined} declined, {', '.join(targets)}"


def _fail_for(faults: Sequence[str]) -> None:
    if faults:
        raise problem("\n  ".join([f"{len(faults)} faults in kernels:", *faults]))


def presets() -> list[str]:
    """The presets that are no small siblings of others."""
    from plait.frontends import PRESETS

    return [p.name for p in PRESETS if not p.name.endswith("-tiny")]


def gpu_targets(given: Sequence[str] | None) -> list[str]:
    """The targets that `sm_90,gfx942` or several options name; all for none."""
    from plait.lowering.gpu import TARGETS

    wanted = [*dict.fromkeys(n for text in given or () for n in names(text))]
    if unknown := [t for t in wanted if t not in TARGETS]:
        raise problem(f"--target: no GPU target called {unknown[0]!r}; there are {', '.join(TARGETS)}")
    return wanted or [*TARGETS]


def fused(name: str) -> Graph:
    """The program of a spec or an .ir file, after the usual passes."""
    from plait.api import program
    from plait.passes import DEFAULT, Pipeline

    source = read_source(name)
    return Pipeline.parse(DEFAULT).run(source.graph if source.graph is not None else program(source.spec or name))


def kernels_of(graph: Graph) -> tuple[Use, ...]:
    """The kernels that training runs: those of the program and of its gradient."""
    from plait import tune

    return tune.kernels_of(graph, lambda text: note(f"plait: note: {text}"))


def tables_of(programs: dict[str, Graph], targets: Sequence[str], tokens: int, only: str, told: Told) -> list[Kernels]:
    """The rows of every program; equal kernels are compiled once for all."""
    from plait.lowering.gpu.report import rows

    chosen = {name: kernels_of(graph) for name, graph in programs.items()}
    if targets:
        _need_triton()
    if only:
        chosen = _only(chosen, names(only))
    every = [u for found in chosen.values() for u in found]
    symbols = {s for u in every for s in u.graph.symbols}
    made = iter(rows(every, targets, bindings(symbols, tokens), told))
    return [Kernels(name, tuple(next(made) for _ in found)) for name, found in chosen.items()]


def _need_triton() -> None:
    try:
        import triton as triton
    except ImportError:
        why = "it comes with plait on Linux; --emit=triton and --emit=fused need none"
        raise problem(f"kernels are compiled by Triton, which is not installed: {why}") from None


def _only(chosen: dict[str, tuple[Use, ...]], wanted: Sequence[str]) -> dict[str, tuple[Use, ...]]:
    """The kernels that are called so, with or without the number that tells kernels of one name apart."""
    known = {n for found in chosen.values() for u in found for n in (u.name, u.graph.name)}
    for name in wanted:
        if name not in known:
            raise problem(f"--only: no kernel called {name}; {suggestion(name, sorted(known))}")
    return {name: tuple(u for u in found if {u.name, u.graph.name} & {*wanted}) for name, found in chosen.items()}


@contextmanager
def compiling_bar() -> Generator[Told]:
    """What to call with how much is compiled: a bar on a terminal, nothing anywhere else."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("compiling", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# -- tables and facts ---------------------------------------------------------------------


def tables(made: Kernels, targets: Sequence[str], tokens: int) -> list[Table]:
    """What each kernel costs, then what its code uses on each target, then those that there cannot be."""
    title = f"{made.name}: {len(made.rows)} distinct kernels; bytes, FLOPs and microseconds at the roofline for {tokens} tokens"
    columns = ("kernel", "direction", "called by", "launches", "bytes", "FLOPs", "FLOPs/byte", *(f"{gpu} us" for gpu in GPUS))
    costs = Table(columns, [_cost(r) for r in made.rows], title)
    codes = [_code_table(made, t) for t in targets]
    troubles = [(r.use.name, "any", r.declined) for r in made.rows if r.declined]
    troubles += [(r.use.name, t, str(u).replace("\n", " ")) for r in made.rows for t, u in r.used.items() if failed(u)]
    told = [Table(("kernel", "target", "why there is none"), troubles, "declined")] if troubles else []
    steps = [(layer, str(n), ", ".join(of)) for layer, (n, of) in step_launches(made.rows).items()]
    one = (
        [Table(("layer", "launches", "kernels"), steps, f"{made.name}: a decode step of a layer, beside its products")]
        if steps
        else []
    )
    return [costs, *(t for t in codes if t.rows), *one, *told]


def step_launches(rows: Sequence[Row]) -> dict[str, tuple[int, list[str]]]:
    """How many kernels of ours one token starts in a layer whose mixer has a step of its own, and which."""
    found = dict[str, tuple[int, list[str]]]()
    there = [r for r in rows if r.use.half == "step" or (r.use.node is None and r.use.direction == "forward")]
    for layer in dict.fromkeys(n for r in there if r.use.half for n in r.use.calls):
        mine = [r for r in there if layer in r.use.calls]
        times = min(r.use.calls[layer] for r in mine)
        found[layer] = sum(r.launches * r.use.calls[layer] // times for r in mine), [r.use.name for r in mine]
    return found


def called_by(row: Row) -> str:
    """`gdn x35, first_gdn`."""
    return ", ".join(f"{layer} x{n}" if n > 1 else layer for layer, n in row.use.calls.items())


def _cost(row: Row) -> tuple[str, ...]:
    from plait.lowering.gpu import MACHINES

    spent = [f"{1e6 * row.seconds(MACHINES[gpu]):.1f}" for gpu in GPUS]
    said = (row.use.name, row.use.direction, called_by(row), str(row.launches), size(row.bytes), count(row.flops))
    return (*said, f"{row.intensity:.2f}", *spent)


def _code_table(made: Kernels, target: str) -> Table:
    columns = ("kernel", "registers", "spills", "shared", "loads", "wide loads", "stores", "wide stores", "tensor cores")
    return Table(
        columns,
        [_code(r, target) for r in made.rows if not failed(r.used.get(target))],
        f"{made.name} on {target}; wide is 128 bits",
    )


def failed(used: Any) -> bool:
    """Whether there is no code."""
    return used is None or isinstance(used, Exception)


def _code(row: Row, target: str) -> tuple[str, ...]:
    used: Any = row.used[target]
    cores = ", ".join(f"{name} x{n}" for name, n in used.tensor_core.items()) or "-"
    numbers = (used.registers, used.spills, size(used.shared), used.loads, used.wide_loads, used.stores, used.wide_stores)
    return (row.use.name, *map(str, numbers), cores)


def facts(made: Kernels) -> dict[str, Any]:
    """The kernels for scripts."""
    steps = {layer: n for layer, (n, _) in step_launches(made.rows).items()}
    return {"name": made.name, "step_launches": steps, "kernels": [_row_facts(r) for r in made.rows]}


def _row_facts(row: Row) -> dict[str, Any]:
    from plait.lowering.gpu import MACHINES

    return {
        "name": row.use.name,
        "direction": row.use.direction,
        "calls": row.use.calls,
        "launches": row.launches,
        "declined": row.declined or None,
        "bytes": row.bytes,
        "flops": row.flops,
        "intensity": row.intensity,
        "seconds": {gpu: row.seconds(MACHINES[gpu]) for gpu in GPUS},
        "targets": {t: {"error": str(u)} if failed(u) else vars(u) for t, u in row.used.items()},
        "faults": row.faults,
    }


# -- text ---------------------------------------------------------------------------------


def source_text(graph: Graph) -> str:
    """The generated source of every distinct kernel; no Triton needed."""
    from plait.lowering.gpu.op_jobs import OpKernels
    from plait.lowering.gpu.report import kernels
    from plait.lowering.rows import RowKernel

    parts = list[str]()
    for use in kernels_of(graph):
        made = kernels(use, "sm_90")
        text = made.source if isinstance(made, RowKernel) else f"# no kernel: {made}\n"
        body = made.text if isinstance(made, OpKernels) else text
        parts.append(f"# {_heading(use)}\n\n{body}")
    return "\n\n".join(parts) or f"# {graph.name} has no kernels\n"


def _heading(use: Use) -> str:
    calls = ", ".join(f"{layer} x{n}" if n > 1 else layer for layer, n in use.calls.items())
    return f"==== {use.name}, {use.direction}, called by {calls}"


def compiled_text(graph: Graph, stage: str, targets: Sequence[str]) -> str:
    """Every kernel as Triton compiled it for each target, at one stage of the way."""
    from plait.lowering.gpu import CompileError
    from plait.lowering.gpu.jobs import job_key
    from plait.lowering.gpu.report import jobs_of, kernels, outcomes
    from plait.lowering.rows import Declined

    _need_triton()
    work, parts = list[tuple["Use", Any]](), list[str]()
    for use in kernels_of(graph):
        made = kernels(use, "sm_90")
        if isinstance(made, Declined):
            parts.append(f"// {_heading(use)}: no kernel: {made}\n")
        work += [(use, job) for target in targets for job in jobs_of(use, target)]
    with compiling_bar() as told:
        found = outcomes([job for _, job in work], _at(stage), told)
    for use, job in work:
        text = found[job_key(job)]
        if isinstance(text, CompileError):
            raise text
        parts.append(f"{_marked(use, job, stage)}\n{text}")
    return "\n".join(parts) or f"// {graph.name} has no kernels\n"


def _at(stage: str) -> Callable[[Compiled], str]:
    """The text of a stage; AMD's assembly stands where PTX would."""
    return lambda made: str(made.asm[stage] if stage in made.asm else made.asm["amdgcn"])


def _marked(use: Use, job: Any, stage: str) -> str:
    """A comment above the text: kernel, function, target, what it is."""
    amd = stage == "ptx" and job.target.startswith("gfx")
    what = "AMD's assembly (amdgcn), which stands where PTX would" if amd else STAGES[stage]
    return f"{';' if amd else '//'} {_heading(use)}: {job.fn.__name__} for {job.target}, {job.num_warps} warps, {what}"
