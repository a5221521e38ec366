"""Rewrite rules: matching, attribute variables, classes, commuting, privacy, fixed points, and the size of graphs."""

from __future__ import annotations

import time

import pytest
from plait.ir import Graph, ParseError, PassError, parse
from plait.passes import Rule, check_types, rewrite, validate


def graph(body: str, inputs: str = "x: f32[b, 5], z: f32[b, 5], w: f32[5]") -> Graph:
    lines = "\n".join(f"    {line.strip()}" for line in body.strip().splitlines())
    return parse(f"def f({inputs}):\n{lines}\n")


def fired(rule: Rule, body: str, expected: str) -> None:
    after, remarks = rewrite(graph(body), [rule])
    check_types(after)
    assert after == graph(expected), after
    assert remarks and {r.what for r in remarks} == {rule.name}


def held(rule: Rule, body: str) -> None:
    after, remarks = rewrite(graph(body), [rule])
    assert after == graph(body) and not remarks


def test_a_rule_replaces_its_root_and_drops_what_is_left_over():
    rule = Rule.of("gate", "n = rms_norm(x, w, eps=e)\ns = silu(z)\ny = mul(n, s)", "a = mul(x, z)\ny = rms_norm(a, w, eps=e)")
    fired(
        rule,
        "n = rms_norm(x, w, eps=0.5)\ns = silu(z)\ny = mul(n, s)\nreturn y",
        "a = mul(x, z)\ny = rms_norm(a, w, eps=0.5)\nreturn y",
    )
    held(rule, "n = rms_norm(x, w)\ns = gelu(z)\ny = mul(n, s)\nreturn y")


def test_a_commuting_root_matches_both_ways():
    rule = Rule.of("gate", "s = silu(z)\ny = mul(n, s)", "y = add(n, z)")
    fired(rule, "s = silu(z)\ny = mul(s, x)\nreturn y", "y = add(x, z)\nreturn y")
    fired(rule, "s = silu(z)\ny = mul(x, s)\nreturn y", "y = add(x, z)\nreturn y")
    held(rule, "s = silu(z)\ny = add(x, s)\nreturn y")


def test_an_inner_value_with_another_use_holds_the_rule_back():
    rule = Rule.of("gate", "s = silu(z)\ny = mul(n, s)", "y = add(n, z)")
    held(rule, "s = silu(z)\ny = mul(x, s)\nreturn y, s")
    held(rule, "s = silu(z)\ny = mul(x, s)\nq = relu(s)\nreturn y, q")


def test_a_value_read_twice_inside_the_match_is_private():
    rule = Rule.of("square", "s = silu(x)\ny = mul(s, s)", "y = relu(x)")
    fired(rule, "s = silu(x)\ny = mul(s, s)\nreturn y", "y = relu(x)\nreturn y")
    held(rule, "s = silu(x)\nt = silu(z)\ny = mul(s, t)\nreturn y")


def test_one_attribute_variable_has_one_value():
    rule = Rule.of("twice", "a = scale(x, by=c)\ny = scale(a, by=c)", "y = scale(x, by=c)")
    fired(rule, "a = scale(x, by=2.0)\ny = scale(a, by=2.0)\nreturn y", "y = scale(x, by=2.0)\nreturn y")
    held(rule, "a = scale(x, by=2.0)\ny = scale(a, by=3.0)\nreturn y")


def test_a_class_stands_for_the_op_that_was_matched_with_its_attributes():
    rule = Rule.of("first", "a = scale_columns(x, w)\ny = activation(a)", "a = activation(x)\ny = scale_columns(a, w)")
    fired(
        rule,
        "a = scale_columns(x, w)\ny = gelu(a, approximate='tanh')\nreturn y",
        "a = gelu(x, approximate='tanh')\ny = scale_columns(a, w)\nreturn y",
    )
    held(rule, "a = scale_columns(x, w)\ny = softplus(a)\nreturn y")


def test_operands_left_out_are_absent_and_named_ones_are_present():
    plain = Rule.of("plain", "y = layer_norm(x, w)", "y = scale_columns(x, w)")
    biased = Rule.of("biased", "y = layer_norm(x, bias=c)", "y = add_bias(x, c)")
    fired(plain, "y = layer_norm(x, w)\nreturn y", "y = scale_columns(x, w)\nreturn y")
    held(plain, "y = layer_norm(x, w, w)\nreturn y")
    fired(biased, "y = layer_norm(x, bias=w)\nreturn y", "y = add_bias(x, w)\nreturn y")
    held(biased, "y = layer_norm(x, w)\nreturn y")


def test_when_says_what_text_cannot():
    rule = Rule.of("small", "y = scale(x, by=c)", "y = silu(x)", lambda m: m.attrs["c"] < 1)
    fired(rule, "y = scale(x, by=0.5)\nreturn y", "y = silu(x)\nreturn y")
    held(rule, "y = scale(x, by=1.5)\nreturn y")


def test_several_results_are_replaced_together():
    rule = Rule.of("halves", "c = concat(p, q)\na, b = split(c, sizes=z)", "p, q", lambda m: m.attrs["z"] == (5, 5))
    fired(rule, "c = concat(x, z)\np, q = split(c, sizes=(5, 5))\ny = add(p, q)\nreturn y", "y = add(x, z)\nreturn y")
    held(rule, "c = concat(x, z)\np, q = split(c, sizes=(4, 6))\nreturn p, q")


def test_a_chain_is_rewritten_to_its_fixed_point():
    rule = Rule.of("none", "y = scale(x, by=1.0)", "x")
    chain = "\n".join(f"a{i + 1} = scale(a{i}, by=1.0)" for i in range(30))
    fired(rule, f"a0 = silu(x)\n{chain}\nreturn a30", "a0 = silu(x)\nreturn a0")


def test_replacements_are_rewritten_too():
    rules = [
        Rule.of("down", "y = gelu(x)", "a = silu(x)\ny = relu(a)"),
        Rule.of("on", "a = silu(x)\ny = relu(a)", "y = sigmoid(x)"),
    ]
    after, remarks = rewrite(graph("y = gelu(x)\nreturn y"), rules)
    assert after == graph("y = sigmoid(x)\nreturn y") and [r.what for r in remarks] == ["down", "on"]


def test_rules_that_undo_each_other_are_refused():
    rules = [Rule.of("there", "y = gelu(x)", "y = silu(x)"), Rule.of("back", "y = silu(x)", "y = gelu(x)")]
    with pytest.raises(PassError, match="one undoes another"):
        rewrite(graph("y = gelu(x)\nreturn y"), rules)


def test_a_rule_that_changes_a_type_is_refused():
    rule = Rule.of("wide", "y = silu(x)", "y = widen(x)")
    with pytest.raises(PassError, match=r"rule wide turns bf16\[b, 5\] into f32\[b, 5\]"):
        rewrite(graph("y = silu(x)\nreturn y", "x: bf16[b, 5]"), [rule])


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("y = slu(x)", "x", "no op or class called slu; did you mean silu?"),
        ("a = silu(z)\ny = relu(x)", "x", "does not lead to a"),
        ("y = relu(x)", "y = mul(x, z)", "z stands in `after` and is not matched"),
        ("y = relu(x)", "z", "z is returned by `after` and is not matched"),
        ("y = relu(x)", "y", "y is returned by `after`"),
        ("a, b = split(x, sizes=z)", "x", "gives 2 values, `after` 1"),
        ("y = relu(x, p=2)", "x", "relu has no attribute p"),
        ("y = relu(x, z)", "x", "given 2 operands"),
        ("y = relu(x)", "y = activation(x)", "must be an op, or a class that stands in `before` once"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(before: str, after: str, says: str):
    with pytest.raises(ParseError, match=says.replace("?", r"\?")):
        Rule.of("bad", before, after)


def test_one_name_is_one_value():
    rule = Rule.of("double", "y = mul(v, v)", "y = silu(v)")
    fired(rule, "y = mul(z, z)\nreturn y", "y = silu(z)\nreturn y")
    held(rule, "y = mul(x, z)\nreturn y")


def test_a_call_that_holds_parameters_survives_its_last_use():
    model = parse("""
def f(x: f32[b, 5]):
    a = one(x, params='layers.0')
    y = add(x, a)
    return y

@layer
def one(x: f32[b, 5], *, w: f32[5] = normal(0.02)):
    y = add_bias(x, w)
    return y
""")
    after, _ = rewrite(model, [Rule.of("first", "y = add(p, q)", "p")])
    assert after.outputs == after.inputs and len(after.layers) == 1
    assert not validate(model, after, "exact").ok


def test_a_big_graph_takes_linear_time():
    def seconds(n: int) -> float:
        rule = Rule.of("gate", "s = silu(z)\ny = mul(n, s)", "y = add(n, z)")
        body = "\n".join(f"s{i} = silu(x{i})\nx{i + 1} = mul(s{i}, x{i})" for i in range(n))
        big = graph(f"x0 = relu(x)\n{body}\nreturn x{n}")
        start = time.perf_counter()
        after, remarks = rewrite(big, [rule])
        assert len(remarks) == n and len(after.nodes) == n + 1
        return time.perf_counter() - start

    seconds(20)
    assert seconds(800) < 20 * seconds(100) + 0.5
