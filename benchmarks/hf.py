"""Hugging Face folders on the CPU: transformers eager, torch.compile of it and plait, on the same weights, in one process.

python benchmarks/hf.py [--case llama,mamba2] [--row prefill,decode] [--quick] [--threads N] [--json PATH]

Needs transformers (`pip install -e '.[bench]'`). Prefill, training step and decoding (batch 1 and 8) take turns by the rules
of measure.py; time to the first result and peak memory are of fresh processes with empty caches. transformers decodes eagerly:
its caches grow, so that compiled code of them would be compiled again for every length.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import fresh
import hf_minis
import torch
from measure import Thunk, interleave
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
ROWS = ("prefill", "train", "decode", "decode 8", "first", "memory")
PROMPT = 16
Record = dict[str, Any]


def main() -> None:
    """Runs the chosen cases, prints the table and writes the JSON, which keeps the rows of other cases."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:6])))
        return
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    say, table = Console(stderr=True, soft_wrap=True), list[Record]()
    for name in args.case.split(","):
        with tempfile.TemporaryDirectory() as place:
            hf_minis.write_folder(name, Path(place))
            for record in rows(name, Path(place), args):
                say.print(f"{name} {record['row']}: " + ", ".join(f"{k} {v:.2f}" for k, v in record["figures"].items()))
                table.append(record)
                write(args.json, table, args)
    show(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default=",".join(hf_minis.MINIS), help="which minis")
    parser.add_argument("--row", default=",".join(ROWS), help="which rows")
    parser.add_argument(
        "--quick", action="store_true", help="short rows of tokens, one sample each, nothing compiled by the peer"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds a row may wait for a quiet machine")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds a row may take, five samples of any kind aside")
    parser.add_argument("--json", type=Path, default=RESULTS / "hf.json", help="where to write")
    return parser.parse_args()


def rows(name: str, folder: Path, args: argparse.Namespace) -> Iterator[Record]:
    """The chosen rows of one mini."""
    wanted, tokens = args.row.split(","), 256 if args.quick else 1024
    builds: dict[str, Callable[[], dict[str, Thunk]]] = {
        "prefill": lambda: prefill(folder, tokens, args.quick),
        "train": lambda: training(folder, tokens, args.quick),
        "decode": lambda: decoding(folder, 1, 8 if args.quick else 64),
        "decode 8": lambda: decoding(folder, 8, 8 if args.quick else 64),
    }
    for row in (r for r in wanted if r in builds):
        torch._dynamo.reset()
        samples = (
            {"samples": 1, "patience": 0.0, "budget": 5.0} if args.quick else {"patience": args.patience, "budget": args.budget}
        )
        timings = interleave(builds[row](), **samples)
        record = judged(name, row, {side: each.median * 1e3 for side, each in timings.items()}, "ms")
        if row.startswith("decode"):
            each = (8 if args.quick else 64) / (1 if row == "decode" else 1 / 8)
            record["tokens/s"] = {side: each / t.median for side, t in timings.items()}
        yield record | {"timings": {k: t.record() for k, t in timings.items()}, "quiet": all(t.quiet for t in timings.values())}
    for row in (r for r in wanted if r in ("first", "memory")):
        sides = ("eager", *(() if args.quick else ("compile",)), "ours", *(("ours, eager",) if row == "first" else ()))
        found = {side: spawn(row, side, folder, tokens) for side in sides}
        key = "peak" if row == "memory" else "total"
        yield judged(name, row, {s: f[key] for s, f in found.items() if key in f}, "MiB" if row == "memory" else "s") | {
            "notes": found
        }


def judged(name: str, row: str, figures: dict[str, float], unit: str) -> Record:
    """A record; the ratio says how many times better ours is than the better of the others, compiled or not."""
    others = [v for side, v in figures.items() if not side.startswith("ours")]
    own = [v for side, v in figures.items() if side.startswith("ours")]
    ratio = min(others) / min(own) if others and own else None
    return {"case": name, "row": row, "unit": unit, "figures": figures, "ratio": ratio}


# -- what is timed ------------------------------------------------------------------------


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, hf_minis.VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def sides_of(folder: Path, mode: str, tokens: torch.Tensor, quick: bool) -> dict[str, Any]:
    peer = hf_minis.peer(folder)
    free = None if quick else hf_minis.mask_free(peer, tokens)
    made: dict[str, Any] = {"eager": peer}
    made |= {} if quick else {"compile": torch.compile(peer, dynamic=False)}
    made |= {"compile, no mask": torch.compile(free, dynamic=False)} if free is not None else {}
    return made | {"ours": hf_minis.ours(folder, mode)}


def prefill(folder: Path, length: int, quick: bool) -> dict[str, Thunk]:
    """Logits of a row of tokens; all sides say the same."""
    tokens = ids(1, length)
    found = sides_of(folder, "infer", tokens, quick)
    with torch.no_grad():
        meant, said = found["eager"](tokens), found["ours"](tokens)
    error = float((meant - said).norm() / meant.norm())
    if error > 1e-3:
        sys.exit(f"hf.py: {folder}: ours is {error:.1e} away from the peer")
    return {side: lambda m=m: cases.forward(m, m, tokens) for side, m in found.items()}


def training(folder: Path, length: int, quick: bool) -> dict[str, Thunk]:
    """One loss and its gradients."""
    tokens = ids(1, length)
    found = sides_of(folder, "train", tokens, quick)
    calls = {side: cases.next_tokens(m) if side == "ours" else m for side, m in found.items()}
    return {side: lambda m=m, call=calls[side]: cases.train(m, call, tokens) for side, m in found.items()}


def decoding(folder: Path, batch: int, count: int) -> dict[str, Thunk]:
    """Tokens one after another, behind a short prompt."""
    prompt, peer, mine = ids(batch, PROMPT), hf_minis.peer(folder).eval(), hf_minis.ours(folder, "infer")
    run: Any = mine.generate
    return {
        "eager": lambda: cases._quietly(lambda: hf_minis.decode(peer, prompt, count)),
        "ours": lambda: cases._quietly(lambda: run(prompt, count)),
    }


# -- fresh processes ----------------------------------------------------------------------


def spawn(row: str, side: str, folder: Path, tokens: int) -> Record:
    """One measurement in a process of its own with caches of its own."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, __file__, "--child", row, side, str(folder), str(tokens)]
        done = subprocess.run(command, env=fresh.environment(root), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"missing": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def child(row: str, side: str, folder: str, tokens: str) -> Record:
    """Seconds to the first logits, loading and compiling included; or the peak of a training step."""
    import plait.api  # noqa: F401 # importing is not what is measured

    family = json.loads(Path(folder, "config.json").read_text())["model_type"]
    importlib.import_module(f"transformers.models.{family}.modeling_{family}")

    given, mode = ids(1, int(tokens)), "train" if row == "memory" else "infer"
    step: Callable[..., object] = cases.train if row == "memory" else cases.forward

    def build() -> Thunk:
        mine = side.startswith("ours")
        module: Any = hf_minis.ours(Path(folder), mode, jit=side == "ours") if mine else hf_minis.peer(Path(folder))
        call: Any = torch.compile(module, dynamic=False) if side == "compile" else module
        call = cases.next_tokens(module) if side == "ours" and row == "memory" else call
        return lambda: step(module, call, given)

    if row == "memory":
        return fresh.measure_memory(build)
    times = fresh.measure_time(build)
    return times | {"total": times["build"] + times["first"]}


# -- the table ----------------------------------------------------------------------------


def show(table: list[Record]) -> None:
    shown = Table("model", "row")
    for heading in ("eager", "compile", "ours", "unit", "ours tokens/s", "ratio"):
        shown.add_column(heading, justify="right")
    for record in table:
        found = record["figures"]
        compiled = [found[side] for side in ("compile", "compile, no mask") if side in found]
        cells = ["-" if v is None else f"{v:.2f}" for v in (found.get("eager"), min(compiled, default=None), found.get("ours"))]
        speed = record.get("tokens/s", {}).get("ours")
        ratio = record["ratio"]
        colored = "-" if ratio is None else f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}[/]"
        mark = "" if record.get("quiet", True) else " ~"
        shown.add_row(record["case"], record["row"] + mark, *cells, record["unit"], f"{speed:.0f}" if speed else "", colored)
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


def write(path: Path, table: list[Record], args: argparse.Namespace) -> None:
    """The rows so far, beside those of other cases that the file has."""
    import transformers

    known = json.loads(path.read_text())["rows"] if path.exists() else []
    mine = {(r["case"], r["row"]) for r in table}
    kept = [r for r in known if (r["case"], r["row"]) not in mine]
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"cpu": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(), "threads": args.threads}
    said = {"when": time.strftime("%Y-%m-%d"), "versions": versions, "machine": machine, "rows": kept + table}
    path.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
