"""The short convolution's generated kernels, interpreted, against the op's meaning in float64: values, gradients, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from plait.ir import PlaitError, ops
from plait.ir.errors import TypeMismatch
from plait.lowering.attending import Step, conv_launch, faces, interpreted
from plait.lowering.attending.conv_source import ConvTraits, conv_source, spread_source, taps_source
from plait.lowering.attending.run import function_of
from plait.lowering.gpu import AccessError, run, watch
from plait.lowering.recurrent.run import named
from torch import Tensor

from tests.laws import error

FORMS = faces(interpreted=True)
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    """One convolution."""

    t: int
    c: int = 20
    taps: int = 4
    batch: int = 1
    dtype: torch.dtype = torch.float32
    bias: bool = False
    state: bool = False
    cu: tuple[int, ...] = ()
    act: str = "none"

    def operands(self) -> list[Tensor | None]:
        """x, w, bias, state, cu."""
        rand = torch.Generator().manual_seed(self.t + self.taps)
        n = len(self.cu) - 1 if self.cu else self.batch
        shapes = [(self.batch, self.t, self.c), (self.c, self.taps), (self.c,), (n, self.c, self.taps - 1)]
        given = [True, True, self.bias, self.state]
        made = [
            torch.randn(s, generator=rand).to(self.dtype) if there else None for s, there in zip(shapes, given, strict=True)
        ]
        return [*made, torch.tensor(self.cu) if self.cu else None]


PACKED = (0, 0, 1, 3, 63, 100, 100)  # one begins on the last row of a tile
CASES = {
    **{f"dense {t}": Case(t, batch=2, state=True, bias=True, act="silu") for t in (2, 63, 65, 130)},
    **{f"taps {k}": Case(65, taps=k, state=True, cu=(0, 5, 64, 65), act="silu") for k in (2, 3, 5, 8)},
    "packed": Case(100, cu=PACKED),
    "packed with all": Case(100, c=130, cu=PACKED, bias=True, state=True, act="silu"),
    "packed of one": Case(1, cu=(0, 1), bias=True, act="silu"),
    "plain": Case(40, c=16),
}


def wide(xs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [x.double() if x is not None and x.is_floating_point() else x for x in xs]


def results(form: Any, xs: Sequence[Tensor | None], act: str) -> list[Tensor]:
    """y, the last inputs, and the gradient of every operand under fixed random weights of both."""
    xs = [x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in xs]
    made, rand = form(*xs, act=act), torch.Generator().manual_seed(9)
    drawn = [torch.randn(y.shape, generator=rand).to(torch.bfloat16).to(y.dtype) for y in made]
    leaves = [x for x in xs if x is not None and x.requires_grad]
    return [*(y.detach() for y in made), *torch.autograd.grad(made, leaves, drawn)]


def agree(case: Case) -> None:
    xs = case.operands()
    got, want = results(FORMS["causal_conv1d"], xs, case.act), results(ops.causal_conv1d.reference, wide(xs), case.act)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert error(a, b) < LIMITS[case.dtype], f"result {i}: {error(a, b):.1e}"


# -- numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    agree(CASES[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["packed with all", "dense 63"])
def test_half_types(name: str, dtype: torch.dtype) -> None:
    agree(replace(CASES[name], dtype=dtype))


@pytest.mark.parametrize("name", ["packed with all", "packed", "dense 65"])
def test_gradients_that_are_ops(name: str) -> None:
    """What `differentiate` calls: the transpose, and the taps' gradient."""
    x, w, _, state, cu = CASES[name].operands()
    assert x is not None and w is not None
    g, final = torch.randn(x.shape), None if state is None else torch.randn(state.shape)
    got = [*FORMS["anticausal_conv1d"](g, w, final, cu), FORMS["conv1d_taps"](x, g, state, cu, k=w.shape[1])]
    want = [
        *ops.anticausal_conv1d.reference(*wide([g, w, final]), cu),
        ops.conv1d_taps.reference(*wide([x, g, state]), cu, k=w.shape[1]),
    ]
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 3e-6


def test_parts_of_wider_rows_and_cotangents_of_one_result() -> None:
    x, w, *_ = CASES["packed"].operands()
    assert x is not None and w is not None
    part = torch.cat([torch.randn(1, 100, 12), x, torch.randn(1, 100, 7)], 2)[:, :, 12:32]
    for given in (part, x.transpose(1, 2).contiguous().transpose(1, 2)):
        leaf = given.detach().requires_grad_()
        y, last = FORMS["causal_conv1d"](leaf, w, cu=torch.tensor(PACKED))
        want = ops.causal_conv1d.reference(x.double(), w.double(), cu=torch.tensor(PACKED))
        assert error(y.detach(), want[0]) < 1e-6 and error(last.detach(), want[1]) < 1e-6
        (d,) = torch.autograd.grad(last.sum(), leaf)
        assert float(d.sum()) == float((last != 0).sum())


def test_empty_calls() -> None:
    x, w = torch.randn(1, 0, 20), torch.randn(20, 4)
    y, last = FORMS["causal_conv1d"](x, w, cu=torch.tensor([0, 0]))
    assert y.shape == (1, 0, 20) and last.shape == (1, 20, 3) and not last.any()
    assert not FORMS["conv1d_taps"](x, x, cu=torch.tensor([0, 0]), k=4).any()


def test_borders_that_leave_the_row_touch_nothing_outside() -> None:
    x, w, bias, state, _ = CASES["packed with all"].operands()
    assert state is not None
    y, last = FORMS["causal_conv1d"](x, w, bias, state[:3], torch.tensor([0, 130, 40, 90]), act="silu")
    assert y.isfinite().all() and last.isfinite().all()


# -- memory -------------------------------------------------------------------------------

WRITES = {"conv": {"p_y"}, "final": {"p_final"}, "taps": {"p_sums", "p_dz"}, "spread": {"p_dx"}, "past": {"p_dstate"}}


@pytest.mark.parametrize("name", ["packed with all", "dense 63"])
def test_every_element_is_written_once_and_bits_are_the_same(name: str) -> None:
    case = CASES[name]
    x, w, bias, state, cu = case.operands()
    assert x is not None and w is not None and state is not None
    dy, dlast = torch.randn(x.shape), torch.randn(state.shape)

    def all_of(how: Any) -> list[Tensor]:
        y, last = conv_launch.forward(x, w, bias, state, cu, how, act=case.act)
        dw, dbias, dz = conv_launch.taps(x, dy, state, cu, how, k=4, w=w, bias=bias, act=case.act)
        return [y, last, dw, dbias, *conv_launch.transposed(dz, w, dlast, cu, how)]

    def watched(step: Step) -> None:
        """The results of a step, filled with NaN before it."""
        made = WRITES[step.function.split("_")[0]] & {*step.arguments}
        for pointer in made:
            step.arguments[pointer].fill_(float("nan"))
        with watch({name: y for name, y in step.arguments.items() if isinstance(y, Tensor)}) as traffic:
            interpreted(step)
        for pointer in made:
            count = traffic[pointer]
            assert count.distinct_stores == step.arguments[pointer].numel() and not count.stored_twice, pointer
        assert not any(traffic[name].raced or traffic[name].atomics for name in traffic)

    for a, b in zip(all_of(watched), all_of(interpreted), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_planted_mistakes_are_caught() -> None:
    x, w, bias, state, cu = CASES["packed with all"].operands()
    assert x is not None and w is not None

    def changed(before: str, after: str) -> Any:
        def go(step: Step) -> None:
            wrong = replace(step, source=replace(step.source, text=step.source.text.replace(before, after)))
            run(function_of(wrong), (wrong.programs,), **named(wrong.arguments))

        return go

    with pytest.raises(AccessError, match=r"conv_silu_bias_state_packed.*p_of\[100\]"):
        conv_launch.forward(x, w, bias, state, cu, changed("start + o_t < rows", "start + o_t <= rows"), act="silu")
    y, _ = conv_launch.forward(x, w, bias, state, cu, interpreted, act="silu")
    for before, after in (("(back >= 0)", "(back > 0)"), ("< K - 1:", "< 1:")):
        assert error(conv_launch.forward(x, w, bias, state, cu, changed(before, after), act="silu")[0], y) > 1e-3


# -- torch --------------------------------------------------------------------------------


def test_torch_sees_the_ops() -> None:
    x, w, bias, state, cu = replace(CASES["packed with all"], t=9, c=6, cu=(0, 2, 2, 9)).operands()
    leaves = tuple(y.requires_grad_() for y in (x, w, bias, state) if y is not None)
    torch.library.opcheck(torch.ops.plait.conv_kernels, (*leaves, cu, "silu", True))
    g, taps, *_ = (y.detach() for y in leaves)
    torch.library.opcheck(torch.ops.plait.conv_kernels_transposed, (g, taps, None, cu, True))
    torch.library.opcheck(torch.ops.plait.conv_kernels_taps, (g, g, None, cu, 4, True))


def test_one_compilation_for_every_length_and_no_second_derivative() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    form = FORMS["causal_conv1d"]
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (40, 65, 70):
        xs = Case(t, bias=True, cu=(0, 3, t)).operands()
        for a, b in zip(results(compiled, xs, "silu"), results(form, xs, "silu"), strict=True):
            assert torch.equal(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    x, w, *_ = CASES["packed"].operands()
    assert x is not None and w is not None
    (first,) = torch.autograd.grad(form(x.requires_grad_(), w)[0].sum(), x, create_graph=True)
    with pytest.raises(PlaitError, match="has no second derivative"):
        first.sum().backward()


def test_operands_that_do_not_fit_are_named() -> None:
    x, w, _, state, cu = CASES["packed with all"].operands()
    assert x is not None and w is not None and state is not None
    form = FORMS["causal_conv1d"]
    with pytest.raises(TypeMismatch, match="w is"):
        form(x, w[:7])
    with pytest.raises(TypeMismatch, match="state is"):
        form(x, w, None, state[:2], cu)
    with pytest.raises(TypeMismatch, match="act is"):
        form(x, w, act="gelu")
    with pytest.raises(TypeMismatch, match="borders of one packed row"):
        form(torch.cat([x, x]), w, cu=cu)


def test_what_kernels_decline_runs_as_torch_code() -> None:
    for case in (Case(30, taps=1), Case(30, taps=9), Case(30, dtype=torch.float64)):
        x, w, *_ = case.operands()
        assert x is not None and w is not None
        want = ops.causal_conv1d.reference(x.double(), w.double())
        assert all(
            a.shape == b.shape and float((a - b).abs().sum()) < 1e-3
            for a, b in zip(FORMS["causal_conv1d"](x, w), want, strict=True)
        )


# -- text ---------------------------------------------------------------------------------


def test_the_source_is_complete_and_names_what_it_is() -> None:
    traits = ConvTraits("silu", bias=True, state=True, packed=True, final=True)
    for source in (conv_source(traits), taps_source(traits), spread_source(traits)):
        assert "$" not in source.text and max(map(len, source.text.splitlines())) <= 140
    assert conv_source(traits).text.startswith('"""Convolution, made by plait: silu bias state packed final."""')
