"""`plait trace`: an eager module of the user's own, as a graph, with what it was raised to."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from plait.cli_output import Table, fail_cleanly, note, problem, show, suggestion, write_json, write_out

if TYPE_CHECKING:
    import torch
    from plait.ir import Graph
    from plait.tracing import Traced

TOKENS = 2**8  # numbers of an example of integers stay below the smallest of the module's vocabularies, or this
DTYPES = ("i64", "f64", "f32", "bf16", "f16", "bool")


class Emit(StrEnum):
    IR = "ir"
    FUSED = "fused"
    REPORT = "report"


Where = Annotated[
    str, typer.Argument(metavar="MODULE:CALLABLE", help="A module of yours by name, and what in it makes the nn.Module.")
]
Example = Annotated[
    str,
    typer.Option(metavar="SIZES", help="Inputs: 2x33 of tokens where the model embeds, else f32; 2x33:i64,2x33x8:f32 says it."),
]


def mount(app: typer.Typer) -> None:
    """Add `trace`."""
    app.command("trace")(trace)


@fail_cleanly
def trace(
    where: Where,
    example: Example = "2x33",
    emit: Annotated[Emit, typer.Option(help="What to print: IR before or after passes, or the report.")] = Emit.REPORT,
    gradients: Annotated[bool, typer.Option(help="Prove gradients too, not values alone.")] = True,
    seq: Annotated[int, typer.Option(min=1, help="Tokens that the report counts traffic and FLOPs for.")] = 4096,
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="Write here; - is stdout.")] = "-",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Trace an nn.Module of your own: what was raised to ops that passes know, what stays torch's own, and the program.

    The module is imported, which runs your code, with the working directory on the path; its weights are what it makes.
    """
    from plait.passes import DEFAULT, Pipeline
    from plait.tracing import trace_module

    module = made(where)
    traced = trace_module(module, inputs(example, module), gradients=gradients)
    after = Pipeline.parse(DEFAULT).run(traced.graph) if emit is not Emit.IR else traced.graph
    if emit is Emit.REPORT:
        return _reported(traced, after, seq, output, as_json)
    if as_json:
        return write_json({"emit": emit.value, "text": str(after), **facts(traced)}, output)
    note(str(traced.report))
    write_out(str(after), output)


def _reported(traced: Traced, after: Graph, tokens: int, output: str, as_json: bool) -> None:
    from plait.cli_report import facts as costs
    from plait.cli_report import report, tables
    from plait.lowering import lower

    counted = report(traced.graph, lower(after), tokens)
    if as_json:
        return write_json({"emit": "report", **facts(traced), "cost": costs(counted)}, output)
    show([*found(traced), *tables(counted)], output)


def facts(traced: Traced) -> dict[str, Any]:
    """The trace's report for scripts."""
    told = traced.report
    lists = {"raised": told.raised, "aten": told.aten, "layers": told.layers}
    lines = {k: [{"what": x.what, "count": x.count, "where": x.where} for x in v] for k, v in lists.items()}
    return {**lines, "held": list(told.held), "symbolic": told.symbolic, "ops": told.nodes}


def found(traced: Traced) -> list[Table]:
    """The trace's report for people."""
    told = traced.report
    sizes = "sizes symbolic" if told.symbolic else "for the example's sizes alone"
    rows = [("raised", x.what, str(x.count), x.where) for x in told.raised]
    rows += [("torch's own", x.what, str(x.count), x.where) for x in told.aten]
    rows += [("layer", x.what, str(x.count), x.where) for x in told.layers]
    rows += [("held back", h, "", "") for h in told.held]
    return [Table(("kind", "what", "count", "where"), rows, f"{told.nodes} ops, {sizes}")]


# -- the user's module ------------------------------------------------------------------------


def made(where: str) -> torch.nn.Module:
    """What `package.file:name` makes: an nn.Module, its class, or a function that gives one, without arguments."""
    from torch import nn

    file, colon, name = where.partition(":")
    if not colon or not re.fullmatch(r"\w+(\.\w+)*", file) or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise problem(f"{where[:80]!r} must be MODULE:CALLABLE, such as my_package.model:Model")
    thing: Any = _imported(file)
    for part in name.split("."):
        if not hasattr(thing, part):
            raise problem(f"{file} has no {name}; {suggestion(part, [k for k in vars(thing) if not k.startswith('_')])}")
        thing = getattr(thing, part)
    if isinstance(thing, nn.Module):
        return thing
    module = _called(thing, where)
    if not isinstance(module, nn.Module):
        raise problem(f"{where} gives a {type(module).__name__}, must give an nn.Module")
    return module


def _imported(file: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it: the working directory
    try:
        return importlib.import_module(file)
    except ModuleNotFoundError as error:
        if error.name and (file == error.name or file.startswith(f"{error.name}.")):
            raise problem(f"there is no module {error.name}; run from the folder that has it, or install it") from None
        raise problem(f"{file} imports {error.name}, which is not there; install it") from None
    except Exception as error:
        raise problem(f"{file} cannot be imported: {type(error).__name__}: {error}") from error


def _called(thing: Callable[..., Any], where: str) -> Any:
    """Called without arguments; what needs some is told which."""
    if not callable(thing):
        raise problem(f"{where} is a {type(thing).__name__}, must be an nn.Module, its class, or a function that makes one")
    needed = [p.name for p in _parameters(thing) if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise problem(f"{where} needs {', '.join(needed)}; name a function without arguments that makes the module")
    try:
        return thing()
    except Exception as error:
        raise problem(f"{where}() fails: {type(error).__name__}: {error}") from error


def _parameters(thing: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return [*inspect.signature(thing).parameters.values()]
    except (TypeError, ValueError):
        return []


# -- the example ------------------------------------------------------------------------------


def inputs(text: str, module: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """`2x33:i64,2x33x8:f32` as tensors with the same numbers every time."""
    return tuple(_input(part.strip(), module, i) for i, part in enumerate(text.split(",")))


def _input(part: str, module: torch.nn.Module, seed: int) -> torch.Tensor:
    import torch
    from plait.ir import DTYPES as TORCH

    if not (read := re.fullmatch(r"(\d{1,6}(?:x\d{1,6})*)(?::(\w+))?", part, re.ASCII)) or (read[2] or "i64") not in DTYPES:
        raise problem(
            f"--example: {part[:40]!r} must be sizes and a dtype of {', '.join(DTYPES)}, such as 2x33:i64 or 2x33x8:f32"
        )
    shape = tuple(map(int, read[1].split("x")))
    sizes = [m.num_embeddings for m in module.modules() if isinstance(m, torch.nn.Embedding)]
    floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
    dtype = TORCH[read[2]] if read[2] else torch.int64 if sizes and len(shape) == 2 else (floats or [torch.float32])[0]
    draw = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=draw).to(dtype)
    return torch.randint(min([TOKENS, *sizes]), shape, generator=draw).to(dtype)
