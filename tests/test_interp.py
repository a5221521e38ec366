"""A graph runs the same on one device and on a pretend mesh: values, and gradients of inputs and parameters."""

from typing import Any

import pytest
import torch
from plait.ir import (
    OPS,
    Builder,
    Graph,
    Mesh,
    ParseError,
    PlacementError,
    TypeMismatch,
    each_layer,
    evaluate,
    fill,
    parameters,
    parse,
    parse_type,
    retype,
    simulate,
    trace,
)
from plait.ir.ops import reorder
from plait.ir.orders import permutation

Tensor = torch.Tensor
MESH = Mesh((("cp", 2), ("tp", 2)))


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def outcome(run: Any, inputs: list[Tensor], params: dict[str, Tensor]) -> list[Tensor]:
    """Results, then gradients of every input and parameter of a fixed weighted sum."""
    leaves = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    named = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
    outs = run(leaves, named)
    outs = outs if isinstance(outs, tuple) else (outs,)
    rng = torch.Generator().manual_seed(9)
    total = sum((y * torch.randn(y.shape, generator=rng, dtype=y.dtype)).sum() for y in outs)
    wanted = [t for t in (*leaves, *named.values()) if t.is_floating_point()]
    return [*outs, *torch.autograd.grad(total, wanted, materialize_grads=True)]  # type: ignore[arg-type] # a tensor: there is a result


def alike(
    graph: Graph, mesh: Mesh, inputs: list[Tensor], params: dict[str, Tensor] | None = None, tolerance: float = 1e-12
) -> None:
    one = outcome(lambda xs, ps: evaluate(graph, *xs, params=ps), inputs, params or {})
    many = outcome(lambda xs, ps: simulate(graph, mesh, *xs, params=ps), inputs, params or {})
    assert any(g.abs().sum() > 0 for g in one)
    for a, b in zip(many, one, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- collectives ------------------------------------------------------------------------------

MOVES = {
    "all_to_all": ("x: f64[3, 8@cp, 12]", "y = all_to_all(x, axis='cp', src=1, dst=2)", "f64[3, 8, 12@cp]"),
    "all_to_all inside": ("x: f64[3, 8@cp@tp, 12]", "y = all_to_all(x, axis='tp', src=1, dst=2)", "f64[3, 8@cp, 12@tp]"),
    "all_to_all onto": ("x: f64[3, 8@cp, 12@tp]", "y = all_to_all(x, axis='cp', src=1, dst=2)", "f64[3, 8, 12@tp@cp]"),
    "all_gather": ("x: f64[3, 8@tp@cp, 12]", "y = all_gather(x, axis='cp', dim=1)", "f64[3, 8@tp, 12]"),
    "reduce_scatter": ("x: f64[3, 8@tp, 12]+cp", "y = reduce_scatter(x, axis='cp', dim=1)", "f64[3, 8@tp@cp, 12]"),
    "all_reduce": ("x: f64[3, 8, 12@tp]+cp", "y = all_reduce(x, axis='cp')", "f64[3, 8, 12@tp]"),
    "all_reduce one of two": ("x: f64[3, 8, 12]+cp+tp", "y = all_reduce(x, axis='cp')", "f64[3, 8, 12]+tp"),
    "shard": ("x: f64[3, 8@tp, 12]", "y = shard(x, axis='cp', dim=1)", "f64[3, 8@tp@cp, 12]"),
    "reorder": ("x: f64[3, 8, 12]", "y = reorder(x, dim=1, order='zigzag(2)')", "f64[3, 8:zigzag(2), 12]"),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_on_two_axes_is_the_identity_of_the_whole(name: str) -> None:
    inputs, equation, after = MOVES[name]
    graph = parse(f"def f({inputs}):\n    {equation}\n    return y\n")
    assert str(graph.outputs[0].type) == after
    x = floats(3, 8, 12)
    alike(graph, MESH, [x])
    if name != "reorder":
        assert torch.equal(evaluate(graph, x), x)


def test_what_each_rank_holds_after_a_move() -> None:
    """The rank rules against slices of the whole, not against their own inverse."""
    whole = torch.arange(16.0).reshape(4, 4)
    rows, columns = list(whole.chunk(2, 0)), list(whole.chunk(2, 1))
    parts = [whole * 0.25, whole * 0.75]
    rules = {name: OPS[name].rank_rule for name in ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "shard")}
    made = {
        "all_to_all": (rules["all_to_all"](rows, axis="cp", src=0, dst=1), columns),
        "all_gather": (rules["all_gather"](rows, axis="cp", dim=0), [whole] * 2),
        "reduce_scatter": (rules["reduce_scatter"](parts, axis="cp", dim=1), columns),
        "all_reduce": (rules["all_reduce"](parts, axis="cp"), [whole] * 2),
        "shard": (rules["shard"]([whole] * 2, axis="cp", dim=0), rows),
    }  # type: ignore[misc] # every collective has a rank rule
    for got, want in made.values():
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_zigzag_gives_each_rank_an_early_and_a_late_chunk() -> None:
    assert permutation("zigzag(2)", 8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    for parts in (1, 2, 3, 5):
        order = permutation(f"zigzag({parts})", 30 * parts).tolist()
        assert sorted(order) == list(range(30 * parts))
        work = [sum(order[r * 30 : r * 30 + 30]) for r in range(parts)]
        assert len(set(work)) == 1, "causal work is the sum of positions"


ZIGZAG = """def f(x: f64[b, s, 6], w: f64[6]):
    a = reorder(x, dim=1, order='zigzag(2)')
    c = shard(a, axis='cp', dim=1)
    h = rms_norm(c, w)
    g = all_gather(h, axis='cp', dim=1)
    y = reorder(g, dim=1, was='zigzag(2)')
    return y
"""


def test_zigzag_there_and_back_is_no_change() -> None:
    x, w = floats(3, 20, 6), floats(6)
    alike(parse(ZIGZAG), MESH, [x, w])
    torch.testing.assert_close(simulate(parse(ZIGZAG), MESH, x, w), OPS["rms_norm"].reference(x, w), rtol=1e-14, atol=1e-14)
    moved = reorder.reference(x, dim=1, order="zigzag(2)")
    assert not torch.equal(moved, x) and torch.equal(reorder.reference(moved, dim=1, was="zigzag(2)"), x)
    assert torch.equal(
        reorder.reference(moved, dim=1, was="zigzag(2)", order="zigzag(5)"), reorder.reference(x, dim=1, order="zigzag(5)")
    )


TENSOR_PARALLEL = """def f(x: f64[b, s@cp, 6], *, w_in: f64[10@tp, 6], b_in: f64[10@tp], w_out: f64[6, 10@tp], b_out: f64[6]):
    h = linear(x, w_in, b_in)
    a = silu(h)
    p = linear(a, w_out)
    o = all_reduce(p, axis='tp')
    y = add_bias(o, b_out)
    r = add(y, x)
    return r, a
"""


def test_tensor_and_token_parallel_at_once() -> None:
    params = {"w_in": floats(10, 6), "b_in": floats(10), "w_out": floats(6, 10), "b_out": floats(6)}
    alike(parse(TENSOR_PARALLEL), MESH, [floats(3, 14, 6)], params)
    assert str(parse(TENSOR_PARALLEL).nodes[2].outputs[0].type) == "f64[b, s@cp, 6]+tp"


def test_a_missing_collective_is_an_error() -> None:
    with pytest.raises(ParseError, match=r"line 5: add_bias: x is partial over tp, in which the op is not linear"):
        parse(TENSOR_PARALLEL.replace("    o = all_reduce(p, axis='tp')\n", "").replace("add_bias(o", "add_bias(p"))


# -- a layer ----------------------------------------------------------------------------------

LAYER = """def model(x: f64[b, s{at}, 8]):
    y = gdn(x, params='layers.0')
    z = attend(y, params='layers.1')
    o = gdn(z, params='layers.2')
    return o

@layer
def gdn(x: f64[b, s{at}, 8], *, norm: f64[8] = constant(1.0), w_in: f64[112, 8] = normal(0.3), conv: f64[64, 4] = normal(0.3),
        rate: f64[8] = log_uniform(0.5, 2.0), out: f64[8, 32] = normal(0.3)):
    h = rms_norm(x, norm)
    p = linear(h, w_in)
    c, z, d, u = split(p, sizes=(64, 32, 8, 8))
{to_heads}    e, tail = causal_conv1d(c2, conv2, act='silu')
    q0, k0, v0 = split(e2, sizes=(16, 16, 32))
    q = reshape(q0, pattern='b s (g k=4) -> b s g k')
    k1 = reshape(k0, pattern='b s (g k=4) -> b s g k')
    v = reshape(v0, pattern='b s (h v=4) -> b s h v')
    k = l2_norm(k1)
    m = softplus(d)
    a = neg_exp(rate)
    l = scale_columns(m, a)
    t = sigmoid(u)
{to_tokens}    j = reshape(o2, pattern='b s h v -> b s (h v)')
    n = norm_gate(j, z)
    w = linear(n, out)
    y = add(w, x)
    return y

@layer
def attend(x: f64[b, s{at}, 8], *, w_in: f64[64, 8] = normal(0.3), out: f64[8, 32] = normal(0.3)):
    p = linear(x, w_in)
    q0, k0, v0 = split(p, sizes=(32, 16, 16))
    q1 = reshape(q0, pattern='b s (h d=4) -> b s h d')
    k1 = reshape(k0, pattern='b s (h d=4) -> b s h d')
    v1 = reshape(v0, pattern='b s (h d=4) -> b s h d')
{attend}    j = reshape(o2, pattern='b s h d -> b s (h d)')
    w = linear(j, out)
    y = add(w, x)
    return y

@kernel
def norm_gate(o: f64[b, s{at}, 32], z: f64[b, s{at}, 32]):
    n = rms_norm(o)
    g = silu(z)
    y = mul(n, g)
    return y
"""
A2A = "    {0}2 = all_to_all({0}, axis='cp', src=1, dst=2)\n"
BACK = "    o2 = all_to_all(o, axis='cp', src=2, dst=1)\n"
GATED = "    o, last = gated_delta_rule({}, {}, {}, {}, {}, scale=0.5)\n"
SERIAL = LAYER.format(
    at="", to_heads="", to_tokens=GATED.format("q", "k", "v", "l", "t"), attend="    o = attention(q1, k1, v1, softcap=5.0)\n"
).replace("c2, conv2", "c, conv").replace("e2", "e").replace("o2", "o")  # fmt: skip
# tokens travel to heads and back: the convolution sees all tokens of some channels, the recurrence all tokens of some heads
PARALLEL = LAYER.format(
    at="@cp", to_heads=A2A.format("c") + "    conv2 = shard(conv, axis='cp', dim=0)\n",
    to_tokens="".join(A2A.format(x) for x in ("q", "k", "v", "l", "t")) + GATED.format("q2", "k2", "v2", "l2", "t2") + BACK,
    attend="".join(A2A.format(x) for x in ("q1", "k1", "v1")) + "    o = attention(q12, k12, v12, softcap=5.0)\n" + BACK,
).replace("act='silu')\n", "act='silu')\n    e2 = all_to_all(e, axis='cp', src=2, dst=1)\n")  # fmt: skip


@pytest.mark.parametrize("mesh", [Mesh((("cp", 1),)), Mesh((("cp", 4),)), Mesh((("tp", 2), ("cp", 2)))], ids=["1", "4", "2x2"])
def test_a_hybrid_runs_the_same_on_any_mesh(mesh: Mesh) -> None:
    rng = torch.Generator().manual_seed(1)
    serial, parallel = parse(SERIAL), parse(PARALLEL)
    assert parameters(serial).keys() == parameters(parallel).keys() and len(parameters(serial)) == 12
    params = {k: fill(init, tuple(int(n) for n in t.shape), rng).double() for k, (t, init) in parameters(serial).items()}
    x = floats(3, 20, 8)
    one = outcome(lambda xs, ps: evaluate(serial, *xs, params=ps), [x], params)
    for run in (lambda xs, ps: evaluate(parallel, *xs, params=ps), lambda xs, ps: simulate(parallel, mesh, *xs, params=ps)):
        many = outcome(run, [x], params)
        assert len(many) == 2 + 12
        for a, b in zip(many, one, strict=True):
            assert b.abs().sum() > 0
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_more_ranks_than_heads_are_refused() -> None:
    params = {k: floats(*(int(n) for n in t.shape)) for k, (t, _) in parameters(parse(PARALLEL)).items()}
    with pytest.raises(TypeMismatch, match="is 4 long, which 8 ranks do not divide"):
        simulate(parse(PARALLEL), Mesh((("cp", 8),)), floats(1, 8, 8), params=params)


# -- graphs of graphs -------------------------------------------------------------------------


def test_a_shared_prefix_is_one_parameter() -> None:
    text = "def f(x: f64[2]):\n    y = g(x, params='a')\n    z = g(y, params='{}')\n    return z\n"
    text += "@layer\ndef g(x: f64[2], *, w: f64[2]):\n    y = mul(x, w)\n    return y\n"
    x, w, v = floats(2), floats(2), floats(2)
    assert list(parameters(parse(text.format("a")))) == ["a.w"]
    torch.testing.assert_close(evaluate(parse(text.format("a")), x, params={"a.w": w}), x * w * w)
    torch.testing.assert_close(evaluate(parse(text.format("a.b")), x, params={"a.w": w, "a.b.w": v}), x * w * v)


NESTED = """def f(x: f64[2]):
    y = outer(x, params='layers.1')
    z = outer(y, params='layers.10')
    return z

@layer
def outer(x: f64[2], *, w: f64[2]):
    y = mul(x, w)
    z = inner(y, params='mixer.0')
    return z

@layer
def inner(x: f64[2], *, w: f64[2]):
    y = add_bias(x, w)
    return y
"""


def test_layers_in_layers_have_longer_prefixes() -> None:
    names = ["layers.1.w", "layers.1.mixer.0.w", "layers.10.w", "layers.10.mixer.0.w"]
    assert list(parameters(parse(NESTED))) == names
    params, x = {name: floats(2) for name in names}, floats(2)
    a, b, c, d = params.values()
    alike(parse(NESTED), MESH, [x], params)
    torch.testing.assert_close(evaluate(parse(NESTED), x, params=params), (x * a + b) * c + d)
    with pytest.raises(TypeMismatch, match=r"w.* missing"):
        evaluate(parse(NESTED), x, params={k: v for k, v in params.items() if "10" in k})


def test_a_graph_is_retyped_and_its_layers_changed() -> None:
    graph = parse(SERIAL)
    placed = retype(graph, [parse_type("f64[2, 12, 8]")])
    assert str(placed.outputs[0].type) == "f64[2, 12, 8]" and len(placed.layers) == 2
    seen = list[str]()

    def note(g: Graph) -> Graph:
        seen.append(g.name)
        return g

    assert each_layer(graph, note) == graph and seen == ["gdn", "attend", "model"]


def test_a_traced_function_is_a_graph() -> None:
    def f(x: Any, w: Any) -> Any:
        return OPS["silu"](OPS["linear"](x, w=w)), OPS["scale"](x, by=2.0)

    graph = trace(f, "f", x=parse_type("f64[3, 5]"), w=parse_type("f64[7, 5]"))
    x, w = floats(3, 5), floats(7, 5)
    for a, b in zip(evaluate(graph, x, w), f(x, w), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(TypeMismatch, match="linear has no attribute weight"):
        trace(lambda x: OPS["linear"](x, weight=x), "f", x=parse_type("f64[3, 5]"))


# -- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("equation", "shape"), [
    ("y = all_to_all(x, axis='cp', src=1, dst=2)", (4, 8, 5)), ("y = silu(x)", (4, 9, 8)),
    ("y = shard(x, axis='tp', dim=0)", (3, 8, 8)), ("y = shard(x, axis='tp', dim=1)", (2, 2, 8)),
])  # fmt: skip
def test_a_length_that_does_not_divide_is_named(equation: str, shape: tuple[int, ...]) -> None:
    graph = parse(f"def f(x: f64[a, s@cp, d]):\n    {equation}\n    return y\n")
    with pytest.raises(TypeMismatch, match=r"long, which .*ranks do not divide"):
        simulate(graph, MESH, floats(*shape))


def test_a_zigzag_that_does_not_divide_is_named() -> None:
    graph = parse(ZIGZAG)
    with pytest.raises(TypeMismatch, match=r"zigzag\(2\): 18 tokens do not divide into 4 chunks"):
        simulate(graph, MESH, floats(1, 18, 6), floats(6))


@pytest.mark.parametrize(
    "run", [evaluate, lambda g, *xs, params=None: simulate(g, MESH, *xs, params=params)], ids=["evaluate", "simulate"]
)
def test_what_is_missing_is_named(run: Any) -> None:
    graph = parse(SERIAL)
    with pytest.raises(TypeMismatch, match="model takes 1 inputs, got 0"):
        run(graph)
    with pytest.raises(TypeMismatch, match=r"parameters .*norm, .*w_in.* are missing"):
        run(graph, floats(1, 4, 8))


def test_an_axis_the_mesh_lacks_is_named() -> None:
    for text in (
        "def f(x: f64[s@ep]):\n    return x\n",
        "def f(x: f64[s]):\n    y = shard(x, axis='ep', dim=0)\n    return y\n",
    ):
        with pytest.raises(PlacementError, match="no axis called ep; it has cp, tp"):
            simulate(parse(text), MESH, floats(8))


def test_a_builder_refuses_and_says_where() -> None:
    b = Builder("f")
    x = b.input("x", parse_type("f64[3, 5]"))
    with (
        b.at("layers.3"),
        b.at("mixer"),
        pytest.raises(TypeMismatch, match=r"linear: w.i is 3, must be 5 as in x \(at layers.3.mixer\)"),
    ):
        b.emit(
            OPS["linear"],
            [x, b.param("w", parse_type("f64[7, 3]"), parse("def f(*, w: f32[1]):\n    return w\n").inits[0]), None],
        )
    with pytest.raises(TypeMismatch, match="parameter w is given twice"):
        b.param("w", parse_type("f64[7]"), parse("def f(*, w: f32[1]):\n    return w\n").inits[0])
    assert not b.nodes
