"""Attention in generated C++ against its meaning in float64: values and gradients, whatever is hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plait.ir import ops
from plait.lowering import cpp, forms
from plait.lowering.cpp import attention as generated
from plait.lowering.forms import attention_fast as fast
from torch import Tensor

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler on this machine")
Operands = list[Tensor | None]


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ runs few tokens too."""
    torch.manual_seed(0)
    monkeypatch.setattr(fast, "SHORT", 0)


def operands(b: int, t: int, s: int, h: int, g: int, d: int, e: int) -> Operands:
    """q, k and v, slices of one wider projection where they are equally long."""
    if t == s:
        wide = torch.randn(b, t, h * d + g * (d + e) + 3)[:, :, 2:-1]
        q, k, v = wide.split((h * d, g * d, g * e), 2)
        return [q.unflatten(2, (h, d)), k.unflatten(2, (g, d)), v.unflatten(2, (g, e))]
    return [torch.randn(b, t, h, d), torch.randn(b, s, g, d), torch.randn(b, s, g, e)]


def run(f: Any, xs: Operands, dtype: torch.dtype | None, attrs: dict[str, Any]) -> list[Tensor]:
    """The result, and the gradient of every float operand under fixed random weights."""
    floats = [x is not None and x.is_floating_point() for x in xs]
    mine = [
        x.detach().to(dtype or x.dtype).requires_grad_() if x is not None and there else x
        for x, there in zip(xs, floats, strict=True)
    ]
    y = f(*mine, **attrs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    leaves = [x for x, there in zip(mine, floats, strict=True) if there]
    return [y.detach(), *torch.autograd.grad((y.double() * weights).sum(), [x for x in leaves if x is not None])]


def agree(op: Any, form: Any, xs: Operands, limit: float, **attrs: Any) -> None:
    q, k, v = xs[:3]
    assert q is not None and k is not None and v is not None and generated.ready(q, k, v)
    means(op, form, xs, limit, **attrs)


def means(op: Any, form: Any, xs: Operands, limit: float, **attrs: Any) -> None:
    got, want = run(form, xs, None, attrs), run(op.reference, xs, torch.float64, attrs)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and a.isfinite().all()
        found = float((a.double() - b).norm() / b.norm().clamp_min(1e-4))
        assert found < limit, f"result {i}: {found:.1e}"


def attends(xs: Operands, limit: float = 3e-6, **attrs: Any) -> None:
    agree(ops.attention, forms.attention, xs, limit, **attrs)


def biased(xs: Operands, limit: float = 3e-6, **attrs: Any) -> None:
    agree(ops.biased_attention, forms.biased_attention, xs, limit, **attrs)


@pytest.mark.parametrize("t", [2, 63, 65, 130])
def test_lengths(t: int) -> None:
    for causal in (True, False):
        attends(operands(2, t, t, 2, 2, 16, 16), causal=causal)


@pytest.mark.parametrize(
    "heads", [(4, 1, 64, 64), (6, 3, 48, 80), (2, 2, 256, 256), (3, 1, 128, 128), (2, 1, 192, 128), (2, 2, 5, 7)]
)
def test_heads(heads: tuple[int, int, int, int]) -> None:
    attends(operands(1, 100, 100, *heads), scale=0.3)


@pytest.mark.parametrize("attrs", [{"window": 70}, {"window": 1}, {"softcap": 2.0}, {"window": 9, "softcap": 30.0}])
def test_what_is_hidden_and_bent(attrs: dict[str, Any]) -> None:
    attends([*operands(2, 150, 150, 4, 2, 32, 32), torch.randn(4)], **attrs)


@pytest.mark.parametrize("place", [None, 0, 7, 200])
def test_queries_behind_keys(place: int | None) -> None:
    """A cache may be longer than what stands in it, and hold anything there."""
    at = None if place is None else torch.tensor(place)
    for window in (0, 40):
        q, k, v = operands(1, 70, 270, 4, 2, 16, 16)
        assert k is not None and v is not None
        attends([q, k, v, None, None, at], window=window)
        if place is not None:
            got = forms.attention(q, k, v, None, None, at, window=window)  # type: ignore[arg-type] # q is there
            k[:, place + 70 :], v[:, place + 70 :] = torch.nan, torch.nan
            assert torch.equal(forms.attention(q, k, v, None, None, at, window=window), got)  # type: ignore[arg-type] # q is there


@pytest.mark.parametrize("borders", [[0, 130], [0, 1, 1, 64, 129, 130], [0, 63, 127, 130]])
def test_packed_segments(borders: list[int]) -> None:
    for window in (0, 20):
        attends([*operands(1, 130, 130, 4, 2, 16, 16), torch.randn(4), torch.tensor(borders)], window=window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    xs = [None if x is None else x.to(dtype) for x in operands(2, 130, 130, 4, 2, 64, 32)]
    attends([*xs, torch.randn(4).to(dtype)], 1e-2, window=100)
    own, wide = (run(forms.attention, xs, t, {})[0].double() for t in (dtype, torch.float32))
    assert float((own - wide).norm() / wide.norm()) < (2.5e-3 if dtype == torch.bfloat16 else 3e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_bias_by_distance(causal: bool) -> None:
    for b, t, s, at in ((2, 63, 63, None), (1, 130, 150, None), (1, 65, 200, 20)):
        place = None if at is None else torch.tensor(at)
        lengths = torch.tensor([s, s // 2][:b])
        biased([*operands(b, t, s, 4, 2, 16, 32), torch.randn(8, 4), lengths, place], causal=causal, reach=20)
        biased([*operands(b, t, s, 4, 4, 16, 16), torch.rand(1, 4) * 0.1, None, place], causal=causal, slopes=True)
        biased([*operands(b, t, s, 4, 1, 64, 64), None, lengths], causal=causal and t == s)


def test_the_number_of_threads_changes_no_bit() -> None:
    def both() -> list[Tensor]:
        torch.manual_seed(1)
        found = run(forms.attention, [*operands(2, 200, 200, 3, 1, 64, 64), torch.randn(3)], None, {"window": 90})
        return found + run(forms.biased_attention, [*operands(1, 200, 200, 3, 3, 16, 16), torch.randn(8, 3)], None, {})

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = both()
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(one, both(), strict=True))
    finally:
        torch.set_num_threads(threads)


def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What allocates, with NaN in what it gives."""

    def run(*args: Any, **options: Any) -> Tensor:
        return make(*args, **options).fill_(torch.nan)

    return run


def test_every_number_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN, and all results are finite, rows that see nothing 0."""
    for place, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(place, name, filled(getattr(place, name)))
    q, k, v = (x for x in operands(1, 70, 90, 4, 2, 20, 36) if x is not None)
    sight, logits = generated.Sight(-5), generated.Logits(0.2, sinks=torch.randn(4))
    o, lse = generated.forward(q, k, v, sight, logits)
    assert o.isfinite().all() and lse.isfinite().all() and not o[:, :5].any()
    d = generated.backward(torch.randn_like(o), o, lse, q, k, v, sight, logits)
    assert all(x is not None and x.isfinite().all() for x in (d.q, d.k, d.v, d.sinks))
    assert not d.q[:, :5].any() and not d.k[:, 65:].any() and not d.v[:, 65:].any()


def test_expanded_operands_and_their_gradients() -> None:
    q, k, v = operands(1, 66, 66, 4, 1, 16, 16)
    assert q is not None and k is not None and v is not None
    attends([q.expand(3, -1, -1, -1), k.expand(3, -1, 2, -1), v.expand(3, -1, 2, -1)])
    attends([x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)])


def test_large_logits_and_nan() -> None:
    q, k, v = (x for x in operands(1, 80, 80, 2, 1, 16, 16) if x is not None)
    attends([q * 4, k * 4, v])
    k = k.clone()
    k[0, 70] = torch.nan
    got = forms.attention(q, k, v)
    assert got[0, 70:].isnan().all() and got[0, :70].isfinite().all()


def test_nothing_at_all() -> None:
    for b, t, s in ((0, 70, 70), (1, 0, 5), (1, 70, 0)):
        q, k, v = torch.randn(b, t, 2, 16), torch.randn(b, s, 1, 16), torch.randn(b, s, 1, 16)
        got = forms.attention(q, k, v, causal=False)
        assert got.shape == q.shape and not got.any()


def test_torch_sees_the_ops() -> None:
    q, k, v = (None if x is None else x.detach().requires_grad_() for x in operands(1, 65, 65, 2, 1, 16, 16))
    given = (q, k, v, torch.randn(2, requires_grad=True), None, None, True, 0, 2.0, 0.25)
    torch.library.opcheck(torch.ops.plait.attention.default, given)
    table = torch.randn(8, 2, requires_grad=True)
    given = (q, k, v, table, torch.tensor([40]), None, False, 16, False, 0.25)
    torch.library.opcheck(torch.ops.plait.biased_attention.default, given)


def test_few_tokens_and_no_compiler_are_torch_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> bool:
        return False

    monkeypatch.setattr(generated, "ready", none)
    q, k, v = (None if x is None else x.detach().requires_grad_() for x in operands(2, 65, 65, 4, 2, 16, 16))
    torch.library.opcheck(torch.ops.plait.attention.default, (q, k, v, None, None, None, True, 0, 0.0, 0.25))
    table = torch.randn(8, 4, requires_grad=True)
    given = (q, k, v, table, torch.tensor([40, 65]), None, False, 16, False, 0.25)
    torch.library.opcheck(torch.ops.plait.biased_attention.default, given)
    for causal in (True, False):
        for op, form, more, attrs in (
            (ops.attention, forms.attention, [], {}),
            (ops.biased_attention, forms.biased_attention, [table, torch.tensor([40, 65])], {"reach": 16}),
            (ops.biased_attention, forms.biased_attention, [table[:1], None, torch.tensor(0)], {"slopes": True}),
        ):
            means(op, form, [q, k, v, *more], 3e-6, causal=causal, **attrs)
