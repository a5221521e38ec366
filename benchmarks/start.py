"""How a large Hugging Face folder starts: its time against reading the file, and its peak memory against the weights.

python benchmarks/start.py [--size MIB] [--dtype bf16] [--model llama,mixtral] [--samples N] [--json PATH]

Every figure is of a fresh process that has imported everything. `read` reads the file into memory that it has just asked for.
Files are warm (in the page cache) or cold (their pages dropped before). The folder has random weights and stands in a temporary
directory that goes away with the run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results"
HIDDEN, WIDTH, VOCAB, KV, EXPERTS = 2048, 5632, 32_000, 512, 8
SINGLE = "model.safetensors"
DTYPES = {"bf16": (torch.bfloat16, "bfloat16"), "f32": (torch.float32, "float32")}
TIME, MEMORY = 1.2, 1.3  # at most: of the time to read the file, of the weights' own size
Record = dict[str, Any]


def main() -> None:
    """Measures in fresh processes, prints the table and writes the JSON; in a process of its own it takes one sample."""
    if sys.argv[1:2] == ["--sample"]:
        print(json.dumps(sample(*sys.argv[2:6])))
        return
    args = parse_arguments()
    table = list[Record]()
    for model in args.model.split(","):
        with tempfile.TemporaryDirectory() as place:
            write_folder(Path(place), model, args.dtype, args.size * 2**20)
            table += measured(place, model, args)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"torch": torch.__version__, "rows": table}, indent=1) + "\n")
    show(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="about how many MiB the weights have")
    parser.add_argument("--dtype", choices=[*DTYPES], default="bf16", help="of the weights in the file")
    parser.add_argument("--model", default="llama,mixtral", help="which families, llama or mixtral")
    parser.add_argument("--samples", type=int, default=3, help="processes for each figure")
    parser.add_argument("--json", type=Path, default=RESULTS / "start.json", help="where to write")
    return parser.parse_args()


# -- the folder ---------------------------------------------------------------------------


def write_folder(folder: Path, model: str, dtype: str, size: int) -> None:
    """A folder of about `size` bytes with as many layers as that takes."""
    kind, name = DTYPES[dtype]
    of_layer = sum(torch.Size(s).numel() for _, s in layer(0, model)) * kind.itemsize
    layers = max(1, round((size - 2 * VOCAB * HIDDEN * kind.itemsize) / of_layer))
    fields: Record = {
        "model_type": model, "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "dtype": name,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    }  # fmt: skip
    fields |= {"num_local_experts": EXPERTS, "num_experts_per_tok": 2} if model == "mixtral" else {}
    (folder / "config.json").write_text(json.dumps(fields))
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= dict(pair for i in range(layers) for pair in layer(i, model))
    rng = torch.Generator().manual_seed(0)
    save_file({n: torch.randn(s, generator=rng).mul_(0.02).to(kind) for n, s in shapes.items()}, folder / SINGLE)


def layer(i: int, model: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a decoder layer, by their names in the file."""
    at = f"model.layers.{i}."
    yield from ((f"{at}{n}_layernorm.weight", (HIDDEN,)) for n in ("input", "post_attention"))
    yield from (
        (f"{at}self_attn.{n}_proj.weight", (rows, HIDDEN)) for n, rows in zip("qkvo", (HIDDEN, KV, KV, HIDDEN), strict=True)
    )
    if model == "llama":
        yield from ((f"{at}mlp.{n}_proj.weight", (WIDTH, HIDDEN)) for n in ("gate", "up"))
        yield f"{at}mlp.down_proj.weight", (HIDDEN, WIDTH)
        return
    yield f"{at}block_sparse_moe.gate.weight", (EXPERTS, HIDDEN)
    for e in range(EXPERTS):
        yield from ((f"{at}block_sparse_moe.experts.{e}.{n}.weight", (WIDTH, HIDDEN)) for n in ("w1", "w3"))
        yield f"{at}block_sparse_moe.experts.{e}.w2.weight", (HIDDEN, WIDTH)


# -- one sample, in a process of its own --------------------------------------------------


def sample(what: str, folder: str, cache: str, dtype: str) -> Record:
    """Seconds, and MiB at the peak over what the process had before."""
    start = STARTS[what]
    import plait.api
    import plait.runtime.module  # noqa: F401 # what is imported is not what starts

    if cache == "cold":
        drop(Path(folder, SINGLE))
    base = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    before, cpu = time.perf_counter(), time.process_time()
    held = start(folder, dtype)
    seconds, used = time.perf_counter() - before, time.process_time() - cpu
    made: Record = {"seconds": seconds, "cpu": used, "peak": status("VmHWM") - base, "after": status("VmRSS") - base}
    del held
    return made


def read(folder: str, dtype: str) -> bytearray:
    """The file, into memory."""
    path = Path(folder, SINGLE)
    held = bytearray(path.stat().st_size)
    with path.open("rb", buffering=0) as file, memoryview(held) as view:
        at = 0
        while at < len(held):
            at += file.readinto(view[at : at + 2**24])
    return held


def load(folder: str, dtype: str) -> object:
    """Every weight by our names."""
    import plait

    return dict(plait.load_hf(folder)[1])


def compile_folder(folder: str, dtype: str) -> object:
    """The model, before its first token."""
    import plait

    return plait.compile(folder, jit=False, dtype=dtype)


STARTS: dict[str, Callable[[str, str], object]] = {"read": read, "load_hf": load, "compile": compile_folder}


def drop(path: Path) -> None:
    """Let the kernel forget the pages of a file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def status(field: str) -> float:
    """A size in MiB from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


# -- the table ----------------------------------------------------------------------------


def measured(folder: str, model: str, args: argparse.Namespace) -> list[Record]:
    """Every way to start, warm and cold, taking turns; times against `read` of the same turn, memory against the weights."""
    size = Path(folder, SINGLE).stat().st_size / 2**20
    wide = {"bf16": ("f32", 2.0), "f32": ("bf16", 0.5)}[args.dtype]
    ways = [("read", "", 1.0), ("load_hf", "", 1.0), ("compile", "", 1.0), ("compile", *wide)]
    table = list[Record]()
    for cache in ("warm", "cold"):
        turns = [[spawn(what, folder, cache, dtype) for what, dtype, _ in ways] for _ in range(args.samples)]
        for i, (what, dtype, times) in enumerate(ways):
            own = [turn[i] for turn in turns]
            middle = {key: statistics.median(each[key] for each in own) for key in own[0]}
            table.append({
                "model": model, "file": args.dtype, "what": f"{what} {dtype}".strip(), "cache": cache, "MiB": size, **middle,
                "over reading": statistics.median(turn[i]["seconds"] / turn[0]["seconds"] for turn in turns),
                "over weights": middle["peak"] / (size * times),
            })  # fmt: skip
    return table


def spawn(what: str, folder: str, cache: str, dtype: str) -> Record:
    command = [sys.executable, __file__, "--sample", what, folder, cache, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"start.py: {what} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(table: list[Record]) -> None:
    shown = Table("folder", "what", "cache")
    for heading in ("s", "CPU s", "over reading", "peak MiB", "over weights", "reached"):
        shown.add_column(heading, justify="right")
    for row in table:
        copies = row["what"] in ("read",) or " " in row["what"]  # a cast writes other bytes than the file has
        reached = row["over weights"] <= MEMORY and (copies or row["over reading"] <= TIME)
        cells = [f"{row[key]:.2f}" for key in ("seconds", "cpu", "over reading")]
        cells += [f"{row['peak']:.0f}", f"{row['over weights']:.2f}", "yes" if reached else "NO"]
        shown.add_row(f"{row['model']} {row['file']} {row['MiB']:.0f} MiB", row["what"], row["cache"], *cells)
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


if __name__ == "__main__":
    main()
