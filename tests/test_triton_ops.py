"""Kernel graphs as torch ops: values, gradients, what torch demands of an op, and operands that are unlike the graph's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from plait.ir import DTYPES, Graph, PlaitError, TypeMismatch, evaluate, parse
from plait.lowering import triton_ops
from plait.lowering.kernels import NAMES, gradient, layout, retyped
from plait.lowering.rows import Declined, row_kernel
from plait.lowering.triton_ops import KernelOp, backward_declined, kernel_op
from torch import Tensor
from torch._subclasses import FakeTensorMode

TEXT = {
    "norm_gate": """
@kernel
def norm_gate(z: f32[b, s, 63], o: f32[b, s, 3, 21], w: f32[21]):
    y1 = reshape(z, pattern='... (h=3 d) -> ... h d')
    y2 = rms_norm(o, w)
    y3 = silu(y1)
    y4 = mul(y2, y3)
    y5 = reshape(y4, pattern='b t h d -> b t (h d)')
    return y5
""",
    "residual_norm": """
@kernel
def residual_norm(x: f32[b, s, 65], delta: f32[b, s, 65], w: f32[65]):
    y = add(x, delta)
    n = rms_norm(y, w, zero_centered=True)
    return y, n
""",
    "gates": """
@kernel
def gates(a: f32[b, s, 5], bias: f32[5], rate: f32[5], c: f32[b, s, 5]):
    y1 = add_bias(a, bias)
    y2 = softplus(y1)
    y3 = neg_exp(rate)
    y4 = scale_columns(y2, y3)
    y5 = sigmoid(c)
    return y4, y5
""",
    "glu": """
@kernel
def glu(y: f32[2*b*s, 130]):
    y1, y2 = split(y, sizes=(65, 65))
    y3 = silu(y1)
    y4 = mul(y3, y2)
    return y4
""",
    "qkv_prep": """
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
""",
    "preamble": """
@kernel
def preamble(y: f32[b, s, 24], conv: f32[24, 4], bias: f32[24], state: f32[b, 24, 3]):
    y1, final = causal_conv1d(y, conv, bias, state, act='silu')
    y2, y3 = split(y1, sizes=(9, 15))
    y4 = reshape(y2, pattern='... (h=3 d) -> ... h d')
    y5 = l2_norm(y4)
    y6 = reshape(y3, pattern='... (h=3 d) -> ... h d')
    return final, y5, y6
""",
}
NAMED = {name: parse(text.strip()) for name, text in TEXT.items()}
every = pytest.mark.parametrize("name", NAMED)
both = pytest.mark.parametrize("interpreted", [False, True], ids=["torch", "interpreted"])


def operands(kernel: Graph, batch: int = 2, length: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = {"b": batch, "s": length, "2*b*s": 2 * batch * length}
    shapes = [[sizes.get(str(d.size), d.size) for d in v.type.dims] for v in kernel.inputs]
    return [
        torch.randn(n).to(dtype) if v.type.is_float else torch.arange(length).expand(n).contiguous()
        for v, n in zip(kernel.inputs, shapes, strict=True)
    ]


def results(op: KernelOp, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    made = op.call(*xs)
    return made if isinstance(made, tuple) else (made,)


def meaning(kernel: Graph, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The references, in float64."""
    made = evaluate(kernel, *(x.double() if x.is_floating_point() else x for x in xs))
    return made if isinstance(made, tuple) else (made,)


def grads(made: Sequence[Tensor], xs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    total = sum((y.double() * w).sum() for y, w in zip(made, weights, strict=True))
    return list(torch.autograd.grad(total, [x for x in xs if x.requires_grad]))  # type: ignore[arg-type] # at least one result


def wanting(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.requires_grad_() if x.is_floating_point() else x for x in xs]


def agree(op: KernelOp, xs: Sequence[Tensor], close: float = 1e-5) -> None:
    """Values and gradients are those of the references in float64, their dtypes those of the graph for such operands."""
    made, wanted = results(op, xs), meaning(op.kernel, xs)
    weights = [torch.randn_like(y) for y in wanted]
    for y, w in zip(made, wanted, strict=True):
        torch.testing.assert_close(y.double(), w, rtol=close, atol=close)
    for a, b in zip(grads(made, xs, weights), grads(wanted, xs, weights), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=close, atol=close * max(1.0, float(b.abs().max())))


@every
@both
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 33)])
def test_values_and_gradients_are_the_references(name: str, interpreted: bool, shape: tuple[int, int]) -> None:
    agree(kernel_op(NAMED[name], interpreted=interpreted), wanting(operands(NAMED[name], *shape)))


@every
@both
def test_torch_accepts_the_ops(name: str, interpreted: bool) -> None:
    op = kernel_op(NAMED[name], interpreted=interpreted)
    xs = operands(op.kernel)
    few = ("test_schema", "test_faketensor")
    utils = "ALL" if name in ("residual_norm", "qkv_prep") else (*few, "test_autograd_registration")  # ALL compiles
    torch.library.opcheck(op.forward, tuple(wanting(xs)), test_utils=utils)
    dtypes = " ".join(NAMES[x.dtype] for x in xs)
    given = [torch.randn(y.shape) for y in results(op, xs)]
    wanted = [x.is_floating_point() for x in xs]
    plain = [*(x.detach() for x in xs), *(y.detach() for y in results(op, xs))]
    torch.library.opcheck(op.backward, (*plain, *given, wanted, dtypes, False), test_utils=utils)
    torch.library.opcheck(op.backward, (*plain, *given, wanted, dtypes, True), test_utils=few)
    torch.library.opcheck(op.backward, (*plain, None, *given[1:], wanted, dtypes, False), test_utils=few)


@pytest.mark.parametrize(("name", "interpreted"), [*((n, False) for n in NAMED), ("qkv_prep", True), ("residual_norm", True)])
def test_compiled_whole_forward_and_backward(name: str, interpreted: bool) -> None:
    op = kernel_op(NAMED[name], interpreted=interpreted)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *xs: results(op, [x * 1 for x in xs]), fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 5), (3, 4)):
        xs = wanting(operands(op.kernel, *shape))
        weights = [torch.randn_like(y) for y in results(op, xs)]
        for a, b in zip(compiled(*xs), results(op, xs), strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(grads(compiled(*xs), xs, weights), grads(results(op, xs), xs, weights), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("interpreted", [False, True])
def test_inductor_runs_them(interpreted: bool) -> None:
    op = kernel_op(NAMED["residual_norm"], interpreted=interpreted)
    xs = wanting(operands(op.kernel))
    compiled = torch.compile(lambda *xs: results(op, [x * 2 for x in xs]), fullgraph=True)
    weights = [torch.randn_like(y) for y in results(op, xs)]
    ours = grads(compiled(*xs), xs, weights)
    for a, b in zip(ours, grads(results(op, [x * 2 for x in xs]), xs, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -- operands unlike the graph's ----------------------------------------------------------


@every
@both
def test_half_operands_give_half_results(name: str, interpreted: bool) -> None:
    op = kernel_op(NAMED[name], interpreted=interpreted)
    xs = wanting(operands(op.kernel, dtype=torch.bfloat16))
    made = results(op, xs)
    assert {y.dtype for y in made} == {torch.bfloat16}
    agree(op, xs, close=0.06)


@both
def test_mixed_operands_keep_their_types_and_get_gradients_in_them(interpreted: bool) -> None:
    op = kernel_op(NAMED["residual_norm"], interpreted=interpreted)
    x, delta, w = operands(op.kernel)
    xs = wanting([x, delta.bfloat16(), w.bfloat16()])
    assert [y.dtype for y in results(op, xs)] == [torch.float32, torch.float32]
    agree(op, xs, close=0.02)


@both
def test_autocast_casts_nothing_inside(interpreted: bool) -> None:
    op = kernel_op(NAMED["gates"], interpreted=interpreted)
    xs = wanting(operands(op.kernel))
    plain = results(op, xs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(op, xs)
        cast[0].sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@every
@both
def test_strides_are_followed(name: str, interpreted: bool) -> None:
    op = kernel_op(NAMED[name], interpreted=interpreted)
    dense = operands(op.kernel, 3, 4)
    xs = wanting(
        [torch.stack([x, x], -1).movedim(0, 1).contiguous().movedim(0, 1)[..., 0] if x.dim() > 1 else x for x in dense]
    )
    assert not xs[0].is_contiguous()
    agree(op, xs)
    wide = [x[:1].expand(x.shape) if x.dim() == 3 and x.is_floating_point() else x for x in dense]
    agree(op, wanting([x.detach() for x in wide]))


@every
@both
def test_nothing_in_is_nothing_out(name: str, interpreted: bool) -> None:
    op = kernel_op(NAMED[name], interpreted=interpreted)
    for shape in ((0, 5), (2, 0)):
        xs = wanting(operands(op.kernel, *shape))
        made, like = results(op, xs), results(op, operands(op.kernel))
        assert [y.dim() for y in made] == [y.dim() for y in like]
        for x, d in zip((x for x in xs if x.requires_grad), grads(made, xs, [torch.ones(())] * len(made)), strict=True):
            assert d.shape == x.shape and (name == "preamble" or not d.any())


@every
@both
def test_every_run_gives_the_same_bits(name: str, interpreted: bool) -> None:
    op = kernel_op(NAMED[name], interpreted=interpreted)
    xs = wanting(operands(op.kernel, 2, 21))
    weights = [torch.randn_like(y) for y in results(op, xs)]
    runs = [[*results(op, xs), *grads(results(op, xs), xs, weights)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@both
def test_wrong_operands_are_named(interpreted: bool) -> None:
    op = kernel_op(NAMED["residual_norm"], interpreted=interpreted)
    x, delta, w = operands(op.kernel)
    with pytest.raises(TypeMismatch, match=r"delta is torch\.int64, must be a float"):
        op.call(x, delta.long(), w)
    with pytest.raises(TypeMismatch, match=r"delta is \[2, 4, 65\], its s must be 5"):
        op.call(x, delta[:, :4], w)
    with pytest.raises(TypeMismatch, match=r"w is \[64\], its 65 must be 65"):
        op.call(x, delta, w[:64])
    with pytest.raises(TypeMismatch, match=r"w is on meta, must be on cpu as x is"):
        op.call(x, delta, w.to("meta"))
    prep = kernel_op(NAMED["qkv_prep"], interpreted=interpreted)
    y, w, p = operands(prep.kernel)
    with pytest.raises(TypeMismatch, match=r"p is torch\.float32, must be i64"):
        prep.call(y, w, p.float())


# -- gradients ----------------------------------------------------------------------------


@every
@both
def test_one_cotangent_and_one_wanted_operand(name: str, interpreted: bool) -> None:
    """A result that nobody reads and an operand that is frozen cost nothing and change nothing."""
    op = kernel_op(NAMED[name], interpreted=interpreted)
    for i in range(len(op.kernel.outputs)):
        for j, value in enumerate(op.kernel.inputs):
            if not value.type.is_float:
                continue
            xs = operands(op.kernel)
            xs[j].requires_grad_()
            y, wanted = results(op, xs)[i], meaning(op.kernel, xs)[i]
            if not wanted.requires_grad:
                continue
            weight = torch.randn_like(wanted)
            (ours,) = torch.autograd.grad((y * weight).sum(), xs[j], allow_unused=True)
            (right,) = torch.autograd.grad((wanted * weight).sum(), xs[j], allow_unused=True)
            ours, right = (torch.zeros_like(xs[j]) if d is None else d for d in (ours, right))
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_a_backward_kernel_computes_what_is_wanted_alone() -> None:
    kernel = NAMED["residual_norm"]
    only = gradient(kernel, (True, False), (True, True, True))
    assert only is not None and only.of == (0, 1) and not only.layout.computed.outputs  # two views of one cotangent
    both_used = gradient(kernel, (True, True), (True, True, True))
    assert both_used is not None and both_used.layout.places == (0, 0, 1)
    assert gradient(kernel, (False, False), (True, True, True)) is None


def test_a_second_derivative_is_refused() -> None:
    for name in ("glu", "qkv_prep"):
        op = kernel_op(NAMED[name])
        xs = wanting(operands(op.kernel))
        (d,) = torch.autograd.grad(results(op, xs)[-1].square().sum(), xs[0], create_graph=True)
        with pytest.raises(PlaitError, match=f"{name} has no second derivative as a kernel; compile with target='reference'"):
            d.sum().backward()


def test_gradients_have_the_operands_dtypes_in_every_mix() -> None:
    for name, kernel in NAMED.items():
        floats = [i for i, v in enumerate(kernel.inputs) if v.type.is_float]
        for half in floats:
            mixed = retyped(kernel, tuple("bf16" if i == half else v.type.dtype for i, v in enumerate(kernel.inputs)))
            made = gradient(mixed, (True,) * len(kernel.outputs), (True,) * len(kernel.inputs))
            assert made is not None
            found = layout(made.layout.computed).computed.outputs
            of = dict(zip(made.layout.places, made.of, strict=True))
            assert [v.type.dtype for v in found] == [mixed.inputs[of[i]].type.dtype for i in range(len(found))], name


# -- registration -------------------------------------------------------------------------


def test_equal_kernels_share_their_ops_whatever_thread_asks() -> None:
    text = TEXT["glu"].replace("65", "33").replace("130", "66").strip()
    found = list[KernelOp]()
    threads = [threading.Thread(target=lambda: found.append(kernel_op(parse(text)))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({id(op) for op in found}) == 1 and len(found) == 8
    other = kernel_op(parse(text.replace("silu", "sigmoid")))
    assert other.forward.name() != found[0].forward.name()
    assert kernel_op(parse(text), interpreted=True).forward.name() == f"{found[0].forward.name()}_interpreted"


def test_results_may_be_operands_and_stand_twice() -> None:
    kernel = parse(
        """
@kernel
def again(x: f32[b, 7], z: f32[b, 7]):
    y = mul(x, z)
    return x, y, y, z
""".strip()
    )
    for interpreted in (False, True):
        op = kernel_op(kernel, interpreted=interpreted)
        assert op.order == (0, 1, 1, 2) and len(op.kernel.outputs) == 3
        xs = wanting([torch.randn(3, 7), torch.randn(3, 7)])
        torch.library.opcheck(op.forward, tuple(xs))
        made = results(op, xs)
        assert made[0].data_ptr() == xs[0].data_ptr()  # no copy
        agree(op, xs)


def test_what_is_no_row_kernel_is_declined() -> None:
    with pytest.raises(Declined, match="float64"):
        kernel_op(parse("@kernel\ndef wide(x: f64[b, 7]):\n    y = silu(x)\n    return y"))
    with pytest.raises(Declined, match="computes nothing"):
        kernel_op(parse("@kernel\ndef part(x: f32[b, 7]):\n    y, z = split(x, sizes=(3, 4))\n    return y"))
    assert all(backward_declined(kernel) == "" for kernel in NAMED.values())


@every
def test_a_cuda_device_gets_every_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device the operands are fake ones; what would be launched is checked against the source."""
    calls = list[tuple[str, int, dict[str, Any]]]()

    class Launcher:
        def __init__(self, function: Any) -> None:
            self.function = function

        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda **arguments: calls.append((self.function.__name__, grid[0], arguments))

    monkeypatch.setattr(torch.library, "wrap_triton", Launcher)
    kernel = NAMED[name]
    made = row_kernel(layout(kernel).computed)
    with FakeTensorMode():
        xs = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in operands(kernel)]
        ys = triton_ops._compiled(layout(kernel).computed, xs)
    assert [c[0] for c in calls] == [step.function for step in made.launches]
    for (_, programs, arguments), step in zip(calls, made.launches, strict=True):
        assert programs > 0 and set(arguments) == {*step.arguments, "num_warps"} and arguments["num_warps"] == step.warps
    shapes = [DTYPES[v.type.dtype] for v in layout(kernel).computed.outputs]
    assert all(y.device.type == "cuda" for y in ys) and [y.dtype for y in ys] == shapes
