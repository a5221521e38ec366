"""The short convolution in generated C++ against its meaning in float64: values and gradients, whatever the sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plait.ir import ops
from plait.ir.errors import DataError, TypeMismatch
from plait.lowering import cpp
from plait.lowering.cpp import conv as generated
from plait.lowering.forms import conv
from torch import Tensor

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler on this machine")

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def operands(b: int, t: int, c: int, k: int, *, bias: bool = True, state: bool = True, n: int | None = None) -> Operands:
    """Operands in float32, x a slice of a wider projection."""
    x = torch.randn(b, t, c + 3)[:, :, 2 : c + 2]
    return x, torch.randn(c, k), torch.randn(c) if bias else None, torch.randn(n or b, c, k - 1) if state else None


def run(f: Any, xs: Operands, dtype: torch.dtype | None, cu: Tensor | None, act: str) -> list[Tensor]:
    """y, the last inputs and the gradient of every operand under fixed random weights of both."""
    mine = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in xs]
    y, last = f(*mine, cu, act=act)
    weights = torch.Generator().manual_seed(9)
    loss = sum((z.double() * torch.randn(z.shape, generator=weights, dtype=torch.float64)).sum() for z in (y, last))
    assert isinstance(loss, Tensor)
    return [y.detach(), last.detach(), *torch.autograd.grad(loss, [x for x in mine if x is not None])]


def agree(xs: Operands, limit: float, cu: Tensor | None = None, act: str = "silu") -> None:
    assert generated.ready(xs[0], xs[1], act)
    got, want = run(conv.causal_conv1d, xs, None, cu, act), run(ops.causal_conv1d.reference, xs, torch.float64, cu, act)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and a.isfinite().all()
        found = float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
        assert found < limit, f"result {i}: {found:.1e}"


@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize("t", [2, 3, 63, 257, 600])
def test_lengths(t: int, act: str) -> None:
    agree(operands(2, t, 5, 4), 1e-6, act=act)


@pytest.mark.parametrize("c", [1, 16, 37, 1030])
def test_channels(c: int) -> None:
    agree(operands(1, 70, c, 4, bias=c % 2 == 0, state=c % 2 == 0), 1e-6)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_taps(k: int) -> None:
    agree(operands(2, 20, 33, k, bias=False), 1e-6, act="none")


@pytest.mark.parametrize("state", [False, True])
def test_packed_with_empty_and_short_segments(state: bool) -> None:
    cu = torch.tensor([0, 0, 1, 3, 3, 300, 301, 301])
    agree(operands(1, 301, 19, 4, state=state, n=7), 1e-6, cu)


def test_bfloat16_is_computed_in_float32() -> None:
    x, w, bias, state = operands(2, 65, 37, 4)
    assert bias is not None and state is not None
    agree((x.bfloat16(), w.bfloat16(), bias.bfloat16(), state.bfloat16()), 4e-3)
    agree((x.bfloat16(), w, bias, state.bfloat16()), 4e-3)


def test_an_expanded_gradient() -> None:
    x, w, bias, state = operands(2, 9, 5, 4)
    grads = list[Tensor]()
    for f, dtype in ((conv.causal_conv1d, torch.float32), (ops.causal_conv1d.reference, torch.float64)):
        mine = x.detach().to(dtype).requires_grad_()
        others = [y if y is None else y.to(dtype) for y in (w, bias, state)]
        f(mine, *others)[0].sum().backward()
        assert mine.grad is not None
        grads.append(mine.grad)
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-5, atol=1e-5)


def test_the_same_bits_from_any_number_of_threads() -> None:
    xs, before, results = operands(1, 1100, 70, 4), torch.get_num_threads(), list[list[Tensor]]()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(conv.causal_conv1d, xs, None, None, "silu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_torch_code_runs_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    xs = operands(2, 9, 5, 4)
    want = run(conv.causal_conv1d, xs, None, None, "silu")
    monkeypatch.setattr(generated, "_library", lambda taps, act: None)
    got = run(conv.causal_conv1d, xs, None, None, "silu")
    assert not generated.ready(xs[0], xs[1], "silu")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused_before_anything_is_read() -> None:
    x, w, bias, _ = operands(1, 9, 5, 4)
    for borders in ([0, 12], [1, 9], [0, 7, 3, 9], [-1, 9]):
        with pytest.raises(DataError, match="must rise from 0 to 9"):
            conv.causal_conv1d(x, w, cu=torch.tensor(borders))
    with pytest.raises(TypeMismatch, match=r"w is \[6, 4\]; with x \[1, 9, 5\] it must be \[5, 4\]"):
        conv.causal_conv1d(x, torch.randn(6, 4))
    with pytest.raises(TypeMismatch, match=r"bias is \[4\]"):
        conv.causal_conv1d(x, w, torch.randn(4))
    with pytest.raises(TypeMismatch, match=r"state is \[1, 5, 2\]"):
        conv.causal_conv1d(x, w, bias, torch.randn(1, 5, 2))
