"""Watching a pipeline run: IR dumps, changes, remarks, timing, a folder of it all, and a reproducer when a pass fails."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from plait.cli_output import Table, note, problem, suggestion, write_out

if TYPE_CHECKING:
    from plait.ir import Graph
    from plait.passes import Event, Pipeline, Remark

REPRODUCER = "plait-reproducer.ir"
ALL = "*"


@dataclass(frozen=True)
class Watch:
    """What is asked for; an empty text asks for nothing, `*` for every pass or remark."""

    before: str = ""
    after: str = ""
    changed: str = ""
    folder: str = ""
    timing: bool = False
    remarks: str = ""
    missed: str = ""


def run_watched(
    graph: Graph, pipeline: Pipeline, watch: Watch, *, verify: str, require: Sequence[str]
) -> tuple[Graph, list[Event]]:
    """Run a pipeline and tell what was asked for; a failing pass leaves a reproducer behind."""
    from plait.passes import PassFailed

    events: list[Event] = []
    told = _tellers(watch)

    def heard(event: Event) -> None:
        events.append(event)
        for tell in told:
            tell(event)

    try:
        return pipeline.run(graph, watch=heard, verify=verify, require=require), events
    except PassFailed as error:
        raise problem(_with_reproducer(error, watch.folder)) from error
    finally:
        _close(events, watch)


def _with_reproducer(error: Any, folder: str) -> str:
    """The failure, and where it can be seen again."""
    from plait.ir import PlaitError

    path = f"{folder}/{REPRODUCER}" if folder else REPRODUCER
    blame = "; this is a mistake in plait, not in what you gave it" if error.internal else ""
    try:
        write_out(error.reproducer, path)
    except PlaitError as unwritten:
        return f"{error}{blame}\n  no reproducer: {unwritten}"
    return f"{error}{blame}\n  reproducer: {path}; `plait opt {path}` shows it again"


def _tellers(watch: Watch) -> list[Callable[[Event], None]]:
    tellers: list[Callable[[Event], None]] = []
    if watch.before:
        wanted = _passes(watch.before)
        tellers.append(lambda e: note(_marked(f"IR Dump Before {e.name}", e.before)) if e.name in wanted else None)
    if watch.after:
        after = _passes(watch.after)
        tellers.append(lambda e: note(_marked(f"IR Dump After {e.name}", e.after)) if e.name in after else None)
    if watch.changed:
        tellers.append(lambda e: _tell_change(e, watch.changed))
    if watch.folder:
        tellers.append(lambda e: _store(e, watch.folder))
    if watch.remarks or watch.missed:
        tellers.append(_remark_teller(watch))
    return tellers


def _passes(text: str) -> set[str]:
    """The names in `fuse,dce`, or all for `*`."""
    from plait.passes import PASSES

    names = [*PASSES] if text == ALL else [n.strip() for n in text.split(",")]
    for name in names:
        if name not in PASSES:
            raise problem(f"no pass called {name}; {suggestion(name, PASSES)}")
    return {*names}


def _marked(title: str, graph: Graph | None = None, text: str = "") -> str:
    return f"# -----// {title} //----- #\n{graph if graph is not None else text}"


def _tell_change(event: Event, how: str) -> None:
    if event.before == event.after:
        if how != "quiet":
            note(_marked(f"IR Unchanged After {event.name}"))
        return
    if how == "diff":
        return note(_marked(f"IR Diff After {event.name}", text=_diff(event)))
    note(_marked(f"IR Dump After {event.name}", event.after))


def _diff(event: Event) -> str:
    before, after = str(event.before).splitlines(), str(event.after).splitlines()
    return "\n".join(difflib.unified_diff(before, after, f"before {event.name}", f"after {event.name}", lineterm=""))


def _remark_teller(watch: Watch) -> Callable[[Event], None]:
    said, missed = _pattern(watch.remarks, "--remarks"), _pattern(watch.missed, "--remarks-missed")

    def tell(event: Event) -> None:
        for remark in event.remarks:
            wanted = missed if remark.kind == "missed" and missed else said
            if wanted and wanted.search(str(remark)):
                note(f"remark: {remark}")

    return tell


def _pattern(text: str, option: str) -> re.Pattern[str] | None:
    try:
        return re.compile("" if text == ALL else text) if text else None
    except re.error as error:
        raise typer.BadParameter(f"{text!r} is no regular expression: {error}", param_hint=option) from None


def _store(event: Event, folder: str) -> None:
    stem = f"{folder}/{event.index:03d}-{event.name}"
    write_out(str(event.before), f"{stem}.before.ir")
    write_out(str(event.after), f"{stem}.after.ir")


def _close(events: Sequence[Event], watch: Watch) -> None:
    """What is told once the pipeline has ended, well or not."""
    if watch.folder:
        write_out("".join(json.dumps(described(e)) + "\n" for e in events), f"{watch.folder}/timeline.jsonl")
        write_out(_index(events), f"{watch.folder}/index.md")
    if watch.timing:
        note(str(timing(events)))


def _index(events: Sequence[Event]) -> str:
    """A page that leads to every file of the folder."""
    rows = ["| # | pass | ms | ops | remarks | files |", "|---|---|---|---|---|---|"]
    for e in events:
        stem = f"{e.index:03d}-{e.name}"
        ops = f"{op_count(e.before)} -> {op_count(e.after)}" + (" (unchanged)" if e.before == e.after else "")
        files = f"[before]({stem}.before.ir), [after]({stem}.after.ir)"
        rows.append(f"| {e.index} | `{e.stage}` | {e.seconds * 1e3:.1f} | {ops} | {len(e.remarks)} | {files} |")
    lines = [f"- {remark}" for e in events for remark in e.remarks]
    return "\n".join(["# Passes", "", *rows, "", "# Remarks", "", *(lines or ["none"])]) + "\n"


def op_count(graph: Graph) -> int:
    """Equations of a graph and of its distinct layers; a kernel counts as one."""
    return len(graph.nodes) + sum(len(layer.nodes) for layer in graph.layers)


def timing(events: Sequence[Event]) -> Table:
    """Time and equations, pass by pass."""
    total = sum(e.seconds for e in events) or 1.0
    rows = [
        (f"{e.seconds * 1e3:.1f}", f"{e.seconds / total:.0%}", str(op_count(e.before)), str(op_count(e.after)), e.stage)
        for e in events
    ]
    title = f"timing: {total * 1e3:.1f} ms in {len(events)} passes"
    return Table(("ms", "share", "ops before", "ops after", "pass"), rows, title)


def described(event: Event) -> dict[str, Any]:
    """An event for scripts."""
    return {
        "index": event.index,
        "pass": event.name,
        "stage": event.stage,
        "seconds": round(event.seconds, 6),
        "changed": event.before != event.after,
        "ops_before": op_count(event.before),
        "ops_after": op_count(event.after),
        "remarks": [_remark(r) for r in event.remarks],
    }


def _remark(remark: Remark) -> dict[str, str]:
    return {"kind": remark.kind, "what": remark.what, "where": remark.where, "why": remark.why, "by": remark.by}
