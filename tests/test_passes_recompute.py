"""What a backward layer takes from its forward half and what it runs again: the same bits under every policy."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from plait.ir import Graph, ParseError, PassError, PlaitError, evaluate, parse
from plait.passes import Pipeline, Remark, recompute
from plait.passes.samples import Sample, draw

from tests.programs import gradients, gradients_agree, preset

Tensor = torch.Tensor
FUSED = "canonicalize,carry-residual,fuse,outline-rows,dce"


SHARED = parse("""
def model(x: f64[b, 5]):
    a = mix(x, params='layers.0')
    y = mix(a, params='layers.0')
    return y

@layer
def mix(x: f64[b, 5], *, w: f64[5] = normal(0.2)):
    n = rms_norm(x, w)
    l = silu(n)
    y = add(x, l)
    return y
""")


def numbers(remarks: tuple[Remark, ...]) -> list[tuple[int, int]]:
    """Bytes saved and FLOPs run again, of each layer."""
    words = [r.why.split() for r in remarks if r.kind == "passed"]
    return [(int(w[0]), int(w[w.index("FLOPs") - 1])) for w in words]


def results(graph: Graph, sample: Sample) -> tuple[Tensor, ...]:
    """All that a differentiated program gives, its cotangents ones."""
    sizes = [v.type for v in graph.inputs[len(sample.inputs) :]]
    ones = [torch.ones([int(sample.sizes.get(str(n), n)) for n in t.shape], dtype=torch.float64) for t in sizes]
    found: tuple[Tensor, ...] = evaluate(graph, *sample.inputs.values(), *ones, params=sample.params)
    return found


@pytest.mark.parametrize("name", ["demo", "nemotron-3-nano-30b-a3b-tiny"])
@pytest.mark.parametrize("passes", ["", FUSED])
def test_every_policy_gives_the_same_bits(name: str, passes: str) -> None:
    graph = Pipeline.parse(passes).run(preset(name))
    after, sample = gradients(graph), draw(graph)
    wanted = results(after, sample)
    for options in ("boundary", "full", "bytes budget=300", "none"):
        made = Pipeline.parse(f"recompute{{policy={options}}}").run(after, verify="types")
        assert (made == after) == (options == "none")
        assert all(torch.equal(a, b) for a, b in zip(wanted, results(made, sample), strict=True)), options


def test_less_saved_is_more_run_again() -> None:
    after = gradients(preset("llama-3-8b-tiny"))
    told = [numbers(recompute(after, policy="full")[1])]
    for budget in (0, 300, 1000, 100000):
        made = numbers(recompute(after, policy="bytes", budget=budget)[1])
        assert all(saved <= budget for saved, _ in made)
        told.append(made)
    assert told[0] == told[1] and all(again == 0 for _, again in told[-1])
    for more, less in pairwise(told):
        assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in zip(more, less, strict=True))


def test_boundary_saves_what_matrix_products_give() -> None:
    graph = parse("""
def f(x: f64[b, 6]):
    y = mlp(x, params='0')
    return y

@layer
def mlp(x: f64[b, 6], *, norm: f64[6] = constant(1.0), w: f64[8, 6] = normal(0.3), v: f64[6, 8] = normal(0.3)):
    n = rms_norm(x, norm)
    h = linear(n, w)
    a = silu(h)
    y = linear(a, v)
    return y
""")
    after = gradients(graph)
    assert [v.name for v in after.layers[0].outputs] == ["y", "n", "h", "a"]
    for policy, kept, again in (("boundary", ["h"], ["rms_norm", "silu"]), ("full", [], ["rms_norm", "linear", "silu"])):
        made, remarks = recompute(after, policy=policy)
        ahead, back = made.layers
        assert [v.name for v in ahead.outputs] == ["y", *kept] and [v.name for v in back.inputs] == ["x", *kept, "d_y"]
        assert [n.op.name for n in back.nodes[: len(again)]] == again
        assert back.params[0].name == "norm" and len(remarks) == 1
        gradients_agree(graph, made)


def test_a_collective_never_runs_again() -> None:
    graph = parse("""
def f(x: f64[b, s@tp, 6]):
    y = mlp(x, params='0')
    return y

@layer
def mlp(x: f64[b, s@tp, 6], *, w: f64[10@tp, 6] = normal(0.3), v: f64[6, 10@tp] = normal(0.3)):
    n = rms_norm(x)
    g = all_gather(n, axis='tp', dim=1)
    h = linear(g, w)
    a = silu(h)
    p = linear(a, v)
    y = reduce_scatter(p, axis='tp', dim=1)
    return y
""")
    made, _ = recompute(gradients(graph), policy="full")
    ahead, back = made.layers
    assert [v.name for v in ahead.outputs] == ["y", "g"] and [v.name for v in back.inputs] == ["x", "g", "d_y"]
    assert [n.op.name for n in back.nodes[:3]] == ["linear", "silu", "all_gather"]
    gradients_agree(graph, made)


def test_a_layer_called_twice_under_one_prefix_keeps_its_halves_apart() -> None:
    made, remarks = recompute(gradients(SHARED), policy="full")
    assert [len(g.outputs) for g in made.layers] == [1, 2] and len(remarks) == 1
    assert [n.operands[0].name for n in made.nodes if n.callee in made.layers[1:]] == ["a", "x"]
    gradients_agree(SHARED, made)


def test_a_result_that_lives_anyway_is_not_run_again() -> None:
    graph = parse("""
def f(x: f64[b, 6], delta: f64[b, 6]):
    x1, d1 = one(x, delta, params='0')
    y, d2 = one(x1, d1, params='1')
    return y, d2

@layer
def one(x: f64[b, 6], delta: f64[b, 6], *, w: f64[6, 6] = normal(0.3)):
    y = add(x, delta)
    n = rms_norm(y)
    d = linear(n, w)
    return y, d
""")
    made, _ = recompute(gradients(graph), policy="full")
    back = made.layers[1]
    assert [v.name for v in back.inputs] == ["y", "d_y", "d_d"] and back.nodes[0].is_op("rms_norm")
    gradients_agree(graph, made)


def test_recompute_needs_halves_and_says_so() -> None:
    made, (remark,) = recompute(SHARED)
    assert made == SHARED and str(remark).startswith("missed recompute at model: no layer is called forward and backward")
    assert recompute(gradients(SHARED), policy="none")[1][0].kind == "note"


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("recompute{policy=some}", PassError, "option policy cannot be 'some'"),
        ("recompute{budget=300}", PassError, "budget is 300 with policy=boundary; it is a number of bytes a token"),
        ("recompute{policy=bytes budget=-1}", PassError, "budget is -1 with policy=bytes"),
        ("recompute{budget=1.5}", PassError, "option budget is '1.5', must be int"),
        ("recompute{policy=}", ParseError, "expected `option=value`"),
    ],
)
def test_options_that_cannot_be(text: str, kind: type[PlaitError], says: str) -> None:
    with pytest.raises(kind, match=says):
        Pipeline.parse(text).run(gradients(SHARED))


@pytest.mark.parametrize(
    "passes",
    [
        "differentiate,canonicalize,fuse,outline-rows,dce",
        f"{FUSED},differentiate,recompute,canonicalize,outline-rows,dce",
        "carry-residual,differentiate,recompute{policy=full},canonicalize,fuse,outline-rows,dce",
    ],
)
def test_both_halves_fuse(passes: str) -> None:
    graph = preset("nemotron-3-nano-30b-a3b-tiny")
    after = Pipeline.parse(passes).run(graph)
    kernels = {g.name: [n.callee.name for n in g.nodes if n.callee is not None] for g in after.layers}
    assert all(kernels[name] for name in kernels if "_backward" in name), kernels
    gradients_agree(graph, after)
