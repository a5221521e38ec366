"""`plait train`, `plait bench`: what runs a model rather than prints it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from plait.cli_output import Table, count, fail_cleanly, note, problem, show, size, write_json
from plait.cli_progress import training_bar

if TYPE_CHECKING:
    from plait.frontends import ModelSpec
    from plait.runtime import CompiledModel
    from plait.runtime.train import History, Options, Progress

DECODED = 32  # steps in one sample of decoding


class Arithmetic(StrEnum):
    F32 = "f32"
    BF16 = "bf16"


Spec = Annotated[str, typer.Argument(metavar="SPEC", help="A preset's name, or a .toml or .json file.")]
Eager = Annotated[bool, typer.Option("--eager", help="Run layers without torch.compile: starts at once, runs slower.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")]


def mount(app: typer.Typer) -> None:
    """Add `train` and `bench`."""
    app.command("train")(train_command)
    app.command("bench")(bench_command)


# -- train ----------------------------------------------------------------------------------


@fail_cleanly
def train_command(
    spec: Spec,
    text: Annotated[Path, typer.Option(help="A file, or a folder whose .py, .txt and .md files are read.")],
    run: Annotated[Path | None, typer.Option(help="Folder of the checkpoints; SPEC's name and -run when absent.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="End after so many steps; 1000 without --minutes.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="End after so many minutes, compiling not counted.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows in a step; 16.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Bytes in a row; 256.")] = None,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate; 0.002.")] = None,
    dtype: Annotated[Arithmetic | None, typer.Option(help="Arithmetic, f32 or bf16; weights stay f32.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights and batches; 0.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run's last checkpoint, with its options.")] = False,
    mesh: Annotated[str, typer.Option(help="Axes and ranks, cp=2, under `torchrun --nproc-per-node 2 -m -- plait`.")] = "",
    place: Annotated[str, typer.Option(help="Options of the pass place, such as 'attention=heads'.")] = "",
    eager: Eager = False,
    as_json: Json = False,
) -> None:
    """Train a byte model on text. Ctrl-C keeps a checkpoint; --resume continues it bit for bit, on any mesh."""
    from plait.runtime.train import train

    leads = _joined(mesh)
    known = byte_spec(spec, bytes_each=16)
    folder = run or Path(f"{known.name}-run")
    given = {"steps": steps, "minutes": minutes, "batch": batch, "length": length, "lr": lr, "seed": seed}
    given |= {"autocast": dtype is Arithmetic.BF16 if dtype else None}
    options = merged(folder, resume, {k: v for k, v in given.items() if v is not None})
    model, data, counts = _prepared(known, text, options, {"jit": not eager, "mesh": mesh, "place": place}, leads)
    with training_bar() if leads else nullcontext(_silent) as progress:
        history = train(model, data, options, run=folder, resume=resume, progress=progress)
    if leads:
        _tell(known.name, model, history, counts, folder, as_json)
    _left(mesh)
    if history.interrupted and leads:
        note(f"plait: interrupted at step {history.step}; continue with --resume --run {folder}")
    if history.interrupted:
        raise typer.Exit(130)


def _joined(mesh: str) -> bool:
    """Join the other processes of a mesh; whether this one speaks for all."""
    from plait.runtime.mesh import init, is_launched

    if mesh:
        return init(mesh).rank == 0
    if is_launched():
        raise problem("several processes were started, but no --mesh says what they share; give one, such as --mesh cp=2")
    return True


def _silent(progress: Progress) -> None:
    """One process speaks for all."""


def _left(mesh: str) -> None:
    from plait.runtime.mesh import close

    if mesh:
        close()


def merged(folder: Path, resume: bool, given: Mapping[str, Any]) -> Options:
    """What was asked for over what the run had, or over the defaults; minutes alone set no limit of steps."""
    from plait.runtime.rundir import stored_options
    from plait.runtime.train import Options, options_of

    base = options_of(stored_options(folder)) if resume else Options()
    free = {"steps": 0} if "minutes" in given and "steps" not in given else {}
    return replace(base, **{**free, **given})


def _prepared(
    spec: ModelSpec, path: Path, options: Options, how: Mapping[str, Any], leads: bool
) -> tuple[CompiledModel, Any, Any]:
    """The model, the text in two parts, and what counting alone achieves on it."""
    from plait.api import compile
    from plait.runtime.data import bigram_entropy, check_length, read_bytes, split

    data = split(read_bytes(path))
    check_length(data, options.length)
    model = compile(spec, dtype="f32", seed=options.seed, **how)
    trained, held = len(data.train), len(data.valid)
    if leads:
        note(f"{spec.name}: {count(_size(model))} parameters; {count(trained)} bytes to train on, {count(held)} held back")
    return model, data, bigram_entropy(data.train, data.valid)


def _size(model: CompiledModel) -> int:
    """Parameters of the whole model."""
    return sum(prod(shape) for shape in model.shapes.values())


def _tell(name: str, model: CompiledModel, history: History, counts: Any, folder: Path, as_json: bool) -> None:
    """The outcome: a person's lines on stderr, or one object on stdout."""
    from plait.runtime.rundir import checkpoint_file

    checkpoint = checkpoint_file(folder)
    if not as_json:
        note(f"validation {history.valid:.3f} nats per byte; counted: pairs {counts.bigram:.3f}, bytes {counts.unigram:.3f}")
        return note(f"{history.step} steps in {history.seconds:.0f} s; weights in {checkpoint}")
    write_json({
        "spec": name, "parameters": _size(model), "steps": history.step,
        "seconds": history.seconds, "train": history.points[-1].loss, "validation": history.valid, "bigram": counts.bigram,
        "unigram": counts.unigram, "interrupted": history.interrupted, "run": str(folder), "checkpoint": str(checkpoint),
    })  # fmt: skip


def byte_spec(source: str, *, bytes_each: int) -> ModelSpec:
    """A spec whose tokens are bytes, small enough for this machine at so many bytes a parameter."""
    from plait.frontends import load_spec

    spec = load_spec(source)
    if spec.vocab != 256:
        raise problem(f"{spec.name}: vocab is {spec.vocab}, must be 256, for bytes; try {spec.name}-tiny or demo")
    return fitting(spec, bytes_each)


def fitting(spec: ModelSpec, bytes_each: int) -> ModelSpec:
    """The spec itself, if this machine's memory holds it."""
    from plait.frontends import parameter_count

    need, have = parameter_count(spec) * bytes_each, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise problem(f"{spec.name}: needs {size(need)} of memory, this machine has {size(have)}; choose a smaller spec")
    return spec


# -- bench ----------------------------------------------------------------------------------

Samples = dict[str, list[float]]


@fail_cleanly
def bench_command(
    spec: Spec,
    tokens: Annotated[int, typer.Option(min=2, help="In a row.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 4,
    dtype: Annotated[Arithmetic, typer.Option(help="Of the weights.")] = Arithmetic.F32,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each measurement; the median is told.")] = 5,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time the compiled model beside the eager reference, taking turns: forward, forward and backward, one decoded token."""
    import torch
    from plait.api import compile, load_spec

    known = fitting(load_spec(spec), 24)
    models = {
        "reference": compile(known, target="reference", dtype=dtype.value, passes="canonicalize", seed=seed, jit=False),
        "compiled": compile(known, dtype=dtype.value, seed=seed),
    }
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randint(known.vocab, (batch, tokens), generator=rng)
    found = {name: measured(models, call, drawn, rounds) for name, call in MEASURES.items()}
    if as_json:
        what = {"spec": known.name, "batch": batch, "tokens": tokens, "dtype": dtype.value, "rounds": rounds}
        return write_json({**what, **_records(found)})
    show([_table(f"{known.name}, {batch} x {tokens} tokens, {dtype.value}", found)])


def _forward(model: CompiledModel, tokens: Any) -> float:
    import torch

    start = time.perf_counter()
    with torch.no_grad():
        model.eval()(tokens)
    return time.perf_counter() - start


def _backward(model: CompiledModel, tokens: Any) -> float:
    start = time.perf_counter()
    model.train().loss(tokens).backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def _decode(model: CompiledModel, tokens: Any) -> float:
    """One token after a prompt, the prompt itself not counted."""
    stream = model.eval().stream(tokens, DECODED + 1)
    next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    return (time.perf_counter() - start) / DECODED


MEASURES: dict[str, Callable[[CompiledModel, Any], float]] = {
    "forward": _forward, "forward + backward": _backward, "decode a token": _decode,
}  # fmt: skip


def measured(models: Mapping[str, CompiledModel], call: Callable[[Any, Any], float], tokens: Any, rounds: int) -> Samples:
    """Seconds of each model, turn by turn; the first turn compiles and warms up, and is kept apart."""
    samples: Samples = {f"{name} first": [call(model, tokens)] for name, model in models.items()}
    for _ in range(rounds):
        for name, model in models.items():
            samples.setdefault(name, []).append(call(model, tokens))
    return samples


def _records(found: Mapping[str, Samples]) -> dict[str, Any]:
    return {
        what: {name: statistics.median(s) for name, s in samples.items()} | {"speedup": _speedup(samples)}
        for what, samples in found.items()
    }


def _speedup(samples: Samples) -> float:
    return statistics.median(samples["reference"]) / statistics.median(samples["compiled"])


def _table(title: str, found: Mapping[str, Samples]) -> Table:
    rows = [
        (
            what, f"{1e3 * statistics.median(s['reference']):.2f}", f"{1e3 * statistics.median(s['compiled']):.2f}",
            f"{_speedup(s):.2f}x", f"{s['compiled first'][0]:.1f}",
        )
        for what, s in found.items()
    ]  # fmt: skip
    return Table(("", "reference ms", "compiled ms", "speedup", "first call s"), rows, title)
