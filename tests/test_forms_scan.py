"""Forms of the selective scan and the gated unit: what their references compute token by token, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plait.frontends import build, load_spec
from plait.ir import OPS, TypeMismatch
from plait.ir.errors import DataError
from plait.lowering import forms
from plait.lowering.cpp import lru, sources
from plait.lowering.cpp import scan as generated
from plait.lowering.forms import scan as scans
from plait.lowering.forms import selective
from plait.lowering.forms.scan import scan

Tensor = torch.Tensor
Operands = list[Tensor | None]
BORDERS = (None, [0, 1, 1, 40, 63], [0, 63], [0, 0, 63, 63])


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operands(
    name: str, tokens: int, *, cu: list[int] | None = None, state: bool = True, width: int = 7, numbers: int = 5
) -> Operands:
    """Float64 operands; decays from nearly all to nearly none."""
    b, runs = (2, 2) if cu is None else (1, len(cu) - 1)
    packed = None if cu is None else torch.tensor(cu)
    x = randn(1, b, tokens, width)
    if name == "rg_lru":
        begun = randn(3, runs, width) if state else None
        at = 3 if state and cu is None else 0  # goes on in the middle of a sequence
        places = OPS["positions"](torch.zeros(b, tokens).long(), torch.tensor(at), packed)
        return [x, -8 * torch.sigmoid(3 * randn(2, b, tokens, width)), places, begun, packed]
    rate, step = -(randn(3, width, numbers).exp()), torch.nn.functional.softplus(2 * randn(2, b, tokens, width))
    begun = randn(6, runs, width, numbers) if state else None
    return [x, step, rate, randn(4, b, tokens, numbers), randn(5, b, tokens, numbers), begun, packed]


def gradients(run: Callable[..., Any], xs: Operands, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Both results, then the cotangents of all float operands for fixed ones of the results."""
    leaves = [x.to(dtype, copy=True).requires_grad_() if x is not None and x.is_floating_point() else x for x in xs]
    made = run(*leaves)
    loss = sum((y.double() * torch.cos(0.3 * torch.arange(y.numel())).view(y.shape)).sum() for y in made)
    loss.backward()  # type: ignore[union-attr] # two results
    floats = [x for x in leaves if x is not None and x.requires_grad]
    return [*(y.detach() for y in made), *(torch.zeros_like(x) if x.grad is None else x.grad for x in floats)]


def agree(found: list[Tensor], wanted: list[Tensor], most: float) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert float((a.double() - b.double()).norm()) <= most * (float(b.double().norm()) + 1e-30)


@pytest.mark.parametrize("name", ["selective_scan", "rg_lru"])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 63, 100])
def test_a_form_is_its_reference(name: str, tokens: int, state: bool) -> None:
    xs = operands(name, tokens, state=state)
    agree(gradients(getattr(forms, name), xs), gradients(OPS[name], xs), 1e-12)


@pytest.mark.parametrize("name", ["selective_scan", "rg_lru"])
@pytest.mark.parametrize("cu", BORDERS[1:])
def test_packed_segments_are_sequences_of_their_own(name: str, cu: list[int]) -> None:
    for state in (True, False):
        xs = operands(name, 63, cu=cu, state=state)
        agree(gradients(getattr(forms, name), xs), gradients(OPS[name], xs), 1e-12)


@pytest.mark.parametrize("name", ["selective_scan", "rg_lru"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_narrow_types_are_kept_wide_inside(name: str, dtype: torch.dtype, most: float) -> None:
    xs = [x.to(dtype).double() if x is not None and x.is_floating_point() else x for x in operands(name, 130)]
    agree(gradients(getattr(forms, name), xs, dtype), gradients(OPS[name], xs), most)


@pytest.mark.parametrize("name", ["selective_scan", "rg_lru"])
@pytest.mark.parametrize(("tokens", "width", "numbers"), [(1, 1, 1), (33, 17, 5), (65, 130, 4), (100, 16, 16)])
def test_generated_code_is_the_reference_too(name: str, tokens: int, width: int, numbers: int) -> None:
    """Every size of a piece, a vector and a group of channels, and one more; batches, segments and states."""
    for cu in (None, [0, 0, tokens // 2, tokens, tokens]):
        for state in (True, False):
            xs = operands(name, tokens, cu=cu, state=state, width=width, numbers=numbers)
            xs = [x.float().double() if x is not None and x.is_floating_point() else x for x in xs]
            # One token in a row is no call of it in a model: there it is a few ops that fuse with their neighbours.
            made = gradients(getattr(torch.ops.plait, name), xs, torch.float32)
            agree(made, gradients(OPS[name], xs), 3e-6)


def test_a_program_names_its_library() -> None:
    blocks = {"name": "m", "vocab": 7, "hidden": 8, "blocks": [{"kind": "mamba1", "width": 8, "state": 5, "rank": 2}]}
    found = sources(build(load_spec(blocks), dtype="f32"))
    assert "scan_5" in found and "constexpr int S = 5;" in found["scan_5"]
    assert not sources(build(load_spec(blocks), dtype="f64")).keys() & {"scan_5"}
    unit = {"name": "m", "vocab": 7, "hidden": 8, "blocks": [{"kind": "lru", "width": 8, "heads": 2}]}
    assert sources(build(load_spec(unit), dtype="f32"))["rg_lru"] == lru.source()


@pytest.mark.parametrize("name", ["selective_scan", "rg_lru"])
def test_no_number_of_threads_changes_a_bit(name: str) -> None:
    xs, before = operands(name, 100, width=300), torch.get_num_threads()
    found = list[list[Tensor]]()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(gradients(getattr(forms, name), xs, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["selective_scan", "rg_lru"])
def test_without_a_compiler_torch_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    xs = operands(name, 63, cu=[0, 1, 1, 40, 63])
    wanted = gradients(getattr(forms, name), xs, torch.float32)

    def never(*operands: Tensor | None) -> bool:
        return False

    for each in (generated, lru):
        monkeypatch.setattr(each, "ready", never)
    agree(gradients(getattr(forms, name), xs, torch.float32), wanted, 3e-6)


@pytest.mark.parametrize("name", ["selective_scan", "rg_lru"])
@pytest.mark.parametrize("cu", [[0, 5, 3, 9], [1, 9], [0, 8]])
def test_borders_that_cannot_be_are_said(name: str, cu: list[int]) -> None:
    for dtype in (torch.float32, torch.float64):
        xs = operands(name, 9, cu=[0, *[3] * (len(cu) - 2), 9])
        low = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in xs[:-1]]
        with pytest.raises(DataError, match="must rise from 0 to 9"):
            getattr(forms, name)(*low, torch.tensor(cu))


def test_channels_in_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    xs = operands("selective_scan", 63, width=9)
    wanted = gradients(OPS["selective_scan"], xs)
    for size in (1, 63 * 2 * 5 * 2, 10**9):
        monkeypatch.setattr(selective, "BLOCK", size)
        agree(gradients(forms.selective_scan, xs), wanted, 1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 63, 100])
def test_blocks_and_one_token_after_another_are_one_scan(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, u = torch.sigmoid(randn(1, 2, tokens, 3, 2)), randn(2, 2, tokens, 3, 2)
    blocks = scan(a, u)
    monkeypatch.setattr(scans, "WIDE", 1)
    agree([scan(a, u)], [blocks], 1e-14)
    for name in ("selective_scan", "rg_lru"):
        xs = operands(name, tokens)
        agree(gradients(getattr(forms, name), xs), gradients(OPS[name], xs), 1e-12)


def test_decays_that_underflow_leave_no_trace() -> None:
    """A product of decays that is 0 is no division by 0."""
    a, u = torch.full((1, 130, 3), 1e-30), randn(1, 1, 130, 3).float()
    a[:, 7] = 1.0
    s = scan(a, u)
    assert torch.isfinite(s).all()
    assert torch.equal(s[:, 7], u[:, 7] + u[:, 6])


@pytest.mark.parametrize("name", ["selective_scan", "rg_lru"])
@pytest.mark.parametrize("cu", [None, [0, 1, 1, 9]])
def test_opcheck(name: str, cu: list[int] | None) -> None:
    xs = [x.float().requires_grad_() if x is not None and x.is_floating_point() else x for x in operands(name, 9, cu=cu)]
    torch.library.opcheck(getattr(torch.ops.plait, name), tuple(xs))


@pytest.mark.parametrize("name", ["selective_scan", "rg_lru"])
def test_a_prompt_in_parts_is_the_whole(name: str) -> None:
    """A state handed on, and one token at a time."""
    xs = operands(name, 11, state=False)
    run, at = getattr(forms, name), (3 if name == "rg_lru" else 5)
    whole, final = run(*xs)
    parts, state = list[Tensor](), None
    for a, b in ((0, 6), (6, 7), (7, 8), (8, 11)):
        piece = [x[:, a:b] if x is not None and x.dim() > 1 and x.shape[1] == 11 else x for x in xs]
        piece[at] = state
        y, state = run(*piece)
        parts.append(y)
    agree([torch.cat(parts, 1), state], [whole, final], 1e-13)  # type: ignore[list-item] # there is a last part


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({2: torch.zeros(6, 5)}, "rate"), ({3: torch.zeros(2, 9, 4)}, "k is"), ({5: torch.zeros(2, 7, 4)}, "state is"),
        ({6: torch.tensor([0, 9])}, "with cu, b is 2"), ({1: torch.zeros(2, 8, 7)}, "step"),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_are_named(change: dict[int, Tensor], said: str) -> None:
    xs: list[Any] = [change.get(i, x) for i, x in enumerate(operands("selective_scan", 9))]
    with pytest.raises(TypeMismatch, match=f"selective_scan: .*{said}"):
        forms.selective_scan(*xs)
