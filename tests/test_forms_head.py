"""What a loss needs of a head's logits, in blocks of tokens: numbers and gradients of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plait.ir import DataError, evaluate, parse
from plait.ir.ops import head_parts, linear_token_losses
from plait.lowering.forms import head

from tests.test_forms import agree, draw, some_labels


@pytest.fixture(params=[7, 256])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "HEAD_ROWS", request.param)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("ignored", [0, 5, 65])
def test_token_losses(ignored: int, softcap: float) -> None:
    labels = some_labels(31, ignored)
    agree(head.linear_token_losses, linear_token_losses, draw(5, 13, 7), draw(31, 7), labels, softcap=softcap)
    agree(head.head_parts, head_parts, draw(5, 13, 7), draw(31, 7), labels - 11, softcap=softcap)


def test_half_precision_is_as_near_as_its_products() -> None:
    x, w = (draw(*n).detach().bfloat16().requires_grad_() for n in ((5, 13, 7), (31, 7)))
    labels = some_labels(31, 5)
    got, want = head.linear_token_losses(x, w, labels), linear_token_losses.reference(x.double(), w.double(), labels)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), want, rtol=2e-2, atol=2e-2)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(got.sum(), (x, w)))


@pytest.mark.parametrize("ignore", [None, -100])
def test_custom_op_keeps_torchs_promises(ignore: int | None) -> None:
    torch.library.opcheck(torch.ops.plait.head_parts, (draw(5, 13, 7), draw(31, 7), some_labels(31, 5), 2.0, ignore))


def test_a_label_of_no_word_is_refused() -> None:
    with pytest.raises(DataError, match="a label is 31"):
        head.linear_token_losses(draw(5, 13, 7), draw(31, 7), torch.full((5, 13), 31))


def test_meaning_of_the_parts() -> None:
    x, w, words = draw(4, 3), draw(6, 3), torch.tensor([0, 5, 6, -1])
    graph = parse("def f(x: f64[4, 3], w: f64[6, 3], n: i64[4]):\n    a, b = head_parts(x, w, n)\n    return a, b\n")
    lse, wanted = (y.detach() for y in evaluate(graph, x.double(), w.double(), words))
    logits: Any = (x.double() @ w.double().T).detach()
    torch.testing.assert_close(lse, logits.exp().sum(-1).log())
    torch.testing.assert_close(wanted, torch.stack([logits[0, 0], logits[1, 5], *torch.zeros(2).double()]))
