"""Attention to some of the keys: the fast form against the op's reference, on runs of places and on any places."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from plait.ir.ops import attention_part, attention_part_gradients
from plait.lowering import form_of

# The folder's face shows the function under the module's name.
form = import_module("plait.lowering.forms.attention_part")
Tensor = torch.Tensor
F64 = torch.float64

PLACES: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int] | None]] = {  # of queries, of keys, borders of segments
    "the same": (range(13), range(13), None),
    "before": (range(13, 20), range(13), None),
    "behind": (range(5), range(5, 12), None),
    "both": (range(4, 9), range(13), None),
    "some": (range(2, 12), range(5, 15), None),
    "zigzag to itself": ([0, 1, 2, 9, 10, 11], [0, 1, 2, 9, 10, 11], None),
    "zigzag to another": ([0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8], None),
    "zigzag to all": ([3, 4, 5, 6, 7, 8], [0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8], None),
    "segments": (range(4, 9), range(13), [0, 2, 2, 5, 7, 13]),
    "another segment": (range(4, 9), range(4), [0, 4, 13]),
    "zigzag of segments": ([0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9], [0, 4, 12]),
    "any places": ([7, 2, 11, 0, 5], [3, 0, 12, 8, 1, 5, 4], None),
    "any places, segments": ([7, 2, 11, 0, 5], [3, 0, 12, 8, 1, 5, 4], [0, 3, 9, 13]),
    "in front of all": (range(-3, 4), range(5), None),
    "one": ([5], [5], None),
}  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {"scale": 1.25},
    {"causal": False},
    {"window": 3},
    {"window": 4, "causal": False, "softcap": 2.0},
]


@pytest.fixture(params=[(64, 128, 1 << 20), (0, 2, 40)], ids=["runs", "many blocks"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("RUNS", "QUERIES", "LOGITS"), request.param, strict=True):
        monkeypatch.setattr(form, name, value)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64).requires_grad_()


def operands(name: str, e: int = 5, b: int = 1) -> tuple[Any, ...]:
    queries, keys, cu = PLACES[name]
    q, k, v = draw(b, len(queries), 6, 5), draw(b, len(keys), 2, 5), draw(b, len(keys), 2, e)
    return q, k, v, torch.tensor([*queries]), torch.tensor([*keys]), None if cu is None else torch.tensor(cu)


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_a_part_is_that_of_the_reference(name: str, options: dict[str, Any]) -> None:
    """Results, denominators and the gradients of the results; a query that sees nothing has 0 and a gradient of 0."""
    given = operands(name, e=5 if form.RUNS else 7, b=2 if PLACES[name][2] is None else 1)
    found, wanted = form.attention_part(*given, **options), attention_part.reference(*given, **options)
    same(found, wanted)
    assert not found[0][found[1] == -torch.inf].any()
    weight = torch.randn_like(wanted[0])
    mine, theirs = (torch.autograd.grad((y[0] * weight).sum(), given[:3]) for y in (found, wanted))
    same(mine, theirs)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["the same", "zigzag to all", "zigzag of segments", "any places"])
def test_gradients_go_through_the_denominators(name: str, options: dict[str, Any]) -> None:
    given = operands(name)

    def mixed(o: Tensor, lse: Tensor) -> Tensor:
        return (o * o.cos().detach()).sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()

    mine = torch.autograd.grad(mixed(*form.attention_part(*given, **options)), given[:3])
    theirs = torch.autograd.grad(mixed(*attention_part.reference(*given, **options)), given[:3])
    same(mine, theirs)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_a_part_of_the_gradients_is_that_of_the_reference(name: str, options: dict[str, Any]) -> None:
    """Told results and denominators of more keys than its own."""
    q, k, v, *places = operands(name)
    o, lse = torch.randn_like(q), attention_part.reference(q, k, v, *places, **options)[1].detach() + 0.75
    for d_o, d_lse in (
        (torch.randn_like(o), None),
        (None, torch.randn_like(lse)),
        (torch.randn_like(o), torch.randn_like(lse)),
    ):
        given = (q.detach(), k.detach(), v.detach(), o, lse, d_o, d_lse, *places)
        same(form.attention_part_gradients(*given, **options), attention_part_gradients.reference(*given, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_precise_operands_give_float32(dtype: torch.dtype, options: dict[str, Any]) -> None:
    q, k, v, *places = operands("zigzag to all")
    low = [x.detach().to(dtype) for x in (q, k, v)]
    wanted = attention_part.reference(*(x.double() for x in low), *places, **options)
    for got, want in zip(form.attention_part(*low, *places, **options), wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_runs_are_told_apart() -> None:
    """Rectangles and triangles where the places allow it; a window or a half-seen run is none."""
    sight = form.Sight.of(torch.tensor([2, 3, 8, 9]), torch.tensor([8, 9, 0, 1, 2, 3]), None, True, 0)
    assert form.pieces(sight) == [
        form.Piece(slice(0, 2), slice(0, 2), False), form.Piece(slice(0, 2), slice(2, 4), True),
        form.Piece(slice(2, 4), slice(0, 4), False), form.Piece(slice(2, 4), slice(4, 6), True),
    ]  # fmt: skip
    assert form.pieces(form.Sight.of(torch.arange(4), torch.arange(4), None, True, 2)) is None
    assert form.pieces(form.Sight.of(torch.arange(4), torch.arange(3), None, True, 0)) is None
    assert form.pieces(form.Sight.of(torch.arange(4), torch.arange(4, 8), None, True, 0)) == []


def test_the_part_has_forms_and_keeps_torchs_promises() -> None:
    assert form_of(attention_part, "cpu") and form_of(attention_part_gradients, "cuda")
    for name in ("zigzag to all", "segments"):
        torch.library.opcheck(torch.ops.plait.attention_part.default, (*operands(name), True, 0, 0.0, 0.5))
