"""The batch and the experts over ranks: losses are means over all tokens, rows go to their experts and come back."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from plait.ir import Mesh, PassError, PlacementError, PlaitError, evaluate, parse, parse_mesh, simulate
from plait.ir.ops import balance, choices_of, load_balance_loss, router_scores, z_loss, z_losses
from plait.passes import Pipeline, differentiate, place, split_batch, split_experts, split_features, validate

from tests.programs import TINY, preset
from tests.tensor_cases import agree, agree_on, layer, lines, moves, types, wide

MOE = ["gdn", "moe"]


# -- the batch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_every_preset_over_its_batch(name: str) -> None:
    before = preset(name)
    after, _ = split_batch(before)
    assert str(after.inputs[0].type) == "i64[b@dp, s]" and str(after.outputs[0].type) == "f64[()]"
    assert not any(moves(g) for g in after.layers if g.name not in ("head", "moe"))
    agree(before, after)


def test_logits_stay_split() -> None:
    before = wide("logits", blocks=["mlp"])
    after, said = split_batch(before)
    assert str(after.outputs[0].type) == "f64[b@dp, s, 64]" and not said
    agree(before, after, gradients=True)


def test_a_loss_is_the_mean_over_all_ranks() -> None:
    """One rank has a label less: the ranks' own means have other weights."""
    before = wide(blocks=["moe"])
    after, _ = split_batch(before)
    assert moves(layer(after, "head")) == {"all_reduce": 2}  # the sum of losses, how many they are
    assert moves(layer(after, "moe")) == {"all_reduce": 5}  # of balance: choices, scores, tokens; of z: squares, tokens
    agree(before, after, gradients=True)
    text = str(split_batch(wide(blocks=["mlp"]))[0])
    forgotten = re.sub(r"all_reduce\((\w+), axis='dp'\)", r"scale(\1, by=1.0)", text)
    with pytest.raises(PlaitError, match=r"mean_of: (total|count) is partial over dp"):
        parse(forgotten)


def test_gradients_are_sums_over_ranks() -> None:
    after = differentiate(split_batch(wide(blocks=["mlp"]))[0])[0]
    found = {v.name: str(v.type) for v in after.outputs}
    assert found["d_layers_0_w_in"] == "f64[24, 20]+dp" and found["d_embed"] == "f64[64, 20]+dp"


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2 cp=2", "tp=2 dp=2 cp=2", "ep=2 dp=2"])
def test_dropout_drops_the_same(mesh: str) -> None:
    before = wide(blocks=["mlp", "moe"], dropout=0.3, training=True)
    agree(before, place(before, mesh=mesh)[0])


def test_losses_in_parts_are_the_losses() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 5, generator=rng, dtype=torch.float64)
    experts = torch.randint(0, 5, (3, 7, 2), generator=rng)
    for score in ("softmax", "sigmoid"):
        scores, chosen = router_scores.reference(logits, score=score), choices_of.reference(experts, e=5)
        made = balance.reference(scores.sum((0, 1)), chosen.sum((0, 1)), torch.tensor(21.0))
        torch.testing.assert_close(made, load_balance_loss.reference(logits, experts, score=score), rtol=1e-12, atol=0)
    torch.testing.assert_close(z_losses.reference(logits).mean(), z_loss.reference(logits), rtol=1e-12, atol=0)


# -- the experts ------------------------------------------------------------------------------------


def test_experts_and_their_rows() -> None:
    before = wide(blocks=["moe"])
    after, said = split_experts(before)
    moe = layer(after, "moe")
    assert types(moe)["w_in"] == "[4@ep, 16, 20]" and types(moe)["w_router"] == "[4, 20]"
    assert [n.op.name for n in moe.nodes if n.op.name in ("send_rows", "return_rows")] == ["send_rows", "return_rows"]
    assert moves(moe) == {"reduce_scatter": 1, "all_reduce": 5}  # how many rows each expert has; sums for the losses
    assert sum(line.startswith("experts moe.experts: rows of 20 numbers") for line in lines(said, "passed")) == 2
    agree(before, after, gradients=True)
    gradient = {v.name: str(v.type) for v in differentiate(after)[0].outputs}
    assert gradient["d_layers_0_w_in"] == "f64[4@ep, 16, 20]" and gradient["d_layers_0_w_router"] == "f64[4, 20]+ep"


@pytest.mark.parametrize("mesh", ["ep=2 cp=2", "tp=2 ep=2", "tp=2 ep=2 dp=2 cp=2"])
def test_experts_beside_other_splits(mesh: str) -> None:
    before = wide(blocks=MOE)
    agree(before, place(before, mesh=mesh)[0], gradients=mesh != "tp=2 ep=2")


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_split_alone_move_no_rows(packed: bool) -> None:
    """Every rank has rows of its own tokens, and adds its part to the gradient of all experts."""
    before = wide(blocks=MOE, packed=packed)
    after, _ = place(before, mesh="cp=2", order="zigzag-packed" if packed else "zigzag")
    assert moves(layer(after, "moe")) == {}
    agree(before, after, gradients=True)


def test_four_ranks_of_experts() -> None:
    before = wide(blocks=["moe"])
    after, _ = split_experts(before, mesh="ep=4")
    assert types(layer(after, "moe"))["w_out"] == "[4@ep, 20, 8]"
    agree_on(before, after, Mesh((("ep", 4),)), "b")


def test_experts_that_do_not_part_stay_everywhere() -> None:
    before = wide(blocks=["moe"], moe={"experts": 5, "top_k": 2, "width": 7})
    after, said = split_experts(before)
    assert types(layer(after, "moe"))["w_in"] == "[5, 14, 20]" and "send_rows" not in str(after)
    assert "dim 0 must be a multiple of ep=2" in lines(said, "missed")[0]
    agree(before, after)


ROWS = """
def f(x: f64[b, s, 6], chosen: i64[b, s, 2], weights: f64[b, s, 2], *, w: f64[4, 5, 6] = normal(0.5)):
    rows, order, counts = dispatch(x, chosen, e=4)
    y = grouped_linear(rows, w, counts)
    z = combine(y, order, weights)
    return z, RESULT
"""


def test_rows_that_are_read_elsewhere_stay_at_home() -> None:
    before, seen = parse(ROWS.replace(", RESULT", "")), parse(ROWS.replace("RESULT", "y"))
    assert "send_rows" in str(split_experts(before)[0])
    assert "send_rows" not in str(split_experts(seen)[0])
    agree(before, split_experts(before)[0], gradients=True)


def test_rows_that_are_nowhere_an_expert_is() -> None:
    """No rank has a token for the last experts, and one has none at all: empty runs."""
    graph, rng = parse(ROWS.replace(", RESULT", "")), torch.Generator().manual_seed(3)
    after = split_experts(graph)[0]
    x, weights = (torch.randn(2, 3, n, generator=rng, dtype=torch.float64) for n in (6, 2))
    w = torch.randn(4, 5, 6, generator=rng, dtype=torch.float64)
    for chosen in (torch.zeros(2, 3, 2).long(), torch.tensor([[[0, 1]] * 3, [[3, 3]] * 3])):
        got = simulate(after, parse_mesh("ep=2"), x, chosen, weights, params={"w": w})
        torch.testing.assert_close(got, evaluate(graph, x, chosen, weights, params={"w": w}), rtol=1e-12, atol=1e-12)


MISTAKES: list[tuple[Callable[[], object], type[PlaitError], str]] = [
    (lambda: split_batch(wide(packed=True)), PlacementError, "cu are borders of packed segments, dp=2 splits the batch"),
    (lambda: split_batch(parse("def f(x: f64[7]):\n    y = silu(x)\n    return y\n")), PlacementError, "no input has a batch"),
    (lambda: split_batch(parse("def f(x: f64[3, 4]):\n    y = silu(x)\n    return y\n")), PlacementError, "a multiple of dp=2"),
    (lambda: split_batch(split_batch(wide())[0]), PassError, "split over dp already; split-batch takes"),
    (lambda: split_experts(wide(), axis="cp"), PlacementError, "no axis called cp"),
]


@pytest.mark.parametrize(("act", "kind", "text"), MISTAKES)
def test_mistakes_are_named(act: Callable[[], object], kind: type[PlaitError], text: str) -> None:
    with pytest.raises(kind, match=text):
        act()


def _moe_text() -> str:
    return str(split_experts(parse(ROWS.replace(", RESULT", "")))[0])


PLANTED = {  # by types, or by running it
    "rows are not sent": ("grouped_linear(sent,", "grouped_linear(rows,", ""),
    "rows are not brought back": ("combine(rows1,", "combine(y,", ""),
    "counts are a rank's own": ("grouped_linear(sent, w, counts1)", "grouped_linear(sent, w, counts)", "split alike"),
    "experts are whole": ("w: f64[4@ep, 5, 6]", "w: f64[4, 5, 6]", "must be a multiple|as|alike|split"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_caught(name: str) -> None:
    was, now, why = PLANTED[name]
    text, before = _moe_text(), parse(ROWS.replace(", RESULT", ""))
    assert was in text, text
    if why:
        with pytest.raises(PlaitError, match=why):
            parse(text.replace(was, now))
    else:
        assert not validate(before, parse(text.replace(was, now)), "reassociates").ok


def test_names_on_the_command_line() -> None:
    before = wide(blocks=MOE)
    text = "split-features{mesh='tp=2'},split-experts{mesh='ep=2'},split-batch{mesh='dp=2'},fuse,outline-rows"
    assert "[4@ep, 16@tp:sections(2,8,8), 20]" in str(Pipeline.parse(text).run(before))
    agree(before, split_batch(split_experts(split_features(before)[0])[0])[0])
