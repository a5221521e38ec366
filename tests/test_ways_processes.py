"""Recurrences and convolutions over split tokens on four gloo processes, by the forms there are, against float64 on one."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from plait.ir import OpDef
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.relay_worker import OPS, cases, drawn
from tests.ways import Tensor, gradients, has_tokens, index, leaves, one, predicted

RANKS = 4


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes left."""
    folder = tmp_path_factory.mktemp("ways")
    run_ranks(folder, "tests.relay_worker", str(folder), ranks=RANKS, seconds=240)
    return folder


@pytest.fixture(scope="module")
def numbers(out: Path) -> list[dict[str, Tensor]]:
    return [load_file(out / f"rank{r}.safetensors") for r in range(RANKS)]


@cache
def expected(op: OpDef, packing: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients of one process in float64."""
    xs, attrs = drawn(op, packing)
    given = leaves([x.double() if x is not None and x.is_floating_point() else x for x in xs])
    ys = one(op, given, attrs)
    names = [o.name for o, x in zip(op.inputs, xs, strict=True) if x is not None and x.is_floating_point()]
    return {f"y{i}": y.detach() for i, y in enumerate(ys)}, dict(zip(names, gradients(ys, given), strict=True))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name)
def test_processes_compute_what_one_does(op: OpDef, ranks: int, numbers: list[dict[str, Tensor]]) -> None:
    for name, (c, xs) in cases(ranks).items():
        if c.op is not op:
            continue
        back = index(c, xs)[1]
        ys, ds = expected(op, name.split()[2])
        wanted = ys | {f"d_{n}": d for n, d in ds.items()} | ({f"b_{n}": d for n, d in ds.items()} if c.by != "halo" else {})
        for k, want in wanted.items():
            parts = [numbers[r][f"{name}/{k}"] for r in range(ranks)]
            split = has_tokens(op, op.outputs[int(k[1:])].name if k[0] == "y" else k[2:])
            got = torch.cat(parts, 1)[:, back] if split else torch.stack(parts).sum(0)
            wrong = float((got.double() - want).norm() / want.norm().clamp_min(1e-6))
            assert wrong <= 1e-5, f"{name} {k} is off by {wrong:.1e}"


def test_bytes_are_as_predicted(out: Path) -> None:
    moved = [json.loads((out / f"rank{r}.json").read_text()) for r in range(RANKS)]
    for ranks in (2, 4):
        for name, (c, xs) in cases(ranks).items():
            assert max(m[name] for m in moved[:ranks]) == predicted(c, xs), name
