"""Compiled models on two processes: what one process computes, in one form or another, and ranks that do not fit together."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plait import api
from plait.ir import PlaitError
from plait.runtime import read_metadata
from plait.runtime.mesh import MeshError, here
from safetensors.torch import load_file

from tests.mesh_worker import CASES, Case, batch, compiled, handmade, measured
from tests.ranks import run_ranks

Tensor = torch.Tensor
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left; they run everything once."""
    folder = tmp_path_factory.mktemp("mesh")
    handmade("").save_sharded(folder / "one")
    run_ranks(folder, "tests.mesh_worker", "models", str(folder))
    return folder


@pytest.fixture(scope="module")
def numbers(out: Path) -> list[dict[str, Tensor]]:
    return [load_file(out / f"rank{r}.safetensors") for r in range(2)]


def under(found: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): x for k, x in found.items() if k.startswith(prefix)}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal to what one process has in float64, as closely as the dtype allows."""
    assert found.keys() == wanted.keys() and len(found) > 3
    for k, x in found.items():
        assert wanted[k].abs().sum() > 0
        limits = CLOSE if x.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(x.double(), wanted[k], msg=lambda text, k=k: f"{k}: {text}", **limits)


# -- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(name: str, numbers: list[dict[str, Tensor]]) -> None:
    wanted = measured(compiled(CASES[name]), CASES[name])
    for rank in numbers:
        same(under(rank, f"{name}/whole/"), wanted)


@pytest.mark.parametrize("name", CASES)
def test_a_rank_may_bring_its_part_of_the_batch(name: str, numbers: list[dict[str, Tensor]]) -> None:
    wanted = measured(compiled(CASES[name]), CASES[name])
    del wanted["logits"]
    for rank in numbers:
        same(under(rank, f"{name}/part/"), wanted)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_data_parallel_by_torch(wrapper: str, numbers: list[dict[str, Tensor]]) -> None:
    model, (tokens, _) = compiled(Case("M*")), batch(Case("M*"))
    model.loss(tokens, torch.roll(tokens, -1, 1)).backward()
    wanted = {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    for rank in numbers:
        same(under(rank, f"{wrapper}/whole/"), wanted)


# -- parameters in parts ----------------------------------------------------------------------


def test_parameters_in_sections_and_their_gradients(numbers: list[dict[str, Tensor]]) -> None:
    """Rank r holds rows r of every section, and the gradient of what it holds."""
    model = handmade("")
    loss = model.loss(batch(Case("M"))[0])
    loss.backward()
    rows = [
        torch.tensor([*range(4 * r, 4 * r + 4), *range(8 + 2 * r, 10 + 2 * r), *range(12 + 6 * r, 18 + 6 * r)]) for r in (0, 1)
    ]
    for rank, index in zip(numbers, rows, strict=True):
        found = under(rank, "split/")
        torch.testing.assert_close(found["loss"], loss.detach(), **CLOSE)
        for name, dim in {"w_in": 0, "w_out": 1}.items():
            p = model.get_parameter(name)
            assert p.grad is not None
            assert torch.equal(found[name], p.detach().index_select(dim, index))
            torch.testing.assert_close(found[f"d {name}"], p.grad.index_select(dim, index), **CLOSE)
        norm = model.get_parameter("norm").grad
        assert norm is not None
        torch.testing.assert_close(found["d norm"], norm, **CLOSE)


def test_files_of_a_mesh_are_read_in_one_process(out: Path) -> None:
    wanted = handmade("")
    for read in (lambda m: m.load_sharded(out / "shards"), lambda m: m.load(out / "mesh.safetensors")):
        model = handmade("")
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        read(model)
        assert all(torch.equal(p, wanted.get_parameter(n)) for n, p in model.named_parameters())


def test_a_file_of_one_process_is_that_of_the_mesh(out: Path, tmp_path: Path) -> None:
    handmade("").save(tmp_path / "one.safetensors")
    one, mesh = (load_file(p) for p in (tmp_path / "one.safetensors", out / "mesh.safetensors"))
    assert one.keys() == mesh.keys() and all(torch.equal(one[k], mesh[k]) for k in one)
    assert read_metadata(tmp_path / "one.safetensors") == read_metadata(out / "mesh.safetensors")


def _last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _block(**changes: object) -> Callable[[bytes], bytes]:
    """A manifest whose first block of w_in says something else."""

    def edit(data: bytes) -> bytes:
        manifest = json.loads(data)
        manifest["tensors"]["w_in"]["blocks"][0] |= changes
        return json.dumps(manifest).encode()

    return edit


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes] | None, str]] = {
    "no manifest": ("manifest.json", None, "the folder is no sharded checkpoint, or a part of one"),
    "half a manifest": ("manifest.json", _half, "cannot be read"),
    "a path": ("manifest.json", _block(file="../rank-00000.safetensors"), "its tensors do not read; it is damaged"),
    "outside": ("manifest.json", _block(offsets=[23, 0]), "its tensors do not read; it is damaged"),
    "a negative offset": ("manifest.json", _block(offsets=[-4, 0]), "its tensors do not read; it is damaged"),
    "a hole": ("manifest.json", _block(sizes=[3, 8]), "the blocks of w_in do not make up the whole; save again"),
    "another file": ("manifest.json", _block(file="rank-00001.safetensors"), "is not what manifest.json says"),
    "a lost part": ("rank-00001.safetensors", None, "No such file"),
    "a flipped bit": ("rank-00001.safetensors", _last_bit, "is damaged, its digest is not the one in manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_shards_are_refused(what: str, out: Path, tmp_path: Path) -> None:
    name, edit, said = DAMAGE[what]
    for part in (out / "shards").iterdir():
        data = part.read_bytes()
        if part.name != name or edit is not None:
            (tmp_path / part.name).write_bytes(edit(data) if edit and part.name == name else data)
    with pytest.raises(PlaitError, match=re.escape(said)):
        handmade("").load_sharded(tmp_path)


def test_a_part_that_was_interrupted_is_no_checkpoint(tmp_path: Path) -> None:
    """What stands beside is never taken for whole, and makes room for the next save."""
    model, folder = handmade(""), tmp_path / "shards"
    (tmp_path / "shards.part").mkdir()
    (tmp_path / "shards.part" / "rank-00007.safetensors").write_bytes(b"half")
    with pytest.raises(PlaitError, match="no sharded checkpoint"):
        model.load_sharded(folder)
    model.save_sharded(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    with pytest.raises(PlaitError, match="exists already"):
        model.save_sharded(folder)


# -- ranks that do not fit together -----------------------------------------------------------

SAYS = {
    "cu": "the batch's checksum is",
    "cu and tokens": "it must rise from 0 to the length, with a batch of one",
    "odd length": "tokens: 19 places of s@cp do not divide over cp=2; pad it to a multiple of 2",
    "one rank's length": "tokens is torch.int64[2, 20] on rank 0, torch.int64[2, 18] on rank 1",
    "one rank's token": "rank 1: tokens holds the token",
    "one rank's labels": "rank 1: labels is torch.int64[2, 19], must be int64 as tokens are, [2, 20]",
    "other tokens": "the ranks do not run one program: the batch's checksum is",
    "parts without labels": "shard_batch makes its labels",
    "specs": "the ranks do not run one program: spec is text of",
    "seeds": "seed is 0 on rank 0, 1 on rank 1",
    "axis": "axis cp=4 is none of the mesh that this process has joined, cp=2; join one that has it",
    "remedy": "option attention cannot be 'nothing'",
    "generation": "generation runs in one process",
    "one rank's folder": "cannot be written: Is a directory",
    "no shards": "the folder is no sharded checkpoint",
    "still fine": "",
}


@pytest.mark.parametrize("what", SAYS)
def test_every_rank_says_what_does_not_fit(what: str, out: Path) -> None:
    (kind, text), other = (json.loads((out / f"rank{r}.json").read_text())[what] for r in (0, 1))
    assert other == [kind, text] and SAYS[what] in text
    assert kind == ("nothing" if what == "still fine" else "PlaitError" if what == "generation" else "MeshError")


def test_a_rank_that_is_late_is_missed_where_it_was(out: Path) -> None:
    kind, text, seconds = json.loads((out / "lost.json").read_text())
    assert kind == "MeshError" and "all_to_all over cp at mamba2 did not end on rank 0 of cp" in text
    assert 4 < seconds < 7


def test_a_model_needs_a_mesh_that_was_joined() -> None:
    with pytest.raises(MeshError, match=r"this process has joined no mesh; call plait.init\('cp=2'\) first"):
        here()
    with pytest.raises(PlaitError, match="no mesh is given"):
        api.compile("demo", place="attention=heads")


def test_the_part_of_one_process_is_all(numbers: list[dict[str, Tensor]]) -> None:
    case, tokens = CASES["heads"], batch(CASES["heads"])[0]
    model = compiled(case)
    loss = model.loss(*api.shard_batch(model, tokens), local=True)
    torch.testing.assert_close(loss.detach(), numbers[0]["heads/part/loss"], **CLOSE)
