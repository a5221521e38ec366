"""Balance of causal attention: exact counts of pairs in every order, and zigzag where that is worth an exchange."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.frontends.shrink import shrink
from plait.ir import Graph, Mesh, TypeMismatch, dump, evaluate, parse, simulate
from plait.ir.orders import permutation
from plait.passes import Remark, balance, imbalance, place
from plait.passes.balance import pairs
from plait.passes.plan_balance import work
from plait.passes.samples import draw


def counted(order: str, ranks: int, cu: Sequence[int], window: int) -> tuple[int, ...]:
    """Every pair, one by one."""
    where, total = permutation(order, cu[-1], torch.tensor([*cu])).tolist(), [0] * ranks
    for place_, i in enumerate(where):
        start = max(a for a in cu if a <= i)
        total[place_ * ranks // cu[-1]] += sum(1 for j in range(start, i + 1) if not window or j > i - window)
    return tuple(total)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(
    ("order", "ranks", "cu"),
    [
        ("", 4, (0, 40)), ("zigzag(4)", 4, (0, 40)), ("", 3, (0, 1, 1, 30)), ("zigzag(3)", 3, (0, 7, 30)),
        ("zigzag(2,packed)", 2, (0, 4, 4, 24, 28)), ("zigzag(2)", 4, (0, 40)),
    ],
)  # fmt: skip
def test_pairs_are_those_counted_one_by_one(order: str, ranks: int, cu: tuple[int, ...], window: int) -> None:
    assert pairs(order, ranks, cu, window) == counted(order, ranks, cu, window)


def test_natural_order_is_uneven_and_zigzag_even() -> None:
    tokens = 8 * 1024
    assert imbalance("", 8, (0, tokens)) == pytest.approx(1.875, abs=1e-3)
    assert imbalance("zigzag(8)", 8, (0, tokens)) == 1.0
    assert imbalance("", 2, (0, tokens)) == pytest.approx(1.5, abs=1e-3)


def test_ragged_segments_are_even_by_segment_and_not_by_the_whole_row() -> None:
    cu = (0, 16, 48, 48, 304, 320)
    assert imbalance("zigzag(4,packed)", 4, cu) == 1.0
    assert imbalance("", 4, cu) > 1.2 and imbalance("zigzag(4)", 4, cu) == pytest.approx(1.0988, abs=1e-4)
    assert imbalance("", 4, (0, 0)) == 1.0


def test_the_planners_closed_form_counts_the_same() -> None:
    for window in (0, 5):
        for lengths in ((48,), (16, 32), (0, 16, 80)):
            cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
            assert work(lengths, 4, "natural", window=window) == pairs("", 4, cu, window)
            assert work(lengths, 4, "zigzag", window=window) == pairs("zigzag(4,packed)", 4, cu, window)


@pytest.mark.parametrize(
    ("order", "ranks", "cu", "why"),
    [
        ("", 3, (0, 40), "40 tokens do not divide over 3"), ("zigzag(3)", 3, (0, 15), "pad to a multiple of 6"),
        ("", 2, (0, 6, 4), "start at 0 and rise"), ("", 2, (1, 4), "start at 0"), ("", 2, (), "start at 0"),
        ("zigzag(2,packed)", 2, (0, 6, 8), "do not divide into 4 chunks"),
    ],
)  # fmt: skip
def test_what_cannot_be_counted_is_refused(order: str, ranks: int, cu: tuple[int, ...], why: str) -> None:
    with pytest.raises(TypeMismatch, match=why):
        imbalance(order, ranks, cu)


@cache
def ring(packed: bool = False) -> Graph:
    graph = build(shrink(load_spec("qwen3-next-80b-a3b-tiny")), task="loss", dtype="f64", packed=packed)
    return place(graph, mesh="cp=2", attention="ring")[0]


def attention_of(graph: Graph) -> tuple[Graph, tuple[Remark, ...]]:
    layer = next(g for g in graph.layers if g.name == "self_attention")
    return balance(layer, mesh="cp=2", worth=0.0)


@pytest.mark.parametrize("packed", [False, True])
def test_causal_attention_is_evened_and_stays_what_it_is(packed: bool) -> None:
    layer, said = attention_of(ring(packed))
    wanted = "zigzag(2,packed)" if packed else "zigzag(2)"
    (node,) = [n for n in layer.nodes if n.is_op("attention")]
    assert node.attrs["order"] == wanted and sum(n.is_op("reorder") for n in layer.nodes) == 4
    (why,) = [r.why for r in said if r.kind == "passed"]
    assert why.startswith(f"the busiest rank has 1.500 of the mean in natural order, 1.000 in {wanted}; ")
    assert parse(dump(layer)) == layer
    before = next(g for g in ring(packed).layers if g.name == "self_attention")
    sample = draw(before, (layer,))
    tokens = 12
    x, cu = torch.randn(1 if packed else 2, tokens, int(before.inputs[0].type.dims[2].size)).double(), torch.tensor([0, 8, 12])
    p = torch.cat([torch.arange(8), torch.arange(4)])[None] if packed else torch.arange(tokens).expand(2, -1)
    given = [{"x": x, "p": p, "cu": cu}[v.name] for v in before.inputs]
    want = evaluate(before, *given, params=sample.params)
    torch.testing.assert_close(simulate(layer, Mesh((("cp", 2),)), *given, params=sample.params), want, rtol=1e-10, atol=1e-10)


TEXT = """def f(q: f64[b, s@cp, 4, 3], k: f64[b, s@cp, 2, 3], v: f64[b, s@cp, 2, 3]):
    o = attention(q, k, v, {})
    return o
"""


@pytest.mark.parametrize(
    ("attrs", "options", "why"),
    [
        ("over='cp', by='ring'", {"worth": 1e9}, "too few FLOPs a byte"),
        ("over='cp', by='ring', window=64", {"worth": 2000.0}, "a narrow window leaves ranks even"),
        ("over='cp', by='ring', causal=False", {"worth": 0.0}, "it is not causal"),
    ],
)
def test_attention_that_gains_nothing_stays(attrs: str, options: dict[str, float], why: str) -> None:
    graph = parse(TEXT.format(attrs))
    after, _ = balance(graph, mesh="cp=2", **options)
    assert after == graph, why


def test_impossible_segments_are_refused() -> None:
    text = TEXT.replace("2, 3]):", "2, 3], cu: i64[n+1]):").replace("{}", "cu=cu, over='cp', by='ring'")
    with pytest.raises(TypeMismatch, match="multiple of segments"):
        balance(parse(text), mesh="cp=2", segments=3, seq=100)
