"""One rank of the matrix: mixed models placed every way, on real processes, against one process in the same precision.

`python -m tests.matrix_worker FOLDER WORLD [full]` starts WORLD processes of itself and prints what they found.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.ir import Graph, PlaitError, arranged, evaluate, natural, parameters, parse
from plait.passes import place
from plait.passes.samples import Sample, draw, is_borders
from plait.runtime import mesh as meshes
from plait.runtime import spmd
from plait.runtime.module import initial

from tests.ranks import run_ranks

Tensor = torch.Tensor
SPEC = {
    "name": "mixed", "vocab": 61, "hidden": 24, "blocks": ["gdn", "attention", "moe", "mamba2", "kda", "mlp"],
    "gdn": {"key_heads": 4, "value_heads": 8, "key_dim": 6, "value_dim": 5},
    "attention": {"heads": 8, "kv_heads": 4, "head_dim": 6, "rope": {}, "gate": True, "qk_norm": True, "sinks": True},
    "mamba2": {"heads": 8, "groups": 4, "state": 6, "head_dim": 4},
    "kda": {"heads": 4, "head_dim": 6},
    "moe": {"experts": 4, "top_k": 2, "width": 8, "aux_loss": 0.01, "shared_width": 8},
    "mlp": {"width": 20},
}  # fmt: skip
WAYS = [("heads", "heads"), ("kv", "states"), ("ring", "chain"), ("kv", "scan"), ("gather", "gather")]
EIGHTHS = parse("def f(x: f64[b, s@a@b@c, 3]):\n    return x\n")  # has tokens that every mesh here divides
ROWS = parse("def f(x: f64[b@a@c, s]):\n    return x\n")  # a batch that every mesh here divides
BOUND = 1e-5  # float32, relative to the largest number of each tensor


@dataclass(frozen=True)
class Case:
    """A mesh and the options of the pass."""

    mesh: str
    attention: str = "heads"
    recurrence: str = "heads"
    order: str = "natural"
    packed: bool = False

    def __str__(self) -> str:
        return f"{self.mesh} {self.attention} {self.recurrence} {self.order}{' packed' if self.packed else ''}"


def cases(world: int, full: bool) -> Iterator[Case]:
    """Every way, dense and packed, in both orders; tensor parallel alone and beside tokens; or a sample with each of them."""
    orders = [("natural", False), ("zigzag-packed", True), ("zigzag", False), ("natural", True)]
    for i, (attention, recurrence) in enumerate(WAYS):
        for j, (order, packed) in enumerate(orders):
            if full or i == j:
                yield Case(f"cp={world}", attention, recurrence, order, packed)
    yield Case(f"tp={world}", packed=True)
    if world == 4:
        for attention, recurrence in WAYS if full else WAYS[:1]:
            for packed in (False, True) if full else (False,):
                yield Case("cp=2,tp=2", attention, recurrence, packed=packed)
        yield Case("dp=2,cp=2", "ring", "chain", "zigzag")
        yield Case("cp=2,tp=2", "ring", "chain", "zigzag-packed", packed=True)
        yield Case("ring=2,cp=2", order="zigzag")
        yield Case("dp=2,ep=2")
    for axis in ("tp", "dp", "ep") if full else ():
        yield Case(f"{axis}={world}")


def before(case: Case) -> Graph:
    return build(load_spec(SPEC), task="loss", dtype="f32", packed=case.packed)


def expected(graph: Graph, sample: Sample) -> dict[str, Tensor]:
    """The loss and every gradient on one process."""
    leaves = {k: t.float().requires_grad_() if t.is_floating_point() else t for k, t in sample.tensors.items()}
    loss = evaluate(graph, *(leaves[v.name] for v in graph.inputs), params=leaves)
    wanted = {k: t for k, t in leaves.items() if t.requires_grad}
    return {"loss": loss.detach()} | dict(zip(wanted, torch.autograd.grad(loss, [*wanted.values()]), strict=True))


def worst(case: Case, here: meshes.Place) -> tuple[float, str]:
    """The largest relative difference of loss and gradients from one process, and what differs; rank 0 knows it."""
    graph = before(case)
    after, _ = place(graph, mesh=case.mesh, attention=case.attention, recurrence=case.recurrence, order=case.order)
    drawn = draw(graph, (after, EIGHTHS, *([] if case.packed else [ROWS])))
    # As a model starts out: numbers at which float32 itself is good for the bound.
    sample = replace(drawn, params={k: x.double() for k, x in initial(graph, 0).items()})
    cu = next((sample.inputs[v.name] for v in graph.inputs if is_borders(graph, v)), None)
    inputs = [arranged(sample.inputs[v.name], v.type, cu) for v in after.inputs]
    named = {k: sample.params[k].float() for k in parameters(after)}
    made = spmd.gradients(after, here, inputs, named, [torch.ones(())])
    types = {k: spmd.dual(t, here.mesh) for k, (t, _) in parameters(after).items()}
    names = [*made.params]
    done = [replace(types[k], partial=frozenset()) for k in names]
    whole = spmd.gathered([made.params[k] for k in names], done, here)
    if here.rank:
        return 0.0, ""
    want = expected(graph, sample)
    found = {"loss": made.results[0]} | {k: natural(x, t) for k, x, t in zip(names, whole, done, strict=True)}
    # A tensor far below the largest gradient is held to a thousandth of that one: it is rounding of larger numbers.
    largest = max(float(want[k].abs().max()) for k in names)
    return max((float((found[k] - x).abs().max() / max(float(x.abs().max()), 1e-3 * largest)), k) for k, x in want.items())


def rank(folder: Path, full: bool) -> None:
    """Run every case; rank 0 writes what it found."""
    torch.set_num_threads(1)
    world, found = int(os.environ["WORLD_SIZE"]), dict[str, tuple[float, str]]()
    for i, case in enumerate(cases(world, full)):
        here = meshes.init(case.mesh, device="cpu", store=f"file://{folder}/store{i}", timeout=60)
        try:
            found[str(case)] = worst(case, here)
        except PlaitError as error:
            found[str(case)] = float("inf"), f"{type(error).__name__}: {str(error)[:300]}"
        meshes.close()
        if here.rank == 0:
            print(f"{case}: {found[str(case)]}", flush=True)
            (folder / "found.json").write_text(json.dumps(found))


def start(folder: Path, world: int, *, full: bool = False) -> dict[str, tuple[float, str]]:
    """Start the ranks, wait for them, and give what they found."""
    told = ["tests.matrix_worker", str(folder), "rank", *(["full"] if full else [])]
    run_ranks(folder, *told, ranks=world, seconds=1200)
    return json.loads((folder / "found.json").read_text())


if __name__ == "__main__":
    where, what = Path(sys.argv[1]), sys.argv[2]
    if what == "rank":
        rank(where, "full" in sys.argv)
    else:
        print(json.dumps(start(where, int(what), full="full" in sys.argv), indent=1))
