"""Orders of tokens: a reorder across ranks is the permutation it says, and passes move reorders to where they cost nothing."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.frontends.shrink import shrink
from plait.ir import (
    Builder,
    Graph,
    Mesh,
    Node,
    ParseError,
    PassError,
    PlacementError,
    arranged,
    dump,
    evaluate,
    natural,
    parse,
    parse_type,
    simulate,
)
from plait.ir.crossing import Here, Request, sent, together
from plait.ir.ops import reorder
from plait.ir.orders import permutation
from plait.passes import Pipeline, check_types, move_reorders, place, validate
from plait.passes.orders import is_reorder
from plait.passes.samples import draw

Tensor = torch.Tensor
MESH = Mesh((("cp", 2),))


def reordering(ranks: int, was: str, order: str, packed: bool = False) -> Graph:
    """One reorder of split tokens."""
    b = Builder("f")
    x = b.input("x", parse_type(f"f64[b, s@cp{':' + was if was else ''}, 3]"))
    named = {"cu": b.input("cu", parse_type("i64[n+1]"))} if packed else {}
    made = reorder(x, **named, order=order, was=was, over="cp", by="exchange")
    return b.finish([made])


ORDERS = [
    (2, "", "zigzag(2)"), (4, "zigzag(4)", ""), (3, "", "zigzag(3)"), (4, "zigzag(4)", "zigzag(2)"), (2, "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "was", "order"), ORDERS)
def test_tokens_go_to_the_ranks_that_hold_them_in_the_new_order(ranks: int, was: str, order: str) -> None:
    graph, mesh = reordering(ranks, was, order), Mesh((("cp", ranks),))
    length = {2: 12, 3: 18, 4: 40}[ranks]
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    natural = x[:, permutation(was, length).argsort()]
    want = natural[:, permutation(order, length)]
    got = simulate(graph, mesh, x)
    assert torch.equal(got, want) and torch.equal(evaluate(graph, x), want)
    d = torch.randn_like(got)
    assert torch.equal(*(torch.autograd.grad(y, x, d)[0] for y in (got, want)))
    assert parse(str(graph)) == graph


def test_every_segment_by_itself_empty_ones_and_one_over_all_ranks() -> None:
    graph, cu = reordering(2, "", "zigzag(2,packed)", packed=True), torch.tensor([0, 4, 4, 20, 24])
    x = torch.randn(1, 24, 3, dtype=torch.float64)
    got = simulate(graph, Mesh((("cp", 2),)), x, cu)
    assert torch.equal(got, x[:, permutation("zigzag(2,packed)", 24, cu)])
    ranks = got[0].split(12)
    assert torch.equal(ranks[0], torch.cat([x[0, [0, 3]], x[0, 4:8], x[0, 16:20], x[0, [20, 23]]]))


def counted(ranks: int, was: str, order: str, length: int) -> list[int]:
    """Bytes that each rank sends."""
    attrs = {"dim": 1, "order": order, "was": was, "over": "cp", "by": "exchange"}
    way, total = reorder.crossing.ways["exchange"], [0] * ranks  # type: ignore[union-attr] # it has one
    places = [Here.of(attrs, ranks, r, lambda: None) for r in range(ranks)]

    def watch(asked: list[Request]) -> None:
        for rank, request in enumerate(asked):
            total[rank] += sent(request, ranks, rank)

    together([way.run(here, torch.randn(2, length // ranks, 3)) for here in places], watch)  # type: ignore[arg-type] # a list is a sequence
    predicted = way.sent([parse_type("f32[2, s@cp, 3]"), None], attrs, ranks, {"s": length})
    assert max(total) == predicted
    return total


def test_what_is_sent_is_what_was_predicted_and_no_more_than_what_leaves() -> None:
    row = 2 * 3 * 4
    # Chunks 0 1 | 2 3 | 4 5 | 6 7 become 0 7 | 1 6 | 2 5 | 3 4: of 0 and 5 alone the ranks are the same.
    assert counted(4, "", "zigzag(4)", 40) == [5 * row, 10 * row, 5 * row, 10 * row]
    assert counted(4, "zigzag(4)", "", 40) == [5 * row, 10 * row, 5 * row, 10 * row]
    assert counted(2, "", "zigzag(2)", 12) == [3 * row, 3 * row]
    assert counted(2, "", "", 12) == [0, 0]


@pytest.mark.parametrize(
    ("type_", "attrs", "why"),
    [
        ("f64[b, s@cp, 3]", {"order": "zigzag(2)"}, "say over which axis"),
        ("f64[b, s@tp@cp, 3]", {"order": "zigzag(2)", "over": "cp", "by": "exchange"}, "split over cp alone"),
        ("f64[b, s@cp, 3]", {"order": "zigzag(2)", "over": "cp", "by": "ring"}, "must be 'exchange'"),
        ("f64[b, s, 3]", {"order": "zigzag(2)", "over": "cp", "by": "exchange"}, "must be split over cp"),
        ("f64[b, s@cp:zigzag(2), 3]", {"order": "", "over": "cp", "by": "exchange"}, "must be in order 'natural'"),
    ],
)
def test_a_reorder_that_the_split_does_not_allow_is_refused(type_: str, attrs: dict[str, str], why: str) -> None:
    b = Builder("f")
    with pytest.raises(PlacementError, match=why):
        reorder(b.input("x", parse_type(type_)), **attrs)


# -- move-reorders ----------------------------------------------------------------------------


@cache
def hybrid(task: str = "loss", packed: bool = False) -> Graph:
    """Three recurrent layers to one of attention, with experts between them."""
    return build(shrink(load_spec("qwen3-next-80b-a3b-tiny")), task=task, dtype="f64", packed=packed)


LONG = {
    "name": "long", "vocab": 31, "hidden": 12, "blocks": ["gdn", "mlp", "gdn", "attention", "gdn", "gdn", "attention"],
    "gdn": {"key_heads": 2, "value_heads": 4, "key_dim": 3, "value_dim": 5},
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 6, "rope": {}, "gate": True},
    "mlp": {"width": 9},
}  # fmt: skip


def reorders(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if is_reorder(n)]


def same(graph: Graph, after: Graph) -> None:
    check_types(after)
    assert parse(dump(after)) == after
    report = validate(graph, after, "reassociates")
    assert report.ok and report.rows, str(report)


@pytest.mark.parametrize("recurrence", ["heads", "chain"])
@pytest.mark.parametrize("order", ["zigzag", "natural"])
def test_a_run_of_recurrent_layers_has_no_reorder_and_attention_one_each_way(order: str, recurrence: str) -> None:
    graph = build(load_spec(LONG), task="loss", dtype="f64")
    placed, _ = place(graph, mesh="cp=2", attention="ring", recurrence=recurrence, order=order)
    before = Pipeline.parse("balance{mesh='cp=2' worth=0}").run(placed) if order == "natural" else placed
    after, said = move_reorders(before, mesh="cp=2")
    assert not any(reorders(g) for g in after.layers), "layers have none inside"
    hidden = [n for n in reorders(after) if n.operands[0].type.is_float]
    if order == "zigzag" and recurrence == "chain":
        assert not reorders(after) and not reorders(before)
        return
    assert len(hidden) <= 3, "there and back around the first attention, there for the last, whose loss knows no order"
    calls = [n for n in after.nodes if n.callee is not None or is_reorder(n)]
    runs = "".join("r" if is_reorder(n) else n.op.name[0] for n in calls if n.outputs[0].type.is_float)
    assert "gg" in runs and not re.search("gr+g", runs), runs
    assert sum(r.kind == "passed" for r in said) == 1
    same(graph, after)


def test_a_program_in_zigzag_order_throughout_comes_in_natural_order_where_that_is_cheaper() -> None:
    placed, _ = place(hybrid(), mesh="cp=2", attention="ring", order="zigzag")
    after, _ = move_reorders(placed, mesh="cp=2")
    types = [str(v.type) for v in after.inputs]
    assert types[0] == "i64[b, s@cp]", "tokens come in natural order, as the recurrences want them"
    assert [n.operands[0].type.is_float for n in reorders(after)] == [True], "positions are counted, not sent"
    assert len(reorders(after)) < sum(len(reorders(n.op)) for n in placed.nodes if isinstance(n.op, Graph))
    same(hybrid(), after)


@pytest.mark.parametrize("mesh", ["cp=2 tp=2", "dp=2 cp=2"])
def test_other_axes_of_the_mesh_do_not_matter(mesh: str) -> None:
    graph = build(load_spec(LONG), task="loss", dtype="f64")
    placed, _ = place(graph, mesh=mesh, attention="ring", order="zigzag")
    after, _ = move_reorders(placed, mesh=mesh)
    assert not any(reorders(g) for g in after.layers) and 0 < len(reorders(after)) <= 3
    steps = f"hoist-exchanges,merge-exchanges{{mesh='{mesh}'}},fold-orders,overlap"
    same(graph, Pipeline.parse(steps).run(after))


def test_segments_are_reordered_by_their_borders() -> None:
    placed, _ = place(hybrid(packed=True), mesh="cp=2", attention="ring", order="zigzag-packed")
    after, _ = move_reorders(placed, mesh="cp=2")
    assert all(len(n.operands) == 2 for n in reorders(after)) and reorders(after)
    sample = draw(hybrid(packed=True), (placed,))
    rng, cu = torch.Generator().manual_seed(0), torch.tensor([0, 8, 8, 24])
    tokens, labels = (torch.randint(0, 50, (1, 24), generator=rng) for _ in range(2))
    given = [{"tokens": tokens, "labels": labels, "cu": cu}[v.name] for v in after.inputs]
    local = [arranged(x, v.type, cu) for x, v in zip(given, after.inputs, strict=True)]
    want = evaluate(hybrid(packed=True), *given, params=sample.params)
    got = simulate(after, MESH, *local, params=sample.params)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_reorders_cancel_and_move_through_ops_that_know_no_order() -> None:
    text = """def f(x: f64[b, s@cp, 4], w: f64[4, 4], v: f64[2, 4]):
    a = reorder(x, order='zigzag(2)', over='cp', by='exchange')
    c = linear(a, w)
    d = reorder(c, was='zigzag(2)', over='cp', by='exchange')
    e = silu(d)
    g = linear(e, v)
    h = reorder(g, order='zigzag(2)', over='cp', by='exchange')
    q = reshape(h, pattern='... (g=1 d) -> ... g d')
    return q
"""
    graph = parse(text)
    after, said = move_reorders(graph, mesh="cp=2")
    assert not reorders(after) and str(after.outputs[0].type) == "f64[b, s@cp, 1, 2]"
    assert said[0].why.startswith("3 reorders (3 of them exchanges) of 80 bytes a token become 0 reorders")
    same(graph, after)


def test_a_reorder_moves_to_the_narrowest_value() -> None:
    text = """def f(x: f64[b, s@cp, 2, 3], k: f64[b, s@cp, 2, 3], v: f64[b, s@cp, 2, 3], u: f64[1, 6], w: f64[6, 1]):
    o = attention(x, k, v, over='cp', by='kv', order='')
    m = reshape(o, pattern='b t h d -> b t (h d)')
    a = reorder(m, order='zigzag(2)', over='cp', by='exchange')
    n = linear(a, u)
    c = silu(n)
    d = linear(c, w)
    e = reshape(d, pattern='... (h=2 d) -> ... h d')
    y = attention(e, e, e, over='cp', by='ring', order='zigzag(2)')
    return y
"""
    graph = parse(text)
    after, _ = move_reorders(graph, mesh="cp=2")
    assert [str(n.operands[0].type) for n in reorders(after)] == ["f64[b, s@cp, 1]"]
    given = [torch.randn(2, 8, 2, 3, dtype=torch.float64) for _ in range(3)]
    given += [torch.randn(1, 6, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)]
    want, got = (natural(simulate(g, MESH, *given), g.outputs[0].type) for g in (graph, after))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_what_cannot_move_stays() -> None:
    text = """def f(x: f64[b, s@cp, 2, 3]):
    a = attention(x, x, x, over='cp', by='ring')
    c = reorder(a, order='zigzag(2)', over='cp', by='exchange')
    y = attention(c, c, c, over='cp', by='ring', order='zigzag(2)')
    return y
"""
    graph = parse(text)
    assert move_reorders(graph, mesh="cp=2")[0] == graph
    plain = parse("def f(x: f64[b, s@cp, 3]):\n    y = silu(x)\n    return y\n")
    after, said = move_reorders(plain, mesh="cp=2")
    assert after is plain and said[0].why == "tokens are in one order everywhere"


def test_a_price_below_nothing_and_a_mesh_without_the_axis_are_refused() -> None:
    graph = parse("def f(x: f64[b, s@cp, 3]):\n    y = silu(x)\n    return y\n")
    for options, error, why in (
        ({"copy": -1.0}, PassError, "must be at least 0"),
        ({"copy": float("nan")}, PassError, "must be at least 0"),
        ({"mesh": "tp=2"}, PlacementError, "no axis called cp"),
    ):
        with pytest.raises(error, match=why):
            move_reorders(graph, **options)


def test_two_orders_beside_the_natural_one_are_refused() -> None:
    text = """def f(x: f64[b, s@cp, 3]):
    a = reorder(x, order='zigzag(2)', over='cp', by='exchange')
    c = reorder(a, was='zigzag(2)', order='zigzag(4)', over='cp', by='exchange')
    return c
"""
    with pytest.raises(PassError, match=r"zigzag\(2\) and zigzag\(4\)"):
        move_reorders(parse(text), mesh="cp=2")


def test_a_reorder_that_was_lost_is_caught() -> None:
    placed, _ = place(hybrid(), mesh="cp=2", attention="ring", order="zigzag")
    after, _ = move_reorders(placed, mesh="cp=2")
    text = dump(after)
    broken = text.replace("order='zigzag(2)', over='cp', by='exchange')", "was='zigzag(2)', over='cp', by='exchange')", 1)
    with pytest.raises(ParseError, match="must be in order"):
        parse(broken)
