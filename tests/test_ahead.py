"""Layers compiled ahead of their call: limits of sizes, what is kept and found again, and what is left to Dynamo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plait.ir import Graph, evaluate, parse
from plait.lowering import cpp_ops, lower
from plait.lowering.reshape import view_steps
from plait.runtime import ahead
from plait.runtime.runner import CompiledLayer

LAYER = """
@layer
def mix(x: f32[b, s, 5], *, w: f32[5, 5] = normal(0.2), g: f32[5] = constant(1)):
    n = rms_norm(x, g)
    l = linear(n, w)
    y = add(x, l)
    return y
"""
ENTRY = "def model(x: f32[b, s, 5]):\n    y = mix(x, params='layers.0')\n    return y\n"


def layer() -> CompiledLayer:
    program = lower(parse(ENTRY + LAYER), target="cpu")
    return CompiledLayer(program.layers["layer0"], program.graph.layers[0], program.fingerprint)


def operands(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(batch + length)
    x, w = torch.randn(batch, length, 5, generator=rng), torch.randn(5, 5, generator=rng)
    return x.requires_grad_(), w.requires_grad_(), torch.ones(5, requires_grad=True)


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
    short, long = versions(of)
    assert short is not None and short.limits and long is not None and long.limits
    assert short.serves(operands(3, 63)) and not short.serves(operands(2, 3000)) and not long.serves(operands(3, 63))


def test_whether_an_activation_learns_is_no_reason_to_compile_again() -> None:
    of, (x, w, g) = layer(), operands(2, 9)
    agrees(of, x, w, g)
    agrees(of, x.detach(), w, g)
    assert len(versions(of)) == 1


def test_kept_code_is_found_and_a_broken_file_is_not_read(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agrees(layer(), *operands(2, 9))
    (kept,) = own_cache.iterdir()
    compiled = list[int]()
    once = ahead._compiled  # pyright: ignore[reportPrivateUsage] # counted

    def counted(*given: Any) -> Any:
        compiled.append(1)
        return once(*given)

    monkeypatch.setattr(ahead, "_compiled", counted)
    agrees(layer(), *operands(4, 5))
    assert not compiled
    kept.write_bytes(kept.read_bytes()[:-7])
    agrees(layer(), *operands(4, 5))
    assert compiled


def test_what_is_not_plain_is_left_to_dynamo() -> None:
    of, (x, w, g) = layer(), operands(2, 9)
    agrees(of, x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(), w, g)
    with torch.autocast("cpu", torch.bfloat16):
        of(x, w, g)
    assert not versions(of) and len(of.seen) == 2


def test_dims_that_disagree_have_no_variable() -> None:
    graph: Graph = parse("def f(x: f32[s, 5], y: f32[s, 5]):\n    z = add(x, y)\n    return z\n")
    assert ahead.bindings(graph, [torch.ones(3, 5), torch.ones(3, 5)]) == {"s": (0, 0)}
    assert ahead.bindings(graph, [torch.ones(3, 5), torch.ones(4, 5)]) is None


FUSED = """
@layer
def mix(x: f32[b, s, 5], *, w: f32[5, 5] = normal(0.2), g: f32[5] = constant(1)):
    n = prenorm(x, g)
    y = linear(n, w)
    return y

@kernel
def prenorm(x: f32[b, s, 5], g: f32[5]):
    a = add(x, x)
    n = rms_norm(a, g)
    return n
"""


def test_another_way_to_run_a_kernel_is_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's own text is the same; what stands behind its kernel is not."""
    made = list[Any]()
    for found in ("g++", None):
        monkeypatch.setattr(cpp_ops, "compiler", lambda found=found: found)
        made.append(lower(parse(ENTRY + FUSED), target="cpu").layers["layer0"])
    assert made[0].code == made[1].code
    assert ahead._texts(made[0]) != ahead._texts(made[1])  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("pattern", ["(h=4 d) r -> h r d", "(h=2 d) r -> d (h r) u=1"])
def test_views_are_the_same_as_methods_and_as_functions(pattern: str) -> None:
    """A layer compiled ahead calls torch's functions where its graph names methods."""
    graph = parse(f"def f(x: f32[12, 5]):\n    y = reshape(x, pattern='{pattern}')\n    return y\n")
    x = y = z = torch.randn(12, 5)
    for name, args in view_steps(graph.nodes[0]):
        y, z = getattr(y, name)(*args), getattr(torch, name)(z, *args)
    assert torch.equal(y, evaluate(graph, x)) and torch.equal(z, y)
