"""Generated recurrence kernels, interpreted, against the token-by-token meaning in float64: values, gradients, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from plait.ir import PlaitError, ops
from plait.ir.errors import TypeMismatch
from plait.lowering.forms.chunked import Operands
from plait.lowering.gpu import AccessError, run, watch
from plait.lowering.recurrent import Source, Step, Traits, faces, forward_source, interpreted
from plait.lowering.recurrent import backward as backward_kernels
from plait.lowering.recurrent import forward as forward_kernels
from plait.lowering.recurrent.run import function_of, named
from torch import Tensor

from tests.laws import error

FORMS = faces(interpreted=True)
GATES = {  # member -> (gate axes, has beta, delta)
    "gated_delta_rule": ("head", True, True),
    "delta_rule": ("", True, True),
    "kimi_delta_attention": ("channel", True, True),
    "ssd": ("head", True, False),
    "gated_linear_attention": ("channel", False, False),
    "retention": ("slope", False, False),
}
members = pytest.mark.parametrize("name", GATES)
WIDE = [("gated_delta_rule", 128, 64), ("kimi_delta_attention", 64, 128), ("ssd", 256, 16)]
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def operands(
    name: str,
    t: int,
    *,
    b: int = 1,
    g: int = 1,
    r: int = 2,
    k: int = 16,
    v: int = 16,
    n: int | None = None,
    dtype: torch.dtype = torch.float32,
    spikes: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """Random operands of a member, state last; q, k and v in `dtype`, gates and state in float32."""
    rand = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rand)

    axes, has_beta, _ = GATES[name]
    key = torch.nn.functional.normalize(normal(b, t, g, k), dim=-1)
    out = [x.to(dtype) for x in (normal(b, t, g, k), key, normal(b, t, g * r, v))]
    shape = {"": None, "head": (b, t, g * r), "channel": (b, t, g * r, k), "slope": (g * r,)}[axes]
    if shape is not None:
        gate = -0.1 * normal(*shape).abs()
        out.append(torch.where(torch.rand(shape, generator=rand) < 0.06, -60.0, gate) if spikes else gate)
    if has_beta:
        out.append(2 * torch.rand(b, t, g * r, generator=rand))
    return [*out, normal(n or b, g * r, k, v)]


def results(form: Any, xs: Sequence[Tensor], **named: Any) -> list[Tensor]:
    """o, final and the gradient of every operand under fixed random weights of both."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    o, final = form(*xs, **named, scale=0.3)
    weights = torch.Generator().manual_seed(9)
    drawn = [torch.randn(y.shape, generator=weights).to(torch.bfloat16).to(y.dtype) for y in (o, final)]
    return [o.detach(), final.detach(), *torch.autograd.grad([o, final], xs, drawn)]


def agree(name: str, xs: list[Tensor], limit: float, **named: Any) -> None:
    got = results(FORMS[name], xs, **named)
    want = results(getattr(ops, name).reference, [x.double() for x in xs], **named)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert error(a, b) < limit, f"{name}, result {i}: {error(a, b):.1e}"


# -- numbers ------------------------------------------------------------------------------


@members
@pytest.mark.parametrize("t", [1, 63, 65, 130])
def test_values_and_gradients(name: str, t: int) -> None:
    agree(name, operands(name, t, b=1 + (t < 65), r=1 + t % 2, k=(16, 20)[t % 2], v=(16, 24)[t % 2], seed=t), 3e-6)


@members
def test_spikes_of_decay_do_not_cost_digits(name: str) -> None:
    agree(name, operands(name, 100, spikes=True), 3e-6)


@pytest.mark.parametrize(("name", "k", "v"), WIDE)
def test_wide_heads(name: str, k: int, v: int) -> None:
    agree(name, operands(name, 65, r=1, k=k, v=v), 3e-6)


@pytest.mark.parametrize("name", ["gated_delta_rule", "kimi_delta_attention", "ssd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(name: str, dtype: torch.dtype) -> None:
    agree(name, operands(name, 100, k=32, v=24, dtype=dtype), LIMITS[dtype])


@members
def test_packed_with_empty_and_short_segments(name: str) -> None:
    cu = torch.tensor([0, 0, 1, 1, 64, 100, 100])
    agree(name, operands(name, 100, n=6), 3e-6, cu=cu)


@members
@pytest.mark.parametrize("t", [1, 3])
def test_a_few_tokens_take_the_decode_step(name: str, t: int) -> None:
    xs = operands(name, t, b=3, k=20, v=40)
    with torch.no_grad():
        got = FORMS[name](*xs, scale=0.3)
    for a, b in zip(got, getattr(ops, name).reference(*(x.double() for x in xs), scale=0.3), strict=True):
        assert error(a, b) < 1e-6


def test_a_step_updates_the_state_in_place() -> None:
    q, k, v, decay, beta, state = operands("gated_delta_rule", 1, b=2)
    want = ops.gated_delta_rule.reference(*(x.double() for x in (q, k, v, decay, beta, state)))
    kept = state.data_ptr()
    o = torch.ops.plait.recurrence_step(q, k, v, decay, beta, state, None, 1.0, "delta", True)
    assert error(o, want[0]) < 1e-6 and error(state, want[1]) < 1e-6 and state.data_ptr() == kept


def test_without_a_state_and_from_views() -> None:
    """Operands are parts of wider rows, as a convolution leaves them; the state starts at zero."""
    q, k, v, decay, beta, _ = operands("gated_delta_rule", 70, b=2)
    wide = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1)
    parts = [x.unflatten(2, (-1, 16)) for x in wide.split([16, 16, 32], -1)]
    want = ops.gated_delta_rule.reference(*(x.double() for x in (q, k, v, decay, beta)))
    for given in (parts, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]):
        assert all(error(a, b) < 3e-6 for a, b in zip(FORMS["gated_delta_rule"](*given, decay, beta), want, strict=True))


def test_a_beta_of_zero_writes_nothing_and_has_its_gradient() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        xs = operands("delta_rule", 65, dtype=dtype)
        xs[3][:, ::2] = 0
        agree("delta_rule", xs, LIMITS[dtype])


def test_empty_calls() -> None:
    q, k, v, decay, beta, state = operands("gated_delta_rule", 0)
    o, final = FORMS["gated_delta_rule"](q, k, v, decay, beta, state)
    assert o.shape == (1, 0, 2, 16) and torch.equal(final, state)
    o, final = FORMS["gated_delta_rule"](*(x[:0] for x in operands("gated_delta_rule", 5)))
    assert o.shape == (0, 5, 2, 16) and final.shape == (0, 2, 16, 16)


# -- memory -------------------------------------------------------------------------------


def call_of(name: str, xs: Sequence[Tensor], cu: Tensor | None = None) -> Operands:
    axes, has_beta, delta = GATES[name]
    rest = list(xs[3:])
    decay = rest.pop(0) if axes else None
    decay = decay.expand(*xs[2].shape[:2], -1) if decay is not None and axes == "slope" else decay
    return Operands(xs[0], xs[1], xs[2], decay, rest.pop(0) if has_beta else None, rest[0], cu, 0.3, delta)


@members
@pytest.mark.parametrize("packed", [False, True])
def test_every_element_is_written_once_and_bits_are_the_same(name: str, packed: bool) -> None:
    cu, dtype = (torch.tensor([0, 3, 3, 70]), torch.bfloat16) if packed else (None, torch.float32)
    x = call_of(name, operands(name, 70, n=3 if packed else 1, k=20, v=24, dtype=dtype), cu)
    do, dfinal = torch.randn(x.v.shape), torch.randn(x.states, 2, 20, 24)

    def all_of(how: Any) -> list[Tensor]:
        o, final, saved = forward_kernels(x, how, keep=True)
        d = backward_kernels(x, saved, do, dfinal, how)
        return [y for y in (o, final, d.q, d.k, d.v, d.decay, d.beta, d.state) if y is not None]

    def watched(step: Step) -> None:
        """The results of a step, filled with NaN before it."""
        made = WRITES[step.function.split("_")[0]] & {*step.arguments}
        made -= set[str]() if step.arguments.get("EARLY", True) else {"p_pulled"}
        for pointer in made:
            step.arguments[pointer].fill_(float("nan"))
        tensors = {name: y for name, y in step.arguments.items() if isinstance(y, Tensor)}
        with watch(tensors) as traffic:
            interpreted(step)
        counts = {name: traffic[name] for name in traffic}
        for pointer in made:
            count = counts[pointer]
            assert count.distinct_stores == step.arguments[pointer].numel() and not count.stored_twice, pointer
        assert not any(c.raced or c.atomics for c in counts.values())

    for a, b in zip(all_of(watched), all_of(interpreted), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


WRITES = {
    "gates": set[str](),
    "prepare": set[str](),
    "scan": {"p_o", "p_final", "p_u"},
    "back": {"p_dv", "p_dstate", "p_w", "p_pulled"},
    "pulls": {"p_dbeta"},
    "gradients": {"p_dq", "p_dk", "p_ddecay"},
}


def test_a_planted_overrun_is_caught() -> None:
    x = call_of("ssd", operands("ssd", 70))

    def overrun(step: Step) -> None:
        text = step.source.text.replace("last = tl.minimum(end - start, CHUNK)", "last = tl.minimum(end - start + 1, CHUNK)")
        wrong = replace(step, source=replace(step.source, text=text))
        run(function_of(wrong), (wrong.programs,), **named(wrong.arguments))

    with pytest.raises(AccessError, match=r"prepare_additive_head_decay_beta_state.*p_[qk]"):
        forward_kernels(x, overrun)


# -- torch --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gated_delta_rule", "gated_linear_attention"])
def test_torch_sees_the_ops(name: str) -> None:
    xs = operands(name, 6)
    x = call_of(name, xs)
    given = (x.q, x.k, x.v, x.decay, x.beta, x.state, None, 0.3, "delta" if x.delta else "additive", True)
    wanted = tuple(y.detach().clone().requires_grad_() if isinstance(y, Tensor) else y for y in given)
    torch.library.opcheck(torch.ops.plait.recurrence_kernels, (*wanted, True))
    torch.library.opcheck(torch.ops.plait.recurrence_step, given)


def test_one_compilation_for_every_length_and_no_second_derivative() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    form = FORMS["gated_delta_rule"]
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (65, 70, 130):
        xs = operands("gated_delta_rule", t)
        for a, b in zip(results(compiled, xs), results(form, xs), strict=True):
            assert torch.equal(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    xs = [x.requires_grad_() for x in operands("gated_delta_rule", 3)]
    (first,) = torch.autograd.grad(form(*xs)[0].sum(), xs[0], create_graph=True)
    with pytest.raises(PlaitError, match="has no second derivative"):
        first.sum().backward()


def test_autocast_leaves_the_kernels_their_precision() -> None:
    xs = operands("ssd", 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = FORMS["ssd"](*xs)
    assert all(torch.equal(a, b) for a, b in zip(inside, FORMS["ssd"](*xs), strict=True))


def test_operands_that_do_not_fit_are_named() -> None:
    q, k, v, decay, beta, state = operands("gated_delta_rule", 5)
    with pytest.raises(TypeMismatch, match="state is"):
        FORMS["gated_delta_rule"](q, k, v, decay, beta, state[:, :1])
    with pytest.raises(TypeMismatch, match="multiple of key heads"):
        FORMS["gated_delta_rule"](torch.cat([q] * 3, 2), torch.cat([k] * 3, 2), v, decay, beta)


def test_other_dtypes_and_wider_heads_run_as_torch_code() -> None:
    for xs in (operands("ssd", 5), operands("ssd", 5, k=300)):
        xs = [x.double() for x in xs]
        got, want = FORMS["ssd"](*xs), ops.ssd.reference(*xs)
        assert all(error(a, b) < 1e-12 for a, b in zip(got, want, strict=True))


# -- text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_the_source_is_complete_and_names_what_it_is(decay: str) -> None:
    found: Source = forward_source(Traits(decay, delta=True, beta=True, packed=False, state=True, keep=False))
    assert "$" not in found.text and max(map(len, found.text.splitlines())) <= 140
    assert found.text.startswith('"""The forward of a linear recurrence, made by plait: delta')
    assert set(found.functions) == {"prepare", "scan"} | ({"gates"} if decay == "channel" else set())
