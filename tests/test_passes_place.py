"""Tokens over ranks: every program stays what it is, each remedy fires and holds back, and what moves is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.ir import (
    Graph,
    Mesh,
    PassError,
    PlacementError,
    PlaitError,
    evaluate,
    ops,
    parameters,
    parse,
    parse_mesh,
    simulate,
)
from plait.passes import DEFAULT, Event, Pipeline, Remark, differentiate, place, with_cache
from plait.passes.samples import draw

from tests.programs import TINY, agree, preset
from tests.tensor_cases import layer, moves

WIDE = {
    "name": "wide", "vocab": 61, "hidden": 20, "blocks": ["gdn", "attention", "mamba2", "kda", "moe", "attention"],
    "gdn": {"key_heads": 4, "value_heads": 8, "key_dim": 3, "value_dim": 5},
    "attention": {"heads": 8, "kv_heads": 4, "head_dim": 6, "rope": {}, "gate": True, "qk_norm": True, "sinks": True},
    "mamba2": {"heads": 8, "groups": 4, "state": 5, "head_dim": 3},
    "kda": {"heads": 4, "head_dim": 6},
    "moe": {"experts": 5, "top_k": 2, "width": 7, "aux_loss": 0.01},
}  # fmt: skip


def wide(task: str = "loss", packed: bool = False) -> Graph:
    return build(load_spec(WIDE), task=task, dtype="f64", packed=packed)


def lines(said: Sequence[Remark], kind: str) -> list[str]:
    return [f"{r.what} {r.why}" for r in said if r.kind == kind]


# -- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["logits", "loss"])
@pytest.mark.parametrize("name", TINY)
def test_every_preset(name: str, task: str) -> None:
    before = preset(name, task, packed=task == "loss")
    after, _ = place(before)
    assert str(after.inputs[0].type) == "i64[b, s@cp]" and len(after.layers) == len(before.layers)
    assert str(after.outputs[0].type) == ("f64[b, s@cp, 61]" if task == "logits" else "f64[()]")
    assert {n: t for n, (t, _) in parameters(after).items()} == {n: t for n, (t, _) in parameters(before).items()}
    agree(before, after)


@pytest.mark.parametrize("way", ["heads", "gather"])
@pytest.mark.parametrize("packed", [False, True])
def test_four_ranks(way: str, packed: bool) -> None:
    before = wide(packed=packed)
    after, _ = place(before, mesh="cp=4", attention=way, recurrence=way)
    agree(before, after)
    twice = parse("def f(x: f64[b, s@cp@dp, 3]):\n    return x\n")  # has tokens that four ranks divide
    sample = draw(before, (after, twice))
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in sample.tensors.items()}
    inputs = [leaves[v.name] for v in before.inputs]
    was = evaluate(before, *inputs, params=leaves)
    now = simulate(after, Mesh((("cp", 4),)), *inputs, params=leaves)
    wanted = [t for t in leaves.values() if t.requires_grad]
    pairs = zip((was, *torch.autograd.grad(was, wanted)), (now, *torch.autograd.grad(now, wanted)), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in pairs)


@pytest.mark.parametrize("name", ["demo", "llama-3-8b-tiny"])
def test_gradients_of_a_placed_program(name: str) -> None:
    before = preset(name, packed=True)
    after = differentiate(place(before)[0])[0]
    agree(before, after, gradients=True)
    types = {v.name: str(v.type) for v in after.outputs}
    assert types["d_layers_0_w_in"].endswith("+cp") and "@" not in types["d_embed"]


def test_a_program_with_dropout() -> None:
    fields = {**WIDE, "blocks": ["gdn", "moe"], "dropout": 0.3}
    before = build(load_spec(fields), task="loss", dtype="f64", training=True)
    agree(before, place(before)[0])


def test_a_cached_program_reads_its_prompt_over_ranks() -> None:
    before = with_cache(preset("demo", "logits"))[0]
    agree(before, place(before)[0])


def test_kernels_become_ops_and_kernels_again() -> None:
    before = Pipeline.parse(DEFAULT).run(preset("demo"))
    placed, _ = place(before)
    assert not any(g.role == "kernel" for part in placed.layers for g in part.callees)
    agree(before, Pipeline.parse(DEFAULT).run(placed))


def test_in_a_pipeline_fusions_still_fire() -> None:
    events = list[Event]()
    text = "place{mesh='cp=2' axis=cp},fuse,outline-rows"
    after = Pipeline.parse(text).run(preset("demo"), verify="numeric", watch=events.append)
    fired = {r.what for e in events for r in e.remarks if r.kind == "passed"}
    assert {"norm-gate", "recurrence-preamble", "glu", "rows", "heads", "sections"} <= fired
    agree(preset("demo"), after)


def test_each_distinct_layer_is_placed_once() -> None:
    after, said = place(wide("logits"))
    calls = [n.callee for n in after.nodes if n.callee is not None and n.callee.name == "self_attention"]
    assert len(calls) == 2 and calls[0] is calls[1]
    assert sum(r.what == "heads" and r.where == "self_attention" for r in said) == 1


# -- what moves -----------------------------------------------------------------------------------


def test_exchanges_of_each_layer() -> None:
    after, _ = place(wide("logits"), mesh="cp=4")
    counts = {g.name: moves(g) for g in after.layers}
    assert counts["gdn"] == {"all_to_all": 4}  # q, k and v at once; decay; beta; o back
    assert counts["kda"] == {"all_to_all": 4}
    assert counts["mamba2"] == {"all_to_all": 4}  # and what skips the recurrence stays where it is
    assert counts["self_attention"] == {"all_to_all": 4}  # q, k, v; o back
    assert counts["moe"] == {}  # every rank has rows of its own tokens
    assert counts["head"] == {}


def test_gathering_moves_each_value_once() -> None:
    after, _ = place(wide("logits"), attention="gather", recurrence="gather")
    counts = {g.name: moves(g) for g in after.layers}
    assert counts["self_attention"] == {"all_gather": 3}
    assert counts["gdn"] == {"all_gather": 3}  # channels before the conv; decay; beta


def test_remarks_say_what_moves() -> None:
    _, said = place(parse(ATTENTION), mesh="cp=4")
    assert lines(said, "note") == [
        "all_to_all q to q of attention: 9 bytes a token and rank",  # 8 heads x 3 x 2 bytes x 3/16
        "all_to_all k to k of attention: 5 bytes a token and rank",
        "all_to_all v to v of attention: 8 bytes a token and rank",
        "all_to_all attention to the results of f: 15 bytes a token and rank",
    ]


# -- remedies -------------------------------------------------------------------------------------

ATTENTION = """
def f(q: bf16[b, s, 8, 3], k: bf16[b, s, 4, 3], v: bf16[b, s, 4, 5], *, sinks: f32[8] = constant(0.5)):
    o = attention(q, k, v, sinks, window=3)
    return o
"""
CONV = """
def f(x: f64[b, s, 14], *, w: f64[14, 4] = normal(0.5), bias: f64[14] = normal(0.5)):
    y, final = causal_conv1d(x, w, bias, act='silu')
    return y, final
"""
RECURRENCE = """
def f(x: f64[b, s, {c}], decay: f64[b, s, {h}], beta: f64[b, s, {h}], *, w: f64[{c}, 4] = normal(0.5)):
    y, end = causal_conv1d(x, w)
    a, b, c = split(y, sizes=({qk}, {qk}, {v}))
    q = reshape(a, pattern='... (h={g} d) -> ... h d')
    n = reshape(b, pattern='... (h={g} d) -> ... h d')
    k = l2_norm(n)
    v = reshape(c, pattern='... (h={h} d) -> ... h d')
    o, final = gated_delta_rule(q, k, v, decay, beta)
    return o, final
"""


def recurrence(g: int, h: int) -> Graph:
    return parse(RECURRENCE.format(g=g, h=h, qk=3 * g, v=5 * h, c=6 * g + 5 * h))


def placed(graph: Graph | str, **options: Any) -> tuple[Graph, list[Remark]]:
    before = parse(graph) if isinstance(graph, str) else graph
    after, said = place(before, **options)
    agree(before, after)
    return after, said


def test_attention_exchanges_heads() -> None:
    after, said = placed(ATTENTION.replace("bf16", "f64"))
    assert lines(said, "passed") == ["heads attention: each rank has whole sequences of some heads"]
    assert "f64[b, s, 4@cp, 3]" in str(after) and "shard(sinks" in str(after)


def test_few_key_heads_stand_there_several_times() -> None:
    after, said = placed(ATTENTION.replace("bf16", "f64").replace(", 4,", ", 1,"), mesh="cp=4")
    assert moves(after) == {"all_to_all": 4} and str(after).count("repeat_heads") == 2
    assert "heads attention: key heads stand 4 times, for as many ranks" in lines(said, "note")


def test_heads_that_ranks_do_not_divide_keep_their_queries_and_say_why() -> None:
    after, said = placed(ATTENTION.replace("bf16", "f64").replace(", 4,", ", 3,").replace("8", "9"))
    assert moves(after) == {} and "by='kv'" in str(after)
    why = "k is f64[b, s, 3, 3]; dim 2 must be a multiple of cp=2, or a divisor of it where key heads can be repeated"
    assert lines(said, "missed") == [f"heads attention: {why}"]


def test_attention_gathers_on_demand() -> None:
    after, said = placed(ATTENTION.replace("bf16", "f64"), attention="gather")
    assert moves(after) == {"all_gather": 3} and not lines(said, "missed")


def test_channels_travel_with_the_heads_they_become() -> None:
    after, said = placed(recurrence(2, 4))
    assert [r.what for r in said if r.kind == "passed"] == ["sections", "heads"]
    assert moves(after) == {"all_to_all": 4, "all_gather": 1}  # the last is for the state, which is a result


def test_a_state_crosses_where_heads_do_not_part() -> None:
    after, said = placed(recurrence(3, 3))
    assert [r.what for r in said if r.kind == "passed"] == ["halo", "states"]
    assert [r.what for r in said if r.kind == "missed"] == ["sections", "heads"]
    assert moves(after) == {"all_reduce": 1}  # the last state, which is a result


def test_everything_is_gathered_once_on_demand() -> None:
    after, said = placed(recurrence(2, 4), recurrence="gather")
    assert [r.what for r in said if r.kind == "passed"] == ["gather", "gather"]
    assert moves(after) == {"all_gather": 3}  # x, decay, beta: what the conv gives is whole already


def test_sections_of_few_key_heads_are_packed_several_times() -> None:
    after, said = placed(recurrence(1, 4), mesh="cp=4")
    assert [r.what for r in said if r.kind == "passed"] == ["sections", "heads"]
    assert moves(after)["all_to_all"] == 4 and "f64[b, s, 4@cp, 3]" in str(after)


def test_a_conv_alone_asks_for_a_halo() -> None:
    after, said = placed(CONV)
    assert [r.what for r in said if r.kind == "passed"] == ["halo"]
    assert moves(after) == {"all_reduce": 1}  # the last inputs, which are a result


def test_sections_that_no_recurrence_takes_stay() -> None:
    text = CONV.replace("    return y, final", "    a, c = split(y, sizes=(6, 8))\n    return a, c")
    after, said = placed(text)
    assert "sections causal_conv1d: no recurrence takes its channels" in lines(said, "missed")
    assert moves(after) == {}


@pytest.mark.parametrize("heads", [4, 3])
@pytest.mark.parametrize("face", ops.FAMILY, ids=lambda face: face.name)
def test_every_recurrence_with_its_state(face: Any, heads: int) -> None:
    decay = {"none": [], "head": ["b, s, 2*g"], "channel": ["b, s, 2*g, 3"], "constant": ["2*g"]}[ops.FAMILY[face].decay]
    gates = [*decay, *(["b, s, 2*g"] if ops.FAMILY[face].beta else [])]
    given = ["b, s, g, 3", "b, s, g, 3", "b, s, 2*g, 5", *gates, "b, 2*g, 3, 5"]
    shapes = [x.replace("2*g", str(2 * heads)).replace("g", str(heads)) for x in given]
    inputs = ", ".join(f"x{i}: f64[{shape}]" for i, shape in enumerate(shapes))
    names = ", ".join(f"x{i}" for i in range(len(shapes)))
    after, said = placed(f"def f({inputs}):\n    o, end = {face.name}({names}, scale=0.1)\n    return o, end\n")
    assert [r.what for r in said if r.kind == "passed"] == ["heads"]
    assert str(after.outputs[0].type) == f"f64[b, s@cp, {2 * heads}, 5]" and "@" not in str(after.outputs[1].type)


def test_a_loss_sums_over_its_own_tokens() -> None:
    after, said = place(preset("llama-3-8b-tiny"))
    assert moves(layer(after, "head")) == {} and "by='sums'" in str(layer(after, "head"))
    assert "sums linear_cross_entropy: 16 bytes a rank of 4096 tokens" in lines(said, "note")


def test_a_sum_over_tokens_is_whole_at_the_end() -> None:
    after, _ = placed("def f(x: f64[b, s, 6], g: f64[b, s, 5]):\n    y = outer(g, x)\n    return y\n")
    assert moves(after) == {"all_reduce": 1} and str(after.outputs[0].type) == "f64[5, 6]"


# -- ways and orders ------------------------------------------------------------------------------

ORDERS = ["natural", "zigzag", "zigzag-packed"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "ways", [("heads", "heads"), ("kv", "states"), ("ring", "chain"), ("kv", "scan"), ("gather", "gather")]
)
def test_every_way_in_every_order(ways: tuple[str, str], order: str) -> None:
    before = wide(packed=order != "zigzag")
    after, _ = place(before, attention=ways[0], recurrence=ways[1], order=order)
    agree(before, after)
    tokens = {"natural": "s@cp", "zigzag": "s@cp:zigzag(2)", "zigzag-packed": "s@cp:zigzag(2,packed)"}[order]
    assert str(after.inputs[0].type) == f"i64[b, {tokens}]"


def test_a_layer_goes_the_way_that_is_forced() -> None:
    before = wide()
    after, _ = place(before, ways="self_attention=ring gdn=chain")
    agree(before, after)
    assert "by='ring'" in str(layer(after, "self_attention")) and "by='chain'" in str(layer(after, "gdn"))
    assert moves(layer(after, "mamba2")) == {"all_to_all": 4}


def test_layers_run_in_orders_of_their_own() -> None:
    """One reorder each way around attention; what takes tokens in any order takes them as they come."""
    before = wide(packed=True)
    after, said = place(before, ways="self_attention=ring:zigzag gdn=chain")
    agree(before, after)
    assert [why.split(": ")[0] for why in lines(said, "note") if why.startswith("reorder ")] == [
        "reorder gdn to x of self_attention",
        "reorder positions to p of self_attention",
        "reorder self_attention to x of mamba2",
        "reorder moe to x of self_attention",
        "reorder self_attention to x of head",
    ]
    other, _ = place(before, order="zigzag", ways="gdn=heads:natural kda=heads:natural self_attention=kv")
    agree(before, other)
    assert str(layer(other, "moe").inputs[0].type) == "f64[b, s@cp, 20]"  # after kda, in its order


def test_a_forced_way_that_is_not_legal_is_refused_with_what_remains() -> None:
    text = ATTENTION.replace(", 4,", ", 3,").replace("8", "9")
    with pytest.raises(PlacementError, match=r"dim 2 must be a multiple of cp=2.*what remains: kv, ring, gather"):
        place(parse(text), ways="f=heads")


# -- mistakes -------------------------------------------------------------------------------------

MISTAKES: list[tuple[Callable[[], object], type[PlaitError], str]] = [
    (lambda: place(wide(), mesh="cp"), PlacementError, "must be named axes and their ranks"),
    (lambda: place(wide(), mesh="cp=2 cp=2"), PlacementError, "each name once"),
    (lambda: place(wide(), mesh="cp=0"), PlacementError, "must be named axes and their ranks"),
    (lambda: place(wide(), axis="tp"), PlacementError, "no axis called tp; it has cp"),
    (lambda: place(place(wide())[0]), PassError, r"tokens is i64\[b, s@cp\], split over cp already"),
    (lambda: place(wide(), ways="gdn=ring"), PlacementError, "ring is no way of it; what remains: heads"),
    (lambda: place(wide(), ways="gnd=chain"), PassError, "names layer 'gnd'; there are gdn,"),
    (lambda: place(wide(), ways="gdn=chain:zagzig"), PassError, "an order is one of natural, zigzag, zigzag-packed"),
    (lambda: place(wide(), ways="gdn=chian"), PassError, "a way is one of heads, kv, ring"),
    (lambda: place(parse("def f(x: f64[7]):\n    y = silu(x)\n    return y\n")), PassError, "no input has tokens"),
    (
        lambda: place(parse(ATTENTION.replace("b, s", "2, 7"))),
        PlacementError,
        r"q is bf16\[2, 7, 8, 3\]; dim 1 must be a multiple of cp=2; pad it",
    ),
]


@pytest.mark.parametrize(("act", "kind", "text"), MISTAKES)
def test_mistakes_are_named(act: Callable[[], object], kind: type[PlaitError], text: str) -> None:
    with pytest.raises(kind, match=text):
        act()


def test_meshes_are_read() -> None:
    assert parse_mesh("dp=2, cp=4") == parse_mesh("dp=2 cp=4") == Mesh((("dp", 2), ("cp", 4)))
