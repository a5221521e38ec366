"""The GPU table: generated kernels beside torch.compile, Liger, fla and mamba-ssm on one device, as shares of the floor.

python benchmarks/gpu.py [--case G3,G5] [--quick] [--json PATH] [--tokens N] [--samples N] [--budget SECONDS] [--check]

Without a GPU the table is what the bytes predict, and --check holds every kernel, interpreted, against float64.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from gpu_cases import Case
    from gpu_rules import Rule

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "gpu.json"
VARIANTS = ("ours", "compile", "liger", "fla", "mamba-ssm")
PREDICTED = ("H100", "H200", "B200", "MI300X")
FEW_TOKENS = 5  # of an interpreted check: more than a convolution has taps
ENDED, DEVICE_LOST, INTERRUPTED = 0, 3, 130  # how a worker ends: DEVICE_LOST where no more can run in its process
Record = dict[str, Any]


def main() -> int:
    """Measures where there is a GPU, predicts where there is none."""
    args = parse_arguments()
    reach_plait()
    chosen = choose(args)
    if args.worker:
        work(chosen, args)
    import torch

    if torch.cuda.is_available() and not args.check:
        return measured_table(chosen, args)
    return predicted_table(chosen, args)


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="ids or kernels, such as G3,swiglu; all if left out")
    parser.add_argument("--quick", action="store_true", help="one kernel of each kind, fewer samples")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go (default %(default)s)")
    parser.add_argument("--tokens", type=_positive, default=8192, help="rows of the batch (default %(default)s)")
    parser.add_argument("--samples", type=_positive, default=0, help="of each variant (default 40, 20 with --quick)")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds a row may take (default %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all; later rows are left out")
    parser.add_argument("--check", action="store_true", help="results alone, of kernels interpreted on the CPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    args.samples = args.samples or (20 if args.quick else 40)
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above zero")
    return int(text)


def reach_plait() -> None:
    """Makes `import plait` work: installed, on the path, or from the checkout that this file is in."""
    try:
        if importlib.util.find_spec("plait") is None:
            place = importlib.util.spec_from_file_location(
                "plait", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
            )
            assert place is not None and place.loader is not None
            module = sys.modules["plait"] = importlib.util.module_from_spec(place)
            place.loader.exec_module(module)
        import plait.lowering.rows  # noqa: F401 # pyright: ignore[reportUnusedImport] # with all that it needs
        import triton  # noqa: F401 # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise SystemExit(f"gpu.py: {error}; it needs torch, triton, networkx and numpy beside the checkout") from None


def choose(args: argparse.Namespace) -> list[str]:
    """Keys of the chosen rows."""
    from gpu_cases import Case, rows

    every = rows()
    known = {name: None for key, (target, _) in every.items() for name in (target.id, target.name, key)}
    wanted = [name for name in args.case.split(",") if name]
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"gpu.py: --case: nothing is called {unknown[0]!r}; there are {', '.join(known)}")
    quick = {key for key, (target, _) in every.items() if isinstance(target, Case) and target.quick}
    if not wanted:
        return [key for key in every if key in quick or not args.quick]
    return [key for key, (target, _) in every.items() if {target.id, target.name, key} & {*wanted}]


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


# -- the worker: a process that may die of a kernel ---------------------------------------


def work(chosen: Sequence[str], args: argparse.Namespace) -> NoReturn:
    """Measures rows, one JSON object on each line of stdout, the device's own first."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is progress

    def tell(record: Record) -> None:
        print(json.dumps(record), file=out, flush=True)

    try:
        code = _work(chosen, args, tell)
    except KeyboardInterrupt:
        code = INTERRUPTED
    os._exit(code)  # a lost device would keep the interpreter from ending so


def _work(chosen: Sequence[str], args: argparse.Namespace, tell: Callable[[Record], None]) -> int:
    import torch
    from gpu_cases import rows
    from gpu_measure import Stopwatch, copy_bandwidth, measure, reason

    tell(device_facts(copy_bandwidth(Stopwatch(), args.samples)))
    for key in chosen:
        say(f"{key} ...")
        try:
            record = measure(rows()[key], args.tokens, args.samples, Stopwatch())
        except Exception as failed:  # a row of its own: the others go on
            record = {**blank(key), "failures": {"row": reason(failed)}}
        tell({"key": key, **record})
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as lost:
            say(f"   the device is lost to this process: {reason(lost)}")
            return DEVICE_LOST
    return ENDED


def device_facts(bandwidth: float) -> Record:
    """The device, what it copies a second, and the versions of what runs on it."""
    import torch
    import triton

    about = torch.cuda.get_device_properties(0)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return {
        "device": about.name, "capability": [about.major, about.minor], "processors": about.multi_processor_count,
        "l2": getattr(about, "L2_cache_size", None), "copy": bandwidth, "versions": versions,
    }  # fmt: skip


def blank(key: str) -> Record:
    """A row of which nothing is known yet."""
    from gpu_cases import rows

    target, mode = rows()[key]
    return {"key": key, "case": target.id, "shape": target.shape, "mode": mode, "bytes": None, "variants": {}, "failures": {}}


# -- the parent ---------------------------------------------------------------------------


def measured_table(chosen: Sequence[str], args: argparse.Namespace) -> int:
    """Measures every row in workers, keeps what is done after each, and prints the table."""
    found: Record = {"device": {}, "rows": list[Record]()}
    interrupted = False
    try:
        with closing(records(chosen, args)) as told:
            for record in told:
                keep(record, found, args.json)
    except KeyboardInterrupt:
        interrupted = True
    if found["device"]:
        print(measured_text(found))
        say(f"written: {args.json}")
    whole = all("ours" in record["variants"] for record in found["rows"])
    return INTERRUPTED if interrupted else int(not whole)


def keep(record: Record, found: Record, path: Path) -> None:
    """Adds a record to what is found, writes all of it and tells of it."""
    from plait.ir.files import write_text

    if "key" not in record:
        say(f"{record['device']}: copies {record['copy'] / 1e12:.2f} TB/s")
        found["device"] = found["device"] or record
        return
    found["rows"].append(record)
    write_text(path, json.dumps(found, indent=1) + "\n")
    for name, each in record["variants"].items():
        say(f"   {name} {each['median'] * 1e6:.1f} us")
    for name, why in record["failures"].items():
        say(f"   {name}: {why}")


def records(chosen: Sequence[str], args: argparse.Namespace, command: Sequence[str] = ()) -> Generator[Record]:
    """The device's record and one for every row; a new worker goes on where one died or said nothing for too long."""
    left, until = [*chosen], time.monotonic() + args.budget
    while left:
        worker, last = start(left, args, command), ""
        try:
            for record in lines(worker, args.patience, until):
                last = record.get("key", "device")
                left = [key for key in left if key != last]
                yield record
                if not left:
                    return
        finally:
            worker.kill()
            worker.wait()
        stopped, why = _stopped(left, last, worker.returncode, time.monotonic() >= until)
        yield from ({**blank(key), "failures": {"row": why}} for key in stopped)
        left = left[len(stopped) :]


def _stopped(left: Sequence[str], last: str, code: int, late: bool) -> tuple[Sequence[str], str]:
    """The first of these rows, which a worker's end leaves without a record, and why; the next worker goes on behind them."""
    if late:
        return left, "left out: the budget is spent"
    why = f"its process ended with {code}, or was ended for being silent"
    if not last:
        return left, f"no worker could begin: {why}"
    return (left[:0] if code == DEVICE_LOST else left[:1]), why


def start(left: Sequence[str], args: argparse.Namespace, command: Sequence[str]) -> subprocess.Popen[str]:
    """A worker for these rows."""
    own = [*(command or (sys.executable, str(Path(__file__).resolve()))), "--worker", "--case", ",".join(left)]
    options = ["--tokens", str(args.tokens), "--samples", str(args.samples)]
    return subprocess.Popen([*own, *options], stdout=subprocess.PIPE, text=True)


def lines(worker: subprocess.Popen[str], patience: float, until: float) -> Generator[Record]:
    """What a worker tells, until it ends, is silent for too long, or the budget is spent."""
    told = queue.Queue[str | None]()

    def read() -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            told.put(line)
        told.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (wait := min(patience, until - time.monotonic())) > 0:
        try:
            line = told.get(timeout=wait)
        except queue.Empty:
            return
        if line is None:
            worker.wait()
            return
        yield json.loads(line)


# -- tables -------------------------------------------------------------------------------


def measured_text(found: Mapping[str, Any]) -> str:
    """The table of what was measured, and below it what was not, and why. The peer is Liger, fla or mamba-ssm."""
    device = found["device"]
    copy = device.get("copy")
    head = ["", "kernel", "shape", "mode", "MB", "floor us", "ours us", "of floor", "to reach"]
    head += ["compile us", "x", "peer us", "x", "error"]
    table = text_table(head, [measured_cells(r, copy) for r in found["rows"]])
    title = f"{device['device']}, torch {device['versions']['torch']}, triton {device['versions']['triton']}"
    notes = [f"{r['key']}: {name}: {why}" for r in found["rows"] for name, why in r["failures"].items()]
    notes += [f"{r['key']}: checked at {r['checked']} tokens" for r in found["rows"] if "checked" in r]
    behind = [f"{r['key']} {n}" for r in found["rows"] for n, each in r["variants"].items() if not each["ahead"]]
    notes += [f"the host was slower than the device: {', '.join(behind)}"] if behind else []
    return "\n".join([f"{title}; the floor is the bytes at {copy / 1e12:.2f} TB/s, what copies reach here", table, *notes])


def measured_cells(record: Mapping[str, Any], copy: float) -> list[str]:
    """A row of the table: what is not known is a dash."""
    times = {name: record["variants"][name]["median"] if name in record["variants"] else None for name in VARIANTS}
    mine = times["ours"]
    floor = record["bytes"] / copy if record["bytes"] else None
    goal = record.get("target")
    cells = [record["case"], record["key"].split(":")[0], record["shape"], record["mode"]]
    cells += [figure(record["bytes"], 1e-6, ".1f"), figure(floor, 1e6, ".1f"), figure(mine, 1e6, ".1f")]
    cells += [figure(floor / mine if floor and mine else None, 100, ".0f", "%")]
    cells += [figure(goal, 100, ".0f", "%") if goal and goal < 1 else figure(goal, 1, ".2f", "x")]
    peer = next((times[name] for name in VARIANTS[2:] if times[name]), None)
    for other in (times["compile"], peer):
        cells += [figure(other, 1e6, ".1f"), figure(other / mine if other and mine else None, 1, ".2f")]
    return [*cells, figure(record.get("errors", {}).get("ours", {}).get("norm"), 1, ".0e")]


def figure(value: float | None, by: float, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value * by:{form}}{unit}"


def text_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; words to the left, figures to the right."""
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    pads = [str.ljust if i < 4 else str.rjust for i in range(len(head))]
    laid = [[pad(cell, width) for cell, pad, width in zip(row, pads, widths, strict=True)] for row in (head, *body)]
    return "\n".join("  ".join(row).rstrip() for row in laid)


# -- without a GPU ------------------------------------------------------------------------


def predicted_table(chosen: Sequence[str], args: argparse.Namespace) -> int:
    """What the bytes predict, and with --check whether the kernels are right. Returns 1 where one is not."""
    import torch
    from gpu_cases import Case, rows, traffic
    from gpu_rules import Rule, launched_bytes, rule_bytes
    from plait.lowering.gpu import MACHINES, predicted_seconds

    say("checking alone" if torch.cuda.is_available() else "no GPU was found: these are predictions, nothing is timed")
    body = list[list[str]]()
    for key in chosen:
        case, mode = rows()[key]
        if isinstance(case, (Case, Rule)):
            rule = isinstance(case, Rule)
            moved = rule_bytes(case, case.tokens) if rule else traffic(case.graph, mode, args.tokens)
            floors = [predicted_seconds(moved, 0, MACHINES[name]) for name in PREDICTED]
            ours = max(moved, launched_bytes(case, case.tokens)) if isinstance(case, Rule) else moved
            cells = [figure(moved, 1e-6, ".1f"), *(figure(f, 1e6, ".1f") for f in floors)]
            body.append([case.id, case.name, case.shape, mode, *cells, figure(ours / MACHINES["H200"].sustained, 1e6, ".1f")])
    print(text_table(("", "kernel", "shape", "mode", "MB", *(f"{name} us" for name in PREDICTED), "ours, H200 us"), body))
    return checked_table(chosen) if args.check else 0


def checked_table(chosen: Sequence[str]) -> int:
    """Errors against float64 of a few rows: our kernels interpreted, the torch expressions, Liger where it is installed."""
    from gpu_cases import Layer, rows
    from gpu_measure import wrong
    from gpu_rules import Rule

    body, bad = list[list[str]](), list[str]()
    for key in chosen:
        case, mode = rows()[key]
        if isinstance(case, Layer):
            continue
        found = checked_rule(case) if isinstance(case, Rule) else checked(case, mode)
        body.append([case.id, case.name, case.shape, mode, *(_error(found.get(name)) for name in ("ours", "torch", "liger"))])
        bad += [f"{key}: {n}: {why}" for n, e in found.items() if (why := e if isinstance(e, str) else wrong(e))]
    print("\n" + "\n".join([text_table(("", "kernel", "shape", "mode", "ours", "torch", "Liger"), body), *bad]))
    return int(bool(bad))


def _error(found: tuple[float, float] | str | None) -> str:
    return "-" if found is None else "fails" if isinstance(found, str) else f"{found[0]:.1e}"


def checked_rule(rule: Rule) -> dict[str, tuple[float, float] | str]:
    """The errors of one recurrence on the CPU, at a shape that an interpreter can run."""
    from gpu_measure import error
    from gpu_rules import call_of, functions, operands, small, truth

    say(f"{rule.name} {rule.mode} ...")
    rule = small(rule)
    xs, made = operands(rule, rule.tokens, "cpu"), functions(rule, "cpu")
    want = truth(rule, xs)
    return {name: error(call_of(rule, made[key](), xs)()(), want) for name, key in (("ours", "ours"), ("torch", "compile"))}


def checked(case: Case, mode: str) -> dict[str, tuple[float, float] | str]:
    """The errors of one row on the CPU."""
    from gpu_cases import problem
    from gpu_measure import as_op, check
    from liger import interpreting

    liger = case.liger if importlib.util.find_spec("liger_kernel") is not None else None
    given = {"torch": case.plain} | ({"ours": as_op(case.graph)} if case.as_op else {}) | ({"liger": liger()} if liger else {})
    say(f"{case.name} {mode} ...")
    with interpreting() if liger else nullcontext():
        return check(case, mode, problem(case.graph, FEW_TOKENS, "cpu"), given)


if __name__ == "__main__":
    raise SystemExit(main())
