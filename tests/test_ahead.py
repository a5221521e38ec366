"""Layers compiled ahead of their call: limits of sizes, what is kept and found again, and what is left to Dynamo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plait.ir import Graph, parse
from plait.lowering import lower
from plait.runtime import ahead
from plait.runtime.runner import CompiledLayer

LAYER = """
@layer
def mix(x: f32[b, s, 5], *, w: f32[5, 5] = normal(0.2)):
    n = rms_norm(x)
    l = linear(n, w)
    y = add(x, l)
    return y
"""
ENTRY = "def model(x: f32[b, s, 5]):\n    y = mix(x, params='layers.0')\n    return y\n"


def layer() -> CompiledLayer:
    program = lower(parse(ENTRY + LAYER), target="cpu")
    return CompiledLayer(program.layers["layer0"], program.graph.layers[0], program.fingerprint)


def operands(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(batch + length)
    return torch.randn(batch, length, 5, generator=rng, requires_grad=True), torch.randn(
        5, 5, generator=rng, requires_grad=True
    )


def agrees(of: CompiledLayer, *args: torch.Tensor) -> None:
    wanted = [a for a in args if a.requires_grad]
    got, ref = of(*args)[0], of.module(*args)[0]
    torch.testing.assert_close(got, ref, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(got.square().sum(), wanted)
    for a, b in zip(mine, torch.autograd.grad(ref.square().sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def versions(of: CompiledLayer) -> list[ahead.Code | None]:
    return [code for known in of.variants.values() for code in known]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def file(key: str) -> Path:
        return tmp_path / key

    monkeypatch.setattr(ahead, "_file", file)
    return tmp_path


def test_code_says_for_which_sizes_it_is() -> None:
    of = layer()
    for batch, length in ((2, 7), (3, 63), (2, 3000), (3, 65)):  # a sum over more than 4,096 rows is written otherwise
        agrees(of, *operands(batch, length))
    for code in versions(of):
        assert code is not None and (len(versions(of)) == 1 or code.limits)


def test_whether_an_activation_learns_is_no_reason_to_compile_again() -> None:
    of, (x, w) = layer(), operands(2, 9)
    agrees(of, x, w)
    agrees(of, x.detach(), w)
    assert len(versions(of)) == 1


def test_kept_code_is_found_and_a_broken_file_is_not_read(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agrees(layer(), *operands(2, 9))
    (kept,) = own_cache.iterdir()
    compiled = list[int]()
    once = ahead._compiled  # pyright: ignore[reportPrivateUsage] # counted
    monkeypatch.setattr(ahead, "_compiled", lambda *a: compiled.append(1) or once(*a))
    agrees(layer(), *operands(4, 5))
    assert not compiled
    kept.write_bytes(kept.read_bytes()[:-7])
    agrees(layer(), *operands(4, 5))
    assert compiled


def test_what_is_not_plain_is_left_to_dynamo() -> None:
    of, (x, w) = layer(), operands(2, 9)
    agrees(of, x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(), w)
    with torch.autocast("cpu", torch.bfloat16):
        of(x, w)
    assert not versions(of) and len(of.seen) == 2


def test_dims_that_disagree_have_no_variable() -> None:
    graph: Graph = parse("def f(x: f32[s, 5], y: f32[s, 5]):\n    z = add(x, y)\n    return z\n")
    assert ahead.bindings(graph, [torch.ones(3, 5), torch.ones(3, 5)]) == {"s": (0, 0)}
    assert ahead.bindings(graph, [torch.ones(3, 5), torch.ones(4, 5)]) is None
