"""Backward kernels: what autograd gives, with the inputs they read and the types they promise."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.frontends.shrink import shrink
from plait.ir import Builder, Graph, Mesh, PassError, dump, evaluate, parse, parse_type, simulate
from plait.ir.gradient import Backward, Cotangents, backward, carrying, cotangent_type, needed
from plait.passes import DEFAULT, Pipeline, check_types
from plait.passes.samples import draw
from plait.passes.validate import in_f64
from plait.passes.verify import reached

Tensor = torch.Tensor
GATE = parse("""
@kernel
def gate(x: f64[b, 65], w: f64[65], p: i64[b], z: f64[b, 65]):
    n = rms_norm(x, w)  # f64[b, 65] from m.norm
    a = silu(z)  # f64[b, 65] from m.gate
    y = mul(n, a)  # f64[b, 65] from m.gate
    return y, p
""")


def many(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def agree(kernel: Graph, made: Backward, inputs: list[Tensor], mesh: Mesh | None = None) -> None:
    """The backward kernel on random cotangents against autograd of the forward."""
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    results = [r for r in many(evaluate(kernel, *leaves)) if r.is_floating_point()]
    cotangents = [torch.randn_like(r) for r in results]
    given = [inputs[i] for i in made.reads] + cotangents
    found = many(simulate(made.graph, mesh, *given) if mesh else evaluate(made.graph, *given))
    pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
    wanted = torch.autograd.grad([r for r, _ in pairs], [leaves[i] for i in made.of], [c for _, c in pairs])
    assert len(found) == len(made.of) > 0
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and float((a - b).abs().max()) <= 1e-10 * max(1.0, float(b.abs().max()))


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_a_backward_kernel_takes_what_it_reads_and_gives_a_cotangent_for_every_float_input() -> None:
    kernel = parse("@kernel\ndef f(x: f32[b, 5], w: f32[5]):\n    y = scale_columns(x, w)\n    return y\n")
    made = backward(kernel)
    assert (made.reads, made.of) == ((0, 1), (0, 1)) and made.graph.name == "f_backward"
    assert made.graph == parse("""
@kernel
def f_backward(x: f32[b, 5], w: f32[5], d_y: f32[b, 5]):
    d_x = scale_columns(d_y, w)
    y = mul(d_y, x)
    d_w = column_sum(y)
    return d_x, d_w
""")


@pytest.mark.parametrize("rows", [1, 63, 65, 100, 130])
def test_it_is_the_gradient(rows: int) -> None:
    made = backward(GATE)
    check_types(made.graph)
    assert made.of == (0, 1, 3) and [v.name for v in made.graph.inputs] == ["x", "w", "z", "d_y"]
    assert [v.name for v in made.graph.outputs] == ["d_x", "d_w", "d_z"] and made.graph.role == "kernel"
    agree(GATE, made, [floats(rows, 65), floats(65), torch.arange(rows), floats(rows, 65)])


def test_nodes_keep_their_place_in_the_spec() -> None:
    assert {n.loc for n in backward(GATE).graph.nodes} == {"m.norm", "m.gate"}


def test_only_what_is_asked_for_is_computed() -> None:
    made = backward(GATE, [False, False, False, True])
    assert made.of == (3,) and made.reads == (0, 1, 3)
    assert "column_sum" not in {n.op.name for n in made.graph.nodes}
    agree(GATE, made, [floats(63, 65), floats(65), torch.arange(63), floats(63, 65)])
    scaled = parse("@kernel\ndef f(x: f64[b, 5], w: f64[5]):\n    y = scale_columns(x, w)\n    return y\n")
    assert backward(scaled, [True, False]).reads == (1,)


@pytest.mark.parametrize(
    "body",
    [
        "a = mul(x, x)\n    c = add(a, x)\n    y = mul(c, z)\n    return y, c",
        "a = silu(x)\n    return a, a, x",
        "a, c = split(x, sizes=(2, 3))\n    y = silu(c)\n    d = mul(z, z)\n    return y, d",
        "a = relu(x)\n    y = add(z, a)\n    c = sigmoid(z)\n    return y",
    ],
)
def test_values_used_often_never_and_in_part(body: str) -> None:
    kernel = parse(f"@kernel\ndef f(x: f64[b, 5], z: f64[b, 5], u: f64[b, 5]):\n    {body}\n")
    made = backward(kernel)
    check_types(made.graph)
    agree(kernel, made, [floats(63, 5), floats(63, 5), floats(63, 5)])


def test_every_float_result_has_its_cotangent_among_the_inputs() -> None:
    kernel = parse("@kernel\ndef f(x: f64[b, 5], z: f64[b, 5]):\n    y = silu(x)\n    c = relu(z)\n    return y, c\n")
    made = backward(kernel, [True, False])
    assert [v.name for v in made.graph.inputs] == ["x", "d_y", "d_c"] and made.of == (0,)
    agree(kernel, made, [floats(7, 5), floats(7, 5)])


def test_a_kernel_without_gradient_says_so() -> None:
    kernel = parse("@kernel\ndef f(x: f64[b, 5], p: i64[b, 5]):\n    y = positions(p)\n    return y\n")
    with pytest.raises(PassError, match="f has no gradient: no float result depends on a float input"):
        backward(kernel)
    with pytest.raises(PassError, match="gate has no gradient"):
        backward(GATE, [False] * 4)


def test_cotangents_have_the_types_of_their_inputs() -> None:
    kernel = parse("""
@kernel
def f(x: bf16[b, s, 12], w: f32[12], d: bf16[b, s, 3, 4], s0: f32[3]):
    n = rms_norm(x, w)
    h = reshape(n, pattern='... (h=3 d) -> ... h d')
    a = scale_heads(d, s0)
    y = add(h, a)
    u = widen(y)
    return y, u
""")
    made = backward(kernel)
    assert [v.type for v in made.graph.outputs] == [v.type for v in kernel.inputs]
    inputs = [torch.randn(2, 5, 12).bfloat16(), torch.randn(12), torch.randn(2, 5, 3, 4).bfloat16(), torch.randn(3)]
    found = evaluate(made.graph, *(inputs[i] for i in made.reads), torch.randn(2, 5, 3, 4).bfloat16(), torch.randn(2, 5, 3, 4))
    assert [t.dtype for t in found] == [t.dtype for t in inputs]


@cache
def kernels(preset: str) -> tuple[Graph, ...]:
    """Every distinct kernel that the default pipeline makes."""
    program = build(shrink(load_spec(preset)), task="loss", dtype="bf16")
    return tuple(g for g in reached(Pipeline.parse(DEFAULT).run(program)) if g.role == "kernel")


@pytest.mark.parametrize("preset", ["demo", "qwen3-next-80b-a3b-tiny", "nemotron-3-nano-30b-a3b-tiny", "llama-3-8b-tiny"])
def test_every_kernel_of_a_preset(preset: str) -> None:
    assert kernels(preset)
    for kernel in kernels(preset):
        made = backward(kernel)
        check_types(made.graph)
        floating = [i for i, v in enumerate(kernel.inputs) if v.type.is_float]
        assert list(made.of) == floating and [v.type for v in made.graph.outputs] == [kernel.inputs[i].type for i in made.of]
        wide = parse(dump(in_f64(kernel)))  # text tells inputs of one name apart
        agree(wide, backward(wide), [*draw(wide).inputs.values()])


def test_the_gradient_of_a_whole_weight_is_partial_where_tokens_are_split() -> None:
    kernel = parse("""
@kernel
def f(x: f64[b@cp, 5], w: f64[5], r: f64[5]):
    e = neg_exp(r)
    n = rms_norm(x, w)
    y = scale_columns(n, e)
    return y
""")
    made = backward(kernel)
    assert [str(v.type) for v in made.graph.outputs] == ["f64[b@cp, 5]", "f64[5]+cp", "f64[5]+cp"]
    assert not any(n.is_op("all_reduce") for n in made.graph.nodes)
    agree(kernel, made, [floats(6, 5), floats(5), floats(5)], Mesh((("cp", 2),)))


def test_the_cotangent_of_a_sum_over_ranks_is_whole() -> None:
    assert cotangent_type(parse_type("f64[b@cp, 5]+tp")) == parse_type("f64[b@cp, 5]")


def test_parts_are_added_before_ranks_are() -> None:
    b = Builder("f")
    x, whole, *partial = [b.input(n, parse_type(t)) for n, t in zip("xwpq", ["f64[5]"] * 2 + ["f64[5]+cp"] * 2, strict=True)]
    sums = Cotangents(b)
    assert sums.total(x) is None and sums.whole(x) is None
    for part in partial:
        sums.add(x, part)
    both = sums.total(x)
    assert both is not None and str(both.type) == "f64[5]+cp" and [n.op.name for n in b.nodes] == ["add"]
    sums.add(x, whole)
    made = sums.total(x)
    assert made is not None and str(made.type) == "f64[5]"
    assert [n.op.name for n in b.nodes[1:]] == ["add", "all_reduce", "add"]
    spared = Cotangents(b)
    spared.add(x, partial[0])
    assert spared.whole(x, ["cp"]) is partial[0]


def test_gradients_flow_between_floats_alone() -> None:
    graph = parse("""
def f(x: f64[b, s, 5], z: f64[b, s, 5], *, w: f64[5, 5] = normal(0.2)):
    a = linear(x, w)
    weights, experts = route(a, k=2)
    c = silu(z)
    rows, order, counts = dispatch(z, experts, e=5)
    return rows, weights
""")
    flows = carrying(graph, [graph.inputs[0]], graph.outputs)
    assert {v.name for v in flows} == {"x", "a", "weights"}
    assert [n.op.name for n in needed(graph.nodes, graph.outputs[1:])] == ["linear", "route"]


def test_a_result_is_read_where_that_is_less_than_what_made_it() -> None:
    text = "@kernel\ndef f(x: bf16[b, 8], d: bf16[b, 8], w: bf16[8]):\n    r = add(x, d)\n    y = rms_norm(r, w)\n"
    text += "    return r, y\n"
    whole, less = backward(parse(text)), backward(parse(text), results=True)
    assert whole.reads == (0, 1, 2) and less.reads == (2, 3)
    assert less.graph.outputs[0] is less.graph.outputs[1]  # an add has one cotangent for both
    inputs = [torch.randn(*s).bfloat16() for s in ((3, 8), (3, 8), (8,))]
    given = [torch.randn(3, 8).bfloat16() for _ in range(2)]
    r = evaluate(parse(text), *inputs)[0]
    got = evaluate(less.graph, inputs[2], r, *given)
    want = evaluate(whole.graph, *inputs, *given)
    assert all(torch.allclose(a.float(), b.float(), atol=0.05, rtol=0.05) for a, b in zip(got, want, strict=True))


def test_a_result_is_not_read_where_its_operands_are_needed_anyway() -> None:
    text = "@kernel\ndef f(x: bf16[b, 8], z: bf16[b, 8]):\n    y = mul(x, z)\n    return y\n"
    assert backward(parse(text), results=True).reads == (0, 1)


def test_kernels_round_their_gradients_once() -> None:
    text = "@kernel\ndef f(x: bf16[b, 8], z: bf16[b, 8]):\n    a = silu(x)\n    c = mul(a, z)\n    y = silu(c)\n    return y\n"
    graph = backward(parse(text)).graph
    casts = [n for n in graph.nodes if n.is_op("cast")]
    assert len(casts) == 2 and {n.outputs[0] for n in casts} == set(graph.outputs)
