"""Validation: right passes agree, wrong ones are caught, and what cannot be compared is said."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.frontends.shrink import shrink
from plait.ir import OPS, Graph, Node, PassError, Replay, Value, each_layer, parse
from plait.passes import Pipeline, check_types, validate
from plait.passes.samples import choose_sizes, draw

SPEC: dict[str, Any] = {
    "name": "zoo", "vocab": 61, "hidden": 20, "dropout": 0.3,
    "blocks": ["gdn", "local", "kda", "mlp", "mamba2", "moe", "attention"],
    "gdn": {"key_heads": 2, "value_heads": 4, "key_dim": 5, "value_dim": 7},
    "kda": {"heads": 3, "head_dim": 5},
    "mamba2": {"heads": 4, "groups": 2, "head_dim": 3, "state": 5},
    "mlp": {"width": 13},
    "moe": {"experts": 5, "top_k": 2, "width": 7, "shared_width": 5, "aux_loss": 0.01, "score": "sigmoid"},
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 6, "qk_norm": True, "gate": True, "rope": {"theta": 100.0}},
    "kinds": {"local": {"kind": "attention", "heads": 3, "head_dim": 5, "window": 3, "sinks": True}},
}  # fmt: skip


@cache
def zoo(packed: bool = False) -> Graph:
    return build(load_spec(SPEC), task="loss", dtype="f64", training=True, packed=packed)


def spoil(
    graph: Graph,
    op: str,
    *,
    which: int = 0,
    into: str = "",
    order: Sequence[int | None] | None = None,
    results: Sequence[int] | None = None,
    drop: Sequence[str] = (),
    **attrs: Any,
) -> Graph:
    """A wrong pass: the nth node of an op (of the first layer that has it) becomes another op, or takes other operands."""
    seen = list[Node]()

    def change(part: Graph) -> Graph:
        replay = Replay(part)

        def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
            if not node.is_op(op):
                return None
            seen.append(node)
            if len(seen) != which + 1:
                return None
            given = [inputs[i] if i is not None else None for i in order] if order is not None else inputs
            kept = {k: v for k, v in node.attrs.items() if k not in drop} if not into else {}
            made = replay.builder.emit(OPS[into or op], given, {**kept, **attrs})
            return [made[i] for i in results] if results else made

        return replay.run(visit)

    wrong = each_layer(graph, change)
    assert wrong != graph
    check_types(wrong)
    return wrong


WRONG: dict[str, dict[str, Any]] = {
    "wrong gate": {"op": "silu", "into": "sigmoid"},
    "swapped sections": {"op": "split", "which": 1, "results": (1, 0, 2)},
    "dropped scale": {"op": "gated_delta_rule", "drop": ("scale",)},
    "wrong eps": {"op": "rms_norm", "eps": 1.1e-5},
    "wrong eps of the last norm": {"op": "rms_norm", "which": 10, "eps": 1e-6},
    "weight taken as zero-centered": {"op": "rms_norm", "zero_centered": True},
    "queries for keys": {"op": "gated_delta_rule", "order": (1, 0, 2, 3, 4, None, None)},
    "decay for beta": {"op": "ssd", "order": (0, 1, 2, 4, 3, None, None)},
    "gate on the other half": {"op": "split", "which": 5, "results": (1, 0)},
    "dropped decay": {"op": "neg_exp", "into": "silu"},
    "residual twice": {"op": "add", "order": (0, 0)},
    "residual lost": {"op": "add", "order": (1, 1)},
    "wrong dropout stream": {"op": "fork_seed", "stream": 99},
    "wrong dropout rate": {"op": "dropout", "p": 0.31},
    "dropout left out": {"op": "dropout", "into": "scale", "order": (0,), "by": 1.0},
    "conv without activation": {"op": "causal_conv1d", "act": "none"},
    "conv bias lost": {"op": "causal_conv1d", "which": 2, "order": (0, 1, None, None, None)},
    "window off by one": {"op": "attention", "window": 4},
    "sinks lost": {"op": "attention", "order": (0, 1, 2, None, None, None)},
    "not causal": {"op": "attention", "which": 1, "causal": False},
    "wrong rope base": {"op": "rope", "theta": 101.0},
    "interleaved rope": {"op": "rope", "interleaved": True},
    "wrong router": {"op": "route", "score": "softmax"},
    "weights not summing to one": {"op": "route", "renormalize": False},
    "balance loss unweighted": {"op": "scale", "which": 0, "by": 1.0},
    "logits bent": {"op": "linear_cross_entropy", "softcap": 30.0},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pass_is_caught(name: str):
    report = validate(zoo(), spoil(zoo(), **WRONG[name]), "exact")
    assert not report.ok and report.rows and report.worst is not None and report.worst.error > 1e-9, report


@pytest.mark.parametrize("op", ["causal_conv1d", "gated_delta_rule", "kimi_delta_attention", "ssd", "attention"])
def test_a_lost_border_is_caught(op: str):
    taken = next(n for g in zoo(packed=True).layers for n in g.nodes if n.is_op(op))
    order = [None if o.name == "cu" or taken.inputs[i] is None else i for i, o in enumerate(OPS[op].inputs)]
    assert not validate(zoo(packed=True), spoil(zoo(packed=True), op, order=order), "exact").ok


def test_a_right_pass_agrees_to_the_last_bit_or_nearly():
    for graph in (zoo(), zoo(packed=True)):
        report = validate(graph, Pipeline.parse("canonicalize,carry-residual,fuse,outline-rows,dce").run(graph), "exact")
        assert report.ok and len(report.rows) > 40, report
        assert all(r.error <= 1e-13 for r in report.rows)
    again = validate(zoo(), zoo(), "exact")
    assert all(r.error == 0 for r in again.rows)


def test_another_seed_is_another_sample():
    first, second = (draw(zoo(), seed=s) for s in (0, 1))
    assert not torch.equal(first.inputs["tokens"], second.inputs["tokens"])
    assert torch.equal(first.params["embed"], draw(zoo()).params["embed"])


def test_a_reassociation_is_allowed_only_where_it_is_declared():
    head = "def f(x: f64[b, 63], y: f64[b, 63], z: f64[b, 63]):\n"
    three = head + "    a = {}\n    c = {}\n    d = rms_norm(c, eps=0.0)\n    return d\n"
    before, after = parse(three.format("add(x, y)", "add(a, z)")), parse(three.format("add(y, z)", "add(a, x)"))
    report = validate(before, after, "reassociates")
    assert report.ok and 0 < max(r.error for r in report.rows) < 1e-12
    scaled = parse(three.format("add(x, y)", "add(a, z)").replace("eps=0.0", "eps=3e-11"))
    assert not validate(before, scaled, "exact").ok and validate(before, scaled, "reassociates").ok


def test_a_change_of_precision_is_bounded_by_its_dtype():
    text = """
def f(x: f32[b, 65], w: f32[65]):
    h = cast(x, dtype='{}')
    k = cast(h, dtype='f32')
    a = scale_columns(k, w)
    c = mul(a, {})
    y = rms_norm(c, w)
    return y
"""
    before = parse(text.format("f32", "a"))
    report = validate(before, parse(text.format("bf16", "a")), "changes-precision")
    assert report.ok and any("own dtype" in r.what and r.error > 1e-4 for r in report.rows)
    assert not validate(before, parse(text.format("bf16", "k")), "changes-precision").ok


def test_a_change_of_precision_that_cancels_is_more_than_its_dtype_allows():
    text = """
def f(x: f32[b, 65], z: f32[b, 65]):
    c = scale(z, by=1000.0)
    d = cast(c, dtype='{}')
    e = cast(x, dtype='{}')
    a = add(e, d)
    n = scale(d, by=-1.0)
    g = add(a, n)
    y = cast(g, dtype='f32')
    return y
"""
    report = validate(parse(text.format("f32", "f32")), parse(text.format("bf16", "bf16")), "changes-precision")
    assert not report.ok and "own dtype" in str(report)


def test_a_program_that_does_not_run_is_a_problem():
    text = "def f(x: f64[b, 61], labels: i64[b]):\n    y = cross_entropy(x, labels)\n    return y\n"
    report = validate(parse(text), parse(text.replace("labels)\n", "labels, ignore=-1)\n")), "exact")
    assert not report.ok and "it does not run on a small sample" in str(report)


@pytest.mark.parametrize(
    ("after", "says"),
    [
        ("def f(x: f64[b, 5], *, w: f64[5] = normal(0.1)):\n    y = add_bias(x, w)\n    return y\n", "input z is gone"),
        (
            "def f(x: f64[b, 5], z: f64[b, 5], *, v: f64[5] = normal(0.1)):\n    y = add_bias(x, v)\n    return y, z\n",
            "parameter w is lost, new or of another shape",
        ),
        (
            "def f(x: f64[b, 5], z: f64[b, 5], *, w: f64[5] = normal(0.1)):\n    y = add_bias(x, w)\n    return y\n",
            "there are 1 results, there were 2",
        ),
    ],
)
def test_programs_of_different_shape_are_a_problem(after: str, says: str):
    before = parse("def f(x: f64[b, 5], z: f64[b, 5], *, w: f64[5] = normal(0.1)):\n    y = add_bias(x, w)\n    return y, z\n")
    report = validate(before, parse(after), "exact")
    assert not report.ok and says in str(report)


def test_a_program_too_large_is_noted():
    big = parse("def f(x: f32[b, 20000], *, w: f32[20000, 20000] = normal(0.1)):\n    y = linear(x, w)\n    return y\n")
    report = validate(big, big, "exact")
    assert (
        report.ok
        and not report.rows
        and "400000000 parameters, too many to evaluate; validate its shrunken spec" in report.note
    )


def test_numbers_that_are_not_finite_are_noted():
    steep = parse("def f(x: f64[b, 5]):\n    a = scale(x, by=1e300)\n    y = neg_exp(a)\n    return y\n")
    assert "not finite" in validate(steep, steep, "exact").note


def test_numerics_is_one_of_three():
    with pytest.raises(PassError, match="numerics is 'close', must be one of exact"):
        validate(zoo(), zoo(), "close")


WHOLE = parse("""
def f(x: f64[b, s, 6], *, w: f64[10, 6] = normal(0.3), v: f64[6, 10] = normal(0.3)):
    a = linear(x, w)
    c = silu(a)
    y = linear(c, v)
    h = reshape(x, pattern='b s (h=2 d) -> b s h d')
    o = attention(h, h, h)
    return y, o
""")
PLACED = """
def f(x: f64[b, s@cp, 6], *, w: f64[10@tp, 6] = normal(0.3), v: f64[6, 10@tp] = normal(0.3)):
    a = linear(x, w)
    c = silu(a)
    p = linear(c, v)
    y = all_reduce(p, axis='tp')
    g = all_gather(x, axis='cp', dim=1)
    h = reshape(g, pattern='b s (h=2 d) -> b s h d')
    q = attention(h, h, h)
    o = shard(q, axis='cp', dim=1)
    return y, o
"""


def test_a_placed_program_runs_on_a_pretend_mesh():
    report = validate(WHOLE, parse(PLACED), "reassociates")
    assert report.ok and len(report.rows) == 5, report
    assert choose_sizes([parse(PLACED)])["s"] % 2 == 0


def test_token_order_is_part_of_the_meaning():
    zigzag = PLACED.replace("s@cp", "s@cp:zigzag(2)").replace(
        "h = reshape(g", "g2 = reorder(g, dim=1, was='zigzag(2)')\n    h = reshape(g2"
    )
    right = zigzag.replace("o = shard(q", "q2 = reorder(q, dim=1, order='zigzag(2)')\n    o = shard(q2")
    assert validate(WHOLE, parse(right), "reassociates").ok
    assert choose_sizes([parse(right)])["s"] % 4 == 0


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("silu(a)", "sigmoid(a)"),
        ("attention(h, h, h)", "attention(h, h, h, causal=False)"),
        ("y = all_reduce(p", "d = scale(p, by=2.0)\n    y = all_reduce(d"),
    ],
)
def test_a_wrong_placed_program_is_caught(was: str, now: str):
    assert was in PLACED and not validate(WHOLE, parse(PLACED.replace(was, now)), "reassociates").ok


def test_samples_suit_the_ops_that_read_them():
    sample = draw(zoo(packed=True))
    tokens, labels, cu = (sample.inputs[n] for n in ("tokens", "labels", "cu"))
    assert tokens.shape == labels.shape == (1, 7) and int(tokens.max()) < 61 and int(labels.min()) == -100
    assert cu[0] == 0 and cu[-1] == 7 and bool((cu.diff() > 0).all())
    assert all(float(t.std()) > 0 for t in sample.params.values() if t.numel() > 1)


def test_shrunken_presets_use_every_parameter():
    graph = build(shrink(load_spec("qwen3-next-80b-a3b-tiny")), task="loss", dtype="f64")
    report = validate(graph, graph, "exact")
    assert len([r for r in report.rows if r.what.startswith("gradient")]) == len(draw(graph).params)
