"""Runs pipelines: watched, timed, verified after every pass, with a reproducer when one fails."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..ir import Graph, ParseError, PassError, PlaitError, dump, parse
from .pipeline import Stage, parse_stages
from .registry import apply
from .remarks import Remark, check_required
from .validate import validate
from .verify import check_order, check_types

VERIFY = ("off", "types", "numeric")
_HEADER = "# pipeline: "


@dataclass(frozen=True)
class Event:
    """One pass that ran."""

    index: int
    name: str
    stage: str  # the pass with its options, as pipeline text
    before: Graph
    after: Graph
    seconds: float
    remarks: tuple[Remark, ...]


class PassFailed(PassError):
    """A pass that raised or broke a program; `reproducer` is a file that shows it again."""

    def __init__(self, text: str, name: str, reproducer: str, internal: bool) -> None:
        super().__init__(text)
        self.name, self.reproducer, self.internal = name, reproducer, internal  # internal: our mistake, not the user's


@dataclass(frozen=True)
class Pipeline:
    """Passes in order."""

    stages: tuple[Stage, ...]

    @staticmethod
    def parse(text: str) -> Pipeline:
        return Pipeline(parse_stages(text))

    def __str__(self) -> str:
        return ",".join(map(str, self.stages))

    def run(
        self, graph: Graph, *, watch: Callable[[Event], None] | None = None, verify: str = "off", require: Sequence[str] = ()
    ) -> Graph:
        """Every pass in turn; `require` names what must have fired by the end."""
        if verify not in VERIFY:
            raise PassError(f"verify is {verify!r}, must be one of {', '.join(VERIFY)}")
        remarks = list[Remark]()
        for index, stage in enumerate(self.stages):
            event = _step(index, stage, graph, verify)
            remarks += event.remarks
            if watch:
                watch(event)
            graph = event.after
        check_required(require, remarks)
        return graph


def _step(index: int, stage: Stage, before: Graph, verify: str) -> Event:
    """One pass and the checks after it; whatever it raises names the pass and carries a reproducer."""
    start = time.perf_counter()
    try:
        after, remarks = apply(stage.made, before, dict(stage.given))
        seconds = time.perf_counter() - start
        check_order(after)
        if after == before:
            remarks += (Remark("note", stage.made.name, before.name, "nothing changed", stage.made.name),)
        remarks += _verified(stage, before, after, verify)
    except PlaitError as error:
        raise _failure(stage, before, verify, str(error), internal=False) from error
    except Exception as error:
        raise _failure(stage, before, verify, f"{type(error).__name__}: {error}", internal=True) from error
    return Event(index, stage.made.name, str(stage), before, after, seconds, remarks)


def _verified(stage: Stage, before: Graph, after: Graph, verify: str) -> tuple[Remark, ...]:
    """Remarks of the checks; raises when one fails."""
    if verify == "off":
        return ()
    check_types(after)
    if verify == "types":
        return ()
    report = validate(before, after, stage.made.numerics, gradients=stage.made.gradients)
    if not report.ok:
        raise PassError(f"changed what {before.name} computes: {report}")
    return (Remark("note", "validate", before.name, report.note, stage.made.name),) if report.note else ()


def _failure(stage: Stage, before: Graph, verify: str, why: str, *, internal: bool) -> PassFailed:
    name = stage.made.name
    text = f"pass {name}: {why}"
    lines = [f"{_HEADER}{stage}", f"# verify: {verify}", f"# torch {torch.__version__}, python {platform.python_version()}"]
    lines += [f"# {line}" for line in text.splitlines()]
    return PassFailed(text, name, "\n".join(lines) + "\n\n" + dump(before), internal)


def read_reproducer(text: str) -> tuple[Pipeline, Graph]:
    """The pipeline and the graph in a reproducer."""
    first = text.partition("\n")[0]
    if not first.startswith(_HEADER):
        raise ParseError(f"a reproducer starts with `{_HEADER}...`, this text with {first[:60]!r}")
    return Pipeline.parse(first.removeprefix(_HEADER)), parse(text)
