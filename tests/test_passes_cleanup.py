"""Cleaning up: each identity where it fires and where it holds back, dce, cse, and their fixed point."""

from __future__ import annotations

import pytest
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.ir import Graph, parse
from plait.passes import canonicalize, check_types, cse, dce, rewrite, simplify, validate
from plait.passes.simplifications import RULES

INPUTS = "x: f64[b, s, 12], z: f64[b, s, 5], h: bf16[b, s, 12], seed: i64[()], w: f64[b@cp, 12], r: f64[b, s@cp, 12]"


def graph(body: str) -> Graph:
    return parse(f"def f({INPUTS}):\n" + "\n".join(f"    {line.strip()}" for line in body.strip().splitlines()) + "\n")


# rule, where it fires, what is left, where it holds back
CASES = [
    ("scale-by-one", "y = scale(x, by=1.0)\nreturn y", "return x", "y = scale(x, by=-1.0)\nreturn y"),
    (
        "reshape-nothing",
        "y = reshape(x, pattern='... d -> ... d')\nreturn y",
        "return x",
        "y = reshape(x, pattern='b s d -> s b d')\nreturn y",
    ),
    (
        "reshape-back",
        "a = reshape(x, pattern='... (h=3 d) -> ... h d')\ny = reshape(a, pattern='b s h d -> b s (h d)')\nreturn y",
        "return x",
        "a = reshape(x, pattern='... (h=3 d) -> ... h d')\ny = reshape(a, pattern='b s h d -> b s (d h)')\nreturn y",
    ),
    (
        "reshape-back",
        "a = reshape(x, pattern='b s (h=3 d) -> b h s d')\ny = reshape(a, pattern='b h s d -> b s (h d)')\nreturn y",
        "return x",
        "a = reshape(x, pattern='b s (h=3 d) -> b s (d h)')\ny = reshape(a, pattern='b s (d h=6) -> b s (h d)')\nreturn y",
    ),
    ("cast-to-same", "y = cast(h, dtype='bf16')\nreturn y", "return h", "y = cast(h, dtype='f32')\nreturn y"),
    (
        "cast-back",
        "a = widen(h)\ny = cast(a, dtype='bf16')\nreturn y",
        "return h",
        "a = widen(h)\ny = cast(a, dtype='f16')\nreturn y",
    ),
    ("widen-wide", "y = widen(x)\nreturn y", "return x", "y = widen(h)\nreturn y"),
    ("no-dropout", "y = dropout(x, seed, p=0.0)\nreturn y", "return x", "y = dropout(x, seed, p=0.1)\nreturn y"),
    ("split-one", "y = split(x, sizes=(12,))\nreturn y", "return x", "y, a = split(x, sizes=(11, 1))\nreturn y, a"),
    (
        "concat-split",
        "a, c = split(x, sizes=(5, 7))\ny = concat(a, c)\nreturn y",
        "return x",
        "a, c = split(x, sizes=(6, 6))\ny = concat(c, a)\nreturn y",
    ),
    (
        "split-concat",
        "c = concat(x, z)\na, d = split(c, sizes=(12, 5))\nreturn a, d",
        "return x, z",
        "c = concat(x, z)\na, d = split(c, sizes=(5, 12))\nreturn a, d",
    ),
    (
        "clamp-softplus",
        "a = softplus(x)\ny = clamp(a, low=0.0)\nreturn y",
        "a = softplus(x)\nreturn a",
        "a = softplus(x)\ny = clamp(a, low=0.001)\nreturn y",
    ),
    (
        "clamp-softplus",
        "a = softplus(x)\ny = clamp(a, low=-1.0)\nreturn y, a",
        "a = softplus(x)\nreturn a, a",
        "a = softplus(x)\ny = clamp(a, low=0.0, high=9.0)\nreturn y",
    ),
    (
        "reorder-nothing",
        "y = reorder(x, dim=1)\nreturn y",
        "return x",
        "y = reorder(x, dim=1, order='zigzag(2)')\nreturn y",
    ),
    (
        "reorder-back",
        "a = reorder(x, dim=1, order='zigzag(2)')\ny = reorder(a, dim=1, was='zigzag(2)')\nreturn y",
        "return x",
        "a = reorder(x, dim=1, order='zigzag(2)')\ny = reorder(a, dim=0, order='zigzag(2)')\nreturn y",
    ),
    (
        "reorder-twice",
        "a = reorder(x, dim=1, order='zigzag(2)')\ny = reorder(a, dim=1, order='zigzag(3)', was='zigzag(2)')\nreturn y",
        "y = reorder(x, dim=1, order='zigzag(3)')\nreturn y",
        "a = reorder(x, dim=1, order='zigzag(2)')\ny = reorder(a, dim=1, order='zigzag(3)', was='zigzag(2)')\nreturn y, a",
    ),
    (
        "gather-shard",
        "a = shard(x, axis='cp', dim=1)\ny = all_gather(a, axis='cp', dim=1)\nreturn y",
        "return x",
        "a = shard(x, axis='cp', dim=1)\nc = silu(a)\ny = all_gather(c, axis='cp', dim=1)\nreturn y",
    ),
    (
        "shard-gather",
        "a = all_gather(r, axis='cp', dim=1)\ny = shard(a, axis='cp', dim=1)\nreturn y",
        "return r",
        "a = all_gather(r, axis='cp', dim=1)\ny = shard(a, axis='cp', dim=2)\nreturn y",
    ),
    (
        "exchange-back",
        "a = all_to_all(r, axis='cp', src=1, dst=2)\ny = all_to_all(a, axis='cp', src=2, dst=1)\nreturn y",
        "return r",
        "a = all_to_all(r, axis='cp', src=1, dst=2)\ny = all_to_all(a, axis='cp', src=2, dst=0)\nreturn y",
    ),
]


@pytest.mark.parametrize(("name", "body", "left", "near"), CASES)
def test_an_identity_fires_and_holds_back(name: str, body: str, left: str, near: str):
    rule = [r for r in RULES if r.name == name]
    after, remarks = rewrite(graph(body), rule)
    check_types(after)
    assert after == graph(left) and {r.what for r in remarks} == {name}
    assert validate(graph(body), after, "exact").ok
    assert rewrite(graph(near), rule) == (graph(near), ())


def test_every_identity_is_tested():
    assert {c[0] for c in CASES} == {r.name for r in RULES}


@pytest.mark.parametrize("name", sorted({c[0] for c in CASES if "cp" not in c[1]}))
def test_a_near_miss_would_change_numbers_or_types(name: str):
    """What holds each rule back is needed: without its condition the result is another one."""
    body, near = next((c[1], c[3]) for c in CASES if c[0] == name)
    assert graph(body) != graph(near) and simplify(graph(body))[0] != graph(near)


def test_simplify_reaches_its_fixed_point_through_several_rules():
    before = graph("""
    a = scale(x, by=1.0)
    c = widen(a)
    d = reshape(c, pattern='... (h=3 d) -> ... h d')
    e = cast(d, dtype='f64')
    g = reshape(e, pattern='b s h d -> b s (h d)')
    p, q = split(g, sizes=(5, 7))
    y = concat(p, q)
    return y
    """)
    after, remarks = simplify(before)
    assert after == graph("return x") and len(remarks) == 5


def test_cse_merges_equal_ops_on_equal_operands():
    before = graph("a = silu(x)\nc = silu(x)\nd = add(a, x)\ne = add(x, c)\ny = mul(d, e)\nreturn y")
    after, remarks = cse(before)
    assert after == graph("a = silu(x)\nd = add(a, x)\ny = mul(d, d)\nreturn y") and len(remarks) == 2
    assert validate(before, after, "exact").ok


@pytest.mark.parametrize(
    "body",
    [
        "a = silu(x)\nc = sigmoid(x)\nreturn a, c",
        "a = scale(x, by=2.0)\nc = scale(x, by=3.0)\nreturn a, c",
        "a, c = split(x, sizes=(5, 7))\nd, e = split(x, sizes=(7, 5))\nreturn a, c, d, e",
        "a = fork_seed(seed, stream=1)\nc = fork_seed(seed, stream=2)\nreturn a, c",
        "a = dropout(x, seed, p=0.5)\nc = dropout(x, seed, p=0.5)\nreturn a, c",
        "a = all_gather(w, axis='cp', dim=0)\nc = all_gather(w, axis='cp', dim=0)\nreturn a, c",
        "a = concat(x, x)\nc = concat(x, z)\nreturn a, c",
    ],
)
def test_cse_holds_back(body: str):
    assert cse(graph(body)) == (graph(body), ())


def test_cse_leaves_operands_that_do_not_commute():
    before = graph("a = silu(x)\nc = concat(a, x)\nd = concat(x, a)\nreturn c, d")
    assert cse(before)[0] == before


def test_dce_drops_what_nothing_reads_and_keeps_inputs_and_parameters():
    before = parse("""
def f(x: f64[b, 5], z: f64[b, 5], *, w: f64[5] = normal(0.1), v: f64[5] = normal(0.1)):
    a = add_bias(x, w)
    c = add_bias(z, v)
    d = silu(c)
    y = relu(a)
    return y
""")
    after, remarks = dce(before)
    assert [n.op.name for n in after.nodes] == ["add_bias", "relu"]
    assert [v.name for v in (*after.inputs, *after.params)] == ["x", "z", "w", "v"]
    assert remarks[0].why == "2 ops that nothing reads are gone" and validate(before, after, "exact").ok


def test_dce_keeps_a_node_of_which_one_result_is_read():
    before = graph("a, c = split(x, sizes=(5, 7))\nreturn c")
    assert dce(before) == (before, ())


def test_dce_narrows_layers_to_what_some_call_reads():
    before = parse("""
def f(x: f64[b, 5]):
    a, c = one(x, params='layers.0')
    d, e = one(a, params='layers.1')
    y = add(d, c)
    return y

@layer
def one(x: f64[b, 5], *, w: f64[5] = normal(0.1)):
    y = add_bias(x, w)
    z = silu(y)
    return y, z
""")
    assert dce(before)[0] == before
    narrow = parse(str(before).replace("y = add(d, c)", "y = silu(d)"))
    after, _ = dce(narrow)
    assert len(after.layers[0].outputs) == 1 and [n.op.name for n in after.layers[0].nodes] == ["add_bias"]
    assert validate(narrow, after, "exact").ok


def test_dce_keeps_a_call_that_holds_parameters():
    before = parse("""
def f(x: f64[b, 5]):
    a = one(x, params='layers.0')
    y = silu(x)
    return y

@layer
def one(x: f64[b, 5], *, w: f64[5] = normal(0.1)):
    y = add_bias(x, w)
    return y
""")
    assert dce(before)[0] == before


def test_balance_losses_go_when_only_logits_are_asked_for():
    before = build(load_spec("demo"), task="logits")
    after, _ = canonicalize(before)
    check_types(after)
    moe = next(g for g in after.layers if g.name == "moe")
    assert len(moe.outputs) == 1 and not any(n.is_op("load_balance_loss") for n in moe.nodes)
    kept, _ = canonicalize(build(load_spec("demo"), task="loss"))
    assert any(n.is_op("load_balance_loss") for g in kept.layers for n in g.nodes)


def test_canonicalize_sees_through_all_three_and_is_its_own_fixed_point():
    before = graph("""
    a, c = split(x, sizes=(5, 7))
    d, e = split(x, sizes=(5, 7))
    g = concat(a, e)
    unused = silu(g)
    y = sigmoid(g)
    return y
    """)
    after, _ = canonicalize(before)
    assert after == graph("y = sigmoid(x)\nreturn y") and validate(before, after, "exact").ok
    assert canonicalize(after)[0] == after
