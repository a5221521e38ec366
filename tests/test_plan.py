"""The planner: prices against the arithmetic they stand for, the cheapest way through a model, and machines as text."""

from bisect import bisect_left
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from plait.frontends import build, load_spec
from plait.ir import Graph, PassError, PlacementError, PlaitError, TypeMismatch, parse, parse_mesh
from plait.ir.ops.attention import visible
from plait.passes import place
from plait.passes.machine import FIELDS, Machine, dump_machine, load_machine, machine_names, parse_machine
from plait.passes.plan import plan
from plait.passes.plan_balance import balance, work
from plait.passes.plan_sites import Mixer, distinct, mixers, steps
from plait.passes.pricing import Offer, Setting, offers, reference, reordering

QWEN = "qwen3-next-80b-a3b"
H200 = load_machine("h200")


@cache
def model(name: str = QWEN) -> Graph:
    return build(load_spec(name))


@cache
def mixer(layer: str, name: str = QWEN) -> Mixer:
    return next(s for s in distinct(steps(model(name))) if s.layer == layer).mixers[0]


def at(mesh: str, seq: int, machine: Machine = H200, lengths: tuple[int, ...] = ()) -> Setting:
    return Setting(machine, parse_mesh(mesh), "cp", 1, seq, lengths)


def offer(found: Mixer, where: Setting, remedy: str, order: str = "natural") -> Offer:
    return next(o for o in offers([found], where) if (o.remedy, o.order) == (remedy, order))


def sent(found: Mixer, where: Setting, remedy: str, order: str = "natural") -> int:
    made = offer(found, where, remedy, order)
    assert made.price, made.why
    return made.price.sent


# -- bytes --------------------------------------------------------------------------------------

HALO = 3 * 8192 * 2
STATE, BOTH = 32 * 128 * 128 * 4, 2 * 32 * 128 * 128 * 4  # S; M and S


@pytest.mark.parametrize(("seq", "cp", "table"), [
    (32768, 8, {"reference": 118, "heads": 88, "states": 29, "scan": 12.6, "chain": 2.1, "kv": 59}),
    (131072, 8, {"reference": 472, "heads": 354, "states": 29, "scan": 12.6, "chain": 2.1, "kv": 235}),
    (1048576, 64, {"reference": 531, "states": 264, "scan": 25, "chain": 2.1, "kv": 2114}),
])  # fmt: skip
def test_the_published_table(seq: int, cp: int, table: dict[str, float]) -> None:
    gdn, attention, where = mixer("gdn"), mixer("self_attention"), at(f"cp={cp}", seq)
    found = {"reference": reference(gdn, where).sent, "kv": sent(attention, where, "kv")}
    found |= {name: sent(gdn, where, name) - HALO for name in ("states", "scan", "chain")}
    found |= {"heads": sent(gdn, where, "heads")} if "heads" in table else {}
    assert {name: size / 1e6 for name, size in found.items()} == pytest.approx(table, rel=0.015)
    assert sent(attention, where, "ring") == found["kv"]


def test_bytes_to_the_last_one() -> None:
    gdn, where, n = mixer("gdn"), at("cp=4", 4 * 1000), 4
    assert sent(gdn, where, "heads") == 1000 * 2 * (8256 + 4096) * 3 // 4
    assert reference(gdn, where).sent == 1000 * 2 * 16448 * 3 // 4 and reference(gdn, where).exchanges == 7
    assert sent(gdn, where, "heads") / reference(gdn, where).sent < 0.76
    assert sent(gdn, where, "states") == (n - 1) * BOTH + HALO and sent(gdn, where, "scan") == 2 * BOTH + HALO
    assert sent(gdn, where, "chain") == STATE + HALO
    assert sent(gdn, at("cp=4", 4 * 8192), "chain") < 0.03 * reference(gdn, at("cp=4", 4 * 8192)).sent
    for way in ("states", "chain"):
        assert sent(gdn, where, way, "zigzag") == 2 * sent(gdn, where, way)
    assert sent(gdn, where, "scan", "zigzag") == 3 * BOTH + 2 * HALO  # no rank passes on all steps up and all down
    assert sent(gdn, where, "gather") == 3 * 1000 * (2 * 8224 + 4 * 32)


def test_an_additive_rule_sends_one_number_a_head_beside_its_state() -> None:
    ssd, where = mixer("mamba2", "nemotron-h-8b"), at("cp=8", 8 * 128)
    halo = 3 * 10240 * 2
    assert sent(ssd, where, "states") == 7 * 4 * (128 + 128 * 128 * 64) + halo
    assert sent(ssd, where, "chain") == 4 * 128 * 128 * 64 + halo
    assert reference(ssd, where).exchanges == 6


def test_groups_are_copied_where_ranks_are_more() -> None:
    ssd, where = mixer("mamba2", "nemotron-h-8b"), at("cp=16", 16 * 32)
    features = 128 * 64 + 2 * 16 * 128 + 128  # 8 groups become 16; dt travels once for decay and beta
    assert sent(ssd, where, "heads") == 32 * 2 * (features + 128 * 64) * 15 // 16
    attention = mixer("self_attention")
    assert sent(attention, at("cp=4", 64), "heads") == 16 * 2 * 256 * (16 + 4 + 4 + 16) * 3 // 4


def test_tp_divides_heads_first() -> None:
    gdn, attention = mixer("gdn"), mixer("self_attention")
    one, two, four = at("cp=4", 4096), at("cp=4,tp=2", 4096), at("cp=4,tp=4", 4096)
    assert [sent(gdn, one, way) // sent(gdn, two, way) for way in ("heads", "states", "chain", "gather")] == [2] * 4
    assert [2 * sent(attention, s, "kv") // sent(attention, one, "kv") for s in (two, four)] == [1, 1]  # a head is the least
    assert "tp=3" in offer(gdn, at("cp=4,tp=3", 4096), "heads").why


@pytest.mark.parametrize("cp", [2, 4, 8, 16])
def test_crossovers_of_the_relay(cp: int) -> None:
    """By bytes alone: (M, S) of all ranks at 127.5 cp local tokens of the reference's exchange, S alone at 64 cp / (cp - 1)."""
    gdn = mixer("gdn")

    def meets(theirs: str, ours: str) -> int:
        def dearer(tokens: int) -> bool:
            where = at(f"cp={cp}", cp * tokens)
            exchanged = reference(gdn, where).sent if theirs == "reference" else sent(gdn, where, theirs)
            return exchanged >= sent(gdn, where, ours) - HALO

        return 8 * bisect_left(range(8, 2**15, 8), True, key=dearer) + 8

    assert meets("reference", "states") == pytest.approx(127.5 * cp, abs=8)
    assert meets("reference", "chain") == pytest.approx(64 * cp / (cp - 1), abs=8)
    assert meets("heads", "states") == pytest.approx(127.5 * cp * 16448 / 12352, abs=8)
    assert meets("heads", "chain") == pytest.approx(64 * cp / (cp - 1) * 16448 / 12352, abs=8)


@pytest.mark.parametrize(("heads", "kv", "cp"), [*product((4, 8, 32), (1, 2, 4), (2, 4))])
def test_heads_against_kv_by_head_counts(heads: int, kv: int, cp: int) -> None:
    """Keys and values travel cp - 1 times; heads once, queries and results with them, and keys copied up to cp."""
    types = f"q: bf16[b, s, {heads}, 8], k: bf16[b, s, {kv}, 8], v: bf16[b, s, {kv}, 8]"
    ir = f"def f({types}):\n    o = attention(q, k, v)\n    return o\n"
    found, where = mixers(parse(ir))[0], at(f"cp={cp}", 64 * cp)
    cheaper = sent(found, where, "heads") < sent(found, where, "kv")
    assert cheaper == (heads + max(kv, cp) < cp * kv)


def test_hidden_states_change_order_by_what_a_rank_does_not_keep() -> None:
    for n in (1, 2, 3, 4, 5, 8):
        where, size = at(f"cp={n}", 16 * n), 10
        natural = [{2 * r, 2 * r + 1} for r in range(n)]
        moved = [len(natural[r] - {r, 2 * n - 1 - r}) for r in range(n)]
        assert reordering(size, where).sent == max(moved) * 8 * size


# -- balance ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "n"), [((24,), 3), ((12, 0, 6, 30), 3), ((48, 4), 2), ((5, 1, 29, 13), 3), ((40,), 1)])
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 5), (True, 40), (False, 0), (False, 5), (False, 40)])
def test_work_is_the_pairs_that_a_mask_leaves(lengths: tuple[int, ...], n: int, causal: bool, window: int) -> None:
    total = sum(lengths)
    borders = torch.tensor([0, *lengths]).cumsum(0)
    mask = visible(total, total, borders, None, causal, window, torch.device("cpu")).sum(1)
    assert work(lengths, n, "natural", causal, window) == tuple(int(x.sum()) for x in mask.chunk(n))
    if any(length % (2 * n) for length in lengths):
        with pytest.raises(TypeMismatch, match="pad to a multiple"):
            work(lengths, n, "zigzag", causal, window)
        return
    chunks = [mask[a:b].chunk(2 * n) if b > a else [mask[:0]] * 2 * n for a, b in pairwise(map(int, borders))]
    wanted = [int(sum(c[r].sum() + c[2 * n - 1 - r].sum() for c in chunks)) for r in range(n)]
    assert work(lengths, n, "zigzag", causal, window) == tuple(wanted)


def test_the_balance_is_a_number() -> None:
    for n in (2, 4, 8):
        assert balance(work((2**14,), n, "natural")) == pytest.approx(2 - 1 / n, abs=1e-3)
        assert balance(work((2**14,), n, "zigzag")) == 1.0
        assert balance(work((16 * n, 128 * n, 0, 48 * n), n, "zigzag")) == 1.0
    ragged = work((7, 301, 90, 2), 4, "natural")
    assert balance(ragged) == max(ragged) * 4 / sum(ragged) and balance(ragged) > 1.5
    assert balance(work((4096,), 4, "natural", window=64)) < 1.01 and balance((0, 0)) == 1.0


def test_work_and_its_balance_are_in_the_price() -> None:
    attention = mixer("self_attention")
    dense, ragged = at("cp=4", 4096), at("cp=4", 4096, lengths=(8, 2048, 1024, 1016))
    even = {o.order: o.price for o in offers([attention], dense) if o.remedy == "kv" and o.price}
    assert even["natural"].balance == pytest.approx(1.75, abs=1e-3) and even["zigzag"].balance == 1.0
    assert even["natural"].compute / even["zigzag"].compute == pytest.approx(even["natural"].balance)
    packed = offer(attention, ragged, "kv").price
    assert packed and packed.balance == balance(work(ragged.lengths, 4, "natural"))
    assert packed.compute < even["natural"].compute / 2


# -- legality -----------------------------------------------------------------------------------


def test_reasons_name_the_value_and_what_it_must_be() -> None:
    gdn, attention = mixer("gdn"), mixer("self_attention")
    ten = parse("def f(q: f32[b, s, 10, 4], k: f32[b, s, 2, 4]):\n    o = attention(q, k, k)\n    return o\n")
    assert "o of gated_delta_rule has 32 heads; they must be a multiple of cp=5" in offer(gdn, at("cp=5", 40), "heads").why
    keys = "k of attention has 2 heads; they must be a multiple of cp=5, or divide it"
    assert keys in offer(mixers(ten)[0], at("cp=5", 40), "heads").why
    assert "4100 tokens; zigzag needs a multiple of 2 x cp = 8" in offer(gdn, at("cp=4", 4100), "chain", "zigzag").why
    assert "4099 tokens; natural needs a multiple of cp=4" in offer(gdn, at("cp=4", 4099), "chain").why
    packed = at("cp=2", 100, lengths=(40, 54, 6))
    assert "segment has 54 tokens; zigzag needs a multiple of 2 x cp = 4" in offer(attention, packed, "kv", "zigzag").why
    assert offer(attention, packed, "kv").price


def test_a_relay_takes_a_state_in_and_gives_one_out() -> None:
    head = "def f(q: f32[b, s, 2, 4], beta: f32[b, s, 2], state: f32[b, 2, 4, 4]):\n"
    graph = parse(head + "    o, last = delta_rule(q, q, q, beta, state)\n    return o, last\n")
    found = {o.remedy: o.price for o in offers(mixers(graph), at("cp=2", 64)) if o.order == "natural"}
    assert found.keys() == {"heads", "states", "scan", "chain", "gather"} and all(found.values())


def test_a_cache_and_other_keys_are_for_everyone() -> None:
    head = "def f(q: f32[b, s, 2, 4], k: f32[b, m, 2, 4], p: i64[()]):\n"
    cached = parse(head + "    o = attention(q, q, q, at=p)\n    return o\n")
    across = parse(head + "    o = attention(q, k, k, causal=False)\n    return o\n")
    for graph, why in ((cached, "at of attention"), (across, "must have the tokens of q")):
        assert why in next(o for o in offers(mixers(graph), at("cp=2", 64)) if o.remedy == "kv").why


def test_mixers_of_one_layer_take_one_remedy() -> None:
    both = parse(
        "def f(q: f32[b, s, 2, 4], beta: f32[b, s, 2]):\n"
        "    o, last = delta_rule(q, q, q, beta)\n    y = attention(o, o, o)\n    return y\n"
    )
    found = offers(mixers(both), at("cp=2", 64))
    assert {o.remedy for o in found} == {"heads", "gather"} and found[0].price
    alone = [sent(m, at("cp=2", 64), "heads") for m in mixers(both)]
    assert found[0].price.sent == sum(alone)


# -- plans --------------------------------------------------------------------------------------


def test_qwen_at_128k_tokens() -> None:
    made = plan(model(), parse_mesh("cp=8"), H200, seq=131072)
    gdn, attention = made.choices
    assert (gdn.layer, gdn.calls, attention.layer, attention.calls) == ("gdn", 36, "self_attention", 12)
    assert (gdn.offer.remedy, gdn.offer.order) == ("scan", "zigzag") and gdn.runner_up and gdn.runner_up.remedy == "chain"
    assert (attention.offer.remedy, attention.offer.order) == ("kv", "zigzag")
    assert attention.runner_up and attention.runner_up.remedy == "heads"
    assert made.place == "place{mesh='cp=8' order=zigzag ways='gdn=scan self_attention=kv'}" and made.reorders == 0
    assert made.reference == 36 * gdn.reference.sent + 12 * attention.reference.sent
    assert gdn.offer.price and gdn.offer.price.sent < 0.06 * gdn.reference.sent and made.sent < 0.2 * made.reference


def test_short_sequences_over_few_ranks_exchange_heads() -> None:
    slow = replace(H200, numbers={**H200.numbers, "links.node.bandwidth": 1e9})
    assert plan(model(), parse_mesh("cp=4"), slow, seq=256).choices[0].offer.remedy == "heads"
    assert plan(model(), parse_mesh("cp=4"), slow, seq=4096).choices[0].offer.remedy == "chain"


@pytest.mark.parametrize("mesh", ["cp=4", "cp=8", "cp=32"])
def test_longer_sequences_leave_heads_for_the_relay_once(mesh: str) -> None:
    taken = [plan(model(), parse_mesh(mesh), H200, seq=2**p).choices[0].offer.remedy for p in range(8, 21)]
    relay = [remedy in ("states", "scan", "chain") for remedy in taken]
    assert relay == sorted(relay) and relay[-1]


def test_recurrences_alone_stay_in_natural_order() -> None:
    made = plan(model("mamba-2-2.7b"), parse_mesh("cp=64"), H200, seq=2**20)
    assert made.order == "natural" and made.ways == "mamba2=scan" and "multiple of cp=64" in made.choices[0].offers[0].why
    assert "it would refuse" in made.choices[0].reference.about


def everything(graph: Graph, where: Setting) -> float:
    """The best total over all remedies and orders, one by one."""
    calls, best = steps(graph), float("inf")
    names = [s.layer for s in distinct(calls)]
    listed = {s.layer: [o for o in offers(s.mixers, where) if o.price] for s in distinct(calls)}
    for chosen in product(*(listed[n] for n in names)):
        by_name = dict(zip(names, chosen, strict=True))
        total = sum(by_name[s.layer].price.training for s in calls)  # type: ignore[union-attr] # it has one
        turns = sum(by_name[a.layer].order != by_name[b.layer].order for a, b in pairwise(calls))
        best = min(best, total + turns * reordering(calls[0].hidden, where).training)
    return best


@pytest.mark.parametrize("name", ["demo", "nemotron-h-8b", QWEN])
@pytest.mark.parametrize(("wire", "memory", "mesh", "seq"), [
    (1, 1, "cp=4", 2**14), (1e-3, 1, "cp=8", 2**17), (1, 1e-3, "cp=2", 2**15), (10, 1e-2, "cp=2", 2**12),
    (1e3, 1e-4, "cp=4", 2**17),
])  # fmt: skip
def test_the_path_is_the_cheapest_of_all(name: str, wire: float, memory: float, mesh: str, seq: int) -> None:
    numbers = {**H200.numbers, "links.node.bandwidth": 450e9 * wire, "memory.bandwidth": 4.8e12 * memory}
    machine = replace(H200, numbers=numbers)
    made, again = (plan(model(name), parse_mesh(mesh), machine, seq=seq, reorders=True) for _ in range(2))
    assert made.training == pytest.approx(everything(model(name), at(mesh, seq, machine)), rel=1e-12)
    assert (again.ways, again.order, again.choices) == (made.ways, made.order, made.choices)
    uniform = plan(model(name), parse_mesh(mesh), machine, seq=seq)
    assert uniform.training >= made.training and uniform.reorders == 0 and ":" not in uniform.ways


def test_orders_may_differ_by_layer() -> None:
    """Long runs of recurrences by heads stay natural where a permutation costs more than two reorders around attention."""
    numbers = {**H200.numbers, "links.node.bandwidth": 1e15, "links.node.latency": 0, "memory.bandwidth": 2e11}
    forced = {"mamba2": "heads", "self_attention": "kv"}
    machine, graph, mesh = replace(H200, numbers=numbers), model("nemotron-h-8b"), parse_mesh("cp=4")
    made = plan(graph, mesh, machine, seq=2**17, ways=forced, reorders=True)
    assert made.order == "natural" and made.ways == "mamba2=heads self_attention=kv:zigzag" and made.reorders == 8
    assert made.sent == sum(c.calls * c.offer.price.sent for c in made.choices if c.offer.price) + 8 * made.reorder.sent
    assert plan(graph, mesh, machine, seq=2**17, ways=forced).reorders == 0
    apart = {"mamba2": "heads:natural", "self_attention": "kv:zigzag"}
    assert plan(graph, mesh, machine, seq=2**17, ways=apart, reorders=True).ways == made.ways
    with pytest.raises(PlacementError, match="mamba2 takes natural, self_attention takes zigzag; give fewer"):
        plan(graph, mesh, machine, seq=2**17, ways=apart)


def test_forced_ways_are_taken_or_refused() -> None:
    made = plan(model(), parse_mesh("cp=4"), H200, seq=4096, ways={"gdn": "chain", "self_attention": "ring:natural"})
    assert [(c.offer.remedy, c.offer.order) for c in made.choices] == [("chain", "natural"), ("ring", "natural")]
    both = plan(model(), parse_mesh("cp=4"), H200, seq=4096, ways={"gdn": "chain:zigzag"})
    assert both.choices[0].offer.order == "zigzag"
    why = r"gdn: heads cannot be: o of gated_delta_rule.*cp=5; what remains is states"
    with pytest.raises(PlacementError, match=why):
        plan(model(), parse_mesh("cp=5"), H200, seq=4000, ways={"gdn": "heads"})


@pytest.mark.parametrize(("options", "why"), [
    ({"ways": {"gdm": "heads"}}, "no layer called gdm mixes tokens; did you mean gdn"),
    ({"ways": {"gdn": "ring"}}, "gdn: no remedy called ring; there are chain, gather, heads, scan, states"),
    ({"ways": {"gdn": "chain:zag"}}, "gdn: no order called zag; there are natural, zigzag"),
    ({"axis": "ep"}, "mesh cp=4 has no axis ep to split tokens over; its axes are cp"),
    ({"batch": 0}, "batch is 0; must be at least 1"),
    ({"lengths": (5, 6)}, "2 segments add up to 11 in a batch of 1; they must add up to seq=4096"),
    ({"seq": 4097}, "every remedy cannot be: a sequence has 4097 tokens"),
    ({"seq": 4100, "ways": {"gdn": "chain:natural", "self_attention": "kv:zigzag"}}, "self_attention: kv:zigzag cannot be"),
])  # fmt: skip
def test_what_cannot_be_planned(options: dict[str, object], why: str) -> None:
    with pytest.raises((PlacementError, PassError)) as found:
        plan(model(), parse_mesh("cp=4"), H200, **{"seq": 4096, **options})  # type: ignore[arg-type] # of several kinds
    assert why in str(found.value) and "Traceback" not in str(found.value)


def test_heads_without_a_number_have_no_price() -> None:
    graph = parse("def f(q: f32[b, s, h, 4]):\n    o = attention(q, q, q)\n    return o\n")
    with pytest.raises(PassError, match=r"attention has no price: q is f32\[b, s, h, 4\]; heads and columns must be numbers"):
        plan(graph, parse_mesh("cp=2"), H200)


def test_a_program_that_is_split_already() -> None:
    placed, _ = place(model("demo"), mesh="cp=2")
    with pytest.raises(PassError, match=r"demo: tokens is i64\[b, s@cp\], split over cp already; a plan is made of a program"):
        plan(placed, parse_mesh("cp=2"), H200)


def test_a_program_that_mixes_nothing_and_one_that_has_no_layers() -> None:
    nothing = parse("def f(x: f32[b, s, 4]):\n    y = silu(x)\n    return y\n")
    empty = plan(nothing, parse_mesh("cp=2"), H200)
    assert (empty.choices, empty.sent, empty.place) == ((), 0, "place{mesh='cp=2' order=natural}")
    flat = parse("def f(q: f32[b, s, 4, 4]):\n    o = attention(q, q, q)\n    return o\n")
    assert plan(flat, parse_mesh("cp=2"), H200).choices[0].layer == "f"


# -- machines -----------------------------------------------------------------------------------


def test_machines_read_back() -> None:
    assert machine_names() == ("b200", "h100", "h200", "laptop", "mi300x")
    for name in machine_names():
        made = load_machine(name)
        assert made.name == name and made.numbers.keys() == FIELDS.keys() and parse_machine(dump_machine(made)) == made


@pytest.mark.parametrize(("mesh", "axis", "kind"), [
    ("cp=8", "cp", "node"), ("cp=16", "cp", "network"), ("cp=4,tp=2", "cp", "node"), ("cp=4,tp=4", "cp", "network"),
    ("cp=4,tp=4", "tp", "node"), ("dp=4,cp=2,tp=2", "cp", "node"), ("dp=2,cp=8", "dp", "network"), ("cp=3", "cp", "network"),
])  # fmt: skip
def test_the_link_of_an_axis(mesh: str, axis: str, kind: str) -> None:
    assert H200.link(parse_mesh(mesh), axis).name == kind


@pytest.mark.parametrize(("was", "now", "why"), [
    ("bandwidth = 450e9", "bandwidth = -1", "links.node.bandwidth is -1; must be bytes a second that a device sends"),
    ("bandwidth = 450e9", "bandwidth = nan", "links.node.bandwidth is nan; must be"),
    ("devices = 8", "devices = 0.5", "devices is 0.5; must be a whole number"),
    ("devices = 8", "devices = 8.5", "devices is 8.5; must be a whole number"),
    ("devices = 8", "devices = true", "devices is True; must be"),
    ("devices = 8", "device = 8", "device is no field of a machine; did you mean devices?"),
    ("attention = 0.6", "", "efficiency.attention is missing; must be the share of the peak"),
    ("attention = 0.6", "attention = 1.5", "efficiency.attention is 1.5; must be the share"),
    ('name = "h200"', "name = 3", "name is '3'; must be a line of text"),
    ("[flops]", "[flops", "does not parse"),
])  # fmt: skip
def test_a_wrong_machine_names_the_field(was: str, now: str, why: str, tmp_path: Path) -> None:
    text = (Path(plan.__code__.co_filename).parent / "machines" / "h200.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(was, now, 1))
    with pytest.raises(PlaitError) as found:
        load_machine(path)
    assert str(found.value).startswith("mine.toml: ") and why in str(found.value)


def test_machines_that_are_not_there(tmp_path: Path) -> None:
    for name, why in (("h20", "did you mean h200"), ("none.toml", "does not exist"), (str(tmp_path), "no .toml file")):
        with pytest.raises(PlaitError, match=why):
            load_machine(name)
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    for name, why in (("folder.toml", "is a directory"), ("bytes.toml", "is not UTF-8")):
        with pytest.raises(PlaitError, match=why):
            load_machine(tmp_path / name)
