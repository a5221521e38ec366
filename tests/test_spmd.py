"""Placed programs on two processes: numbers against one process, and ranks that do not fit together."""

import json
from pathlib import Path

import pytest
import torch
from plait.ir import OPS, Mesh, PlaitError, evaluate, mesh_text, parse_mesh, parse_type, simulate
from plait.ir.ops import COLLECTIVES
from plait.lowering.forms.collectives import COLLECTIVE_FORMS, axis_group, reorder
from plait.runtime.mesh import MeshError, launched
from plait.runtime.spmd import dual
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.spmd_worker import CASES, Case, tensors

Tensor = torch.Tensor
ROOT = Path(__file__).parent.parent
RANKS = 2


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left; they run every case once."""
    folder = tmp_path_factory.mktemp("spmd")
    run_ranks(folder, "tests.spmd_worker", str(folder), ranks=RANKS, seconds=120)
    return folder


@pytest.fixture(scope="module")
def numbers(out: Path) -> list[dict[str, Tensor]]:
    return [load_file(out / f"rank{r}.safetensors") for r in range(RANKS)]


@pytest.fixture(scope="module")
def reports(out: Path) -> list[dict[str, dict[str, list[str]]]]:
    return [json.loads((out / f"rank{r}.json").read_text()) for r in range(RANKS)]


# -- numbers ----------------------------------------------------------------------------------


def expected(case: Case, mesh: Mesh | None) -> dict[str, Tensor]:
    """Results and gradients in one process: of the whole program, or of every rank of a pretend mesh."""
    inputs, params, cotangents = tensors(case)
    leaves = [x.requires_grad_(x.is_floating_point()) for x in inputs]
    named = {k: x.requires_grad_() for k, x in params.items()}
    made = simulate(case.graph, mesh, *leaves, params=named) if mesh else evaluate(case.graph, *leaves, params=named)
    results = made if isinstance(made, tuple) else (made,)
    wanted = {f"d{i}": x for i, x in enumerate(leaves) if x.requires_grad} | {f"d_{k}": x for k, x in named.items()}
    found = torch.autograd.grad(results, [*wanted.values()], cotangents, materialize_grads=True)
    return {f"y{i}": y.detach() for i, y in enumerate(results)} | dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("way", ["by_autograd", "by_text"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(name: str, way: str, numbers: list[dict[str, Tensor]]) -> None:
    one, pretend = expected(CASES[name], None), expected(CASES[name], parse_mesh(CASES[name].mesh))
    for rank in numbers:
        found = {k.rpartition("/")[2]: x for k, x in rank.items() if k.startswith(f"{name}/{way}/")}
        assert found.keys() == one.keys() == pretend.keys() and len(found) >= 2
        for k, x in found.items():
            assert one[k].abs().sum() > 0
            torch.testing.assert_close(x, one[k], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(x, pretend[k], rtol=1e-10, atol=1e-10)


def test_forms_are_the_same_under_compile(numbers: list[dict[str, Tensor]]) -> None:
    for rank in numbers:
        eager = {k: x for k, x in rank.items() if k.startswith("forms/eager")}
        assert len(eager) == 4
        for k, x in eager.items():
            assert x.abs().sum() > 0
            torch.testing.assert_close(rank[k.replace("eager", "compiled")], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [60, 120])
@pytest.mark.parametrize("order", ["", "zigzag(1)", "zigzag(2)", "zigzag(3)", "zigzag(5)"])
@pytest.mark.parametrize("was", ["", "zigzag(2)", "zigzag(5)"])
def test_reorder_moves_every_token_like_the_op(length: int, order: str, was: str) -> None:
    x = torch.arange(3.0 * length).reshape(3, length)
    for dim, given in ((1, x), (0, x.t())):
        y = reorder(given, dim=dim, order=order, was=was)
        assert torch.equal(y, OPS["reorder"].reference(given, dim=dim, order=order, was=was))


def test_every_collective_has_a_form() -> None:
    assert {c.name for c in COLLECTIVES} | {"reorder"} == COLLECTIVE_FORMS.keys()


def test_a_cotangent_is_whole_where_its_value_is_partial_and_partial_where_it_is_whole() -> None:
    mesh = parse_mesh("cp=2,tp=4,ep=2")
    assert str(dual(parse_type("f64[b, s@cp, 8]+tp"), mesh)) == "f64[b, s@cp, 8]+ep"
    assert dual(dual(parse_type("f64[b, s@cp, 8]+tp"), mesh), mesh) == parse_type("f64[b, s@cp, 8]+tp")


# -- ranks that do not fit together -----------------------------------------------------------

SAYS = {
    "joining/world": ("MeshError", "mesh cp=3 has 3 ranks, but 2 processes were started; start 3, or give a mesh of 2"),
    "joining/axes": ("MeshError", "mesh is cp=2 on rank 0, tp=2 on rank 1"),
    "joining/shape": ("MeshError", "mesh is cp=2,tp=1 on rank 0, cp=1,tp=2 on rank 1"),
    "joining/alone": ("MeshError", "another rank stopped or never came"),
    "running/program": ("MeshError", "the ranks do not run one program: program is text of 359 characters with sha256"),
    "running/length": ("MeshError", "inputs is float64[3, 100, 6] on rank 0, float64[3, 60, 6] on rank 1"),
    "running/dtype": ("MeshError", "inputs is float64[3, 100, 6] on rank 0, float32[3, 100, 6] on rank 1"),
    "running/missing": ("MeshError", "rank 1: f: parameters m are missing"),
    "running/misfit": ("MeshError", "rank 0: w is float64[7], must be f64[6], whole; rank 1: w is float64[7], must be f64[6]"),
    "running/drawn apart": ("MeshError", "the ranks do not run one program: parameter checksum is"),
    "running/uneven": ("MeshError", "25 long, which cp=2 ranks do not divide"),
    "running/no axis": ("MeshError", "the mesh has no axis called tp; it has cp"),
    "running/odd zigzag": ("TypeMismatch", "zigzag(2): 101 tokens do not divide into 4 chunks"),
    "running/still fine": ("nothing", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", SAYS)
def test_every_rank_says_what_does_not_fit(name: str, reports: list[dict[str, dict[str, list[str]]]]) -> None:
    where, _, what = name.partition("/")
    texts = [report[where][what] for report in reports]
    for kind, text in texts:
        assert kind == SAYS[name][0] and SAYS[name][1] in text
    if name != "joining/alone":
        assert texts[0] == texts[1]


def test_a_rank_that_left_is_missed(reports: list[dict[str, dict[str, list[str]]]]) -> None:
    kind, text = reports[0]["left"][""]
    assert kind == "MeshError" and "rank 0 could not hear from all ranks" in text


def test_a_mesh_is_read_and_written() -> None:
    assert parse_mesh("cp=2, tp=4") == Mesh((("cp", 2), ("tp", 4))) and parse_mesh("") == Mesh(())
    assert mesh_text(parse_mesh("cp=2,tp=4")) == "cp=2,tp=4"


@pytest.mark.parametrize(
    "text", ["cp", "cp=0", "cp=-1", "cp=x", "=2", "2", "cp=2,cp=2", "cp=2;tp=2", "class=2", "a b=2=3", "é=2"]
)
def test_a_mesh_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(PlaitError, match="mesh"):
        parse_mesh(text)


def test_a_process_that_nothing_launched_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MeshError, match="RANK is '', must be a number; start with `torchrun"):
        launched()


def test_a_collective_without_a_mesh_says_so() -> None:
    with pytest.raises(PlaitError, match="mesh axis cp; this process has axes: none, as no mesh is in use"):
        axis_group("cp")
