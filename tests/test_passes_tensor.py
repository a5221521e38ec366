"""Features over ranks: sections, every mixer, and what moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plait.ir import (
    Graph,
    Mesh,
    ParseError,
    PassError,
    PlacementError,
    PlaitError,
    evaluate,
    gather,
    ops,
    parse,
    scatter,
    simulate,
)  # fmt: skip
from plait.ir.ops import reorder, split
from plait.lowering.local import local_kernel
from plait.passes import Pipeline, check_types, differentiate, place, split_features, validate
from plait.passes.samples import shape

from tests.programs import TINY, preset
from tests.tensor_cases import agree, agree_on, layer, lines, moves, types, wide

SECTIONS = """
def f(x: f64[b, s, 5], *, w: f64[14@tp:sections(2,4,4,6), 5] = normal(0.5), c: f64[8@tp:sections(2,4,4), 3] = normal(0.5)):
    y = linear(x, w)
    a, v = split(y, sizes=(8, 6), parts=2)
    k, end = causal_conv1d(a, c, act='silu')
    q, u = split(k, sizes=(4, 4), parts=2)
    j = join(u, v, order='sections(2,4,6)')
    back, behind = split(j, sizes=(4, 6), parts=2)
    m = mul(q, back)
    whole = all_gather(m, axis='tp', dim=2)
    rest = all_gather(behind, axis='tp', dim=2)
    return whole, rest
"""
PLAIN = """
def f(x: f64[b, s, 5], *, w: f64[14, 5] = normal(0.5), c: f64[8, 3] = normal(0.5)):
    y = linear(x, w)
    a, v = split(y, sizes=(8, 6))
    k, end = causal_conv1d(a, c, act='silu')
    q, u = split(k, sizes=(4, 4))
    m = mul(q, u)
    return m, v
"""


def test_sections_part_and_join_on_ranks_and_on_one_device() -> None:
    graph, plain = parse(SECTIONS), parse(PLAIN)
    check_types(graph)
    assert str(graph.nodes[1].outputs[0].type) == "f64[b, s, 8@tp:sections(2,4,4)]"
    assert str(graph.nodes[4].outputs[0].type) == "f64[b, s, 10@tp:sections(2,4,6)]"
    for after in (graph, differentiate(graph)[0]):
        report = validate(plain, after, "reassociates", gradients=after is not graph)
        assert report.ok and report.rows, report


def test_a_whole_dim_in_sections_parts_too() -> None:
    x = torch.randn(3, 20, dtype=torch.float64)
    moved = reorder.reference(x, dim=1, order="sections(4,8,4,8)")
    for got, want in zip(split.reference(moved, sizes=(12, 8), parts=4), x.split([12, 8], -1), strict=True):
        again = reorder.reference(got, dim=1, was="sections(4,8,4)") if got.shape[1] == 12 else got
        assert torch.equal(again, want)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x: f64[3, 6@tp]):\n    a, b = split(x, sizes=(2, 4), parts=2)", "must be in order sections"),
        ("x: f64[3, 6@tp:sections(2,2,4)]):\n    a, b = split(x, sizes=(2, 4))", "must see the last dim whole"),
        ("x: f64[3, 6@tp:sections(2,2,4)]):\n    a, b = split(x, sizes=(4, 2), parts=2)", "one or more of the"),
        ("x: f64[3, 2@tp], y: f64[3, 4]):\n    a = join(x, y, order='sections(2,2,4)')", "split alike"),
        ("x: f64[3, 2], y: f64[3, 4]):\n    a = join(x, y, order='sections(2,4,2)')", "do not make up"),
        ("x: f64[3, 2], y: f64[3, 4]):\n    a = join(x, y, order='')", "must be sections"),
    ],
)
def test_what_does_not_part_is_refused(text: str, why: str) -> None:
    with pytest.raises(ParseError, match=why):
        parse(f"def f({text}\n    return a\n")


# -- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_every_preset(name: str) -> None:
    before = preset(name, packed=True)
    after, said = split_features(before, sequence=name.startswith(("demo", "llama")))
    assert any(r.what == "columns" for r in said) and str(after.outputs[0].type) == "f64[()]"
    agree(before, after)


def test_logits_come_out_whole() -> None:
    before = wide("logits", blocks=["mlp"], logit_softcap=3.0, tied=True)
    after, _ = split_features(before)
    assert str(after.outputs[0].type) == "f64[b, s, 64]" and types(after) == {"embed": "[64@tp, 20]"}
    assert moves(layer(after, "head")) == {"all_gather": 1}
    agree(before, after, gradients=True)


@pytest.mark.parametrize("sequence", [False, True])
def test_gradients_as_ir(sequence: bool) -> None:
    before = wide()
    after, _ = split_features(before, sequence=sequence)
    agree(before, after, gradients=True)


@pytest.mark.parametrize(("packed", "sequence"), [(False, True), (True, False)])
def test_four_ranks_and_two_key_heads(packed: bool, sequence: bool) -> None:
    before = wide(packed=packed)
    after, said = split_features(before, mesh="tp=4", sequence=sequence)
    assert sum(r.what == "repeat_heads" for r in said) == 6
    assert "f64[b, s, 4@tp, 6]" in str(layer(after, "self_attention"))
    agree_on(before, after, Mesh((("tp", 4),)))


def test_dropout_drops_the_same() -> None:
    before = wide(blocks=["mlp", "moe"], dropout=0.3, training=True)
    agree(before, split_features(before)[0])


def test_sections_of_every_projection() -> None:
    after, _ = split_features(wide())
    assert types(layer(after, "gdn")) == {
        "norm": "[20]", "w_in": "[112@tp:sections(2,8,8,40,40,8,8), 20]", "conv": "[56@tp:sections(2,8,8,40), 4]",
        "dt_bias": "[8@tp]", "A_log": "[8@tp]", "out_norm": "[5]", "w_out": "[20, 40@tp]",
    }  # fmt: skip
    assert types(layer(after, "self_attention")) == {
        "norm": "[20]", "w_in": "[120@tp:sections(2,48,48,12,12), 20]", "w_in_bias": "[120@tp:sections(2,48,48,12,12)]",
        "q_norm": "[6]", "k_norm": "[6]", "sinks": "[8@tp]", "w_out": "[20, 48@tp]", "w_out_bias": "[20]",
    }  # fmt: skip
    assert types(layer(after, "mamba2"))["conv"] == "[32@tp:sections(2,24,4,4), 4]"
    assert types(layer(after, "kda"))["w_decay"] == "[32@tp, 8]" and types(layer(after, "kda"))["w_gate"] == "[32@tp, 8]"
    assert types(layer(after, "moe"))["w_in"] == "[4, 16@tp:sections(2,8,8), 20]"
    assert types(layer(after, "moe"))["w_out"] == "[4, 20, 8@tp]" and types(layer(after, "moe"))["w_router"] == "[4, 20]"
    assert types(after) == {"embed": "[64@tp, 20]", "head": "[64@tp, 20]"}


def test_one_sum_a_layer() -> None:
    after, _ = split_features(wide())
    assert {g.name: moves(g) for g in after.layers} == {
        "gdn": {"all_reduce": 1},
        "self_attention": {"all_reduce": 1},
        "mamba2": {"all_reduce": 2, "all_gather": 2},  # B and C of one group are whole; a norm over all features
        "kda": {"all_reduce": 1, "all_gather": 2},  # what decay and gate are made of
        "mlp": {"all_reduce": 1},
        "moe": {"all_reduce": 1},  # routed and shared experts together
        "head": {},  # three numbers a token cross by the loss's own way
    }


def test_one_sum_a_layer_on_the_way_back() -> None:
    made = differentiate(split_features(wide())[0])[0]
    found = {g.name.removesuffix("_backward"): moves(g) for g in made.layers if g.name.endswith("_backward")}
    assert found["mlp"] == found["self_attention"] == found["gdn"] == found["head"] == {"all_reduce": 1}
    moe = layer(made, "moe_backward")
    summed = [str(n.outputs[0].type) for n in moe.nodes if n.is_op("all_reduce")]
    assert summed == ["f64[b, s, 1]", "f64[b, s, 2]", "f64[b, s, 20]"]  # of the gate, of the weights, of tokens: not of rows


def test_tokens_are_split_between_layers() -> None:
    after, _ = split_features(wide("logits"), sequence=True)
    mlp = layer(after, "mlp")
    assert str(mlp.inputs[0].type) == str(mlp.outputs[0].type) == "f64[b, s@tp, 20]"
    assert moves(mlp) == {"all_gather": 1, "reduce_scatter": 1}
    assert moves(layer(after, "gdn")) == {"all_gather": 1, "reduce_scatter": 1}
    assert [n.op.name for n in mlp.nodes][:3] == ["rms_norm", "all_gather", "linear"]


def test_norms_of_heads_and_of_split_tokens_have_gradients_in_parts() -> None:
    def gradient(graph: Graph, name: str) -> str:
        return next(str(v.type) for v in differentiate(graph)[0].outputs if v.name == name)

    before = wide(blocks=["attention"])
    features, tokens = split_features(before)[0], split_features(before, sequence=True)[0]
    assert gradient(features, "d_layers_0_q_norm") == "f64[6]+tp" and gradient(features, "d_layers_0_norm") == "f64[20]"
    assert gradient(tokens, "d_layers_0_norm") == "f64[20]+tp"
    assert gradient(features, "d_layers_0_w_in") == "f64[120@tp:sections(2,48,48,12,12), 20]"


def test_tokens_and_batch_split_as_well() -> None:
    before = wide(packed=True)
    agree(before, place(before, mesh="tp=2 cp=2", attention="kv", recurrence="states")[0])


def test_tokens_between_layers_split_over_both_axes() -> None:
    before = wide(blocks=["gdn", "attention", "moe"])
    options = {"order": "zigzag", "attention": "ring", "recurrence": "chain"}
    after, _ = place(before, mesh="tp=2 cp=2", sequence=True, **options)
    assert {str(g.inputs[0].type) for g in after.layers} == {"f64[b, s@cp@tp:zigzag(2), 20]"}
    agree(before, after, gradients=True)


def test_a_name_on_the_command_line() -> None:
    before = preset("llama-3-8b-tiny")
    after = Pipeline.parse("split-features{mesh='tp=2' axis=tp sequence=true},fuse").run(before, verify="numeric")
    assert "s@tp" in str(after)


# -- rules, where they fire and where they hold back ------------------------------------------------


@pytest.mark.parametrize("sequence", [False, True])
def test_heads_that_do_not_part_leave_the_layer_whole(sequence: bool) -> None:
    before = wide(blocks=["attention"], attention={"heads": 3, "kv_heads": 3, "head_dim": 4})
    after, said = split_features(before, sequence=sequence)
    attention = layer(after, "self_attention")
    assert not any("@tp" in t for t in types(attention).values()) and "64@tp" in types(after)["embed"]
    assert lines(said, "missed") == [
        "columns self_attention: attention: 3 heads do not part into tp=2; every rank does all of it"
    ]
    agree(before, after)


def test_sections_that_do_not_part_leave_the_projection_whole() -> None:
    before = wide(blocks=["mlp"], mlp={"width": 7})
    after, said = split_features(before)
    assert types(layer(after, "mlp"))["w_in"] == "[14, 20]"
    why = "sections (7, 7) of w_in; 7 must be a multiple of tp=2; every rank has all of it"
    assert lines(said, "missed") == [f"columns mlp: {why}"]
    agree(before, after)


def test_a_vocabulary_that_does_not_part_stays_whole() -> None:
    before = wide(blocks=["mlp"], vocab=61)
    after, _ = split_features(before)
    assert types(after) == {"embed": "[61, 20]", "head": "[61, 20]"} and "linear_cross_entropy(" in str(after)
    agree(before, after)


RECURRENCE = """
def f(x: f64[b, s, 5], *, w: f64[{wide}, 5] = normal(0.5), {params}v: f64[5, 30] = normal(0.5)):
    y = linear(x, w)
    {names} = split(y, sizes=({sizes}))
    q1 = reshape(q, pattern='... (h={g} d) -> ... h d')
    k1 = reshape(k, pattern='... (h={g} d) -> ... h d')
    k2 = l2_norm(k1)
    u1 = reshape(u, pattern='... (h=6 d) -> ... h d')
{gates}
    o, end = {face}(q1, k2, u1, {given}scale=0.1)
    m = reshape(o, pattern='b t h d -> b t (h d)')
    z = linear(m, v)
    return z
"""


def recurrence(face: Any, g: int) -> Graph:
    """A projection, a recurrence of g key heads and six heads, and a projection."""
    traits, given, gates = ops.FAMILY[face], list[str](), list[str]()
    sizes = {"q": 4 * g, "k": 4 * g, "u": 30}
    if traits.decay in ("head", "channel"):
        sizes["a"] = 6 if traits.decay == "head" else 24
        heads = "a1 = reshape(a, pattern='... (h=6 d) -> ... h d')\n    " if traits.decay == "channel" else ""
        gates.append(f"{heads}decay = neg_exp({'a1' if heads else 'a'})")
        given.append("decay")
    elif traits.decay == "constant":
        gates.append("decay = neg_exp(rate)")
        given.append("decay")
    if traits.beta:
        sizes["b"] = 6
        gates.append("beta = sigmoid(b)")
        given.append("beta")
    return parse(
        RECURRENCE.format(
            wide=sum(sizes.values()), names=", ".join(sizes), sizes=", ".join(map(str, sizes.values())), g=g, face=face.name,
            gates="\n".join(f"    {x}" for x in gates), given="".join(f"{x}, " for x in given),
            params="rate: f64[6] = normal(0.1), " if traits.decay == "constant" else "",
        )
    )  # fmt: skip


@pytest.mark.parametrize("g", [6, 3])
@pytest.mark.parametrize("face", ops.FAMILY, ids=lambda face: face.name)
def test_every_recurrence(face: Any, g: int) -> None:
    """Three key heads are two each for two ranks: they are whole in front, and repeated."""
    before = recurrence(face, g)
    after, _ = split_features(before)
    assert moves(after) == ({"all_reduce": 1} if g == 6 else {"all_gather": 2, "all_reduce": 1})
    assert ("repeat_heads" in str(after)) == (g == 3) and "v: f64[5, 30@tp]" in str(after)
    agree(before, after, gradients=True)


def test_kernels_of_a_rank_see_its_share_of_sections() -> None:
    """What a kernel of the placed program computes on shards is what a rank's own kernel does, forward and backward."""
    mesh, graph = Mesh((("tp", 2),)), Pipeline.parse("place{mesh='tp=2'},fuse").run(wide("logits", blocks=["gdn", "mlp"]))
    kernels = [k for part in differentiate(graph)[0].layers for k in part.callees if "parts=2" in str(k) or "join" in str(k)]
    assert {"preamble", "glu", "preamble_backward", "glu_backward"} <= {k.name for k in kernels}
    for kernel in kernels:
        own, rng = local_kernel(kernel, mesh), torch.Generator().manual_seed(0)
        assert not any(n.is_op("join") for n in own.nodes)
        whole = [torch.randn(shape(v.type, {"b": 2, "s": 5}), generator=rng, dtype=torch.float64) for v in kernel.inputs]
        parts = [scatter(x, v.type, mesh) for x, v in zip(whole, kernel.inputs, strict=True)]
        made = [evaluate(own, *(p[rank] for p in parts)) for rank in range(2)]
        rows = zip(*(m if isinstance(m, tuple) else (m,) for m in made), strict=True)
        want = simulate(kernel, mesh, *whole)
        for got, y, v in zip(rows, want if isinstance(want, tuple) else (want,), kernel.outputs, strict=True):
            torch.testing.assert_close(gather([*got], v.type, mesh), y, rtol=1e-12, atol=1e-12)


NORM = """
def f(x: f64[b, s, 5], *, w: f64[12, 5] = normal(0.5), n: f64[12] = normal(0.5), v: f64[5, 12] = normal(0.5)):
    y = linear(x, w)
    a = silu(y)
    z = rms_norm(a, n, groups=GROUPS, zero_centered=True)
    o = linear(z, v)
    return o
"""


@pytest.mark.parametrize(("groups", "moved"), [(4, {}), (1, {"all_reduce": 1}), (3, {"all_gather": 1})])
def test_a_norm_over_split_features(groups: int, moved: dict[str, int]) -> None:
    before = parse(NORM.replace("GROUPS", str(groups)))
    after, _ = split_features(before)
    found = moves(after)
    found.subtract({"all_reduce": 1 if groups != 3 else 0})  # that of the rows
    assert +found == moved, str(after)
    agree(before, after)


def test_rows_with_a_bias_add_it_once() -> None:
    before = wide(blocks=["mlp"])
    text = str(layer(split_features(before)[0], "mlp"))
    assert text.index("all_reduce(") < text.index("add_bias(")


MISTAKES = [
    (lambda: split_features(wide(), axis="cp"), PlacementError, "no axis called cp"),
    (lambda: split_features(split_features(wide())[0]), PassError, "split over tp already"),
]


@pytest.mark.parametrize(("act", "kind", "text"), MISTAKES)
def test_mistakes_are_named(act: object, kind: type[PlaitError], text: str) -> None:
    with pytest.raises(kind, match=text):
        act()  # type: ignore[operator] # each takes nothing


PLANTED = {  # what someone gets wrong, and what of the program's text that is
    "a sum is forgotten": ("y7 = all_reduce(y6, axis='tp')", "y7 = scale(y6, by=1.0)", "b is partial over tp"),
    "sections are not those of the weight": (
        "sizes=(12, 12), parts=2",
        "sizes=(8, 16), parts=2",
        "one or more of the sections",
    ),
    "sections are taken as whole": (", parts=2", "", "must see the last dim whole"),
    "a weight in its natural order": ("24@tp:sections(2,12,12)", "24@tp", "must be in order sections"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_types_catch(name: str) -> None:
    was, now, why = PLANTED[name]
    text = str(split_features(wide("logits", blocks=["mlp"], mlp={"width": 12}))[0])
    assert was in text
    with pytest.raises(PlaitError, match=why):
        parse(text.replace(was, now))


def test_validation_catches_sections_of_another_layout() -> None:
    """gate and up are as wide: exchanged, everything is well typed."""
    before = wide("logits", blocks=["mlp"], mlp={"width": 12})
    text = str(split_features(before)[0]).replace("silu(y2)", "silu(y3)").replace("mul(y4, y3)", "mul(y4, y2)")
    assert not validate(before, parse(text), "reassociates").ok
