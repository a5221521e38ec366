"""A gated delta net over two processes: forward and backward of our ways, Megatron-core's scheme and fla's, side by side.

python benchmarks/mesh.py [--quick] [--compile] [--ways heads,states,chain] [--tokens 4096] [--json] [--out [PATH]]

One command: it starts its own processes (gloo, this machine). Variants take turns, each call a forward and a backward that
all ranks begin together; a sample is what the slowest rank took, the median is kept. Results and gradients of every variant
are held against the layer on one device in float64 before anything is timed. Gradients of parameters are left as each rank's
part, which data parallelism sums, on all sides. Bytes are what one rank sends in a call, counted at the collectives.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import DISTURBED, read_clock
from mesh_peers import Params, Sizes, Wire, fla, megatron, order_of, whole
from plait.frontends.layers import MIXERS, Layer
from plait.frontends.load import load_spec
from plait.ir import Builder, Graph, PlaitError, TensorType, Value, arranged, parameters, scatter, tensor_type
from plait.lowering import lower
from plait.lowering.forms.traffic import count_anew, traffic
from plait.passes import DEFAULT, Pipeline
from plait.runtime.mesh import Place, close, init
from plait.runtime.runner import Runner
from rich.console import Console
from rich.table import Table

Tensor = torch.Tensor
RESULTS = Path(__file__).parent / "results"
PASSES = f"hoist-exchanges,merge-exchanges,fold-orders,{DEFAULT}"
WRONG = 1e-3  # of the norm: a variant further off than this is not timed
Record = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One side: its forward on this rank's tokens, where these stand in the sequence, and how bytes are counted."""

    forward: Callable[[Params, Tensor], Tensor]
    here: Tensor  # i64[s / ranks]
    counted: Callable[[], tuple[int, int]]  # exchanges and bytes since it was last asked
    first: bool = False  # sequence first
    orders: Mapping[str, TensorType] | None = None  # of parameters that are stored in another order


@dataclass(frozen=True)
class Sample:
    """What the slowest rank took, in seconds, and how many cores other programs used meanwhile."""

    seconds: float
    others: float


def main() -> None:
    """Starts the ranks, or is one of them."""
    args = parse_arguments()
    if args.rank is None:
        return launch(args)
    torch.set_num_threads(args.threads)
    try:
        place = init(f"cp={args.ranks}", device="cpu", store=args.store, timeout=600.0)
        records = run(args, place)
    except PlaitError as error:
        sys.exit(f"rank {args.rank}: {error}")
    close()
    if place.rank == 0:
        report(args, records)


def parse_arguments() -> argparse.Namespace:
    """The options; `--quick` is fewer tokens and samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,024 tokens and three samples, unless said otherwise")
    parser.add_argument("--compile", action="store_true", help="our layer under torch.compile; the peers stay eager")
    parser.add_argument("--ways", default="heads,states,chain", help="comma-separated; way:zigzag for tokens in that order")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--tokens", type=int, default=0, help="of the whole sequence; 4,096 unless given")
    parser.add_argument("--samples", type=int, default=0, help="of each variant; 7 unless given")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of a process")
    for name, size in (("batch", 1), ("hidden", 512), ("key-heads", 4), ("value-heads", 8), ("key-dim", 64), ("value-dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--json", action="store_true", help="print every figure as JSON instead of the table")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS / "mesh.json", help="write the JSON, too")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.tokens, args.samples = args.tokens or (1024 if args.quick else 4096), args.samples or (3 if args.quick else 7)
    if args.tokens % (2 * args.ranks):
        parser.error(f"--tokens is {args.tokens}, must be a multiple of {2 * args.ranks}: Megatron-core's tokens are a zigzag")
    if args.key_heads % args.ranks or args.value_heads % args.key_heads:
        parser.error("--key-heads must be a multiple of --ranks, and --value-heads of --key-heads")
    return args


def launch(args: argparse.Namespace) -> None:
    """One process for each rank, this same command; what the first says is the report."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        quiet = {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore::FutureWarning", "OMP_NUM_THREADS": str(args.threads)}
        env = {**os.environ, **quiet, "WORLD_SIZE": str(args.ranks)}
        started = [
            subprocess.Popen([sys.executable, *sys.argv, "--rank", str(r), "--store", store], env=env | {"RANK": str(r)})
            for r in range(args.ranks)
        ]
        try:
            codes = [p.wait() for p in started]
        finally:
            for p in started:
                p.kill()
    sys.exit(max(codes, key=abs))


# -- the sides --------------------------------------------------------------------------------


def layer(sizes: Sizes) -> Graph:
    """`x -> gated delta net(x)`, called by an entry, as in a model."""
    fields = {k: v for k, v in asdict(sizes).items() if k not in ("hidden", "tokens", "batch")}
    spec = load_spec({"name": "one", "vocab": 2, "hidden": sizes.hidden, "blocks": ["gdn"], "gdn": fields, "norm_eps": 1e-6})
    b, entry, type_ = Builder("gdn", "layer"), Builder("one"), tensor_type("f32", "b", "s", sizes.hidden)
    made = MIXERS["gdn"](Layer(b, spec, "f32", {}), b.input("x", type_), spec.blocks[0])
    assert isinstance(made, Value)
    return entry.finish([entry.call(b.finish([made]), entry.input("x", type_), params="layer")])


def ours(way: str, sizes: Sizes, place: Place, *, compiled: bool) -> Variant:
    """Our layer, its tokens split in a way that is told."""
    name, _, order = way.partition(":")
    first = f"place{{mesh='cp={place.mesh['cp']}' recurrence={name} order={order or 'natural'}}}"
    program = lower(Pipeline.parse(f"{first},{PASSES}").run(layer(sizes)), target="cpu")
    run_program, graph = Runner(program, {} if compiled else None), program.graph
    index = arranged(torch.arange(sizes.tokens)[None, :, None], graph.inputs[0].type)
    here = scatter(index, graph.inputs[0].type, place.mesh)[place.rank].flatten()

    def forward(params: Params, x: Tensor) -> Tensor:
        return run_program([x], [params[k.removeprefix("layer.")] for k in program.parameters])[0]

    def counted() -> tuple[int, int]:
        found = traffic().get("cp")
        count_anew()
        return (found.calls, found.bytes) if found else (0, 0)

    orders = {k.removeprefix("layer."): t for k, (t, _) in parameters(graph).items()}
    return Variant(forward, here, counted, orders=orders)


def peers(sizes: Sizes, place: Place) -> dict[str, Variant]:
    """The other sides."""
    ranks, rank = place.mesh["cp"], place.rank
    natural, zigzag = (x.chunk(ranks)[rank] for x in (torch.arange(sizes.tokens), order_of(sizes.tokens, ranks)))

    def side(call: Callable[..., Tensor], here: Tensor, first: bool) -> Variant:
        wire = Wire(ranks, rank)

        def counted() -> tuple[int, int]:
            found = wire.calls, wire.bytes
            wire.calls = wire.bytes = 0
            return found

        return Variant(lambda p, x: call(p, x, sizes, wire), here, counted, first)

    return {
        "megatron 7": side(partial(megatron, apart=True, loop=True), zigzag, True),
        "megatron 2": side(partial(megatron, apart=False, loop=True), zigzag, True),
        "megatron 2, solved": side(partial(megatron, apart=False, loop=False), zigzag, True),
        "fla": side(fla, natural, False),
    }


def drawn(sizes: Sizes) -> dict[str, Tensor]:
    """Parameters, the sequence and a cotangent; the same on every rank."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int, by: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=rng) * by

    values, width = sizes.value_heads * sizes.value_dim, sum(sizes.sections)
    whole_shape = sizes.batch, sizes.tokens, sizes.hidden
    return {
        "w_in": normal(width, sizes.hidden, by=sizes.hidden**-0.5), "conv": normal(sum(sizes.sections[:3]), 4, by=0.5),
        "dt_bias": normal(sizes.value_heads), "A_log": torch.rand(sizes.value_heads, generator=rng) * 2,
        "out_norm": 1 + normal(sizes.value_dim, by=0.1), "w_out": normal(sizes.hidden, values, by=values**-0.5),
        "x": normal(*whole_shape), "d": normal(*whole_shape),
    }  # fmt: skip


# -- measuring --------------------------------------------------------------------------------


def run(args: argparse.Namespace, place: Place) -> list[Record]:
    """Every variant: checked, counted, then timed in turns."""
    names = ("hidden", "key_heads", "value_heads", "key_dim", "value_dim", "tokens", "batch")
    sizes = Sizes(**{name: getattr(args, name) for name in names})
    made = {f"plait {way}": ours(way, sizes, place, compiled=args.compile) for way in args.ways.split(",")}
    made |= peers(sizes, place)
    given = drawn(sizes)
    wanted = reference(given, sizes)
    records, calls = list[Record](), dict[str, Callable[[], object]]()
    for name, variant in made.items():
        call = prepared(variant, given)
        record: Record = {"name": name, **checked(variant, call, wanted)}
        records.append(record)
        if record["error"] <= WRONG:
            calls[name] = call
    for name, taken in timed(calls, args.samples).items():
        record = next(r for r in records if r["name"] == name)
        seconds = [s.seconds for s in taken]
        record |= {"ms": statistics.median(seconds) * 1e3, "low": min(seconds) * 1e3, "high": max(seconds) * 1e3}
        record["others"] = statistics.median(s.others for s in taken)
    return records


def prepared(variant: Variant, given: Mapping[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward on this rank's tokens: the result, and the gradients of them and of every parameter."""
    orders = variant.orders or {}
    params = {k: arranged(v, orders[k]) if k in orders else v for k, v in given.items() if k not in "xd"}
    params = {k: v.clone().requires_grad_() for k, v in params.items()}
    x, d = (_local(given[k], variant) for k in "xd")

    def call() -> tuple[Tensor, ...]:
        y = variant.forward(params, leaf := x.detach().requires_grad_())
        return y, *torch.autograd.grad(y, [leaf, *params.values()], d)

    return call


def _local(whole_x: Tensor, variant: Variant) -> Tensor:
    part = whole_x[:, variant.here]
    return part.transpose(0, 1).contiguous() if variant.first else part.contiguous()


def reference(given: Mapping[str, Tensor], sizes: Sizes) -> list[Tensor]:
    """The layer on one device in float64: its result and all gradients."""
    wide = {k: v.double().requires_grad_(k != "d") for k, v in given.items()}
    y = whole(wide, wide["x"], sizes)
    leaves = [wide["x"], *(v for k, v in wide.items() if k not in "xd")]
    return [y.detach(), *torch.autograd.grad(y, leaves, wide["d"])]


def checked(variant: Variant, call: Callable[[], tuple[Tensor, ...]], wanted: list[Tensor]) -> Record:
    """How far a variant is off, at most on any rank, and what it sends in a call."""
    variant.counted()
    y, d_x, *grads = call()
    exchanges, sent = variant.counted()
    names = ("w_in", "conv", "dt_bias", "A_log", "out_norm", "w_out")
    errors = [_off(part, _local(full, variant)) for part, full in zip((y, d_x), wanted[:2], strict=True)]
    for name, part, full in zip(names, grads, wanted[2:], strict=True):
        total = part.detach().double()
        dist.all_reduce(total)
        errors.append(_off(total, arranged(full, variant.orders[name]) if variant.orders else full))
    error, most = torch.tensor(errors).max(), torch.tensor(sent)
    for x in (error, most):
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return {"error": float(error), "exchanges": exchanges, "bytes": int(most)}


def _off(found: Tensor, full: Tensor) -> float:
    return float((found.detach().double() - full).norm() / full.norm())


def timed(calls: Mapping[str, Callable[[], object]], samples: int) -> dict[str, list[Sample]]:
    """Samples of every variant, in turns."""
    for call in calls.values():
        call()
        call()
    taken: dict[str, list[Sample]] = {name: [] for name in calls}
    for turn in range(samples):
        names = list(calls)[turn % len(calls) :] + list(calls)[: turn % len(calls)]
        for name in names:
            taken[name].append(sample(calls[name]))
    return taken


def sample(call: Callable[[], object]) -> Sample:
    """One call that all ranks begin together: what the slowest took, and what others than the ranks did meanwhile."""
    dist.barrier()
    before = read_clock()
    call()
    after = read_clock()
    slowest = torch.tensor([after.wall - before.wall, after.busy - before.busy], dtype=torch.float64)
    ours = torch.tensor(after.own - before.own, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(ours)
    seconds, busy = slowest.tolist()
    return Sample(seconds, max(0.0, busy - float(ours)) / seconds)


# -- telling ----------------------------------------------------------------------------------


def report(args: argparse.Namespace, records: list[Record]) -> None:
    options = {k: v for k, v in vars(args).items() if k not in ("rank", "store", "out", "json")}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    text = json.dumps({"options": options, "machine": machine, "rows": records}, indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(table(args, records))


def table(args: argparse.Namespace, records: list[Record]) -> Table:
    """One row for each variant; ratios say how many times as long each peer takes. ~: other programs used the machine."""
    rest = {r["name"]: r["ms"] for r in records if not r["name"].startswith("plait") and "ms" in r}
    shown = Table(
        "variant", *(f"x {name}" for name in rest), title=f"{args.tokens} tokens, {args.ranks} processes, f32, fwd+bwd"
    )
    for heading in ("ms", "low", "high", "exchanges", "KiB sent", "error"):
        shown.add_column(heading, justify="right")
    for r in records:
        times = [f"{r[k]:.1f}" for k in ("ms", "low", "high")] if "ms" in r else ["wrong", "", ""]
        ratios = [f"{ms / r['ms']:.2f}" if "ms" in r else "" for ms in rest.values()]
        name = r["name"] + (" ~" if r.get("others", 0) > DISTURBED else "")
        shown.add_row(name, *ratios, *times, str(r["exchanges"]), f"{r['bytes'] / 1024:.1f}", f"{r['error']:.0e}")
    return shown


if __name__ == "__main__":
    main()
