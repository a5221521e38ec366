"""Attention over tokens that are split between ranks: every way against one device, values and gradients, and its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from plait.ir import (
    DTYPES,
    OpDef,
    evaluate,
    interp,
    parse,
    parse_mesh,
    parse_type,
    simulate,
)
from plait.ir.crossing import Here, Keep, OneWay, Request, sent, together
from plait.ir.ops import BACKWARD, attention
from plait.lowering import form_of
from plait.passes import differentiate

from tests.attention_cases import (
    F64,
    GIVEN,
    UNEVEN,
    WAYS,
    Given,
    Tensor,
    check,
    crossed_by,
    draw,
    same,
    split,
    tensors,
    whole,
    with_gradients,
)


def chosen(way: str) -> OneWay:
    assert attention.crossing is not None
    return attention.crossing.ways[way]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GIVEN)
def test_a_way_means_what_one_device_computes(name: str, way: str) -> None:
    check(GIVEN[name], way)


def by_form(op: OpDef, *operands: Any, **attrs: Any) -> Any:
    form = form_of(op, "cpu")
    assert form is not None
    return form.run(*operands, **attrs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GIVEN)
def test_fast_forms_mean_the_same(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interp, "_reference", by_form)
    for widths in ((5, 5), (5, 3)):  # torch's kernel takes keys and values of one width
        check(replace(GIVEN[name], widths=widths), way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["plain", "zigzag of three", "window in zigzag", "packed, sinks, window", "zigzag of segments"]
)
def test_gradients_as_text_go_the_same_way(name: str, way: str) -> None:
    """`attention_backward` runs over the axis too; the gradient of the sinks is a sum over ranks until it is reduced."""
    given = GIVEN[name]
    leaves = [x.detach() for x in tensors(given)]
    d_y = torch.randn(given.batch, given.tokens, given.heads[0], given.widths[1], dtype=F64)
    back, mesh = differentiate(parse(split(given, way)))[0], parse_mesh(f"cp={given.ranks}")
    node = next(n for n in back.nodes if n.op is BACKWARD[attention])
    assert (node.attrs["over"], node.attrs["by"]) == ("cp", way)
    same(simulate(back, mesh, *leaves, d_y), evaluate(differentiate(parse(whole(given)))[0], *leaves, d_y))


# -- queries and keys of different lengths ----------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", ["", ", window=3", ", causal=False"])
@pytest.mark.parametrize("t,s,at", [(6, 15, None), (6, 15, 4), (3, 9, 0), (6, 12, 6)])
def test_queries_may_be_fewer_than_keys(t: int, s: int, at: int | None, options: str, way: str) -> None:
    text = UNEVEN.replace("{options}", options).replace("{way}", way).replace("{at}", "" if at is None else ", at=at")
    leaves = [x.requires_grad_() for x in (draw(2, t, 4, 3), draw(2, s, 2, 3), draw(2, s, 2, 5))]
    graph, place = parse(text), torch.tensor(at or 0)
    one = with_gradients(evaluate(graph, *leaves, place), leaves)
    same(with_gradients(simulate(graph, parse_mesh("cp=3"), *leaves, place), leaves), one)


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_whose_queries_see_no_key_has_zeros(way: str) -> None:
    """More queries than keys: the first stand in front of all keys. Nothing is no number, in gradients neither."""
    leaves = [x.requires_grad_() for x in (draw(1, 8, 4, 3), draw(1, 4, 2, 3), draw(1, 4, 2, 5))]
    graph = parse(UNEVEN.replace("{options}", "").replace("{way}", way).replace("{at}", ""))
    y, *grads = with_gradients(simulate(graph, parse_mesh("cp=2"), *leaves, torch.tensor(0)), leaves)
    assert not y[:, :4].any() and not grads[0][:, :4].any()
    tail = [leaves[0][:, 4:].detach().requires_grad_(), *leaves[1:]]
    one = attention.reference(*tail)
    torch.testing.assert_close(y[:, 4:], one, rtol=1e-10, atol=1e-10)
    weight = torch.arange(1.0, y.numel() + 1, dtype=F64).sin().view(y.shape)[:, 4:]
    same([grads[0][:, 4:], *grads[1:]], torch.autograd.grad((one * weight).sum(), tail))


# -- traffic and work -------------------------------------------------------------------------


def lockstep(given: Given, way: str, dtype: torch.dtype) -> tuple[list[list[int]], int]:
    """What every rank sent, request by request, and what the way says that the busiest one sends."""
    shares = [x.detach().to(dtype).chunk(given.ranks, 1) for x in tensors(given)[:3]]
    named = {**attention.attrs, "over": "cp", "by": way, "order": given.said}
    places = [Here.of(named, given.ranks, r, by_form) for r in range(given.ranks)]
    counted = [list[int]() for _ in places]

    def watch(asked: Sequence[Request]) -> None:
        for rank, request in enumerate(asked):
            counted[rank] += [] if isinstance(request, Keep) else [sent(request, given.ranks, rank)]

    across = chosen(way)
    together([across.run(here, *(x[here.rank] for x in shares)) for here in places], watch)
    name = next(k for k, d in DTYPES.items() if d == dtype)
    (h, g), (d, e) = given.heads, given.widths
    types = [parse_type(f"{name}[b, s@cp, {n}, {w}]") for n, w in ((h, d), (g, d), (g, e))]
    return counted, across.sent([*types, None, None, None], named, given.ranks, {"b": given.batch, "s": given.tokens})


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["plain", "odd local length", "four ranks, one key head", "zigzag of three"])
def test_a_way_sends_what_it_says(name: str, way: str, dtype: torch.dtype) -> None:
    """All ranks as much, in one exchange or in as many as there are other ranks."""
    given = GIVEN[name]
    counted, says = lockstep(given, way, dtype)
    assert [sum(x) for x in counted] == [says] * given.ranks
    assert [len(x) for x in counted] == [1 if way == "kv" else given.ranks - 1] * given.ranks
    own = given.batch * given.tokens // given.ranks * given.heads[1] * sum(given.widths) * dtype.itemsize
    assert says == (given.ranks - 1) * own


@pytest.mark.parametrize(
    "given,parts",
    [
        (Given(4, 16), [1, 2, 3, 4]),
        (Given(4, 16, "zigzag"), [4, 4, 4, 4]),
        (Given(4, 16, options="window=4"), [1, 2, 2, 2]),
    ],
)
def test_a_step_that_no_query_sees_costs_nothing(given: Given, parts: list[int]) -> None:
    """Parts that each rank computes: in natural order the last does all the work, in zigzag order each as much."""
    done = [0] * given.ranks

    def run(op: OpDef, q: Tensor, *rest: Any, **attrs: Any) -> Any:
        rank = int(q[0, 0, 0, 0])
        done[rank] += 1
        return op.reference(q, *rest, **attrs)

    named = {**attention.attrs, "over": "cp", "by": "ring", "order": given.said, "window": 4 if given.options else 0}
    xs = [draw(1, 4, 2, 3) for _ in range(3)]
    marked = [[torch.full_like(xs[0], float(r)), *xs[1:]] for r in range(given.ranks)]
    together([chosen("ring").run(Here.of(named, given.ranks, r, run), *marked[r]) for r in range(given.ranks)])
    assert done == parts


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fast", [False, True])
def test_less_precise_numbers_stay_near(
    fast: bool, way: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fast:
        monkeypatch.setattr(interp, "_reference", by_form)
    given = Given(4, 40, "zigzag", sinks=True, batch=2, widths=(5, 5))
    name = next(k for k, d in DTYPES.items() if d == dtype)
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors(given)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    one = with_gradients(evaluate(parse(whole(given)), *exact), exact)
    many = simulate(parse(split(given, way).replace("f64", name)), parse_mesh("cp=4"), *leaves)
    assert many.dtype == dtype
    for got, want in zip(with_gradients(many, leaves), one, strict=True):
        assert float((got.double() - want).detach().abs().max()) <= tolerance * float(want.detach().abs().max())


# -- two axes, and few key heads --------------------------------------------------------------

FEW = """def f(q: f64[b, s@cp, 8, 5], k: f64[b, s@cp, 2, 5], v: f64[b, s@cp, 2, 3]):
    k0 = repeat_heads(k, r=2)
    v0 = repeat_heads(v, r=2)
    q1 = all_to_all(q, axis='cp', src=1, dst=2)
    k1 = all_to_all(k0, axis='cp', src=1, dst=2)
    v1 = all_to_all(v0, axis='cp', src=1, dst=2)
    o = attention(q1, k1, v1)
    y = all_to_all(o, axis='cp', src=2, dst=1)
    return y
"""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mesh,order", [("r=2,a=2", ""), ("a=4,r=3", ""), ("a=2,r=2", "zigzag(4)"), ("r=3,a=4", "zigzag(12)")])
def test_heads_over_one_axis_and_a_way_over_another(mesh: str, order: str, way: str) -> None:
    graph = parse(crossed_by(way, order))
    meeting = next(n for n in graph.nodes if n.op is attention)
    assert str(meeting.outputs[0].type) == f"f64[b, s@r{order and ':' + order}, 8@a, 3]"
    leaves = [x.requires_grad_() for x in (draw(2, 24, 8, 5), draw(2, 24, 4, 5), draw(2, 24, 4, 3))]
    one = with_gradients(attention.reference(*leaves), leaves)
    same(with_gradients(simulate(graph, parse_mesh(mesh), *leaves), leaves), one)


def test_fewer_key_heads_than_ranks_are_repeated() -> None:
    graph, leaves = parse(FEW), [x.requires_grad_() for x in (draw(2, 12, 8, 5), draw(2, 12, 2, 5), draw(2, 12, 2, 3))]
    assert str(graph.nodes[3].outputs[0].type) == "f64[b, s, 4@cp, 5]"
    one = with_gradients(attention.reference(*leaves), leaves)
    same(with_gradients(simulate(graph, parse_mesh("cp=4"), *leaves), leaves), one)
    back = differentiate(graph)[0]
    given = [*(x.detach() for x in leaves), draw(2, 12, 8, 3)]
    same(simulate(back, parse_mesh("cp=4"), *given), evaluate(back, *given))
