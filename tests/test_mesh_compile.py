"""A placed model under torch.compile on two processes: the same numbers, the same traffic."""

import json
from pathlib import Path

import torch
from plait import api
from safetensors.torch import load_file

from tests.mesh_worker import Case, batch, fields
from tests.ranks import run_ranks


def test_a_placed_layer_compiles(tmp_path: Path) -> None:
    run_ranks(tmp_path, "tests.mesh_worker", "compiled", str(tmp_path), seconds=400)
    case = Case("*")
    one = api.compile(fields(case), dtype="f32", seed=5, jit=False)
    loss = one.loss(batch(case)[0])
    loss.backward()
    for rank in (0, 1):
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        torch.testing.assert_close(found["compiled/loss"], loss.detach())
        for name, p in one.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(found[f"compiled/d {name}"], p.grad, rtol=1e-4, atol=1e-7)
        assert torch.equal(found["compiled/moved"], found["eager/moved"]) and found["eager/moved"].min() > 8
    kind, text = json.loads((tmp_path / "lost.json").read_text())
    assert kind == "MeshError" and "all_to_all over cp at self_attention did not end on rank 0 of cp" in text
