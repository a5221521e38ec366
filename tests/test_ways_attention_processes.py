"""Attention over split tokens on four gloo processes, by references, by forms and by gradients as text, against one process."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from plait.ir import Node, evaluate, parse
from plait.ir.ops import attention
from safetensors.torch import load_file

from tests.attention_cases import Tensor
from tests.attention_worker import CASES, drawn
from tests.ranks import run_ranks

ROOT, RANKS = Path(__file__).parent.parent, 4


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes left; they run every case once."""
    folder = tmp_path_factory.mktemp("attention")
    run_ranks(folder, "tests.attention_worker", str(folder), ranks=RANKS, seconds=240)
    return folder


@pytest.fixture(scope="module")
def numbers(out: Path) -> list[dict[str, Tensor]]:
    return [load_file(out / f"rank{r}.safetensors") for r in range(RANKS)]


@cache
def expected(name: str) -> dict[str, Tensor]:
    """Results and gradients of the program of one device."""
    inputs, d_y = drawn(CASES[name])
    leaves = [x.requires_grad_(x.is_floating_point()) for x in inputs]
    y = evaluate(parse(CASES[name].whole), *leaves)
    floats = {f"d{i}": x for i, x in enumerate(leaves) if x.requires_grad}
    return {"y": y.detach(), **dict(zip(floats, torch.autograd.grad(y, [*floats.values()], d_y), strict=True))}


@pytest.mark.parametrize("how", ["by_autograd", "by_forms", "by_text"])
@pytest.mark.parametrize("name", CASES)
def test_four_processes_compute_what_one_does(name: str, how: str, numbers: list[dict[str, Tensor]]) -> None:
    one = expected(name)
    for rank in numbers:
        found = {k.rpartition("/")[2]: x for k, x in rank.items() if k.startswith(f"{name}/{how}/")}
        assert found.keys() == one.keys()
        for k, x in found.items():
            torch.testing.assert_close(x, one[k], rtol=1e-10, atol=1e-10)


def crossing(name: str) -> Node:
    return next(n for n in CASES[name].graph.nodes if n.op is attention)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if "a=" not in c.mesh])
def test_processes_send_what_the_way_says(name: str, out: Path) -> None:
    """Keys and values forward, their cotangents back (a ring sends both again); a gradient as text goes forward first."""
    node, case = crossing(name), CASES[name]
    assert attention.crossing is not None
    types = [v.type if v is not None else None for v in node.inputs]
    sizes = {"b": case.given.batch, "s": case.given.tokens}
    way = attention.crossing.ways[node.attrs["by"]]
    says, back = (f(types, node.attrs, case.given.ranks, sizes) for f in (way.sent, way.sent_back))
    assert back == says if node.attrs["by"] == "kv" else back > 2 * says
    for rank in range(RANKS):
        assert json.loads((out / f"rank{rank}.json").read_text())[name] == [says, says + back, 2 * says + back]
