"""The CPU table: eager, torch.compile and plait on the same shapes, in one process, with the figure to reach.

python benchmarks/cpu.py [--case C1,C4] [--quick] [--threads N] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from cases import Row, rows
from fresh import cold_and_warm, peak_memory, quiet
from measure import Timing, interleave
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
COMPILED = ("compile", "compile, no mask")
Record = dict[str, Any]


def main() -> None:
    """Runs the chosen cases, prints the table and writes the JSON."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    chosen = set(args.case.split(",")) if args.case else None
    say = Console(stderr=True, soft_wrap=True)
    table = list[Record]()
    for record in run(chosen, args, say):
        table.append(record)
        write(args.json, table, args)
    show(table, Console(width=None if sys.stdout.isatty() else 160))
    say.print(f"written: {args.json}")


def parse_arguments() -> argparse.Namespace:
    """The options, with a results file named by the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="comma-separated ids, such as C1,C4; all of them if left out")
    parser.add_argument("--json", type=Path, default=RESULTS / time.strftime("cpu-%Y%m%d-%H%M%S.json"), help="where to write")
    parser.add_argument("--quick", action="store_true", help="the small shapes only, three samples each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds a row may wait for a quiet machine")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds a row may take, five samples of any kind aside")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the peer out: minutes less")
    return parser.parse_args()


def run(chosen: set[str] | None, args: argparse.Namespace, say: Console) -> Iterable[Record]:
    """Every record of the chosen cases, as it is ready."""
    for row in rows():
        if (chosen is None or row.case in chosen) and (row.quick or not args.quick):
            yield timed(row, args, say)
    if chosen is None or "C8" in chosen:
        yield from compile_rows(args, say)
    if (chosen is None or "C10" in chosen) and not args.quick:
        yield memory_row(say)


def timed(row: Row, args: argparse.Namespace, say: Console) -> Record:
    """Builds a row's variants, lets them take turns, and judges ours."""
    say.print(f"{row.case} {row.title} {row.shape} {row.mode} ...")
    torch._dynamo.reset()
    bench = row.build()
    variants = {label: call for label, call in bench.variants.items() if not (args.no_compile and label in COMPILED)}
    timings = interleave(variants, samples=3 if args.quick else 5, patience=args.patience, budget=args.budget)
    # A decoding call says many tokens; the row is per token.
    milliseconds = {label: each.median * 1e3 / bench.notes.get("calls", 1) for label, each in timings.items()}
    record: Record = {field: getattr(row, field) for field in ("case", "title", "shape", "mode", "over", "target")}
    record |= {"ms": milliseconds, "timings": {label: each.record() for label, each in timings.items()}, "notes": bench.notes}
    record |= {"quiet": all(each.quiet for each in timings.values()), "ratio": ratio(milliseconds, row.over)}
    say.print("   " + describe(milliseconds, timings))
    return record


def describe(milliseconds: dict[str, float], timings: dict[str, Timing]) -> str:
    """One line of progress: the medians, and the samples dropped."""
    dropped = sum(each.dropped for each in timings.values())
    return ", ".join(f"{label} {value:.2f} ms" for label, value in milliseconds.items()) + f" ({dropped} samples dropped)"


def ratio(milliseconds: dict[str, float], over: str) -> float | None:
    """How many times faster ours is than the fastest of the peers the row is held against."""
    peers = {"compile": COMPILED, "eager": ("eager",), "peer": ("eager", *COMPILED)}[over]
    against = [milliseconds[label] for label in peers if label in milliseconds]
    return min(against) / milliseconds["ours"] if against and "ours" in milliseconds else None


def compile_rows(args: argparse.Namespace, say: Console) -> Iterable[Record]:
    """C8: cold compile against the peer's, deep against shallow, and a warm start."""
    say.print("C8 compile time in fresh processes ...")
    tokens = 256 if args.quick else 1024
    sides = {side: cold_and_warm(side, "q3n", tokens) for side in ("compile", "no mask") if not args.no_compile}
    mine, deep = cold_and_warm("ours", "q3n", tokens), cold_and_warm("ours", "q3n", tokens, layers=48)
    cold = {side: each["cold"]["compile"] for side, each in sides.items() if "cold" in each}
    notes = {"peers": sides, "ours": mine, "ours, 48 layers": deep}
    known, known_deep = "cold" in mine, "cold" in deep
    total = _built(mine, "cold") if known else None
    share = total / min(cold.values()) if known and cold else None
    deeper = _built(deep, "cold") / total if known and known_deep else None
    ms = {label: seconds * 1e3 for label, seconds in cold.items()} | ({"ours": total * 1e3} if known else {})
    base: Record = {"case": "C8", "title": "compile q3n", "mode": "fwd+bwd", "over": "at most", "notes": notes}
    base["quiet"] = all(quiet(each) for each in (*sides.values(), mine, deep))
    yield base | {"shape": f"cold, f32 {tokens} tokens", "target": (1 / 6, 1 / 8), "ms": ms, "ratio": share}
    yield base | {"shape": "48 layers over 4", "target": (1.3, 1.2), "ms": {}, "ratio": deeper}
    warm = _built(mine, "warm") if known else None
    yield base | {"shape": "warm start, seconds", "target": (2.0, 1.0), "ms": {}, "ratio": warm}


def _built(times: Record, which: str) -> float:
    """Our compile time holds the building of the module, where most of the work is."""
    return times[which]["build"] + times[which]["compile"]


def memory_row(say: Console) -> Record:
    """C10: the peak of a 4,096-token training step, each side in its own process."""
    say.print("C10 peak memory in fresh processes ...")
    sides = {side: peak_memory(side, "q3n", 4096) for side in ("eager", "ours")}
    peaks = {side: each["peak"] for side, each in sides.items() if "peak" in each}
    share = peaks["ours"] / peaks["eager"] if len(peaks) == 2 else None
    return {
        "case": "C10", "title": "peak memory q3n, MiB", "shape": "f32 4096 tokens", "mode": "fwd+bwd", "over": "at most",
        "target": (0.65, 0.45), "ms": peaks, "ratio": share, "quiet": True, "notes": sides,
    }  # fmt: skip


def reached(record: Record) -> str:
    """Which of the two figures is reached: of the torch forms, or of the generated kernels."""
    value, (forms, kernels) = record["ratio"], record["target"]
    if value is None:
        return "-"
    better = (lambda goal: value <= goal) if record["over"] == "at most" else (lambda goal: value >= goal)
    return "[green]kernels[/]" if better(kernels) else "[green]forms[/]" if better(forms) else "[red]no[/]"


def show(table: list[Record], console: Console) -> None:
    """The table; a row that could not be measured in quiet carries a tilde."""
    shown = Table("case", "what", "shape", "mode")
    for heading in ("eager ms", "compile ms", "ours ms", "ratio", "target"):
        shown.add_column(heading, justify="right")
    shown.add_column("reached")
    for record in table:
        ms, goal = record["ms"], " / ".join(f"{each:.3g}" for each in record["target"])
        compiled = [ms[label] for label in COMPILED if label in ms]
        figures = [ms.get("eager"), min(compiled) if compiled else None, ms.get("ours"), record["ratio"]]
        mode = record["mode"] + ("" if record["quiet"] else " ~")
        cells = ["-" if each is None else f"{each:.2f}" for each in figures]
        shown.add_row(record["case"], record["title"], record["shape"], mode, *cells, goal, reached(record))
    console.print(shown)
    sizes = {record["title"]: record["notes"] for record in table if "parameters" in record["notes"]}
    for title, notes in sizes.items():
        mine = f"{notes['our parameters']:,}" if "our parameters" in notes else "-"
        console.print(f"{title}: peer {notes['parameters']:,} parameters, ours {mine}", highlight=False)
    for reason in sorted({record["notes"]["ours"] for record in table if isinstance(record["notes"].get("ours"), str)}):
        console.print(f"not measured: {reason}")


def write(path: Path, table: list[Record], args: argparse.Namespace) -> None:
    """Writes what is known so far, so that a stopped run keeps its rows."""
    import transformers

    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"cpu": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(), "threads": args.threads}
    path.write_text(json.dumps({"versions": versions, "machine": machine, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
