"""`plait compile`: a spec, or IR, to any stage of the way."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from plait.cli_output import count, fail_cleanly, note, problem, read_text, show, write_json, write_out
from plait.cli_watch import ALL, Watch, described, run_watched

if TYPE_CHECKING:
    from plait.frontends import ModelSpec
    from plait.ir import Graph
    from plait.passes import Event, Pipeline

LARGE = 2**20  # parameters beyond which numbers are compared on the shrunken spec: float64 references take a minute for 5M


class Emit(StrEnum):
    SPEC = "spec"
    IR = "ir"
    FUSED = "fused"
    FX = "fx"
    REPORT = "report"
    CPP = "cpp"
    TRITON = "triton"
    TTGIR = "ttgir"
    PTX = "ptx"


KERNELS = (Emit.TRITON, Emit.TTGIR, Emit.PTX)


class Task(StrEnum):
    LOGITS = "logits"
    LOSS = "loss"
    CACHED = "cached"


class Dtype(StrEnum):
    F64 = "f64"
    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"


class Verify(StrEnum):
    OFF = "off"
    TYPES = "types"
    NUMERIC = "numeric"


Spec = Annotated[str, typer.Argument(metavar="SPEC", help="A preset's name, a .toml, .json or .ir file, or - for stdin.")]
EmitOption = Annotated[
    Emit, typer.Option(help="What to print: the spec, IR before or after passes, fx source, a report, or kernels at a stage.")
]
PipelineOption = Annotated[str | None, typer.Option("-p", "--pipeline", help="Passes, such as 'fuse{only=glu},dce'.")]
Output = Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="Write here, whole or not at all; - is stdout.")]
Require = Annotated[str, typer.Option(metavar="NAMES", help="Fail unless these fusions fire: norm-gate,glu.")]
VerifyOption = Annotated[Verify, typer.Option("--verify-each", help="Check types, or also numbers, after every pass.")]
Timing = Annotated[bool, typer.Option("--timing", help="Tell the time of every stage.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


@dataclass(frozen=True)
class Source:
    """What is compiled: a spec and the way it becomes a program, or IR as it was written."""

    spec: ModelSpec | None
    graph: Graph | None
    task: str = "logits"
    dtype: str = ""
    packed: bool = False

    def program(self, spec: ModelSpec) -> Graph:
        from plait.api import program

        return program(spec, task=self.task, dtype=self.dtype, packed=self.packed)


def mount(app: typer.Typer) -> None:
    """Add `compile`."""
    app.command("compile")(compile_command)


@fail_cleanly
def compile_command(
    spec: Spec,
    emit: EmitOption = Emit.FUSED,
    pipeline: PipelineOption = None,
    output: Output = "-",
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; the spec's own when absent.")] = None,
    task: Annotated[Task, typer.Option(help="Tokens to logits, labels to a loss, or logits with caches.")] = Task.LOGITS,
    packed: Annotated[bool, typer.Option("--packed", help="Several sequences in one row, with their borders.")] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Lowered for cpu, cuda, interpreter or reference; code with --emit=ttgir, ptx: sm_90,gfx942."),
    ] = None,
    require: Require = "",
    mesh: Annotated[str, typer.Option(help="Split the program over a mesh first: cp=4,tp=2.")] = "",
    place: Annotated[str, typer.Option(help="Options of the pass that does it: 'attention=ring recurrence=chain'.")] = "",
    verify: VerifyOption = Verify.OFF,
    seq: Annotated[int, typer.Option(min=1, help="Tokens that the report counts traffic and FLOPs for.")] = 4096,
    remarks: Annotated[bool, typer.Option("--remarks", help="Tell what every pass did, and what it did not and why.")] = False,
    timing: Timing = False,
    as_json: Json = False,
) -> None:
    """Compile a spec to a stage and print it. No weight is ever allocated."""
    laps: dict[str, float] = {}
    with timed("read", laps):
        source = read_source(spec, task=task.value, dtype=dtype.value if dtype else "", packed=packed)
    watch = Watch(timing=timing, remarks=ALL * remarks)
    pipeline = with_mesh(pipeline, mesh, place, source)
    job = Job(source, emit, pipeline, tuple(target or ()), names(require), verify.value, seq, watch)
    made = run(job, laps)
    if timing:
        note("\n".join(f"{stage:>8} {seconds * 1e3:9.1f} ms" for stage, seconds in laps.items()))
    if as_json:
        return write_json({"emit": emit.value, **made.facts, "passes": [described(e) for e in made.events]}, output)
    show(made.tables, output) if made.tables else write_out(made.text, output)


def with_mesh(pipeline: str | None, mesh: str, options: str, source: Source) -> str | None:
    """The pipeline behind the stages that split a program over a mesh."""
    if not mesh:
        if options:
            raise problem(f"--place is {options!r}, but there is no mesh; give one, such as --mesh cp=2")
        return pipeline
    from plait.frontends import ways_of
    from plait.passes import DEFAULT, placement

    ways = ways_of(source.spec) if source.spec else ""
    return ",".join(x for x in (placement(mesh, options, ways), DEFAULT if pipeline is None else pipeline) if x)


@dataclass(frozen=True)
class Job:
    """One run of `plait compile`."""

    source: Source
    emit: Emit
    pipeline: str | None
    target: tuple[str, ...]
    require: tuple[str, ...]
    verify: str
    tokens: int
    watch: Watch


@dataclass(frozen=True)
class Made:
    """What came out: text or tables for people, facts for scripts, and the passes that ran."""

    facts: dict[str, Any]
    text: str = ""
    tables: list[Any] = field(default_factory=list[Any])
    events: list[Event] = field(default_factory=list["Event"])


@contextmanager
def timed(stage: str, laps: dict[str, float]) -> Generator[None]:
    """Note the seconds of a stage."""
    start = time.perf_counter()
    yield
    laps[stage] = time.perf_counter() - start


def names(text: str) -> tuple[str, ...]:
    """`norm-gate,glu` as names."""
    return tuple(n.strip() for n in text.split(",") if n.strip())


def run(job: Job, laps: dict[str, float]) -> Made:
    """Go as far as the stage that is asked for."""
    pipeline = _pipeline(job.pipeline)  # a mistake in it is one at every stage
    if job.emit is Emit.SPEC:
        return _spec(job.source)
    with timed("build", laps):
        before = _before(job.source)
    if job.emit is Emit.IR:
        return _text(str(before))
    with timed("passes", laps):
        after, events = _passes(job, pipeline, before)
    if job.emit is Emit.FUSED:
        return _text(str(after), events)
    if job.emit is Emit.CPP:
        return _text(_cpp(after), events)
    if job.emit in KERNELS:
        return _kernels(job, after, events, laps)
    return _lowered(job, before, after, events, laps)


def _cpp(after: Graph) -> str:
    """The C++ that runs on a CPU, with the size of each library; nothing is built."""
    from plait.lowering.libraries import libraries

    parts = [f"// ==== {name}, {text.count(chr(10))} lines\n\n{text}" for name, text in libraries(after).items()]
    return "\n\n".join(parts) or f"// {after.name} calls no C++ of plait's\n"


def _kernels(job: Job, after: Graph, events: list[Event], laps: dict[str, float]) -> Made:
    from plait.cli_kernels import compiled_text, gpu_targets, source_text

    targets = gpu_targets(job.target or ("sm_90",))
    with timed("kernels", laps):
        triton = job.emit is Emit.TRITON
        return _text(source_text(after) if triton else compiled_text(after, job.emit.value, targets), events)


def _lowered(job: Job, before: Graph, after: Graph, events: list[Event], laps: dict[str, float]) -> Made:
    from plait.cli_report import facts, report, tables
    from plait.lowering import lower

    with timed("lower", laps):
        program = lower(after, target=",".join(job.target) or "cpu")
    if job.emit is Emit.FX:
        return _text(program.source, events)
    made = report(before, program, job.tokens)
    return Made(facts(made), tables=[*tables(made)], events=events)


def _text(text: str, events: list[Event] | None = None) -> Made:
    return Made({"text": text}, text, events=events or [])


def _spec(source: Source) -> Made:
    from plait.frontends import dump_spec

    if source.spec is None:
        raise problem("--emit=spec: an .ir file has no spec; give a preset's name, or a .toml or .json file")
    return _text(dump_spec(source.spec))


def _pipeline(text: str | None) -> Pipeline:
    from plait.passes import DEFAULT, Pipeline

    return Pipeline.parse(DEFAULT if text is None else text)


def _before(source: Source) -> Graph:
    if source.graph is not None:
        return source.graph
    assert source.spec is not None
    return source.program(source.spec)


def _passes(job: Job, pipeline: Pipeline, graph: Graph) -> tuple[Graph, list[Event]]:
    """Run the pipeline; the numbers of a large spec are compared on its shrunken one, which has the same structure."""
    from plait.frontends import parameter_count, shrink

    spec, verify = job.source.spec, job.verify
    if verify == "numeric" and spec is not None and parameter_count(spec) > LARGE:
        small = job.source.program(shrink(spec))
        run_watched(small, pipeline, Watch(), verify="numeric", require=())
        note(f"plait: note: numbers are verified on the shrunken spec, {count(parameter_count(spec))} parameters by type")
        verify = "types"
    return run_watched(graph, pipeline, job.watch, verify=verify, require=job.require)


def read_source(name: str, *, task: str = "logits", dtype: str = "", packed: bool = False) -> Source:
    """A spec or IR, from a preset, a file, or stdin."""
    if name == "-":
        return _from_stdin(read_text("-"), task, dtype, packed)
    if Path(name).suffix.lower() == ".ir":
        return _from_ir(read_text(name), name, task, dtype, packed)
    from plait.frontends import load_spec

    return Source(load_spec(name), None, task, dtype, packed)


def _from_ir(text: str, name: str, task: str, dtype: str, packed: bool) -> Source:
    from plait.ir import parse

    if task != "logits" or dtype or packed:
        given = "--task" if task != "logits" else "--dtype" if dtype else "--packed"
        raise problem(f"{given} is for a spec; {name} is IR, which already says what is computed; leave it out")
    return Source(None, parse(text, name))


def _from_stdin(text: str, task: str, dtype: str, packed: bool) -> Source:
    """Text tells by its start what it is: IR, JSON, or TOML."""
    first = next((line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")), "")
    if first.startswith(("def ", "@")):
        return _from_ir(text, "stdin", task, dtype, packed)
    from plait.frontends import load_spec

    with tempfile.TemporaryDirectory() as folder:  # the reader of specs takes files
        path = Path(folder) / ("stdin.json" if first.startswith("{") else "stdin.toml")
        path.write_text(text, encoding="utf-8")
        return Source(load_spec(path), None, task, dtype, packed)
