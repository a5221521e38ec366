"""Programs with their gradients: agreement with autograd, saved values, placement, and what validation catches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.ir import DTYPES, OPS, Graph, Node, PlaitError, Replay, Value, dump, each_layer, evaluate, parameters, parse
from plait.ir.grow import random_graph
from plait.passes import DEFAULT, PASSES, PassFailed, Pipeline, check_types, recompute, validate
from plait.passes.samples import draw
from typer.testing import CliRunner

from tests.programs import TINY, gradients, gradients_agree, preset

# -- a program with its gradients -----------------------------------------------------------------


@pytest.mark.parametrize("task", ["logits", "loss"])
@pytest.mark.parametrize("name", TINY)
def test_every_preset(name: str, task: str) -> None:
    packed = task == "loss"  # each of the two is tried with either pipeline
    plain, fused = preset(name, task, packed), Pipeline.parse(DEFAULT).run(preset(name, task, not packed))
    gradients_agree(plain, gradients(plain))
    gradients_agree(fused, gradients(fused))


def test_dropout_repeats_in_the_backward() -> None:
    fields = {"name": "wet", "vocab": 61, "hidden": 20, "dropout": 0.3, "blocks": ["mlp", "mlp"], "mlp": {"width": 13}}
    graph = build(load_spec(fields), task="loss", dtype="f64", training=True)
    gradients_agree(graph, recompute(gradients(graph), policy="full")[0])


LAYERS = parse("""
def model(x: f64[b, 5], t: i64[b], u: f64[b, 5], *, w: f64[5] = normal(0.2), idle: f64[3] = normal(0.2)):
    a = mix(x, params='layers.0')
    c = mix(a, params='layers.0')
    d = scale_columns(c, w)
    y = mul(d, c)
    return y, t

@layer
def mix(x: f64[b, 5], *, w: f64[5] = normal(0.2), idle: f64[5] = normal(0.2)):
    n = rms_norm(x, w)  # f64[b, 5] from mix.norm
    l = silu(n)  # f64[b, 5] from mix
    y = add(x, l)  # f64[b, 5] from mix
    return y
""")


def test_what_goes_in_and_what_comes_out() -> None:
    """A layer under one prefix twice, a value used twice, an input and parameters that nothing reads, integers."""
    after = gradients(LAYERS)
    assert after.name == "model_gradients"
    assert [v.name for v in after.inputs] == ["x", "t", "u", "d_y"] and after.params[0].name == "w"
    names = ["y", "t", "d_x", "d_u", "d_w", "d_idle", "d_layers_0_w", "d_layers_0_idle"]
    assert [v.name for v in after.outputs] == names
    assert [g.name for g in after.layers] == ["mix_forward", "mix_backward"]
    gradients_agree(LAYERS, after)


def test_a_layer_in_two_halves() -> None:
    back = gradients(LAYERS).layers[1]
    assert [v.name for v in back.inputs] == ["x", "n", "d_y"] and [v.name for v in back.params] == ["w", "idle"]
    assert [v.name for v in back.outputs] == ["d_x", "d_w", "d_idle"]
    assert {n.loc for n in back.nodes} == {"mix", "mix.norm", ""}
    ahead = gradients(LAYERS).layers[0]
    assert ahead == parse("""
@layer
def mix_forward(x: f64[b, 5], *, w: f64[5] = normal(0.2), idle: f64[5] = normal(0.2)):
    n = rms_norm(x, w)
    l = silu(n)
    y = add(x, l)
    return y, n
""")


def test_a_linear_saves_its_input_and_a_kernel_recomputes_inside() -> None:
    graph = parse("""
def f(x: f64[b, 5]):
    y = mlp(x, params='layers.0')
    return y

@layer
def mlp(x: f64[b, 5], *, w: f64[6, 5] = normal(0.3), v: f64[5, 3] = normal(0.3)):
    h = linear(x, w)
    a = glu(h)
    y = linear(a, v)
    return y

@kernel
def glu(h: f64[b, 6]):
    g, u = split(h, sizes=(3, 3))
    s = silu(g)
    a = mul(s, u)
    return a
""")
    after = gradients(graph)
    ahead, back = after.layers
    assert [v.name for v in ahead.outputs] == ["y", "h", "a"] and [v.name for v in back.inputs] == ["x", "h", "a", "d_y"]
    assert [g.name for g in back.callees] == ["glu_backward"]
    gradients_agree(graph, after)


def test_layers_call_layers() -> None:
    graph = parse("""
def f(x: f64[b, 5]):
    a = outer_one(x, params='a')
    y = outer_one(a, params='c')
    return y

@layer
def outer_one(x: f64[b, 5], *, w: f64[5] = normal(0.3)):
    a = inner(x, params='in')
    c = inner(a, params='out')
    y = scale_columns(c, w)
    return y

@layer
def inner(x: f64[b, 5], *, w: f64[5, 5] = normal(0.3)):
    h = linear(x, w)
    y = silu(h)
    return y
""")
    after = gradients(graph)
    assert [v.name for v in after.outputs[2:5]] == ["d_a_w", "d_a_in_w", "d_a_out_w"]
    gradients_agree(graph, after)
    for policy in ("boundary", "full"):
        gradients_agree(graph, recompute(after, policy=policy)[0])


def test_a_result_that_a_layer_gives_for_nothing_is_no_cotangent() -> None:
    graph = parse("""
def f(x: f64[b, 5]):
    y, z = two(x, params='a')
    u = dead(x, params='c')
    return y, x

@layer
def two(x: f64[b, 5], *, w: f64[5] = normal(0.3)):
    y = scale_columns(x, w)
    z = silu(x)
    return y, z

@layer
def dead(x: f64[b, 5], *, w: f64[5] = normal(0.3)):
    y = scale_columns(x, w)
    return y
""")
    after = gradients(graph)
    assert [len(g.inputs) for g in after.layers if "backward" in g.name] == [0, 2]
    gradients_agree(graph, after)


CHOICES = (
    "silu({0})", "mul({0}, {1})", "add({0}, {1})", "linear({0}, w)", "rms_norm({0}, u)", "scale({0}, by=0.5)", "sub({1}, {0})",
    "l2_norm({0})", "softcap({0}, cap=2.0)", "clamp({0}, low=-0.5)", "scale_columns({1}, u)", "layer_norm({0}, u, u)",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(15))
def test_random_programs(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=rng))

    lines, values = list[str](), ["x", "z"]
    for i in range(14):
        one, two = values[pick(len(values))], values[max(0, len(values) - 1 - pick(4))]
        lines.append(f"    v{i} = {CHOICES[pick(len(CHOICES))].format(one, two)}")
        values.append(f"v{i}")
    head = "def f(x: f64[b, 5], z: f64[b, 5], *, w: f64[5, 5] = normal(0.3), u: f64[5] = normal(0.3)):\n"
    graph = parse(head + "\n".join(lines) + f"\n    return {', '.join(values[-3:])}\n")
    gradients_agree(graph, gradients(graph))
    outlined = Pipeline.parse("outline-rows{max_ops=5}").run(graph)
    gradients_agree(outlined, gradients(outlined))


def test_grown_graphs() -> None:
    """Over every op, layers and kernels: well typed, read back, and right where the program runs; else the reason is said."""
    told = Counter[str]()
    for seed in range(60):
        graph = random_graph(seed)
        try:
            after = gradients(graph)
        except PlaitError as error:
            told[type(error).__name__] += 1
            assert any(why in str(error) for why in ("has no gradient", "nothing is differentiable", "share their", "partial"))
            continue
        check_types(after)
        try:
            report = validate(graph, after, "reassociates", gradients=True)
        except (PlaitError, KeyError):  # random sizes that no mesh divides, or that no input names
            continue
        assert report.ok or "does not run" in str(report), f"{seed}: {report}"
        told["right"] += bool(report.rows)
    assert told["right"] > 5, told


# -- placement ------------------------------------------------------------------------------------

TENSOR_PARALLEL = parse("""
def f(x: f64[b, s@cp, 6], *, norm: f64[6] = constant(1.0), w_in: f64[10@tp, 6] = normal(0.3), w_out: f64[6, 10@tp]):
    n = rms_norm(x, norm)
    h = linear(n, w_in)
    g = linear(n, w_in)
    m = mul(h, g)
    a = silu(m)
    p = linear(a, w_out)
    o = all_reduce(p, axis='tp')
    y = add(o, x)
    return y, a
""")
SEQUENCE_PARALLEL = parse("""
def f(x: f64[b, s@tp, 6]):
    a = mlp(x, params='0')
    y = mlp(a, params='1')
    return y

@layer
def mlp(x: f64[b, s@tp, 6], *, norm: f64[6] = constant(1.0), w_in: f64[10@tp, 6] = normal(0.3), w_out: f64[6, 10@tp]):
    n = rms_norm(x, norm)
    g = all_gather(n, axis='tp', dim=1)
    h = linear(g, w_in)
    a = silu(h)
    p = linear(a, w_out)
    o = reduce_scatter(p, axis='tp', dim=1)
    y = add(o, x)
    return y
""")
ZIGZAG = parse("""
def f(x: f64[b, s, 8], w: f64[8]):
    a = reorder(x, dim=1, order='zigzag(2)')
    c = shard(a, axis='cp', dim=1)
    n = rms_norm(c, w)
    h = reshape(n, pattern='b s (h d=2) -> b s h d')
    g = all_to_all(h, axis='cp', src=1, dst=2)
    u = reorder(g, dim=1, was='zigzag(2)')
    o = attention(u, u, u)
    v = reorder(o, dim=1, order='zigzag(2)')
    k = all_to_all(v, axis='cp', src=2, dst=1)
    e = all_gather(k, axis='cp', dim=1)
    y = reorder(e, dim=1, was='zigzag(2)')
    return y, n
""")


def moves(graph: Graph) -> list[str]:
    return [n.op.name for n in graph.nodes if n.op.name in ("all_reduce", "all_gather", "reduce_scatter", "shard")]


def test_a_partial_cotangent_is_summed_once_before_it_goes_on_and_a_parameters_not_at_all() -> None:
    after = gradients(TENSOR_PARALLEL)
    assert moves(after) == ["all_reduce", "all_reduce"]
    summed = [n for n in after.nodes if n.is_op("all_reduce")][1]
    assert str(summed.inputs[0] and summed.inputs[0].type) == "f64[b, s@cp, 6]+tp" and summed.outputs[0].name == "d_n"
    assert [str(v.type) for v in after.outputs[3:]] == ["f64[6]+cp", "f64[10@tp, 6]+cp", "f64[6, 10@tp]+cp"]
    gradients_agree(TENSOR_PARALLEL, after)


def test_a_gathers_cotangent_is_summed_and_scattered_at_once() -> None:
    after = gradients(SEQUENCE_PARALLEL)
    assert moves(after.layers[1]) == ["all_gather", "reduce_scatter"]
    gradients_agree(SEQUENCE_PARALLEL, after)


def test_exchanges_and_orders_run_backwards() -> None:
    after = gradients(ZIGZAG)
    assert str(after.outputs[2].type) == "f64[b, s, 8]" and str(after.inputs[3].type) == "f64[b, s@cp:zigzag(2), 8]"
    gradients_agree(ZIGZAG, after)


# -- what validation catches ----------------------------------------------------------------------


def test_the_passes_are_verified_with_numbers() -> None:
    after = Pipeline.parse("differentiate,recompute,fuse,outline-rows").run(LAYERS, verify="numeric")
    assert after.name == "model_gradients" and PASSES["differentiate"].gradients and PASSES["recompute"].numerics == "exact"


def spoiled(graph: Graph, op: str, into: str, half: str) -> Graph:
    """A wrong gradient: ops of one half become others."""

    def change(part: Graph) -> Graph:
        replay = Replay(part)

        def visit(node: Node, inputs: list[Value | None]) -> tuple[Value, ...] | None:
            return replay.builder.emit(OPS[into], inputs) if half in part.name and node.is_op(op) else None

        return replay.run(visit)

    wrong = each_layer(graph, change)
    assert wrong != graph
    return wrong


@pytest.mark.parametrize(
    ("op", "into", "half"),
    [
        ("sigmoid", "silu", "_backward"),
        ("sub", "add", "_backward"),
        ("rsqrt", "tanh", "_backward"),
        ("column_sum", "zeros", "_backward"),
        ("add", "mul", "_gradients"),
        ("silu", "relu", "_forward"),
    ],
)
def test_a_wrong_gradient_is_caught(op: str, into: str, half: str) -> None:
    if into == "zeros":
        graph, into = parse(dump(gradients(LAYERS)).replace("column_sum(y12)", "zeros_like(w)")), ""
        assert "zeros_like(w)" in dump(graph)
    else:
        graph = spoiled(gradients(LAYERS), op, into, half)
    report = validate(LAYERS, graph, "reassociates", gradients=True)
    assert not report.ok and report.worst is not None and report.worst.error > 1e-6


def test_a_program_without_all_its_gradients_is_a_problem() -> None:
    report = validate(LAYERS, LAYERS, "reassociates", gradients=True)
    assert "there are 3 inputs, must be 3 and 1 cotangents of float results" in report.problem
    short = parse(dump(gradients(LAYERS)).replace(", d_layers_0_idle2\n", "\n"))
    assert "there are 7 results, must be 8 with the gradients" in validate(LAYERS, short, "exact", gradients=True).problem


def test_the_command_line_verifies_it(tmp_path: Path) -> None:
    from plait.__main__ import app

    file = tmp_path / "program.ir"
    file.write_text(dump(preset("llama-3-8b-tiny", dtype="bf16")))
    command = ["opt", str(file), "-p", "differentiate,recompute{policy=bytes budget=200}", "--verify-each=numeric", "--remarks"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert "def mlp_backward" in found.output and "bytes a token are saved" in found.output


def test_numbers_have_the_dtypes_that_types_promise() -> None:
    graph = preset("nemotron-3-nano-30b-a3b-tiny", dtype="bf16")
    after, sample = gradients(graph), draw(graph)
    given = {n: sample.params[n].to(DTYPES[type_.dtype]) for n, (type_, _) in parameters(graph).items()}
    out = evaluate(after, *sample.inputs.values(), torch.tensor(1.0), params=given)
    assert [t.dtype for t in out] == [DTYPES[v.type.dtype] for v in after.outputs]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(p: i64[b, s]):\n    y = positions(p)\n    return y\n", "f: nothing is differentiable: no float result depends"),
        ("def f(x: f32[b], p: i64[b, s]):\n    y = positions(p)\n    return y\n", "f: nothing is differentiable"),
        (
            "def f(x: f64[b, 5]):\n    a = one(x, params='l')\n    y = two(a, params='l')\n    return y\n"
            "@layer\ndef one(x: f64[b, 5], *, w: f64[5]):\n    y = add_bias(x, w)\n    return y\n"
            "@layer\ndef two(x: f64[b, 5], *, w: f64[7, 5]):\n    y = linear(x, w)\n    return y\n",
            r"f: parameter l.w is f64\[5\] in one layer and f64\[7, 5\] in another",
        ),
        (
            "def f(x: f64[b, 5], d: f64[()]):\n    y = z_loss_backward(x, d)  # f64[b, 5] from m.loss\n    return y\n",
            r"z_loss_backward has no gradient: .* \(at m.loss\)",
        ),
    ],
)
def test_what_has_no_gradient_says_why(text: str, says: str) -> None:
    with pytest.raises(PassFailed, match=f"pass differentiate: {says}") as caught:
        Pipeline.parse("differentiate").run(parse(text))
    assert not caught.value.internal
