"""Recurrences in generated C++ against their token-by-token meaning in float64: values and gradients, whatever the sizes."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from plait.ir import ops
from plait.ir.errors import DataError, TypeMismatch
from plait.lowering import cpp, form_of
from plait.lowering.cpp import build
from plait.lowering.cpp import recurrence as generated
from plait.lowering.forms import recurrence, relay_op
from torch import Tensor

from tests.laws import error

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler on this machine")

FACES = {  # name -> (gate axes, has beta)
    "gated_delta_rule": ("head", True),
    "delta_rule": ("", True),
    "kimi_delta_attention": ("channel", True),
    "ssd": ("head", True),
    "gated_linear_attention": ("channel", False),
    "retention": ("slope", False),
}
SIZES = (32, 16)  # of key and value heads; those of tests that pad are padded to these, for libraries take seconds to build
PACKED = torch.tensor([0, 0, 1, 1, 64, 130, 130])


def operands(
    name: str, t: int, k: int, v: int, *, r: int = 3, b: int = 1, n: int | None = None, decay: float = 0.1
) -> list[Tensor]:
    """Operands of a face in float32, its state last."""
    axes, has_beta = FACES[name]
    g, heads = 2, 2 * r
    shape = {"": None, "head": (b, t, heads), "channel": (b, t, heads, k), "slope": (heads,)}[axes]
    out = [torch.randn(b, t, g, k), torch.nn.functional.normalize(torch.randn(b, t, g, k), dim=-1), torch.randn(b, t, heads, v)]
    if shape is not None:
        out.append(-torch.randn(shape).abs() * decay)
    if has_beta:
        out.append(2 * torch.rand(b, t, heads))
    return [*out, torch.randn(n or b, heads, k, v)]


def run(f: Any, xs: list[Tensor], **named: Any) -> list[Tensor]:
    """o, final and the gradient of every operand under fixed random weights of both."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    o, final = f(*xs, **named, scale=0.3)
    weights = torch.Generator().manual_seed(9)
    loss = sum((y.double() * torch.randn(y.shape, generator=weights, dtype=torch.float64)).sum() for y in (o, final))
    assert isinstance(loss, Tensor)
    return [o.detach(), final.detach(), *torch.autograd.grad(loss, xs)]


def agree(name: str, xs: list[Tensor], limit: float = 3e-6, **named: Any) -> None:
    got = run(getattr(recurrence, name), xs, **named)
    want = run(getattr(ops, name).reference, [x.double() for x in xs], **named)
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) < limit, f"{name}: {' '.join(f'{e:.1e}' for e in errors)}"


@pytest.fixture
def only_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch code must not run."""

    def refuse(*operands: Any, **options: Any) -> None:
        raise AssertionError("torch code ran")

    for name in ("forward", "backward", "decode"):
        monkeypatch.setattr(recurrence, name, refuse)


@pytest.mark.usefixtures("only_generated")
class TestNumbers:
    @pytest.mark.parametrize("name", FACES)
    @pytest.mark.parametrize("t", [1, 63, 65, 100, 130])
    def test_lengths(self, name: str, t: int) -> None:
        agree(name, operands(name, t, *SIZES, r=1 + 2 * (t % 2)))

    @pytest.mark.parametrize("name", FACES)
    def test_padded_heads_of_unequal_sizes(self, name: str) -> None:
        agree(name, operands(name, 70, 24, 7))

    @pytest.mark.parametrize("name,k,v", [("gated_delta_rule", 128, 128), ("kimi_delta_attention", 64, 128), ("ssd", 256, 48)])
    def test_wide_heads(self, name: str, k: int, v: int) -> None:
        agree(name, operands(name, 65, k, v, r=2))

    @pytest.mark.parametrize("name", FACES)
    @pytest.mark.parametrize("which", [0, 1])
    def test_gradients_of_one_result_alone(self, name: str, which: int) -> None:
        def alone(f: Any, xs: list[Tensor]) -> list[Tensor]:
            xs = [x.detach().clone().requires_grad_() for x in xs]
            return list(torch.autograd.grad(f(*xs, scale=0.3)[which].double().square().sum(), xs, allow_unused=True))

        for xs in (operands(name, 70, 24, 16)[:-1], operands(name, 70, 24, 16)):
            got, want = alone(getattr(recurrence, name), xs), alone(getattr(ops, name).reference, [x.double() for x in xs])
            for a, b in zip(got, want, strict=True):
                assert a.count_nonzero() == 0 if b is None else error(a, b) < 3e-6

    @pytest.mark.parametrize("name", ["gated_delta_final", "kimi_delta_final"])
    @pytest.mark.parametrize("cu", [None, PACKED])
    def test_final_states_alone(self, name: str, cu: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
        for other in ("final_state", "backward"):
            monkeypatch.setattr(relay_op, other, None)
        rule = "kimi_delta_attention" if name == "kimi_delta_final" else "gated_delta_rule"
        _, *xs = operands(rule, 130, 24, 16, r=6, n=None if cu is None else 6)

        def final(f: Any, xs: list[Tensor]) -> list[Tensor]:
            xs = [x.detach().clone().requires_grad_() for x in xs]
            y = f(*xs, cu)
            return [y.detach(), *torch.autograd.grad(y.double().square().sum(), xs)]

        got, want = final(getattr(relay_op, name), xs), final(getattr(ops, name).reference, [x.double() for x in xs])
        assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 3e-6

    @pytest.mark.parametrize("name", FACES)
    def test_packed_with_empty_segments(self, name: str) -> None:
        agree(name, operands(name, 130, *SIZES, n=6), cu=PACKED)

    @pytest.mark.parametrize("decay", [3.0, 20.0])
    @pytest.mark.parametrize("name", [name for name in FACES if FACES[name][0]])
    def test_strong_decay(self, name: str, decay: float) -> None:
        # one gradient per slope is a sum over tokens of what nearly cancels, which torch adds up in float32
        agree(name, operands(name, 70, *SIZES, decay=decay), 1e-5 if name == "retention" else 3e-6)

    @pytest.mark.parametrize("name", [name for name in FACES if FACES[name][0]])
    @pytest.mark.parametrize("gate", [-60.0, float("-inf")])
    def test_decay_that_forgets_all(self, name: str, gate: float) -> None:
        xs = operands(name, 70, *SIZES)
        xs[3] = torch.full_like(xs[3], gate)
        got, want = getattr(recurrence, name)(*xs), getattr(ops, name).reference(*(x.double() for x in xs))
        assert error(got[0], want[0]) < 1e-6 and error(got[1], want[1]) < 1e-6

    @pytest.mark.parametrize("name", ["gated_delta_rule", "kimi_delta_attention", "ssd"])
    def test_bfloat16_is_computed_in_float32(self, name: str) -> None:
        xs = [x.bfloat16() if i < 3 else x for i, x in enumerate(operands(name, 100, *SIZES))]
        got = run(getattr(recurrence, name), xs)
        want = run(getattr(ops, name).reference, [x.double() for x in xs])
        assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32 and got[2].dtype == torch.bfloat16
        assert error(got[1], want[1]) < 1e-6 and max(error(a, b) for a, b in zip(got, want, strict=True)) < 4e-3

    @pytest.mark.parametrize("name", FACES)
    def test_decode_steps_continue_a_prefill(self, name: str) -> None:
        xs = operands(name, 40, 24, 16, b=2)
        want, last = getattr(ops, name).reference(*(x.double() for x in xs))
        state, out, start = xs[-1], list[Tensor](), 0
        with torch.no_grad():
            for step in (33, 1, 1, 2, 3):
                part = [x if x.dim() < 3 else x[:, start : start + step] for x in xs[:-1]]
                before = state.clone()
                o, after = getattr(recurrence, name)(*part, state)
                assert torch.equal(state, before)
                state, start = after, start + step
                out.append(o)
        assert error(torch.cat(out, 1), want) < 1e-6 and error(state, last) < 1e-6

    def test_strided_operands(self) -> None:
        q, k, v, decay, beta, state = operands("gated_delta_rule", 65, 30, 12)
        packed = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1)
        q1, k1, v1 = (x.unflatten(2, (-1, d)) for x, d in zip(packed.split([60, 60, 72], -1), (30, 30, 12), strict=True))
        turned = beta.transpose(1, 2).contiguous().transpose(1, 2)
        across = state.transpose(2, 3).contiguous().transpose(2, 3)
        got = recurrence.gated_delta_rule(q1, k1, v1, decay[:, :, :1].expand_as(decay), turned, across)
        want = recurrence.gated_delta_rule(q, k, v, decay[:, :, :1].expand_as(decay).contiguous(), beta, state)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])

    @pytest.mark.parametrize("name", ["gated_delta_rule", "kimi_delta_attention"])
    def test_the_same_bits_from_any_number_of_threads(self, name: str) -> None:
        xs, before = operands(name, 300, *SIZES, r=8, b=2), torch.get_num_threads()
        results = list[list[Tensor]]()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(run(getattr(recurrence, name), xs))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_what_is_saved_is_written_whole(self) -> None:
        xs = operands("gated_delta_rule", 70, *SIZES)
        for _ in range(2):
            torch.empty(1 << 16).fill_(float("nan"))
            saved = torch.ops.plait.linear_recurrence(*xs, None, 0.3, "delta", True)
            assert all(x.isfinite().all() for x in saved)


@pytest.mark.parametrize("name", FACES)
def test_torch_code_runs_where_there_is_no_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(traits: generated.Traits) -> None:
        pass

    monkeypatch.setattr(generated, "library", none)
    agree(name, operands(name, 70, *SIZES))


def test_a_bad_border_is_refused_before_anything_is_read() -> None:
    xs = operands("gated_delta_rule", 10, 16, 16, n=2)
    for borders in ([0, 5, 11], [0, 12, 10], [1, 5, 10], [-1, 5, 10]):
        with pytest.raises(DataError, match="must rise from 0 to the number of tokens, 10"):
            recurrence.gated_delta_rule(*xs, cu=torch.tensor(borders))


@pytest.mark.parametrize("name", FACES)
def test_no_tokens_and_no_rows(name: str) -> None:
    for t, b in ((0, 1), (3, 0)):
        xs = operands(name, t, 16, 16, b=b)
        o, final, *grads = run(getattr(recurrence, name), xs)
        assert o.shape == xs[2].shape and torch.equal(final, xs[-1])
        assert [g.shape for g in grads] == [x.shape for x in xs]


def test_operands_on_two_devices_are_refused() -> None:
    q, k, v, decay, beta, state = operands("gated_delta_rule", 5, 16, 16)
    with pytest.raises(TypeMismatch, match="operands are on cpu and meta; move all to one device"):
        recurrence.gated_delta_rule(q, k.to("meta"), v, decay, beta, state)


def test_float64_and_half_run_as_torch_code() -> None:
    for dtype in (torch.float64, torch.float16):
        q, k, v, decay, beta, _ = (x.to(dtype) for x in operands("gated_delta_rule", 5, 16, 16))
        assert not generated.takes(recurrence.Operands(q, k, v, decay, beta, None, None, 1.0, True))


def test_the_report_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    form = form_of(ops.gated_delta_rule, "cpu")
    assert form is not None and "; C++ by " in form.reason
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert form.reason.endswith("torch code: CXX names no program: 'no-such-compiler'")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler (c++, g++, clang++); install one or set CXX" in form.reason


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of another processor")
@pytest.mark.parametrize("flag", ["-march=x86-64", "-march=x86-64-v3"])
def test_narrower_vectors(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [f for f in build.FLAGS[0] if not f.startswith("-m")]
    monkeypatch.setattr(build, "FLAGS", ((*plain, flag),))
    monkeypatch.setattr(generated, "library", generated.library.__wrapped__)
    agree("kimi_delta_attention", operands("kimi_delta_attention", 70, *SIZES))
