"""Layers that repeat in a flat graph: found, made one graph, called with their own parameters, and the same numbers."""

import re
from collections.abc import Callable

import plait
import pytest
import torch
from plait import Traced, trace_module
from plait.ir import Graph, dump, evaluate, parameters, parse, parse_mesh, simulate
from plait.passes import DEFAULT, PASSES, Pipeline, check_types, flat_name, outline_layers, validate
from torch import nn

from tests.fx_models import Block, Llama, Mamba2

Tensor = torch.Tensor
MLP = """def f(x: f64[b, 6], z: f64[b, 6]{given}, *, {params}):
    p = scale(z, by=2.0)  # f64[b, 6] from layers.0.first
{body}
    return {last}
"""
LAYER = """
    a{i} = {norm}({x}, {w})  # f64[b, 6] from layers.{i}.first
    c{i} = mul(a{i}, p)  # f64[b, 6] from layers.{i}
    d{i} = linear(c{i}, layers_{i}_up)  # f64[b, 6] from layers.{i}.up
    e{i} = silu(d{i})  # f64[b, 6] from layers.{i}
    y{i} = add({x}, e{i})  # f64[b, 6] from layers.{i}"""


def flat(norms: str = "rms rms rms", shared: bool = False, between: str = "") -> Graph:
    """Layers of one norm and one projection each, by the letters of their norms; `p` is made where it is first asked for."""
    params, body, x = list[str](), "", "x"
    for i, norm in enumerate(norms.split()):
        w = "shared" if shared else f"layers_{i}_norm"
        params += [f"{w}: f64[6]"] * (not shared or i == 0) + [f"layers_{i}_up: f64[6, 6]"]
        text = LAYER.format(i=i, norm={"rms": "rms_norm", "layer": "layer_norm"}[norm], x=x, w=w)
        body, x = body + text, f"y{i}"
        if between:
            body, x = body + f"\n    m{i} = {between.format(x)}  # f64[b, 6] from between", f"m{i}"
    return parse(MLP.format(given="", params=", ".join(params), body=body, last=x))


def calls(graph: Graph) -> list[tuple[str, str]]:
    return [(n.op.name, n.attrs["params"]) for n in graph.nodes if n.callee is not None]


def test_what_repeats_is_one_layer() -> None:
    before = flat()
    after, remarks = outline_layers(before)
    assert calls(after) == [("layer", f"layers.{i}") for i in range(3)] and len(after.layers) == 1
    assert [n.op.name for n in after.nodes] == ["scale", "layer", "layer", "layer"]  # what all read is no layer's own
    assert [v.name for v in after.layers[0].params] == ["norm", "up"] and not after.params
    assert [n.loc for n in after.layers[0].nodes] == ["first", "", "up", "", ""]
    assert str(remarks[0]) == "passed outline-layers at layers.0: layer is called 3 times, 5 ops each"
    assert {flat_name(n) for n in parameters(after)} == {v.name for v in before.params}
    check_types(after)
    assert parse(dump(after)) == after


@pytest.mark.parametrize("graph", [flat(), flat(shared=True), flat("rms layer rms"), flat(between="scale({}, by=0.5)")])
def test_the_numbers_are_the_same_to_the_bit(graph: Graph) -> None:
    after = outline_layers(graph)[0]
    assert after.layers and validate(graph, after, "exact").ok
    rng = torch.Generator().manual_seed(0)
    x, z = (torch.randn(7, 6, generator=rng, dtype=torch.float64) for _ in "xz")
    full = {
        n: torch.randn([int(d) for d in t.shape], generator=rng, dtype=torch.float64) for n, (t, _) in parameters(after).items()
    }
    want = evaluate(graph, x, z, params={flat_name(n): v for n, v in full.items()})
    assert torch.equal(evaluate(after, x, z, params=full), want)


def test_a_wrong_layer_is_seen() -> None:
    before = flat()
    after = outline_layers(before)[0]
    wrong = parse(re.sub(r"layer\((\w+), \w+, params='layers.1'\)", r"layer(\1, \1, params='layers.1')", dump(after)))
    assert wrong != after and not validate(before, wrong, "exact").ok


def test_a_shared_parameter_is_given_to_every_layer() -> None:
    after = outline_layers(flat(shared=True))[0]
    assert [v.name for v in after.params] == ["shared"] and len(after.layers) == 1
    assert [len(n.operands) for n in after.nodes if n.callee] == [3, 3, 3]


def test_layers_of_several_kinds_have_names_of_their_own() -> None:
    after = outline_layers(flat("rms layer rms"))[0]
    assert calls(after) == [("layer", "layers.0"), ("layer_2", "layers.1"), ("layer", "layers.2")]


@pytest.mark.parametrize("graph", [
    flat("rms layer"), flat("rms"), parse("def f(x: f64[b, 6]):\n    y = silu(x)\n    z = silu(y)\n    return z\n"),
])  # fmt: skip
def test_what_does_not_repeat_stays_flat(graph: Graph) -> None:
    assert outline_layers(graph) == (graph, ())


def test_small_parts_are_no_layers() -> None:
    assert outline_layers(flat(), min_ops=6)[0] == flat()


def test_fused_first_it_says_so() -> None:
    fused = Pipeline.parse(DEFAULT).run(flat())
    after, remarks = outline_layers(fused)
    assert after == fused and "it must be flat" in remarks[0].why


def test_layers_inside_what_does_not_repeat_are_found() -> None:
    text = dump(flat("rms rms")).replace("from layers", "from stages.0.layers")
    text = text.replace("layers_", "stages_0_layers_")
    after = outline_layers(parse(text))[0]
    assert calls(after) == [("layer", "stages.0.layers.0"), ("layer", "stages.0.layers.1")]


def test_ways_out_and_in_again_hold_a_layer_back() -> None:
    text = dump(flat("rms rms rms"))
    lines = text.splitlines()
    i = next(i for i, x in enumerate(lines) if "from layers.1.up" in x)
    value = lines[i].split("=")[0].strip()
    lines.insert(i + 1, f"    out = relu({value})  # f64[b, 6] from between")
    lines[i + 2] = lines[i + 2].replace(f"silu({value})", f"mul({value}, out)")
    graph = parse("\n".join(lines) + "\n")
    after, remarks = outline_layers(graph)
    assert [p for _, p in calls(after)] == ["layers.0", "layers.2"] and validate(graph, after, "exact").ok
    assert str(remarks[-1]).startswith("missed outline-layers at layers.1")


# -- of a trace -------------------------------------------------------------------------------


class Deep(nn.Module):
    """Two kinds of layers, called in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList([Mamba2() for _ in range(3)])
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            x = x + self.scale * mixer(x)
        return x


def deep_llama() -> nn.Module:
    model = Llama("torch")
    model.layers.extend([Block(20, "torch", False) for _ in range(2)])
    return model


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, Traced]:
    torch.manual_seed(3)
    module = deep_llama().double()
    return module, trace_module(module, torch.randint(31, (2, 7)))


def test_a_trace_calls_each_distinct_layer(traced: tuple[nn.Module, Traced]) -> None:
    module, made = traced
    assert [x.what for x in made.report.layers] == ["layer"] and made.report.layers[0].count == 3
    assert "layers.*, 20 ops" in str(made.report)
    model, x = plait.compile(made, jit=False), torch.randint(31, (3, 11))
    assert len(model.program.layers) == 1
    assert torch.allclose(model(x), module(x), rtol=1e-9, atol=1e-12)
    assert torch.allclose(evaluate(made.graph, x, params=made.params), module(x), rtol=1e-9, atol=1e-12)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_its_layers_are_placed_and_differentiated(traced: tuple[nn.Module, Traced]) -> None:
    module, made = traced
    x = torch.randint(31, (2, 8))
    for mesh in ("cp=2", "tp=2"):
        placed = Pipeline.parse(f"place{{mesh='{mesh}'}}").run(made.graph)
        assert placed.layers and placed != made.graph
        got = simulate(placed, parse_mesh(mesh), x, params=made.params)
        assert torch.allclose(got, module(x), rtol=1e-9, atol=1e-12)
    back = Pipeline.parse("differentiate").run(made.graph)
    assert len(back.layers) == 2 and PASSES["outline-layers"].numerics == "exact"


def test_layers_of_any_name() -> None:
    made = trace_module(Deep().double(), torch.randn(2, 5, 20, dtype=torch.float64), gradients=False)
    assert calls(made.graph) == [("mixer", f"mixers.{i}") for i in range(3)]
    block: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6), nn.Tanh())  # noqa: E731
    made = trace_module(nn.Sequential(block(), block()), torch.randn(3, 6), gradients=False)
    assert calls(made.graph) == [("layer", "m_0"), ("layer", "m_1")]
    x = torch.randn(5, 6)
    assert torch.allclose(plait.compile(made, jit=False)(x), made.module(x), atol=1e-6)
