"""Generated attention kernels, interpreted, against the op's meaning in float64: values, gradients, memory, torch's view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from plait.ir import PlaitError, ops
from plait.ir.errors import TypeMismatch
from plait.lowering.attending import (
    Operands,
    Step,
    Traits,
    backward,
    backward_source,
    decode,
    decode_source,
    faces,
    forward,
    forward_source,
    interpreted,
)
from plait.lowering.attending.run import function_of
from plait.lowering.gpu import AccessError, run, watch
from plait.lowering.recurrent.run import named
from torch import Tensor

FORM = faces(interpreted=True)["attention"]
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    """One attention: sizes, then what it has besides q, k and v."""

    t: int
    s: int = 0  # as many as queries where it is 0
    heads: tuple[int, int] = (2, 1)
    widths: tuple[int, int] = (16, 16)
    batch: int = 1
    dtype: torch.dtype = torch.float32
    sinks: bool = False
    cu: tuple[int, ...] = ()
    at: int = -1
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def operands(self) -> list[Tensor | None]:
        """q, k, v, sinks, cu, at."""
        rand = torch.Generator().manual_seed(self.t + self.heads[0])
        (h, g), (d, e), s = self.heads, self.widths, self.s or self.t
        shapes = [(self.batch, self.t, h, d), (self.batch, s, g, d), (self.batch, s, g, e), *([(h,)] if self.sinks else [])]
        made: list[Tensor | None] = [torch.randn(shape, generator=rand).to(self.dtype) for shape in shapes]
        made += [] if self.sinks else [None]
        return [*made, torch.tensor(self.cu) if self.cu else None, torch.tensor(self.at) if self.at >= 0 else None]

    def described(self) -> Operands:
        q, k, v, sinks, cu, at = self.operands()
        assert q is not None and k is not None and v is not None
        given = self.options
        options = given.get("causal", True), given.get("window", 0), given.get("softcap", 0.0)
        return Operands(q, k, v, sinks, cu, at, *options, given.get("scale", q.shape[3] ** -0.5))


FULL = {"window": 9, "softcap": 3.0, "scale": 0.4}
CASES = {
    **{f"causal {t}": Case(t, heads=(4, 2)) for t in (1, 63, 65)},
    "causal 130": Case(130),
    "wide heads": Case(65, widths=(128, 256)),
    "heads of 64": Case(100, heads=(3, 1), widths=(64, 64)),
    "heads that fill no tile": Case(65, heads=(2, 2), widths=(20, 88)),
    "window": Case(130, options={"window": 20}),
    "window without causal": Case(100, options={"window": 70, "causal": False}),
    "open": Case(63, 130, options={"causal": False}),
    "softcap": Case(65, options={"softcap": 2.0}),
    "sinks": Case(65, batch=2, sinks=True),
    "packed": Case(130, cu=(0, 0, 1, 64, 100, 100, 130)),
    "packed with all": Case(100, heads=(4, 2), widths=(24, 40), sinks=True, cu=(0, 3, 70, 100), options=FULL),
    "behind a cache": Case(5, 100, heads=(4, 2), sinks=True, at=70, options=FULL),
    "keys before the queries": Case(33, 130, heads=(4, 2)),
    "all with all": Case(130, heads=(4, 2), widths=(16, 24), sinks=True, options=FULL),
}


def error(got: Tensor, want: Tensor) -> float:
    """Relative, but to a gradient that is none: alone with one key, a query changes nothing."""
    assert got.shape == want.shape and got.isfinite().all()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1.0))


def results(form: Any, xs: list[Tensor | None], options: Mapping[str, Any]) -> list[Tensor]:
    """o, and the gradient of every operand under fixed random weights."""
    xs = [x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in xs]
    o = form(*xs, **options)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16).to(o.dtype)
    leaves = [x for x in xs if x is not None and x.requires_grad]
    return [o.detach(), *torch.autograd.grad(o, leaves, weights)]


def agree(case: Case) -> None:
    xs = case.operands()
    got = results(FORM, xs, case.options)
    want = results(
        ops.attention.reference, [x.double() if x is not None and x.is_floating_point() else x for x in xs], case.options
    )
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert error(a, b) < LIMITS[case.dtype], f"result {i}: {error(a, b):.1e}"


# -- numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    agree(CASES[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["wide heads", "packed with all"])
def test_half_types(name: str, dtype: torch.dtype) -> None:
    agree(replace(CASES[name], dtype=dtype))


STEPS = {
    "one": Case(1, 130, heads=(8, 2), widths=(20, 40), batch=3),
    "in a cache": Case(1, 300, heads=(4, 1), batch=2, at=77, sinks=True),
    "in a window": Case(3, 300, heads=(4, 2), at=260, sinks=True, options=FULL),
    "at the start": Case(2, 65, heads=(2, 2), at=0),
    "all keys": Case(4, 600, options={"causal": False}),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_queries_share_out_the_keys(name: str, dtype: torch.dtype) -> None:
    case = replace(STEPS[name], dtype=dtype)
    xs, made = case.operands(), list[str]()
    with torch.no_grad():
        got = FORM(*xs, **case.options)
    want = ops.attention.reference(*(x.double() if x is not None and x.is_floating_point() else x for x in xs), **case.options)
    assert error(got, want) < LIMITS[dtype]
    decode(case.described(), lambda step: made.append(step.function.split("_")[0]))
    assert made == ["split", "join"]


def test_a_query_that_sees_nothing_gives_nothing() -> None:
    case = Case(65, 40)  # the first queries stand before every key
    got = results(FORM, case.operands(), {})
    assert all(x.isfinite().all() for x in got) and not got[0][:, :25].any() and not got[1][:, :25].any()
    want = ops.attention.reference(*(x.double() for x in case.operands()[:3] if x is not None))
    assert error(got[0][:, 25:], want[:, 25:]) < 3e-6


def test_operands_that_are_views_and_of_other_dtypes() -> None:
    """Parts of wider rows, heads first, and keys of another dtype."""
    q, k, v, *_ = Case(70, heads=(4, 2), batch=2).operands()
    assert q is not None and k is not None and v is not None
    want = ops.attention.reference(q.double(), k.double(), v.double())
    wide = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
    parts = [x.unflatten(2, (-1, 16)) for x in wide.split([64, 32, 32], -1)]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for given in (parts, turned, [q, k.double(), v.double()], [q, k.expand(2, -1, -1, -1), v]):
        assert error(FORM(*given), want) < 3e-6


def test_empty_calls() -> None:
    q, k, v, *_ = Case(5).operands()
    assert q is not None and k is not None and v is not None
    assert FORM(q[:0], k[:0], v[:0]).shape == (0, 5, 2, 16) and FORM(q[:, :0], k, v).shape == (1, 0, 2, 16)
    xs = [q[:, :0].clone().requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_()]
    FORM(*xs).sum().backward()
    assert xs[1].grad is not None and not xs[1].grad.any()
    assert not FORM(q, k[:, :0], v[:, :0]).any()


# -- memory -------------------------------------------------------------------------------

WRITES = {
    "attend": {"p_o", "p_lse"},
    "queries": {"p_dq", "p_delta"},
    "keys": {"p_dk"},
    "values": {"p_dv"},
    "split": {"p_acc", "p_top", "p_sum"},
    "join": {"p_o"},
}


@pytest.mark.parametrize("name", ["packed with all", "behind a cache", "heads that fill no tile"])
def test_every_element_is_written_once_and_bits_are_the_same(name: str) -> None:
    x = CASES[name].described()
    do = torch.randn(*x.q.shape[:3], x.v.shape[3])

    def all_of(how: Any) -> list[Tensor]:
        o, lse = forward(x, how)
        d = backward(x, o, lse, do, how)
        return [y for y in (o, lse, d.q, d.k, d.v, d.sinks, decode(x, how) if x.few else None) if y is not None]

    def watched(step: Step) -> None:
        """The results of a step, filled with NaN before it."""
        made = WRITES[step.function.split("_")[0]]
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


def changed(before: str, after: str) -> Any:
    """Runs a step with a mistake in its text."""

    def go(step: Step) -> None:
        text = step.source.text.replace(before, after)
        wrong = replace(step, source=replace(step.source, text=text))
        run(function_of(wrong), (wrong.programs,), **named(wrong.arguments))

    return go


def test_planted_mistakes_are_caught() -> None:
    x = CASES["causal 65"].described()
    with pytest.raises(AccessError, match=r"attend_causal.*p_k"):
        forward(x, changed("m_j = o_j < s", "m_j = o_j <= s"))
    o, _ = forward(x, interpreted)
    late, _ = forward(x, changed("o_c + at + 1)", "o_c + at + 2)"))
    early, _ = forward(x, changed("tl.cdiv(tl.maximum(tl.max(lo, 0), 0), B)", "tl.maximum(tl.max(lo, 0), 0) // B"))
    assert error(late, o) > 1e-3 and error(early, o) < 1e-6
    windowed = replace(x, window=20)
    inner = changed("tl.cdiv(tl.maximum(tl.max(lo, 0), 0), B)", "tl.maximum(tl.max(lo, 0), 0) // B")
    longer = replace(CASES["causal 130"].described(), window=100)
    assert error(forward(longer, inner)[0], forward(longer, interpreted)[0]) > 1e-3
    assert error(forward(windowed, interpreted)[0], o) > 1e-3


# -- torch --------------------------------------------------------------------------------


def test_torch_sees_the_ops() -> None:
    q, k, v, sinks, _, at = Case(3, 9, sinks=True, at=5).operands()
    leaves = tuple(x.requires_grad_() for x in (q, k, v, sinks) if x is not None)
    torch.library.opcheck(torch.ops.plait.attention_kernels, (*leaves, None, at, True, 9, 3.0, 0.4, True, True))


def test_one_compilation_for_every_length_and_no_second_derivative() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(FORM, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (65, 70, 30):
        xs = Case(t, sinks=True).operands()
        for a, b in zip(results(compiled, xs, FULL), results(FORM, xs, FULL), strict=True):
            assert torch.equal(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    xs = [x.requires_grad_() for x in Case(3).operands()[:3] if x is not None]
    (first,) = torch.autograd.grad(FORM(*xs).sum(), xs[0], create_graph=True)
    with pytest.raises(PlaitError, match="has no second derivative"):
        first.sum().backward()


def test_autocast_leaves_the_kernels_their_precision() -> None:
    xs = Case(20, sinks=True).operands()
    with torch.autocast("cpu", torch.bfloat16):
        inside = FORM(*xs)
    assert torch.equal(inside, FORM(*xs))


def test_operands_that_do_not_fit_are_named() -> None:
    q, k, v, *_ = Case(5, heads=(4, 2)).operands()
    assert q is not None and k is not None and v is not None
    with pytest.raises(TypeMismatch, match="they must be"):
        FORM(q[:, :, :3], k, v)
    with pytest.raises(TypeMismatch, match="sinks are"):
        FORM(q, k, v, torch.zeros(3))
    with pytest.raises(TypeMismatch, match="every query must stand at a key"):
        FORM(q, k[:, :4], v[:, :4], None, torch.tensor([0, 4]))
    with pytest.raises(TypeMismatch, match="it must be one number"):
        FORM(q, k, v, None, None, torch.tensor([0, 1]))


def test_what_kernels_decline_runs_as_torch_code() -> None:
    for case in (Case(5, options={"scale": -0.3}), Case(5, options={"scale": 0.0, "window": 3}), Case(5, widths=(300, 16))):
        q, k, v, *_ = case.operands()
        assert q is not None and k is not None and v is not None
        want = ops.attention.reference(q.double(), k.double(), v.double(), **case.options)
        assert error(FORM(q, k, v, **case.options), want) < 1e-5
        assert error(FORM(q.double(), k, v, **case.options), want) < 1e-12


def test_borders_that_leave_the_row_touch_nothing_outside() -> None:
    q, k, v, *_ = Case(20).operands()
    assert FORM(q, k, v, None, torch.tensor([0, 30, 10, 20])).isfinite().all()


# -- text ---------------------------------------------------------------------------------


def test_the_source_is_complete_and_names_what_it_is() -> None:
    traits = Traits(causal=True, window=True, softcap=True, sinks=True, packed=False, at=True)
    found = [forward_source(traits), backward_source(traits), decode_source(traits)]
    assert [set(x.functions) for x in found] == [{"attend"}, {"queries", "keys", "values"}, {"split", "join"}]
    for source in found:
        assert "$" not in source.text and max(map(len, source.text.splitlines())) <= 140
    assert found[0].text.startswith('"""Attention, made by plait: causal window softcap sinks at."""')
