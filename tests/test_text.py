"""The text form loses nothing: a graph is read as it was written, and equal programs are equal."""

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plait.ir import OPS, Builder, OpDef, dump, parse, parse_type
from plait.ir.graph import Graph
from plait.ir.grow import random_graph

LAYER = """def model(x: f64[b, s@cp, 12], tokens: i64[b, s], *, norm: f64[12] = constant(1.0)):
    h = rms_norm(x, norm, eps=1e-05)                          # f64[b, s@cp, 12] from layers.0.norm
    g, u = split(h, sizes=(4, 8))                             # two of them from layers.0.gate
    a = all_to_all(u, axis='cp', src=1, dst=2)
    y, last = block(a, params='layers.0')                     # the layer from layers.0
    z = both(g, g)
    return y, z

@layer
def block(x: f64[b, s, 8@cp], *, w: f64[8@cp, 4] = normal(0.02), bias: f64[8@cp]):
    y, final = causal_conv1d(x, w, bias, act='silu')
    return y, final

@kernel
def both(a: f64[b, s@cp, 4], c: f64[b, s@cp, 4]):
    y = mul(a, c)
    z = clamp(y, low=-1.5)
    return z
"""


def parts(graph: Graph) -> list[Any]:
    """All that equality leaves out, and all that it must not."""
    nodes = [
        (n.op.name, dict(n.attrs), n.loc, [v.type for v in n.outputs], [v is None for v in n.inputs])
        for n in graph.nodes
        if isinstance(n.op, OpDef)
    ]
    own = [[v.type for v in graph.inputs], [(v.name, v.type) for v in graph.params], graph.inits, graph.role, nodes]
    return [own, *(parts(g) for g in graph.callees)]


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_text_loses_nothing(seed: int) -> None:
    graph = random_graph(seed)
    text = dump(graph)
    again = parse(text)
    assert again == graph and again.key == graph.key and hash(again) == hash(graph)
    assert parts(again) == parts(graph)
    assert dump(again) == text


def test_random_graphs_reach_every_op() -> None:
    reached, roles = set[str](), set[str]()
    for seed in range(len(OPS)):
        todo = [random_graph(seed)]
        while todo:
            g = todo.pop()
            roles.add(g.role)
            todo += g.callees
            reached |= {n.op.name for n in g.nodes if isinstance(n.op, OpDef)}
    assert {"graph", "layer", "kernel"} <= roles
    assert reached >= set(OPS) - {"all_to_all", "reduce_scatter", "begin_all_to_all", "end_all_to_all"}


# -- what equality sees -------------------------------------------------------------------------


def test_names_are_hints() -> None:
    renamed = (
        LAYER.replace("y, last", "q, r")
        .replace("return y, z", "return q, z")
        .replace("def block", "def part")
        .replace("block(", "part(")
    )
    assert parse(renamed) == parse(LAYER)
    assert dump(parse(renamed)) != dump(parse(LAYER))


@pytest.mark.parametrize(("old", "new"), [
    ("eps=1e-05", "eps=1e-06"), ("both(g, g)", "both(g, h2)"), ("return y, z", "return z, y"),
    ("constant(1.0)", "constant(2.0)"),
    (r"norm\b(?!al)", "scale_of"), ("@kernel", "@layer"), ("act='silu'", "act='none'"), ("low=-1.5", "low=1.5"),
    ("f64", "f32"), ("cp", "tp"),
    ("'layers.0'", "'layers.1'"), ("mul(a, c)", "mul(c, a)"),
])  # fmt: skip
def test_any_other_difference_counts(old: str, new: str) -> None:
    text = re.sub(r"(?<!rms_)" + (old if "\\b" in old else re.escape(old)), new, LAYER)
    text = text.replace("g, u = split", "h2, u2 = split(h, sizes=(4, 8))\n    g, u = split") if "h2" in new else text
    text = text.replace("both(g, g)", "both(g, g, params='k')") if new == "@layer" else text
    assert parse(text) != parse(LAYER)


def test_a_parameter_is_no_numbered_value() -> None:
    """A parameter that is called as values are numbered stays another value."""
    text = "def f(x: f32[3], *, v0: f32[3] = constant(1.0)):\n    y = add({})\n    return y\n"
    assert len({parse(text.format(args)) for args in ("x, v0", "v0, x", "x, x", "v0, v0")}) == 4


def test_where_a_node_came_from_survives() -> None:
    graph = parse(LAYER)
    assert [n.loc for n in graph.nodes] == ["layers.0.norm", "layers.0.gate", "", "layers.0", ""]
    assert [n.loc for n in parse(dump(graph)).nodes] == [n.loc for n in graph.nodes]


def test_absent_operands_and_defaults_are_not_written() -> None:
    b = Builder("f")
    x = b.input("x", parse_type("f32[2, 5, 3]"))
    w, state = b.input("w", parse_type("f32[3, 4]")), b.input("state", parse_type("f32[2, 3, 3]"))
    y, _ = b.emit(OPS["causal_conv1d"], [x, w, None, state, None], {"act": "none"}, loc="a.b")
    text = dump(b.finish([y]))
    assert "    y, final = causal_conv1d(x, w, state=state)  # f32[2, 5, 3], f32[2, 3, 3] from a.b\n" in text
    assert parse(text) == b.finish([y])


def test_graphs_that_share_callees_have_short_keys() -> None:
    """Each graph calls the next two; a key that repeated its callees would double at every one."""
    deep = [f"@kernel\ndef g{i}(x: f32[2]):\n    y = g{i + 1}(x)\n    z = g{i + 2}(y)\n    return z" for i in range(28)]
    ends = [f"@kernel\ndef g{i}(x: f32[2]):\n    y = {op}(x)\n    return y" for i, op in ((28, "silu"), (29, "relu"))]
    start = time.process_time()
    graph = parse("\n\n".join([*deep, *ends]))
    assert parse(dump(graph)) == graph and len(graph.key) < 1000
    assert time.process_time() - start < 5
