"""`plait calibrate`: this host's own numbers, as a machine description for `plait explain`."""

from __future__ import annotations

import socket
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from plait.cli_output import Table, fail_cleanly, note, problem, show, write_json

if TYPE_CHECKING:
    import torch

LEAST = 1e-12  # seconds or seconds a byte, where a fit would say none


class Sample(NamedTuple):
    """One exchange that was timed: messages one after the other, bytes that a rank sent, seconds."""

    messages: int
    sent: int
    seconds: float


@dataclass(frozen=True)
class Links:
    """What the ranks' exchanges came to."""

    kind: str  # node or network
    rank: int  # of this process
    ranks: int
    devices: int  # ranks of one host
    latency: float
    bandwidth: float


def mount(app: typer.Typer) -> None:
    """Add `calibrate`."""
    app.command("calibrate")(calibrate)


@fail_cleanly
def calibrate(
    machine_out: Annotated[Path, typer.Option(metavar="FILE", help="The .toml file to write, whole or not at all.")],
    machine: Annotated[str, typer.Option(help="The machine whose numbers stand for what is not measured.")] = "laptop",
    name: Annotated[str, typer.Option(help="What to call it; the file's name when absent.")] = "",
    seconds: Annotated[float, typer.Option(min=0.001, max=60, help="To spend on each measurement.")] = 0.2,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Measure this host and write a machine description: arithmetic, memory, and under torchrun the links between ranks."""
    import torch
    import torch.distributed as dist
    from plait.ir.files import write_text
    from plait.passes.machine import dump_machine, load_machine, parse_machine

    if machine_out.suffix.lower() != ".toml":
        raise problem(f"--machine-out is {str(machine_out)!r}; must be a .toml file")
    title = name or machine_out.stem
    if not title.isprintable() or len(title) > 100:
        raise problem(f"--name is {title[:60]!r}; must be at most 100 printable characters")
    base = load_machine(machine)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    links = measure_links(device, seconds) if dist.is_torchelastic_launched() else None
    if links is not None and links.rank:
        return  # the first rank writes
    found = {**measure_arithmetic(device, seconds), **measure_memory(device, seconds), **_link_numbers(links)}
    made = replace(base, name=title, about=_about(base.name, links), numbers={**base.numbers, **found})
    write_text(machine_out, dump_machine(parse_machine(dump_machine(made), "what was measured")))
    _tell(found, base.numbers, machine_out, as_json, links is None)


def _about(base: str, links: Links | None) -> str:
    between = f"links of {links.ranks} ranks measured" if links else f"links as of {base}"
    return f"Measured by plait calibrate; {between}; efficiency of attention and recurrences as of {base}"


def _link_numbers(links: Links | None) -> dict[str, float]:
    if links is None:
        return {}
    where = f"links.{links.kind}"
    measured = {f"{where}.latency": links.latency, f"{where}.bandwidth": links.bandwidth, "efficiency.link": 1.0}
    return {"devices": float(links.devices), **measured}


def _tell(found: Mapping[str, float], base: Mapping[str, float], out: Path, as_json: bool, alone: bool) -> None:
    """What was measured beside what it replaces."""
    if alone:
        note("plait: note: links are the base machine's; start under torchrun to measure them")
    if as_json:
        return write_json({"file": str(out), "measured": dict(found)})
    show([Table(("field", "measured", "base"), [(k, f"{v:.4g}", f"{base[k]:.4g}") for k, v in found.items()], f"wrote {out}")])


# -- one device -------------------------------------------------------------------------------


def timed(step: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest run, of those that fit into the time."""
    import torch

    best, end = float("inf"), time.perf_counter() + seconds
    step()  # what is slow the first time
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def measure_arithmetic(device: torch.device, seconds: float) -> dict[str, float]:
    """Operations a second of a square matrix product, by dtype."""
    import torch
    from plait.ir import DTYPES
    from plait.passes.machine import DTYPES as KINDS

    size, found = (8192 if device.type == "cuda" else 512), dict[str, float]()
    for kind in KINDS:
        x = torch.ones(size, size, dtype=DTYPES[kind], device=device)
        found[f"flops.{kind}"] = 2.0 * size**3 / timed(lambda x=x: x @ x, device, seconds)
    return found


def measure_memory(device: torch.device, seconds: float) -> dict[str, float]:
    """Bytes a second of a copy, read and written, of more than any cache holds."""
    import torch

    size = 2**30 if device.type == "cuda" else 2**27
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    rate = 2.0 * size / timed(lambda: y.copy_(x), device, seconds)
    return {"memory.bandwidth": rate, "efficiency.memory": 1.0}


# -- between ranks ----------------------------------------------------------------------------


def measure_links(device: torch.device, seconds: float) -> Links:
    """Latency and bandwidth of what connects the ranks that torchrun started."""
    from plait.runtime.mesh import close, init, launched

    world = launched().world
    if world < 2:
        raise problem("one process was started, which has no links; start two or more, or leave torchrun out")
    place = init(f"x={world}", device=device.type)
    try:
        samples = [_exchange(kind, 2**power, device, seconds) for power in (8, 12, 16, 20, 22) for kind in EXCHANGES]
        hosts = _hosts(place.device)
    finally:
        close()
    latency, bandwidth = fit(samples)
    alone = hosts.count(hosts[0]) == world
    return Links("node" if alone else "network", place.rank, world, hosts.count(hosts[0]), latency, bandwidth)


def _hosts(device: torch.device) -> list[int]:
    """A number for every rank's host."""
    import torch
    import torch.distributed as dist

    own = torch.tensor([zlib.crc32(socket.gethostname().encode())], device=device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return [int(x) for x in found]


def _swap(x: torch.Tensor, ranks: int) -> Sample:
    import torch
    import torch.distributed as dist

    dist.all_to_all_single(torch.empty_like(x), x)
    return Sample(1, x.numel() * (ranks - 1) // ranks, 0)


def _collect(x: torch.Tensor, ranks: int) -> Sample:
    import torch
    import torch.distributed as dist

    dist.all_gather([torch.empty_like(x) for _ in range(ranks)], x)
    return Sample(ranks - 1, x.numel() * (ranks - 1), 0)


def _pass(x: torch.Tensor, ranks: int) -> Sample:
    import torch
    import torch.distributed as dist

    own = dist.get_rank()
    to, of = (own + 1) % ranks, (own - 1) % ranks
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, to), dist.P2POp(dist.irecv, torch.empty_like(x), of)]):
        work.wait()
    return Sample(1, x.numel(), 0)


EXCHANGES: tuple[Callable[[torch.Tensor, int], Sample], ...] = (_swap, _collect, _pass)


def _exchange(kind: Callable[[torch.Tensor, int], Sample], size: int, device: torch.device, seconds: float) -> Sample:
    """An exchange of about `size` bytes, as the slowest rank saw it; all ranks run it equally often."""
    import torch
    import torch.distributed as dist

    ranks = dist.get_world_size()
    x = torch.zeros(-(-size // ranks) * ranks, dtype=torch.uint8, device=device)
    shape = kind(x, ranks)
    once = _slowest(timed(lambda: kind(x, ranks), device, 0.0), device)
    times = max(3, min(1000, int(seconds / len(EXCHANGES) / once)))
    best = min(timed(lambda: kind(x, ranks), device, 0.0) for _ in range(times))
    return shape._replace(seconds=_slowest(best, device))


def _slowest(seconds: float, device: torch.device) -> float:
    import torch
    import torch.distributed as dist

    found = torch.tensor([seconds], dtype=torch.float32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def fit(samples: list[Sample]) -> tuple[float, float]:
    """Latency and bandwidth that explain the samples with the least relative error, squared."""
    import numpy as np

    rows = np.array([[s.messages / s.seconds, s.sent / s.seconds] for s in samples])
    latency, a_byte = (max(float(x), LEAST) for x in np.linalg.lstsq(rows, np.ones(len(samples)), rcond=None)[0])
    return latency, 1.0 / a_byte
