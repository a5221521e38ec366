"""`plait opt`: passes on IR in a file, with everything about them to see."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from plait.cli_compile import Json, Output, PipelineOption, Require, Timing, Verify, VerifyOption, names
from plait.cli_output import fail_cleanly, note, problem, read_text, suggestion, write_json, write_out
from plait.cli_watch import ALL, Watch, described, run_watched
from typer.core import TyperCommand

if TYPE_CHECKING:
    from plait.passes import Pipeline

HEADER = "# pipeline: "  # of a reproducer
BARE = {"--print-ir-before": ALL, "--print-ir-after": ALL, "--print-changed": "full", "--remarks": ALL, "--remarks-missed": ALL}


class Changed(StrEnum):
    FULL = "full"
    DIFF = "diff"
    QUIET = "quiet"


class OptCommand(TyperCommand):
    """Gives options that may stand without a value, `--print-ir-after[=PASS]`, the one that means all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [f"{a}={BARE[a]}" if a in BARE else a for a in args])


def mount(app: typer.Typer) -> None:
    """Add `opt`."""
    app.command("opt", cls=OptCommand)(opt)


@fail_cleanly
def opt(
    file: Annotated[str, typer.Argument(metavar="FILE", help="IR as text; - for stdin. A reproducer brings its pipeline.")],
    pipeline: PipelineOption = None,
    before: Annotated[str, typer.Option("--print-ir-before", metavar="[=PASS]", help="Print IR before these, or all.")] = "",
    after: Annotated[str, typer.Option("--print-ir-after", metavar="[=PASS]", help="Print IR after these, or all.")] = "",
    changed: Annotated[Changed | None, typer.Option("--print-changed", help="Print IR that changed; bare is full.")] = None,
    verify: VerifyOption = Verify.TYPES,
    folder: Annotated[str, typer.Option("--dump-dir", metavar="DIR", help="IR around every pass, with an index.")] = "",
    timing: Timing = False,
    remarks: Annotated[str, typer.Option("--remarks", metavar="[=REGEX]", help="Tell what passes did, or what matches.")] = "",
    missed: Annotated[str, typer.Option("--remarks-missed", metavar="[=REGEX]", help="Tell what they did not, and why.")] = "",
    require: Require = "",
    disable: Annotated[str, typer.Option("--disable-pass", metavar="NAMES", help="Leave these passes out.")] = "",
    output: Output = "-",
    as_json: Json = False,
) -> None:
    """Run passes over IR and print what they make of it."""
    from plait.ir import parse

    watch = Watch(before, after, changed.value if changed else "", folder, timing, remarks, missed)
    text = read_text(file)
    plan = without(_plan(pipeline, text), names(disable))
    graph = parse(text, "stdin" if file == "-" else file)
    if not plan.stages and pipeline is None:
        note("plait: note: no pipeline given with -p; the IR is read, checked and printed")
    graph, events = run_watched(graph, plan, watch, verify=verify.value, require=names(require))
    if as_json:
        return write_json({"pipeline": str(plan), "text": str(graph), "passes": [described(e) for e in events]}, output)
    write_out(str(graph), output)


def _plan(given: str | None, text: str) -> Pipeline:
    """The pipeline that was given, or the one that a reproducer was made with."""
    from plait.passes import Pipeline

    first = text.partition("\n")[0]
    kept = first.removeprefix(HEADER) if first.startswith(HEADER) else ""
    return Pipeline.parse(kept if given is None else given)


def without(pipeline: Pipeline, disabled: tuple[str, ...]) -> Pipeline:
    """The pipeline, some passes left out."""
    from plait.passes import PASSES, Pipeline

    for name in disabled:
        if name not in PASSES:
            raise problem(f"--disable-pass: no pass called {name}; {suggestion(name, PASSES)}")
    return Pipeline(tuple(s for s in pipeline.stages if s.made.name not in disabled))
