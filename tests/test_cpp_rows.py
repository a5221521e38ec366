"""Row kernels in C++: values and gradients against float64, what torch demands of the ops, and which kernels they are for."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from plait.api import compile, program
from plait.ir import Graph, TypeMismatch, evaluate, parse
from plait.lowering import lower
from plait.lowering.cpp import build, compiler
from plait.lowering.cpp.rows import cpp_kernel
from plait.lowering.cpp_ops import CPP, cpp_op
from plait.lowering.cpp_parts import parted
from plait.lowering.kernels import NAMES, layout
from plait.lowering.rows import Declined
from plait.lowering.triton_ops import KernelOp, registered
from plait.passes import DEFAULT, Pipeline
from torch import Tensor

from tests.row_cases import CASES, errors, exact, gradient_of, graph_of, operands

built = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
CLOSE = {"f32": 3e-6, "bf16": 1e-2, "f16": 2e-3}
# The widths of a case that are tried, since each is a library to be built; others are tried by hand.
WIDTHS = [("norms", 48), ("norm_gate", 8), ("norm_gate", 1000), ("grouped", 48), ("qkv", 48), ("activations", 48)]
NORM = """
@kernel
def residual_norm(x: f32[b, s, 65], delta: f32[b, s, 65], w: f32[65]):
    y = add(x, delta)
    n = rms_norm(y, w, zero_centered=True)
    return y, n
"""
PREP = """
@kernel
def qkv_prep(y: f32[b, s, 100], w: f32[10], p: i64[b, s]):
    y1, y2, y3 = split(y, sizes=(60, 20, 20))
    q = reshape(y1, pattern='... (h=6 d) -> ... h d')
    k = reshape(y2, pattern='... (h=2 d) -> ... h d')
    v = reshape(y3, pattern='... (h=2 d) -> ... h d')
    q1 = rms_norm(q, w, zero_centered=True)
    q2 = rope(q1, p)
    k1 = rope(k, p)
    return v, q2, k1
"""


def run(graph: Graph, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Every result of a graph, one that stands twice once."""
    made = layout(graph)
    return made.results(CPP.compute(made.computed, xs), xs)


def op_of(text: str) -> KernelOp:
    return cpp_op(parse(text.strip()))[0]


def results(op: KernelOp, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    made = op.call(*xs)
    return made if isinstance(made, tuple) else (made,)


# -- numbers ------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("name", "width"), WIDTHS[:1] + WIDTHS[4:5])
def test_values_and_gradients_in_every_dtype(name: str, width: int, dtype: str) -> None:
    agree(name, width, dtype)


@built
@pytest.mark.parametrize(("name", "width"), WIDTHS[1:4] + WIDTHS[5:])
def test_values_and_gradients(name: str, width: int) -> None:
    agree(name, width, "f32")


def agree(name: str, width: int, dtype: str) -> None:
    graph = graph_of(CASES[name][0], width, dtype)
    for b, s in ((1, 1), (5, 13), (2, 65)):
        sizes = {"b": b, "s": s}
        xs = operands(graph, sizes)
        backward, ds = gradient_of(graph, xs, sizes)
        assert cpp_kernel(graph) and cpp_kernel(backward)
        for found, wanted in ((run(graph, xs), exact(graph, xs)), (run(backward, ds), exact(backward, ds))):
            assert all(e < CLOSE[dtype] for e in errors(found, wanted)), (b, s)


FUNCTION = """
@kernel
def one(x: f32[b, s, 33]):
    y = {op}(x)
    return y
"""


@built
@pytest.mark.parametrize("op", ["tanh", "softplus", "gelu", "sigmoid", "neg_exp"])
def test_each_number_of_a_function_is_close(op: str) -> None:
    """Relative to each number, not to all: small ones count as much, but where a function is a difference from 1."""
    graph = parse(FUNCTION.format(op=op).strip())
    steps = torch.linspace(-20, 20, 33 * 301)
    x = torch.cat([steps, steps / 1000]).reshape(2, 301, 33)
    (y,), (want,) = run(graph, [x]), exact(graph, [x])
    scale = want.abs().clamp_min(2.0 if op == "gelu" else 1e-7)
    assert float(((y.double() - want).abs() / scale).max()) < 5e-7
    odd = torch.tensor([math.nan, math.inf, 88.0, -88.0, 0.0, 1e-30]).repeat(1, 11, 6)[..., :33].contiguous()
    (y,), (want,) = run(graph, [odd]), exact(graph, [odd])
    assert torch.equal(y.isnan(), want.isnan())
    finite = want.isfinite() & (want.abs() < 1e38)
    torch.testing.assert_close(y[finite].double(), want[finite], rtol=1e-6, atol=1e-7)


@built
def test_far_positions_stay_sharp() -> None:
    graph = parse(PREP.strip())
    xs = operands(graph, {"b": 2, "s": 5})
    xs[2] = xs[2] + 1_000_003
    assert all(e < 3e-6 for e in errors(run(graph, xs), exact(graph, xs)))


# -- operands unlike the graph's ----------------------------------------------------------


@built
def test_strides_are_followed() -> None:
    graph = parse(NORM.strip())
    x, delta, w = operands(graph, {"b": 3, "s": 7})
    wide = torch.stack([x, x], -1)
    forms = [wide[..., 0], x.transpose(0, 1).contiguous().transpose(0, 1), x[:1].expand(x.shape), x[..., :1].expand(x.shape)]
    for form in forms:
        assert not form.is_contiguous()
        want = exact(graph, [form, delta, w])
        assert all(e < 3e-6 for e in errors(run(graph, [form, delta, w]), want))


@built
@pytest.mark.parametrize("text", [NORM, PREP], ids=["norm", "prep"])
def test_nothing_in_is_nothing_out(text: str) -> None:
    op = op_of(text)
    for shape in ({"b": 0, "s": 5}, {"b": 2, "s": 0}):
        xs = [x.requires_grad_() if x.is_floating_point() else x for x in operands(op.kernel, shape)]
        made = results(op, xs)
        grads = torch.autograd.grad([y.sum() for y in made], [x for x in xs if x.requires_grad])
        assert all(y.numel() == 0 for y in made) and not any(bool(g.any()) for g in grads)


@built
def test_wrong_operands_are_named() -> None:
    op = op_of(NORM)
    x, delta, w = operands(op.kernel, {"b": 2, "s": 5})
    with pytest.raises(TypeMismatch, match=r"delta is \[2, 4, 65\], its s must be 5"):
        op.call(x, delta[:, :4], w)
    with pytest.raises(TypeMismatch, match=r"w is \[64\], its 65 must be 65"):
        op.call(x, delta, w[:64])


@built
def test_mixed_dtypes_have_a_kernel_of_their_own_and_others_are_torch_code() -> None:
    op = op_of(NORM)
    x, delta, w = operands(op.kernel, {"b": 2, "s": 5})
    y, n = op.call(x, delta.bfloat16(), w.bfloat16())
    want = exact(op.kernel, [x, delta.bfloat16(), w.bfloat16()])
    assert {y.dtype, n.dtype} == {torch.float32} and all(e < 3e-6 for e in errors((y, n), want))
    double = [v.double() for v in (x, delta, w)]
    assert all(e < 1e-14 for e in errors(op.call(*double), exact(op.kernel, double)))


# -- torch --------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("text", [NORM, PREP], ids=["norm", "prep"])
def test_torch_accepts_the_ops(text: str) -> None:
    op = op_of(text)
    xs = operands(op.kernel, {"b": 2, "s": 5})
    few = ("test_schema", "test_faketensor")
    wanting = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in xs)
    torch.library.opcheck(op.forward, wanting, test_utils=(*few, "test_autograd_registration", "test_aot_dispatch_dynamic"))
    made = results(op, xs)
    rest = ([x.is_floating_point() for x in xs], " ".join(NAMES[x.dtype] for x in xs))
    torch.library.opcheck(op.backward, (*xs, *made, *map(torch.randn_like, made), *rest, False), test_utils=few)
    torch.library.opcheck(op.backward, (*xs, *made, *map(torch.randn_like, made), *rest, True), test_utils=few)


@built
def test_compiled_whole_with_lengths_that_vary() -> None:
    op = op_of(PREP)
    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage] # it has no public name
    seen = list[list[str]]()

    def look(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.append([str(n.target) for n in module.graph.nodes if n.op == "call_function"])
        return module

    compiled: Any = torch.compile(lambda *xs: op.call(*xs), fullgraph=True, backend=look, dynamic=True)
    for shape in ({"b": 2, "s": 5}, {"b": 3, "s": 4}):
        xs = operands(op.kernel, shape)
        assert all(torch.equal(a, b) for a, b in zip(compiled(*xs), results(op, xs), strict=True))
    assert len(seen) == 1


@built
def test_threads_change_no_bit() -> None:
    graph = parse(NORM.strip())
    sizes, before = {"b": 3, "s": 700}, torch.get_num_threads()
    xs = operands(graph, sizes)
    backward, ds = gradient_of(graph, xs, sizes)
    try:
        found = list[tuple[Tensor, ...]]()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((*run(graph, xs), *run(backward, ds)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(e < 3e-6 for e in errors(found[0][2:], exact(backward, ds)))


# -- which kernels ------------------------------------------------------------------------


@built
def test_what_is_cheap_or_narrow_is_not_for_cpp() -> None:
    assert "along rows" in cpp_op(graph_of(CASES["norms"][0], 48))[1]
    assert "exponentials" in cpp_op(graph_of(CASES["glu"][0], 256))[1]
    for name, why in (("gates", "48 numbers a row"), ("glu", "48 numbers"), ("conv", "and cheap"), ("preamble", "beyond")):
        with pytest.raises(Declined, match=why):
            cpp_op(graph_of(CASES[name][0], 48))
    with pytest.raises(Declined, match="float64"):
        cpp_op(graph_of(CASES["norms"][0], 48, "f64"))


def test_without_a_compiler_everything_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Declined, match="no C\\+\\+ compiler"):
        cpp_op(parse(NORM.strip()))
    graph = parse(NORM.strip())
    xs = operands(graph, {"b": 2, "s": 5})
    monkeypatch.setattr(build, "_WARNED", set[str]())
    assert registered(graph, CPP) and all(e < 3e-6 for e in errors(run(graph, xs), exact(graph, xs)))


@built
def test_the_report_says_what_runs_in_cpp() -> None:
    graph = Pipeline.parse(DEFAULT).run(program("llama-3-8b-tiny", dtype="f32"))
    found = {c.op: c.why for c in lower(graph).choices if c.runs == "C++ rows"}
    assert {"residual_norm", "qkv_prep", "glu"} <= set(found)


@built
def test_what_is_behind_a_convolution_is_rows() -> None:
    graph = graph_of(CASES["preamble"][0], 48, "f64")
    made = parted(graph)
    assert [n.op.name for n in made.nodes] == ["causal_conv1d", "preamble"] and parted(made) is made
    xs = operands(graph, {"b": 2, "s": 5})
    assert all(torch.equal(a, b) for a, b in zip(evaluate(made, *xs), evaluate(graph, *xs), strict=True))
    whole = Pipeline.parse(DEFAULT).run(program("qwen3-next-80b-a3b-tiny", dtype="f32"))
    assert "preamble" in {c.op for c in lower(whole).choices if c.runs == "C++ rows"}


@built
@pytest.mark.parametrize("preset", ["llama-3-8b-tiny", "qwen3-next-80b-a3b-tiny"])
def test_a_model_is_the_same(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients, with the kernels and op by op."""
    tokens = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    found = list[list[Tensor]]()
    for own in (True, False):
        if not own:
            monkeypatch.setattr(lowering_module(), "cpp_op", _none)
        torch.manual_seed(0)
        model = compile(preset, dtype="f32", jit=False, mode="train")
        loss = model.loss(tokens)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(e < 1e-5 for e in errors(found[0], [x.double() for x in found[1]]))


def lowering_module() -> object:
    return sys.modules[lower.__module__]


def _none(kernel: Graph) -> object:
    raise Declined("op by op")
