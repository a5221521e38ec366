"""Overlap: exchanges are begun early and ended where they are read; what is under way is read by its end alone."""

from __future__ import annotations

import pytest
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.frontends.shrink import shrink
from plait.ir import Graph, Mesh, ParseError, TypeMismatch, dump, parse
from plait.passes import Pipeline, overlap, validate
from plait.passes.traffic import traffic


def names(graph: Graph) -> list[str]:
    return [n.op.name for n in graph.nodes]


def same(graph: Graph, after: Graph) -> None:
    assert parse(dump(after)) == after
    report = validate(graph, after, "exact")
    assert report.ok and report.rows, str(report)


LATE = """def f(x: f64[b, s@cp, 4], z: f64[b, s@cp, 6], w: f64[6, 6]):
    a = all_to_all(x, axis='cp', src=1, dst=2)
    y = silu(a)
    g = linear(z, w)
    h = sigmoid(g)
    return y, h
"""


def test_work_that_does_not_wait_runs_while_an_exchange_is_under_way() -> None:
    graph = parse(LATE)
    after, said = overlap(graph)
    assert names(after) == ["begin_all_to_all", "linear", "sigmoid", "end_all_to_all", "silu"]
    assert [r.why for r in said] == ["90 FLOPs a token run while it is under way: linear, sigmoid"]
    same(graph, after)


def test_an_exchange_is_begun_before_work_that_it_does_not_need() -> None:
    text = LATE.replace("    a = all_to_all(x, axis='cp', src=1, dst=2)\n    y = silu(a)\n", "").replace(
        "    return", "    e = silu(x)\n    a = all_to_all(e, axis='cp', src=1, dst=2)\n    y = silu(a)\n    return"
    )
    after, _ = overlap(parse(text))
    assert names(after) == ["silu", "begin_all_to_all", "linear", "sigmoid", "end_all_to_all", "silu"]
    same(parse(text), after)


def test_exchanges_keep_their_order_and_a_result_ends_what_is_under_way() -> None:
    text = """def f(x: f64[b, s@cp, 4], z: f64[b, s@cp, 6], w: f64[4, 4]):
    m = linear(x, w)
    a = all_to_all(m, axis='cp', src=1, dst=2)
    c = all_to_all(z, axis='cp', src=1, dst=2)
    t = linear(x, w)
    d = all_gather(t, axis='cp', dim=1)
    return a, c, d
"""
    graph = parse(text)
    after, _ = overlap(graph)
    moving = [n for n in names(after) if "all_" in n]
    assert [n for n in moving if not n.startswith("end")] == ["begin_all_to_all", "begin_all_to_all", "all_gather"]
    assert overlap(graph)[0] == after and sorted(moving).count("end_all_to_all") == 2
    same(graph, after)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = silu(a)\n    g = silu(y)", "everything waits for it"),
        ("g = reshape(z, pattern='... (h=2 d) -> ... h d')\n    y = silu(a)", "what is left to do costs nothing"),
    ],
)
def test_an_exchange_with_nothing_to_hide_it_stays_one(body: str, why: str) -> None:
    head = "def f(x: f64[b, s@cp, 4], z: f64[b, s@cp, 6]):\n    a = all_to_all(x, axis='cp', src=1, dst=2)\n    "
    graph = parse(f"{head}{body}\n    return y, g\n")
    after, said = overlap(graph)
    assert after == graph and not said, why


END = "end_all_to_all(h, axis='cp', src=1, dst=2)"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = silu(h)", "silu: h is under way; its end alone may read it"),
        ("y = end_all_to_all(h, axis='cp', src=1, dst=0)", "end_all_to_all: x is|must be begun"),
        ("y = end_all_to_all(z, axis='cp', src=1, dst=2)", "z must be begun with"),
        (
            "u = end_all_to_all(h, axis='cp', src=1, dst=2)\n    y = end_all_to_all(h, axis='cp', src=1, dst=2)",
            "not be ended yet",
        ),
        ("u = end_all_to_all(h, axis='cp', src=1, dst=2)\n    y = silu(h)", "its end alone may read it"),
        ("y = h", "expected"),
    ],
)
def test_what_is_under_way_is_read_once_by_its_end(body: str, why: str) -> None:
    head = "def f(x: f64[b, s@cp, 4], z: f64[b, s, 4@cp]):\n    h = begin_all_to_all(x, axis='cp', src=1, dst=2)\n    "
    with pytest.raises(ParseError, match=why):
        parse(f"{head}{body}\n    return y\n")


def test_what_is_under_way_is_no_result() -> None:
    text = "def f(x: f64[b, s@cp, 4]):\n    h = begin_all_to_all(x, axis='cp', src=1, dst=2)\n    return h\n"
    with pytest.raises(TypeMismatch, match="return: h is under way"):
        parse(text)


SMALL = {
    "name": "small", "vocab": 31, "hidden": 12, "blocks": ["gdn"],
    "gdn": {"key_heads": 2, "value_heads": 4, "key_dim": 3, "value_dim": 5},
}  # fmt: skip


def placed(name: str, steps: str) -> Graph:
    graph = build(load_spec(SMALL) if name == "small" else shrink(load_spec(name)), task="loss", dtype="f64")
    return Pipeline.parse(f"place{{mesh='cp=2'}},hoist-exchanges,merge-exchanges{{mesh='cp=2'}},fold-orders{steps}").run(graph)


@pytest.mark.parametrize("name", ["small", "nemotron-h-8b-tiny"])
def test_layers_overlap_and_stay_what_they_are_with_their_bytes(name: str) -> None:
    before, mesh = placed(name, ""), Mesh((("cp", 2),))
    after, said = (
        Pipeline.parse("overlap").run(before),
        overlap(next(g for g in before.layers if g.name in ("gdn", "mamba2")))[1],
    )
    assert any(n.is_op("begin_all_to_all") for g in after.layers for n in g.nodes) and said
    sizes = {"b": 2, "s": 8}
    counted = [sum(t.bytes for t in traffic(g, mesh, sizes)) for g in (before, after)]
    assert counted[0] == counted[1] > 0
    same(before, after)


def test_a_program_with_its_gradients_overlaps() -> None:
    before = placed("small", ",differentiate,canonicalize")
    after = Pipeline.parse("overlap").run(before)
    begun = [n for g in after.callees for n in g.nodes if n.is_op("begin_all_to_all")]
    assert len(begun) > 2
    same(before, after)


def test_a_wrong_end_is_caught() -> None:
    text = dump(overlap(parse(LATE))[0])
    broken = text.replace("end_all_to_all(a, axis='cp', src=1, dst=2)", "end_all_to_all(a, axis='cp', src=0, dst=2)")
    assert broken != text
    with pytest.raises(ParseError, match="must be begun with"):
        parse(broken)
