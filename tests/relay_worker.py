"""One of four ranks of the crossings in test_ways_processes: runs every case and leaves its shards and bytes in files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from plait.ir import OpDef
from plait.ir.ops import BACKWARD, FAMILY, anticausal_conv1d, causal_conv1d, conv1d_taps
from plait.lowering.forms.crossing import watch
from plait.lowering.table import choose
from plait.runtime.mesh import close, init, launched
from safetensors.torch import save_file

from tests import test_ways_conv as convs
from tests import test_ways_recurrence as relays
from tests.laws import graph_of
from tests.ways import Crossing, Tensor, has_tokens, index, leaves, one, types, weights

TOKENS, WAIT = 136, 60.0
MESHES = {2: "dp=2,cp=2", 4: "cp=4"}
BORDERS = {"dense": None, "packed": [0, 20, 20, 35, 135, 136]}
Case = tuple[Crossing, list[Tensor | None]]


@cache
def drawn(op: OpDef, packing: str) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Operands in float32, and attributes."""
    cu = BORDERS[packing]
    if op in FAMILY:
        xs = relays.operands(op, TOKENS, b=1 if cu else 2, k=8, v=6, state=True, cu=cu)
        return _single(xs), {"scale": 0.7}
    xs, attrs = convs.operands(op, TOKENS, 4, b=1 if cu else 2, state=True, cu=cu)
    return _single(xs), attrs


@cache
def cotangents(op: OpDef, packing: str) -> list[Tensor]:
    xs, attrs = drawn(op, packing)
    return weights(one(op, xs, attrs))


def _single(xs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [x.float() if x is not None and x.is_floating_point() else x for x in xs]


OPS = [*FAMILY, causal_conv1d, anticausal_conv1d, conv1d_taps]


def cases(ranks: int) -> dict[str, Case]:
    """Every op by every way; dense and packed tokens, natural and zigzag order take turns, the other way round on two ranks."""
    made = dict[str, Case]()
    for i, op in enumerate(OPS):
        for j, by in enumerate(("chain", "states", "scan") if op in FAMILY else ("halo",)):
            packing = list(BORDERS)[(i + j + ranks // 4) % 2]
            order = f"zigzag({ranks})" if (i // 2 + j + ranks // 4) % 2 else ""
            xs, attrs = drawn(op, packing)
            made[f"{op.name} {by} {packing} {ranks}"] = Crossing(op, by, ranks, order, attrs), xs
    return made


def shard(case: Case, names: Sequence[str], xs: Sequence[Tensor | None], rank: int) -> list[Any]:
    """What a rank holds of some values, which have the names of operands or results."""
    c, (there, _) = case[0], index(*case)
    return [
        x[:, there].chunk(c.ranks, 1)[rank].contiguous() if x is not None and has_tokens(c.op, n) else x
        for n, x in zip(names, xs, strict=True)
    ]


def form(c: Crossing, op: OpDef, xs: Sequence[Tensor | None]) -> Any:
    """What runs the op on this process."""
    (node,) = graph_of(op, types(c, xs, op), c.all_attrs).nodes
    return choose(node, "cpu")[0]


def ran(case: Case, rank: int, packing: str) -> tuple[dict[str, Tensor], int]:
    """A rank's results and cotangents, by autograd and by the op for gradients; the bytes that the results took."""
    c, xs = case
    names = [o.name for o in c.op.inputs]
    own, total = leaves(shard(case, names, xs, rank)), list[int]()
    stop = watch(lambda axis, request, sent: total.append(sent))
    made = form(c, c.op, xs)(*own, **c.all_attrs)
    stop()
    ys = made if isinstance(made, tuple) else (made,)
    ds = cotangents(c.op, packing)
    own_ds = shard(case, [o.name for o in c.op.outputs], ds, rank)
    floats = [(n, x) for n, x in zip(names, own, strict=True) if x is not None and x.is_floating_point()]
    found = torch.autograd.grad(ys, [x for _, x in floats], own_ds, materialize_grads=True)
    numbers = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {f"d_{n}": d for (n, _), d in zip(floats, found, strict=True)}
    if c.op in BACKWARD:
        back, plain = BACKWARD[c.op], [x.detach() if x is not None else None for x in own]
        again = form(c, back, [*xs, *ds])(*plain, *own_ds, **c.all_attrs)
        numbers |= {f"b_{n}": d for (n, _), d in zip(floats, again, strict=True)}
    return {k: x.contiguous().clone() for k, x in numbers.items()}, sum(total)


def main(out: Path) -> None:
    numbers, moved, world = dict[str, Tensor](), dict[str, int](), launched().rank
    for ranks, mesh in MESHES.items():
        init(mesh, store=f"file://{out}/store{ranks}", timeout=WAIT)
        for name, case in cases(ranks).items():
            made, moved[name] = ran(case, world % ranks, name.split()[2])
            numbers |= {f"{name}/{k}": x for k, x in made.items()}
        close()
    save_file(numbers, out / f"rank{world}.safetensors")
    (out / f"rank{world}.json").write_text(json.dumps(moved))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
