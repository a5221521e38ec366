"""The chunked recurrence against its token-by-token meaning: values and gradients, float64 to 1e-10."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from plait.ir import ops
from plait.ir.errors import DataError, PlaitError, TypeMismatch
from plait.lowering.forms import recurrence
from torch import Tensor

from tests.laws import error

FACES = ("gated_delta_rule", "delta_rule", "kimi_delta_attention", "ssd", "gated_linear_attention", "retention")
GATES = {  # name -> (gate axes, has beta)
    "gated_delta_rule": ("head", True),
    "delta_rule": ("", True),
    "kimi_delta_attention": ("channel", True),
    "ssd": ("head", True),
    "gated_linear_attention": ("channel", False),
    "retention": ("slope", False),
}


def face(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The form and the meaning of a face."""
    return getattr(recurrence, name), getattr(ops, name).reference


def operands(
    name: str,
    t: int,
    *,
    b: int = 2,
    g: int = 2,
    r: int = 2,
    k: int = 7,
    v: int = 5,
    decay: str = "mild",
    state: bool = True,
    n: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """Random operands of a face, in its order, state last."""
    rand = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rand, dtype=torch.float64)

    axes, has_beta = GATES[name]
    heads = g * r
    shape = {"": None, "head": (b, t, heads), "channel": (b, t, heads, k), "slope": (heads,)}[axes]
    key = torch.nn.functional.normalize(normal(b, t, g, k), dim=-1)
    out = [normal(b, t, g, k), key, normal(b, t, heads, v)]
    if shape is not None:
        gate = -normal(*shape).abs() * {"mild": 0.1, "strong": 8.0, "spiky": 0.1}[decay]
        if decay == "spiky":
            gate = torch.where(torch.rand(gate.shape, generator=rand) < 0.06, -60.0, gate)
        out.append(gate)
    if has_beta:
        out.append(2 * torch.rand(b, t, heads, generator=rand, dtype=torch.float64))
    if state:
        out.append(normal(n or b, heads, k, v))
    return [x.to(dtype) for x in out]


def run(f: Callable[..., Any], xs: Sequence[Tensor], **named: Any) -> list[Tensor]:
    """o, final and the gradient of every operand under fixed random weights of both."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    o, final = f(*xs, **named, scale=0.3)
    weights = torch.Generator().manual_seed(9)
    loss = sum((y.double() * torch.randn(y.shape, generator=weights, dtype=torch.float64)).sum() for y in (o, final))
    grads = torch.autograd.grad(loss, xs, allow_unused=True, materialize_grads=True)
    return [o.detach(), final.detach(), *grads]


def agree(name: str, xs: list[Tensor], limit: float, **named: Any) -> None:
    form, meaning = face(name)
    got = run(form, xs, **named)
    want = run(meaning, [x.double() for x in xs], **named)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert error(a, b) < limit, f"{name}, result {i}: {error(a, b):.1e}"


@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize("decay", ["mild", "spiky", "strong"])
def test_values_and_gradients(name: str, decay: str) -> None:
    agree(name, operands(name, 130, b=1, decay=decay), 1e-10)


@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize("t", [1, 63, 65])
def test_odd_lengths(name: str, t: int) -> None:
    agree(name, operands(name, t, state=t != 63, r=1 + t % 2, seed=t), 1e-10)


@pytest.mark.parametrize("name", FACES)
def test_packed_with_empty_and_short_segments(name: str) -> None:
    cu = torch.tensor([0, 0, 1, 1, 64, 100, 100])
    agree(name, operands(name, 100, b=1, n=6, decay="spiky"), 1e-10, cu=cu)
    xs = operands(name, 100, b=1, n=6)
    with torch.no_grad():
        o, final = face(name)[0](*xs, cu=cu)
        want, states = face(name)[1](*xs, cu=cu)
    assert error(o, want) < 1e-13 and error(final, states) < 1e-13


@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize("decay", ["mild", "spiky"])
def test_float32(name: str, decay: str) -> None:
    xs = operands(name, 130, b=1, k=32, v=24, decay=decay, dtype=torch.float32)
    agree(name, xs, 5e-6)


@pytest.mark.parametrize("name", FACES)
def test_float32_under_very_strong_decay_is_finite_and_exact(name: str) -> None:
    xs = operands(name, 100, b=1, k=32, v=24, dtype=torch.float32)
    if GATES[name][0] == "":
        return
    for strong in (-20.0, -90.0, float("-inf")):
        gated = [*xs[:3], torch.full_like(xs[3], strong), *xs[4:]]
        got = face(name)[0](*gated)
        want = face(name)[1](*(x.double() for x in gated))
        assert error(got[0], want[0]) < 1e-6 and error(got[1], want[1]) < 1e-6
    agree(name, [*xs[:3], torch.full_like(xs[3], -20.0), *xs[4:]], 5e-6)


@pytest.mark.parametrize("name", ["gated_delta_rule", "kimi_delta_attention", "ssd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    xs = operands(name, 130, b=1, k=32, v=24)
    xs = [x.to(dtype) if i < 3 else x.float() for i, x in enumerate(xs)]
    got, want = run(face(name)[0], xs), run(face(name)[1], [x.double() for x in xs])
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert error(got[1], want[1]) < 1e-6
    # What is left is the rounding of results to the half type.
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


def test_identical_keys_and_full_beta_do_not_lose_accuracy() -> None:
    xs = operands("delta_rule", 130, b=1, k=32, v=24, dtype=torch.float32)
    xs[1] = xs[1][:, :1].expand_as(xs[1]).contiguous()
    xs[3] = torch.full_like(xs[3], 2.0)
    agree("delta_rule", xs, 5e-5)


@pytest.mark.parametrize("name", FACES)
def test_beta_of_zero_has_a_gradient(name: str) -> None:
    if not GATES[name][1]:
        return
    xs = operands(name, 65, b=1)
    xs[-2][:, ::3] = 0
    agree(name, xs, 1e-10)


@pytest.mark.parametrize("name", FACES)
def test_no_tokens(name: str) -> None:
    xs = operands(name, 0)
    got = run(face(name)[0], xs)
    assert got[0].shape == (2, 0, 4, 5) and torch.equal(got[1], xs[-1]) and got[-1].count_nonzero() == got[-1].numel()


@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decode_steps_continue_a_prefill(name: str, dtype: torch.dtype) -> None:
    form, meaning = face(name)
    xs = operands(name, 40)
    slope, has_beta = GATES[name][0] == "slope", GATES[name][1]
    by_token = [i for i in range(len(xs) - 1) if not (slope and i == 3)]
    xs = [x.to(dtype) if i < 3 else x for i, x in enumerate(xs)]
    assert has_beta or len(xs) >= 4
    want, last = meaning(*(x.double() for x in xs))
    state, out, start = xs[-1].float() if dtype != torch.float64 else xs[-1], list[Tensor](), 0
    with torch.no_grad():
        for step in (33, 1, 1, 2, 3):
            part = [x[:, start : start + step] if i in by_token else x for i, x in enumerate(xs[:-1])]
            o, state = form(*part, state)
            out.append(o)
            start += step
    limit = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert error(torch.cat(out, 1), want) < limit and error(state, last) < min(limit, 1e-6)
    assert out[-1].dtype == dtype and state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_strided_operands() -> None:
    q, k, v, decay, beta, state = operands("gated_delta_rule", 65)
    packed = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1)
    split = [x.unflatten(2, (-1, d)) for x, d in zip(packed.split([14, 14, 20], -1), (7, 7, 5), strict=True)]
    strided = [*split, decay[:, :, :1].expand_as(decay), beta.transpose(1, 2).contiguous().transpose(1, 2), state]
    got = recurrence.gated_delta_rule(*strided)
    want = recurrence.gated_delta_rule(*(x.contiguous() for x in strided))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_gradients_of_some_operands_from_final_alone() -> None:
    xs = operands("gated_delta_rule", 65)
    results = list[Tensor]()
    for f in face("gated_delta_rule"):
        v = xs[2].clone().requires_grad_()
        f(xs[0], xs[1], v, *xs[3:])[1].square().sum().backward()
        assert v.grad is not None
        results.append(v.grad)
    assert error(results[0], results[1]) < 1e-10


@pytest.mark.parametrize("name", FACES)
def test_opcheck(name: str) -> None:
    axes, has_beta = GATES[name]
    xs = operands(name, 65, dtype=torch.float32)
    decay = None if not axes else xs[3] if axes != "slope" else xs[3].expand(2, 65, -1)
    update = "delta" if "delta" in name or name == "kimi_delta_attention" else "additive"
    for grad in (False, True):
        q, k, v, state = (x.requires_grad_(grad) for x in (*xs[:3], xs[-1]))
        args = (q, k, v, decay, xs[-2] if has_beta else None, state, None, 0.5, update, grad)
        torch.library.opcheck(torch.ops.plait.linear_recurrence.default, args)


@pytest.mark.parametrize("name", ["gated_delta_rule", "kimi_delta_attention", "retention"])
def test_compiles_whole_and_once_for_all_lengths(name: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *xs: face(name)[0](*xs, scale=0.3), backend=counter, fullgraph=True, dynamic=True)

    def form(*xs: Tensor, scale: float) -> Any:
        return compiled(*xs)

    for t in (65, 100, 130):
        xs = operands(name, t, b=3)
        got, want = run(form, xs), run(face(name)[0], xs)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert counter.frame_count == 1


def test_exports_with_a_dynamic_length() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
            return recurrence.gated_delta_rule(q, k, v, decay, beta)[0]

    xs = tuple(operands("gated_delta_rule", 65, state=False))
    length = torch.export.Dim("t", min=8, max=4096)
    program = torch.export.export(Layer(), xs, dynamic_shapes=[{1: length}] * 5)
    longer = tuple(operands("gated_delta_rule", 100, state=False))
    assert torch.equal(program.module()(*longer), Layer()(*longer))


def test_mixed_types_under_autocast() -> None:
    xs = operands("gated_delta_rule", 65, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = torch.nn.functional.linear(xs[2], torch.eye(5))
        o, final = recurrence.gated_delta_rule(xs[0], xs[1], value, *xs[3:])
    want, _ = face("gated_delta_rule")[1](*(x.double() for x in (xs[0], xs[1], value, *xs[3:])))
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32 and error(o, want) < 4e-3


def test_operands_that_do_not_fit_are_named() -> None:
    q, k, v, decay, beta, state = operands("gated_delta_rule", 8)
    with pytest.raises(TypeMismatch, match="v has 3 heads, k has 2; value heads must be a multiple"):
        recurrence.gated_delta_rule(q, k, v[:, :, :3], decay, beta)
    with pytest.raises(TypeMismatch, match=r"decay is \[2 7 4\]; it must be \[2 8 4\] or \[2 8 4 7\]"):
        recurrence.gated_delta_rule(q, k, v, decay[:, :7], beta)
    with pytest.raises(TypeMismatch, match=r"state is \[2 4 5 7\]"):
        recurrence.gated_delta_rule(q, k, v, decay, beta, state.mT)
    with pytest.raises(TypeMismatch, match="update is 'erase'"):
        recurrence.linear_recurrence(q, k, v, update="erase")
    with pytest.raises(TypeMismatch, match="pack all sequences into one row"):
        recurrence.gated_delta_rule(q, k, v, decay, beta, cu=torch.tensor([0, 8]))
    one = [x[:1] for x in (q, k, v, decay, beta)]
    with pytest.raises(TypeMismatch, match=r"cu torch.float32 \[2\]; .* in int64"):
        recurrence.gated_delta_rule(*one, cu=torch.tensor([0.0, 8.0]))
    with pytest.raises(DataError, match="must rise from 0 to the number of tokens, 8"):
        recurrence.gated_delta_rule(*one, cu=torch.tensor([0, 5]))


def test_second_derivatives_are_refused() -> None:
    xs = [x.requires_grad_() for x in operands("gated_delta_rule", 8)]
    o, _ = recurrence.gated_delta_rule(*xs)
    (dv,) = torch.autograd.grad(o.sum(), xs[2], create_graph=True)
    with pytest.raises(PlaitError, match="no second derivative"):
        torch.autograd.grad(dv.sum(), xs[0])
