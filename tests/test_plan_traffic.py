"""Traffic read from placed programs: by hand, against what ranks send when they run, and against what was planned."""

from collections import Counter
from functools import cache

import pytest
import torch
from plait.frontends import build, load_spec
from plait.ir import Graph, PassError, PlacementError, TensorType, parse, parse_mesh
from plait.ir.crossing import Here, Request, together
from plait.ir.crossing import sent as request_bytes
from plait.passes import Pipeline, place
from plait.passes.machine import load_machine
from plait.passes.plan import Plan, plan
from plait.passes.traffic import Sum, by_layer, traffic

MODELS = ("qwen3-next-80b-a3b", "nemotron-h-8b", "demo", "kimi")
KIMI = {
    "name": "kimi", "vocab": 64, "hidden": 48, "blocks": ["kda", "mlp", "attention", "kda"],
    "kda": {"heads": 8, "head_dim": 16}, "attention": {"heads": 8, "kv_heads": 2, "head_dim": 16}, "mlp": {"width": 64},
}  # fmt: skip
H200 = load_machine("h200")


@cache
def model(name: str, packed: bool = False) -> Graph:
    return build(load_spec(KIMI if name == "kimi" else name), packed=packed)


# -- by hand ------------------------------------------------------------------------------------


def test_every_collective_by_hand() -> None:
    graph = parse("""def f(x: f32[b, s@cp, 6], y: bf16[b, s, 8@tp]+cp, z: f32[5, 7]+cp):
    a = all_to_all(x, axis='cp', src=1, dst=2)
    g = all_gather(x, axis='cp', dim=1)
    r = reduce_scatter(y, axis='cp', dim=1)
    t = all_gather(y, axis='tp', dim=2)
    q = all_reduce(z, axis='cp')
    h = shard(g, axis='cp', dim=0)
    return a, r, q, h
""")
    found = traffic(graph, parse_mesh("cp=3,tp=2"), {"b": 9, "s": 12})
    own, half = 9 * 4 * 6 * 4, 9 * 12 * 4 * 2
    assert [(t.op, t.axis, t.bytes) for t in found] == [
        ("all_to_all", "cp", own * 2 // 3), ("all_gather", "cp", 2 * own), ("reduce_scatter", "cp", half * 2 // 3),
        ("all_gather", "tp", half), ("all_reduce", "cp", 2 * 2 * 140 // 3),
    ]  # fmt: skip
    assert found[0].value == "x" and by_layer(found) == {"": Sum(5, sum(t.bytes for t in found))}


def test_a_layer_counts_at_every_call() -> None:
    graph = parse("""def f(x: f32[b, s@cp, 4]):
    y = twice(x, params='layers.0')
    z = twice(y, params='layers.1')
    g = all_gather(z, axis='cp', dim=1)
    return g

@layer
def twice(x: f32[b, s@cp, 4]):
    a = all_to_all(x, axis='cp', src=1, dst=2)
    y = all_to_all(a, axis='cp', src=2, dst=1)
    return y
""")
    found = by_layer(traffic(graph, parse_mesh("cp=2"), {"b": 1, "s": 8}))
    assert found == {"layers.0": Sum(2, 64), "layers.1": Sum(2, 64), "": Sum(1, 64)}


def test_what_cannot_be_counted() -> None:
    graph = parse("def f(x: f32[b, s@cp, 4]):\n    y = all_gather(x, axis='cp', dim=1)\n    return y\n")
    with pytest.raises(PassError, match="f: no size is given for b; its symbols are b, s"):
        traffic(graph, parse_mesh("cp=2"), {"s": 8})
    with pytest.raises(PlacementError, match="the mesh has no axis called cp"):
        traffic(graph, parse_mesh("tp=2"), {"b": 1, "s": 8})


# -- against what ranks send --------------------------------------------------------------------

OPS = {
    "attention": ("q: f32[2, 48, 4, 3], k: f32[2, 48, 2, 3], v: f32[2, 48, 2, 5]", "o = attention(q, k, v)"),
    "delta": (
        "q: f32[2, 48, 2, 3], v: f32[2, 48, 4, 5], g: f32[2, 48, 4]", "o, last = gated_delta_rule(q, q, v, g, g)",
    ),
    "ssd": ("q: f32[2, 48, 2, 3], v: f32[2, 48, 4, 5], g: f32[2, 48, 4]", "o, last = ssd(q, q, v, g, g)"),
    "gla": ("q: f32[2, 48, 2, 3], v: f32[2, 48, 2, 5], g: f32[2, 48, 2, 3]", "o, last = gated_linear_attention(q, q, v, g)"),
    "conv": ("x: f32[2, 48, 7], w: f32[7, 4]", "o, last = causal_conv1d(x, w)"),
}  # fmt: skip
WAYS = [
    *(("attention", way) for way in ("kv", "ring")),
    *((op, way) for op in ("delta", "ssd", "gla") for way in ("states", "scan", "chain")), ("conv", "states"),
]  # fmt: skip


def measured(graph: Graph, ranks: int) -> int:
    """Bytes of the rank that sends most when all run the one op that crosses the split."""
    node = next(n for n in graph.nodes if n.attrs.get("over"))
    op, count = node.op, Counter[int]()
    assert not isinstance(op, Graph) and op.crossing is not None
    given = [torch.rand(*shape(v.type, ranks)) if v is not None else None for v in node.inputs]
    places = [Here.of(node.attrs, ranks, r, lambda op, *xs, **named: op.reference(*xs, **named)) for r in range(ranks)]

    def watch(asked: "list[Request]") -> None:
        count.update({r: request_bytes(a, ranks, r) for r, a in enumerate(asked)})

    together([op.crossing.ways[node.attrs["by"]].run(here, *given) for here in places], watch)
    return max(count.values())


def shape(type_: TensorType, ranks: int) -> list[int]:
    return [int(d.size) // (ranks if d.axes else 1) for d in type_.dims]


@pytest.mark.parametrize("order", ["natural", "zigzag"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("op", "way"), WAYS)
def test_ranks_send_what_is_counted(op: str, way: str, ranks: int, order: str) -> None:
    inputs, line = OPS[op]
    whole = parse(f"def f({inputs}):\n    {line}\n    return o\n")
    asked = {"recurrence": way} if op == "conv" else {"ways": f"f={way}"}
    placed, _ = place(whole, mesh=f"cp={ranks}", order=order, **asked)
    found = [t for t in traffic(placed, parse_mesh(f"cp={ranks}"), {}) if "." in t.op]
    assert [t.bytes for t in found] == [measured(placed, ranks)] and found[0].bytes > 0


# -- against the plan ---------------------------------------------------------------------------


def counted(made: Plan, whole: Graph, passes: str = "") -> dict[str, Sum]:
    """What a call of every layer that mixes tokens exchanges in the program that a plan makes."""
    at = made.setting
    placed = Pipeline.parse(made.place + passes).run(whole)
    of = {n.attrs["params"]: n.callee.name for n in whole.nodes if n.callee is not None}
    moved = traffic(placed, at.mesh, {"b": at.batch, "s": at.seq, "n": len(at.lengths)})
    found = by_layer(t for t in moved if t.axis == at.axis)
    return {c.layer: next((s for p, s in found.items() if of.get(p) == c.layer), Sum(0, 0)) for c in made.choices}


def forced(name: str, recurrence: str, attention: str, order: str, mesh: str, batch: int) -> Plan:
    kinds = {c.layer: {o.remedy for o in c.offers} for c in plan(model(name), parse_mesh("cp=1"), H200).choices}
    ways = {layer: f"{attention if 'kv' in known else recurrence}:{order}" for layer, known in kinds.items()}
    return plan(model(name), parse_mesh(mesh), H200, batch, 4096, ways=ways)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("recurrence", "attention"), [("states", "kv"), ("scan", "ring"), ("chain", "heads"), ("gather", "gather")]
)
@pytest.mark.parametrize(("order", "mesh", "batch"), [("natural", "cp=4", 1), ("zigzag", "cp=2", 3)])
def test_counted_bytes_are_those_that_were_predicted(
    name: str, recurrence: str, attention: str, order: str, mesh: str, batch: int
) -> None:
    made = forced(name, recurrence, attention, order, mesh, batch)
    assert {k: s.bytes for k, s in counted(made, model(name)).items()} == {
        c.layer: c.offer.price.sent for c in made.choices if c.offer.price
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order", ["natural", "zigzag"])
def test_heads_take_two_exchanges_of_the_predicted_bytes(name: str, order: str) -> None:
    made = forced(name, "heads", "heads", order, "cp=4", 1)
    found = counted(made, model(name), ",hoist-exchanges,merge-exchanges{mesh='cp=4'}")
    for choice in made.choices:
        assert choice.offer.price
        assert found[choice.layer] == Sum(2, choice.offer.price.sent)


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_itself_is_what_it_says(name: str) -> None:
    made = plan(model(name), parse_mesh("cp=8"), H200, seq=2**17)
    found = counted(made, model(name))
    assert sum(c.calls * found[c.layer].bytes for c in made.choices) == made.sent


@pytest.mark.parametrize("order", ["natural", "zigzag"])
@pytest.mark.parametrize("name", ["nemotron-h-8b", "kimi"])
def test_packed_segments_are_zigzags_of_their_own(name: str, order: str) -> None:
    """Each of them has a state that crosses every border."""
    whole, lengths = model(name, packed=True), (64, 800, 0, 160)
    kinds = {c.layer: {o.remedy for o in c.offers} for c in plan(whole, parse_mesh("cp=1"), H200).choices}
    ways = {layer: f"{'kv' if 'kv' in known else 'scan'}:{order}" for layer, known in kinds.items()}
    made = plan(whole, parse_mesh("cp=4"), H200, seq=1024, lengths=lengths, ways=ways)
    assert {k: s.bytes for k, s in counted(made, whole).items()} == {
        c.layer: c.offer.price.sent for c in made.choices if c.offer.price
    }
    dense = plan(model(name), parse_mesh("cp=4"), H200, seq=1024, ways=ways)
    pairs = [(a.offer.price, b.offer.price) for a, b in zip(made.choices, dense.choices, strict=True)]
    assert all(a and b and a.sent > b.sent for a, b in pairs[:1]) == (order == "zigzag")


@pytest.mark.parametrize("name", ["qwen3-next-80b-a3b", "nemotron-h-8b"])
@pytest.mark.parametrize(("recurrence", "attention"), [("scan", "kv"), ("chain", "ring"), ("states", "heads")])
def test_heads_are_shared_out_over_tp_first(name: str, recurrence: str, attention: str) -> None:
    """Of a mesh with tp, the plan says what moves over cp."""
    made = forced(name, recurrence, attention, "zigzag", "cp=2,tp=2", 1)
    assert {k: s.bytes for k, s in counted(made, model(name)).items()} == {
        c.layer: c.offer.price.sent for c in made.choices if c.offer.price
    }
