"""Outlining a convex set of nodes, inlining it again, and the general outlining of row-wise regions."""

from __future__ import annotations

import pytest
import torch
from plait.ir import Graph, PassError, evaluate, parse
from plait.passes import (
    Region,
    check_types,
    convex,
    inline,
    inline_kernels,
    outline,
    outline_all,
    outline_rows,
    region,
    validate,
)

DIAMOND = parse("""
def f(x: f32[b, 5], *, w: f32[5] = normal(0.02)):
    a = silu(x)  # f32[b, 5] from m.one
    c = scale_columns(a, w)  # f32[b, 5] from m.two
    d = relu(a)  # f32[b, 5] from m.two
    y = add(c, d)
    return y, c
""")
COLLECTIVE = parse("""
def f(x: f32[b@cp, 5], z: f32[b@cp, 5]):
    a = silu(x)
    g = all_gather(a, axis='cp', dim=0)
    c = relu(z)
    h = all_gather(c, axis='cp', dim=0)
    d = silu(c)
    e = all_gather(d, axis='cp', dim=0)
    y = add(g, h)
    return y, e
""")


def node_names(graph: Graph) -> list[str]:
    return [n.op.name for n in graph.nodes]


def test_a_region_becomes_a_kernel_called_once():
    after = outline(DIAMOND, DIAMOND.nodes[:3], "part")
    check_types(after)
    assert after == parse("""
def f(x: f32[b, 5], *, w: f32[5] = normal(0.02)):
    c, d = part(x, w)
    y = add(c, d)
    return y, c

@kernel
def part(x: f32[b, 5], w: f32[5]):
    a = silu(x)
    c = scale_columns(a, w)
    d = relu(a)
    return c, d
""")
    assert after.nodes[0].loc == "m" and validate(DIAMOND, after, "exact").ok


def test_results_are_what_is_read_outside_or_returned():
    a, c, _, y = DIAMOND.nodes
    made = region(DIAMOND, [c, y], "part")
    assert [v.name for v in made.operands] == ["a", "w", "d"] and [v.name for v in made.results(DIAMOND)] == ["c", "y"]
    assert region(DIAMOND, [y, c, a], "part").nodes == (a, c, y)


def test_a_set_that_is_not_convex_is_refused():
    a, _, d, y = DIAMOND.nodes
    assert convex(DIAMOND, [a, d]) and not convex(DIAMOND, [a, y])
    with pytest.raises(PassError, match=r"outline: part \(silu at m.one to add\) is not convex"):
        outline(DIAMOND, [a, y], "part")


def test_two_sets_that_need_each_other_are_refused():
    both = parse("""
def f(x: f32[b, 5], z: f32[b, 5]):
    a = silu(x)
    c = relu(z)
    d = relu(a)
    e = silu(c)
    return d, e
""")
    a, c, d, e = both.nodes
    assert convex(both, [a, e]) and convex(both, [c, d])
    with pytest.raises(PassError, match="not convex"):
        outline_all(both, [region(both, [a, e], "one"), region(both, [c, d], "two")])
    joined = outline_all(both, [region(both, [a, d], "one"), region(both, [c, e], "two")])
    assert node_names(joined) == ["one", "two"] and len(joined.callees) == 2


def test_nodes_that_read_the_kernel_come_after_it_and_others_keep_their_order():
    mixed = parse("""
def f(x: f32[b, 5]):
    a = silu(x)
    e = gelu(a)
    c = relu(x)
    d = softplus(x)
    y = add(a, d)
    return y, e, c
""")
    a, _, _, d, y = mixed.nodes
    after = outline(mixed, [a, d, y], "part")
    assert node_names(after) == ["relu", "part", "gelu"] and validate(mixed, after, "exact").ok


def test_collectives_keep_their_order():
    after = outline(COLLECTIVE, COLLECTIVE.nodes[2:5:2], "part")
    check_types(after)
    assert node_names(after) == ["silu", "all_gather", "part", "all_gather", "all_gather", "add"]
    assert [n.outputs[0].name for n in after.nodes if n.is_op("all_gather")] == ["g", "h", "e"]


def test_a_set_around_a_chain_of_collectives_is_not_convex():
    later = parse("""
def f(x: f32[b@cp, 5], z: f32[b@cp, 5]):
    a = silu(x)
    g = all_gather(a, axis='cp', dim=0)
    h = all_gather(z, axis='cp', dim=0)
    y = relu(h)
    return y, g
""")
    assert not convex(later, [later.nodes[0], later.nodes[3]])
    with pytest.raises(PassError, match="not convex"):
        outline(later, [later.nodes[0], later.nodes[3]], "part")


def test_kernels_hold_local_ops_alone():
    with pytest.raises(PassError, match="all_gather is a call or a collective"):
        outline(COLLECTIVE, COLLECTIVE.nodes[:2], "part")
    fused = outline(DIAMOND, DIAMOND.nodes[:2], "part")
    with pytest.raises(PassError, match="part at m is a call or a collective"):
        outline(fused, fused.nodes, "whole")


def test_sets_are_disjoint_nonempty_and_of_this_graph():
    with pytest.raises(PassError, match="at least one node"):
        outline(DIAMOND, [], "part")
    with pytest.raises(PassError, match="only nodes of f"):
        outline_all(DIAMOND, [Region("part", COLLECTIVE.nodes[:1])])
    twice = region(DIAMOND, DIAMOND.nodes[:1], "part")
    with pytest.raises(PassError, match=r"silu at m\.one is in two sets"):
        outline_all(DIAMOND, [twice, twice])


def test_a_set_that_nothing_uses_is_refused():
    dead = parse("def f(x: f32[b, 5]):\n    a = silu(x)\n    y = relu(x)\n    return y\n")
    with pytest.raises(PassError, match="nothing that it makes is used; run dce first"):
        outline(dead, dead.nodes[:1], "part")


def test_equal_kernels_are_one_graph():
    twin = parse("""
def f(x: f32[b, 5], z: f32[b, 5]):
    a = silu(x)
    c = mul(a, z)
    d = silu(z)
    e = mul(d, x)
    return c, e
""")
    n = twin.nodes
    after = outline_all(twin, [region(twin, n[:2], "gate"), region(twin, n[2:], "door")])
    assert len(after.callees) == 1 and str(after).count("@kernel") == 1
    check_types(after)


def test_inline_is_the_inverse():
    fused = outline(DIAMOND, DIAMOND.nodes[:3], "part")
    assert inline(fused) == DIAMOND and inline_kernels(DIAMOND) == DIAMOND
    assert [n.loc for n in inline(fused).nodes] == [n.loc for n in DIAMOND.nodes]


ROWS = parse("""
def f(x: f32[b, s, 12], r: f32[b, s, 12], *, w: f32[12, 12] = normal(0.02), a: f32[12] = normal(0.02)):
    g, u, v = split(x, sizes=(4, 4, 4))
    k = silu(g)
    m = mul(k, u)
    c = concat(m, u)
    t = concat(c, m)
    l = linear(t, w)
    h = add(l, r)
    n = rms_norm(h, a)
    y = reshape(n, pattern='b s (i j=3) -> b s i j')
    return y, v, h
""")


def test_rows_take_maximal_regions_and_leave_views_outside():
    after, remarks = outline_rows(ROWS)
    check_types(after)
    assert node_names(after) == ["split", "rows", "linear", "rows", "reshape"]
    assert [[n.op.name for n in k.nodes] for k in after.callees] == [["silu", "mul", "concat", "concat"], ["add", "rms_norm"]]
    assert [r.what for r in remarks] == ["rows", "rows"] and validate(ROWS, after, "exact").ok


def test_rows_stop_where_a_value_leaves_and_comes_back():
    graph = parse("""
def f(x: f64[b, 5], *, w: f64[5, 5] = normal(0.1)):
    a = silu(x)
    l = linear(a, w)
    c = relu(a)
    y = add(c, l)
    return y
""")
    after, _ = outline_rows(graph)
    assert [[n.op.name for n in k.nodes] for k in after.callees] == [["silu", "relu"]]
    assert validate(graph, after, "exact").ok


def test_rows_are_bounded():
    assert outline_rows(ROWS, min_ops=6) == (ROWS, ()) and len(outline_rows(ROWS, min_ops=4)[0].callees) == 1
    after, _ = outline_rows(ROWS, max_ops=2)
    assert all(len(k.nodes) <= 2 for k in after.callees) and after.callees
    assert validate(ROWS, after, "exact").ok


@pytest.mark.parametrize(
    "body",
    [
        "a = linear(x, w)\n    y = embedding(w, t)\n    return a, y",
        "a = scale(x, by=2.0)\n    c = linear(a, w)\n    y = scale(c, by=3.0)\n    return y",
        "a = scale(x, by=2.0)\n    c = reshape(a, pattern='b d -> d b')\n    y = scale(c, by=3.0)\n    return y",
        "a, c = split(x, sizes=(2, 3))\n    y = concat(c, a)\n    return y",
        "a = dropout(x, seed, p=0.5)\n    y = scale(a, by=2.0)\n    return y",
    ],
)
def test_rows_hold_back(body: str):
    graph = parse(f"def f(x: f32[b, 5], t: i64[b], seed: i64[()], *, w: f32[5, 5] = normal(0.02)):\n    {body}\n")
    assert outline_rows(graph) == (graph, ())


def test_a_norm_or_an_activation_alone_is_a_kernel_since_its_gradient_is_many_ops():
    graph = parse("def f(x: f32[b, 5], *, w: f32[5, 5] = normal(0.02)):\n    a = silu(x)\n    y = linear(a, w)\n    return y\n")
    after, _ = outline_rows(graph)
    assert node_names(after) == ["rows", "linear"] and validate(graph, after, "exact").ok


def test_scalars_are_no_rows():
    graph = parse("def f(x: f32[()]):\n    a = scale(x, by=2.0)\n    y = silu(a)\n    return y\n")
    assert outline_rows(graph) == (graph, ())


CHOICES = (
    "silu({0})", "mul({0}, {1})", "add({0}, {1})", "linear({0}, w)", "rms_norm({0})", "scale({0}, by=0.5)", "sigmoid({1})",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(25))
def test_rows_of_random_graphs_stay_what_they_were(seed: int):
    rng = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=rng))

    lines, values = list[str](), ["x", "z"]
    for i in range(14):
        kind, made = pick(len(CHOICES)), f"v{i}"
        one, two = values[pick(len(values))], values[max(0, len(values) - 1 - pick(4))]
        text = [
            "silu({0})",
            "mul({0}, {1})",
            "add({0}, {1})",
            "linear({0}, w)",
            "rms_norm({0})",
            "scale({0}, by=0.5)",
            "sigmoid({1})",
        ]
        lines.append(f"    {made} = {text[kind].format(one, two)}")
        values.append(made)
    head = "def f(x: f64[b, 5], z: f64[b, 5], *, w: f64[5, 5] = normal(0.3)):\n"
    graph = parse(head + "\n".join(lines) + f"\n    return {', '.join(values[-3:])}\n")
    after, _ = outline_rows(graph, max_ops=5)
    check_types(after)
    assert validate(graph, after, "exact").ok and inline(after).symbols == graph.symbols
    x, z, w = (torch.randn(n, 5, generator=rng, dtype=torch.float64) for n in (63, 63, 5))
    for was, now in zip(evaluate(graph, x, z, params={"w": w}), evaluate(inline(after), x, z, params={"w": w}), strict=True):
        assert torch.equal(was, now)
