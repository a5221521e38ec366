"""Exchanges: in front of what widens them, merged into one, packed by the projection; two per recurrent layer."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.frontends.shrink import shrink
from plait.ir import Graph, Mesh, Node, dump, evaluate, parameters, parse, simulate
from plait.passes import Pipeline, Remark, differentiate, fold_orders, hoist_exchanges, merge_exchanges, validate
from plait.passes.samples import draw
from plait.passes.traffic import by_layer, traffic

from tests.programs import TINY

KDA = {
    "name": "kdas", "vocab": 61, "hidden": 20, "blocks": ["kda", "mlp"],
    "kda": {"heads": 4, "head_dim": 6}, "mlp": {"width": 9},
}  # fmt: skip


def exchanges(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.is_op("all_to_all")]


def moved(graph: Graph) -> list[str]:
    """The types that are exchanged."""
    return [str(n.operands[0].type) for n in exchanges(graph)]


def passed(remarks: tuple[Remark, ...], what: str) -> list[str]:
    return [r.why for r in remarks if r.kind == "passed" and r.what == what]


def text(body: str, inputs: str = "x: bf16[b, s@cp, 4]", params: str = "") -> Graph:
    return parse(f"def f({inputs}{', *, ' + params if params else ''}):\n" + "\n".join(f"    {x}" for x in body.split("\n")))


def same(graph: Graph, after: Graph) -> None:
    """Equal when read back, and equal numbers and gradients on two ranks."""
    assert parse(dump(after)) == after
    report = validate(graph, after, "exact")
    assert report.ok and report.rows, str(report)


@cache
def small(name: str, packed: bool = False) -> Graph:
    spec = load_spec(KDA) if name == "kdas" else shrink(load_spec(name))
    return build(spec, task="loss", dtype="f64", packed=packed)


def merged(graph: Graph, ranks: int) -> Graph:
    steps = f"place{{mesh='cp={ranks}'}},hoist-exchanges,merge-exchanges{{mesh='cp={ranks}'}},fold-orders"
    return Pipeline.parse(steps).run(graph)


# -- hoisting ---------------------------------------------------------------------------------

DECAY = """w = widen(x)
a = add_bias(w, dt_bias)
y = softplus(a)
r = neg_exp(A_log)
z = scale_columns(y, r)
out = all_to_all(z, axis='cp', src=1, dst=2)
return out"""


def test_an_exchange_goes_in_front_of_what_widens() -> None:
    graph = text(DECAY, params="dt_bias: f32[4] = constant(1.0), A_log: f32[4] = log_uniform(1.0, 16.0)")
    after, said = hoist_exchanges(graph)
    assert moved(after) == ["bf16[b, s@cp, 4]"]
    assert [str(n.outputs[0].type) for n in after.nodes if n.is_op("shard")] == ["f32[4@cp]", "f32[4@cp]"]
    assert passed(said, "hoist-exchange")[-1] == "the all_to_all goes in front of widen: 8 bytes a token, were 16"
    same(graph, after)


AWAY = "o = all_to_all(y, axis='cp', src=1, dst=2)\nreturn o"


@pytest.mark.parametrize(
    ("body", "inputs", "why"),
    [
        ("y = sigmoid(x)\n" + AWAY + ", y", "x: f64[b, s@cp, 4]", "it is a result"),
        ("y = sigmoid(x)\nz = silu(y)\n" + AWAY + ", z", "x: f64[b, s@cp, 4]", "it is read at home too: computed twice"),
        ("y = mul(x, g)\n" + AWAY, "x: f64[b, s@cp, 4], g: f64[b, s@cp, 4]", "two would travel"),
        ("y = rms_norm(x, w)\n" + AWAY, "x: f64[b, s@cp, 4], w: f64[4]", "rows are whole"),
        ("y = linear(x, w)\n" + AWAY, "x: f64[b, s@cp, 3], w: f64[4, 3]", "x would be gathered"),
        ("y = cast(x, dtype='bf16')\n" + AWAY, "x: f32[b, s@cp, 4]", "more would move"),
        ("y = reshape(x, pattern='... h d -> ... (h d)')\n" + AWAY, "x: f64[b, s@cp, 3, 4]", "12 divides, 3 need not"),
    ],
)
def test_an_exchange_stays_where_that_is_no_gain_or_not_the_same(body: str, inputs: str, why: str) -> None:
    graph = text(body, inputs)
    after, said = hoist_exchanges(graph)
    assert after == graph and not said, why


def test_a_value_that_travels_already_is_not_sent_again() -> None:
    body = """y = softplus(x)
d = scale_columns(y, r)
a = all_to_all(d, axis='cp', src=1, dst=2)
c = all_to_all(y, axis='cp', src=1, dst=2)
return a, c"""
    graph = text(body, "x: f64[b, s@cp, 4], r: f64[4]")
    after, _ = hoist_exchanges(graph)
    assert len(exchanges(after)) == 1 and exchanges(after)[0].operands == after.inputs[:1]
    same(graph, after)


HOME = "x: f64[b, s@cp, 4, 3], z: f64[b, s@cp, 12]"


def test_a_gate_that_would_travel_both_ways_stays_home() -> None:
    body = """o = all_to_all(x, axis='cp', src=1, dst=2)
g = all_to_all(z, axis='cp', src=1, dst=2)
s = silu(g)
p = reshape(s, pattern='... (h d=3) -> ... h d')
m = mul(o, p)
y = all_to_all(m, axis='cp', src=2, dst=1)
return y, o"""
    graph = text(body, HOME)
    after, _ = hoist_exchanges(graph)
    assert moved(after) == ["f64[b, s@cp, 4, 3]"], "o travels, since it is a result; the gate does not"
    same(graph, after)
    early = text(body.replace("all_to_all(z", "all_to_all(t").replace("o = all", "t = sigmoid(z)\no = all"), HOME)
    assert moved(hoist_exchanges(early)[0]) == ["f64[b, s@cp, 4, 3]"]
    same(early, hoist_exchanges(early)[0])
    used = text(body.replace("return y, o", "return y, o, p"), HOME)
    assert len(exchanges(hoist_exchanges(used)[0])) == 3, "what is read there is there anyway"


def test_heads_are_parted_behind_the_exchange() -> None:
    body = "y = reshape(x, pattern='... (h=4 d) -> ... h d')\no = all_to_all(y, axis='cp', src=1, dst=2)\nreturn o"
    graph = text(body, "x: f64[b, s@cp, 12]")
    after, _ = hoist_exchanges(graph)
    assert moved(after) == ["f64[b, s@cp, 12]"] and after.nodes[-1].attrs["pattern"] == "... (h d=3) -> ... h d"
    same(graph, after)


# -- merging ----------------------------------------------------------------------------------

TWO = """a = all_to_all(x, axis='cp', src=1, dst=2)
c = all_to_all(z, axis='cp', src=1, dst=2)
o = scale_heads(a, s)
return o, c"""


def test_two_exchanges_become_one_packed_by_a_copy() -> None:
    graph = text(TWO, "x: f64[b, s@cp, 4, 3], z: f64[b, s@cp, 6], s: f64[4@cp]")
    after, said = merge_exchanges(graph)
    assert moved(after) == ["f64[b, s@cp, 2, 9]"]
    assert passed(said, "merge-exchanges") == [
        "2 exchanges become one of 144 bytes a token (96 + 48); packed by one copy",
    ]
    same(graph, after)


def test_exchanges_on_the_way_back_become_one() -> None:
    body = TWO.replace("src=1, dst=2", "src=2, dst=1")
    graph = text(body, "x: f64[b, s, 4@cp, 3], z: f64[b, s, 6@cp], s: f64[4]")
    after, _ = merge_exchanges(graph)
    assert moved(after) == ["f64[b, s, 2@cp, 9]"]
    same(graph, after)


def test_features_that_another_axis_splits_stay_on_their_ranks() -> None:
    graph = text(TWO, "x: f64[b, s@cp, 4@tp, 3], z: f64[b, s@cp, 8@tp], s: f64[4@tp@cp]")
    after, _ = merge_exchanges(graph, mesh="cp=2 tp=2")
    assert moved(after) == ["f64[b, s@cp, 4@tp, 5]"]
    tensors = [torch.randn(2, 6, 4, 3), torch.randn(2, 6, 8), torch.randn(4)]
    for mesh in (Mesh((("cp", 2), ("tp", 2))), Mesh((("tp", 2), ("cp", 2)))):
        for got, want in zip(simulate(after, mesh, *tensors), evaluate(graph, *tensors), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("body", "inputs", "why"),
    [
        (
            "a = all_to_all(x, axis='cp', src=1, dst=2)\nc = all_to_all(a, axis='cp', src=2, dst=1)\n"
            "d = silu(c)\ne = all_to_all(d, axis='cp', src=1, dst=2)\nreturn a, e",
            "x: f64[b, s@cp, 4]", "the second waits for the first",
        ),
        (TWO, "x: f64[b, s@cp, 4, 3], z: f32[b, s@cp, 6], s: f64[4@cp]", "dtypes differ"),
        (TWO, "x: f64[b, s@cp, 4, 3], z: f64[b, s@cp, 7], s: f64[4@cp]", "ranks do not divide 7"),
    ],
)  # fmt: skip
def test_exchanges_that_cannot_be_one_stay(body: str, inputs: str, why: str) -> None:
    graph = text(body, inputs)
    after, said = merge_exchanges(graph)
    assert after == graph and not passed(said, "merge-exchanges"), why


def test_groups_that_wait_for_each_other_are_not_both_merged() -> None:
    body = """a = all_to_all(x, axis='cp', src=1, dst=2)
c = all_to_all(z, axis='cp', src=2, dst=1)
e = silu(c)
f = all_to_all(e, axis='cp', src=1, dst=2)
g = silu(a)
h = all_to_all(g, axis='cp', src=2, dst=1)
return f, h"""
    graph = text(body, "x: f64[b, s@cp, 4], z: f64[b, s, 6@cp]")
    after, said = merge_exchanges(graph)
    assert len(exchanges(after)) == 3 and [r.why for r in said if r.kind == "missed"]
    same(graph, after)


PROJECTION = """y = linear(x, w)
q, z, k = split(y, sizes=(4, 6, 8))
a = all_to_all(q, axis='cp', src=1, dst=2)
c = all_to_all(k, axis='cp', src=1, dst=2)
o = silu(z)
return a, c, o"""
WEIGHT = "w: f64[18, 5] = normal(0.1)"


def test_sections_of_a_projection_are_packed_by_its_weight_and_the_weight_is_kept_so() -> None:
    graph = text(PROJECTION, "x: f64[b, s@cp, 5]", WEIGHT)
    after, said = merge_exchanges(graph)
    assert passed(said, "merge-exchanges")[0].endswith("the projection writes them packed")
    assert not any(n.is_op("concat") for n in after.nodes) and sum(n.is_op("reorder") for n in after.nodes) == 1
    kept, told = fold_orders(after)
    assert str(kept.params[0].type) == "f64[18:sections(2,4,-6,8), 5]" and not any(n.is_op("reorder") for n in kept.nodes)
    assert passed(told, "fold-orders") == ["w is kept as f64[18:sections(2,4,-6,8), 5]"]
    for made in (after, kept):
        same(graph, made)


@pytest.mark.parametrize(
    ("body", "params"),
    [
        (PROJECTION.replace("return a, c, o", "return a, c, o, q"), WEIGHT),  # a section is read at home, too
        (PROJECTION.replace("return a, c, o", "t = linear(x, w)\nreturn a, c, o, t"), WEIGHT),  # the weight has other readers
        (PROJECTION.replace("y = linear(x, w)", "h = silu(w)\ny = linear(x, h)"), WEIGHT),  # it is no parameter
    ],
)
def test_a_projection_that_others_need_as_it_is_stays_and_a_copy_packs(body: str, params: str) -> None:
    graph = text(body, "x: f64[b, s@cp, 5]", params)
    after, said = merge_exchanges(graph)
    assert passed(said, "merge-exchanges")[0].endswith("packed by one copy") and len(exchanges(after)) == 1
    same(graph, after)


def test_a_bias_goes_with_its_rows() -> None:
    body, params = PROJECTION.replace("linear(x, w)", "linear(x, w, v)"), f"{WEIGHT}, v: f64[18] = normal(0.1)"
    graph = text(body, "x: f64[b, s@cp, 5]", params)
    after, _ = merge_exchanges(graph)
    kept, _ = fold_orders(after)
    assert [str(v.type) for v in kept.params] == ["f64[18:sections(2,4,-6,8), 5]", "f64[18:sections(2,4,-6,8)]"]
    same(graph, kept)


def test_a_parameter_that_is_read_in_two_orders_is_kept_as_it_is() -> None:
    body = "u = reorder(w, dim=0, order='sections(2,4,6)')\nreturn u, w"
    graph = text(body, "x: f64[b, s]", "w: f64[10, 3] = normal(0.1)")
    assert fold_orders(graph)[0] == graph


# -- whole models -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TINY, "kdas"])
def test_every_preset_makes_two_exchanges_a_layer_and_stays_what_it_is(name: str) -> None:
    graph = small(name)
    after = merged(graph, 2)
    same(graph, after)
    counts = {g.name: len(exchanges(g)) for g in after.layers}
    assert {n: c for n, c in counts.items() if c} == {
        n: 2 for n in counts if n in ("gdn", "kda", "mamba2", "self_attention")
    }, counts


@pytest.mark.parametrize(("name", "ranks"), [("qwen3-next-80b-a3b-tiny", 4), ("kdas", 4), ("nemotron-h-8b-tiny", 2)])
def test_packed_segments_and_four_ranks(name: str, ranks: int) -> None:
    graph = small(name, packed=True)
    after = merged(graph, ranks)
    sample = draw(graph, (after,))
    sizes = {**sample.sizes}
    mesh = Mesh((("cp", ranks),))
    tokens = {n: t if t.dim() < 2 else t[:, : t.shape[1] // ranks * ranks] for n, t in sample.inputs.items()}
    if "cu" in tokens:
        length = next(t.shape[1] for t in tokens.values() if t.dim() > 1)
        tokens["cu"] = torch.tensor([0, 1, *[length] * (sizes["n"])])[: tokens["cu"].shape[0]]
    given = [tokens[v.name] for v in graph.inputs]
    want, got = evaluate(graph, *given, params=sample.params), simulate(after, mesh, *given, params=sample.params)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_gradients_of_the_merged_program_are_those_of_the_program() -> None:
    after = merged(small("kdas"), 2)
    back, _ = differentiate(after)
    report = validate(after, back, "reassociates", gradients=True)
    assert report.ok and report.rows, str(report)


@pytest.mark.parametrize(("was", "now"), [("sections(2,12,12,24,-24,4,4)", "sections(2,12,24,12,-24,4,4)")])
def test_sections_in_a_wrong_order_are_caught(was: str, now: str) -> None:
    graph = small("qwen3-next-80b-a3b-tiny")
    said = dump(merged(graph, 2))
    assert was in said
    assert not validate(graph, parse(said.replace(was, now)), "exact").ok


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_full_gdn_layer_sends_three_quarters_of_the_reference_in_two_exchanges(ranks: int) -> None:
    spec = load_spec("qwen3-next-80b-a3b")
    graph = merged(build(spec, task="logits"), ranks)
    tokens = 8192
    found = by_layer(traffic(graph, Mesh((("cp", ranks),)), {"b": 1, "s": tokens * ranks}))
    first = found["layers.0"]
    assert graph.nodes[0].op is not None and parameters(graph)["layers.0.w_in"]
    assert first.exchanges == 2
    assert first.bytes == tokens * (8192 + 64 + 4096) * 2 * (ranks - 1) // ranks
    assert first.bytes <= 0.76 * tokens * 16448 * 2 * (ranks - 1) / ranks
    gdn = next(g for g in graph.layers if g.name == "gdn")
    assert not [n for n in gdn.nodes if n.is_op("reorder")]
