"""Recurrences over split tokens: every way, order and packing against one device, values and gradients in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from plait.ir import Mesh, OpDef, PlacementError, TypeMismatch, parse_type, simulate
from plait.ir.crossing import Cut, Here, Hop, OneWay, together
from plait.ir.ops import BACKWARD, FAMILY, gated_delta_rule, gated_linear_attention, kimi_delta_attention, ssd

from tests.laws import graph_of
from tests.ways import (
    Crossing,
    Tensor,
    agrees,
    agrees_back,
    close,
    counted,
    gradients,
    has_tokens,
    leaves,
    many,
    one,
    predicted,
    reference,
    types,
)

WAYS = ("chain", "states", "scan")
EVERY = pytest.mark.parametrize("op", list(FAMILY), ids=lambda o: o.name)
BY = pytest.mark.parametrize("by", WAYS)


def operands(
    op: OpDef,
    t: int,
    *,
    b: int = 1,
    g: int = 2,
    r: int = 2,
    k: int = 3,
    v: int = 2,
    state: bool = False,
    cu: list[int] | None = None,
) -> list[Tensor | None]:
    """Random operands in float64; keys of length one, decays a few percent a token."""
    rng, traits = torch.Generator().manual_seed(t), FAMILY[op]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    shapes: dict[str, list[Any]] = {"none": [], "head": [(b, t, g * r)], "channel": [(b, t, g * r, k)], "constant": [(g * r,)]}
    gates = [-0.2 * normal(*s).abs() for s in shapes[traits.decay]]
    gates += [torch.sigmoid(normal(b, t, g * r))] if traits.beta else []
    borders, runs = (torch.tensor(cu), len(cu) - 1) if cu else (None, b)
    key = normal(b, t, g, k)
    starts = normal(runs, g * r, k, v) if state else None
    return [normal(b, t, g, k), key / key.norm(dim=-1, keepdim=True), normal(b, t, g * r, v), *gates, starts, borders]


def crossing(op: OpDef, by: str, ranks: int, order: str = "") -> Crossing:
    return Crossing(op, by, ranks, order, {"scale": 0.7})


def packed(t: int, ranks: int) -> list[int]:
    """A short segment, an empty one, one that ends where another begins inside a rank, and the last token."""
    return sorted([0, 1, 1, min(t, t // ranks + 1), t - 1, t])


@EVERY
@BY
def test_every_member_by_every_way(op: OpDef, by: str) -> None:
    """Two ranks or three, either order, a batch or packed segments, from states that are given."""
    for ranks, order, t in ((3, "", 9), (2, "zigzag(2)", 8)):
        for xs in (operands(op, t, b=2, state=True), operands(op, t, cu=packed(t, ranks), state=True)):
            agrees(crossing(op, by, ranks, order), xs)
            agrees_back(crossing(op, by, ranks, order), BACKWARD[op], xs)


PLACES = [
    (1, "", 3), (2, "", 2), (2, "", 14), (4, "", 4), (5, "", 15), (8, "", 8), (1, "zigzag(1)", 6), (2, "zigzag(2)", 12),
    (3, "zigzag(3)", 6), (4, "zigzag(4)", 8), (4, "zigzag(4)", 24), (8, "zigzag(8)", 16),
]  # fmt: skip


@BY
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_every_number_of_ranks(place: tuple[int, str, int], by: str) -> None:
    """One token a rank, odd numbers of them; segments over all ranks, over none, that end where ranks do."""
    ranks, order, t = place
    for op, g, r in ((gated_delta_rule, 1, 3), (gated_linear_attention, 2, 1), (ssd, 1, 2)):
        c = crossing(op, by, ranks, order)
        for xs in (operands(op, t, b=3, g=g, r=r), operands(op, t, g=g, r=r, cu=[0, 0, t, t], state=True),
                   operands(op, t, g=g, r=r, cu=[0, t // ranks, t], state=True),
                   operands(op, t, g=g, r=r, cu=packed(t, ranks))):  # fmt: skip
            agrees(c, xs)
            assert counted(c, xs)[0] == predicted(c, xs)


@EVERY
def test_segments_that_are_zigzags_by_themselves(op: OpDef) -> None:
    for by, cu in (("chain", [0, 4, 4, 16]), ("states", [0, 8, 12]), ("scan", [0, 4, 12])):
        c, xs = crossing(op, by, 2, "zigzag(2,packed)"), operands(op, cu[-1], cu=cu, state=True)
        agrees(c, xs)
        assert counted(c, xs)[0] == predicted(c, xs)


@EVERY
def test_heads_may_be_split_over_another_axis(op: OpDef) -> None:
    """Tokens over cp and heads over tp: each axis' ranks talk to their own."""
    c, xs = crossing(op, "chain", 2), operands(op, 6, b=2, state=True)
    made = types(c, xs)
    for i, t in enumerate(made):
        at = {"slope": 0, "state": 1}.get(op.inputs[i].name, 2)
        made[i] = t.with_dim(at, replace(t.dims[at], axes=("tp",))) if t is not None and op.inputs[i].name != "cu" else t
    a, b = leaves(xs), leaves(xs)
    found = simulate(graph_of(op, made, c.all_attrs), Mesh((("cp", 2), ("tp", 2))), *[x for x in a if x is not None])
    wanted = one(op, b, c.attrs)
    close(found, wanted)
    close(gradients(found, a), gradients(wanted, b))


# -- what travels -----------------------------------------------------------------------------


def test_a_chain_sends_states_alone_and_once() -> None:
    """Qwen3-Next's layer, 32 heads of 128 x 128 in float32: 2.1 MB whatever the length and the number of ranks."""
    big = [parse_type(f"bf16[1, 8192, {h}, 128]") for h in (16, 16, 32)] + [parse_type("bf16[1, 8192, 32]")] * 2 + [None, None]
    state = 32 * 128 * 128 * 4
    for ranks in (2, 8, 64):
        sent = {by: _way(by).sent(big, {"order": ""}, ranks, {}) for by in WAYS}
        assert sent["chain"] == state == 2_097_152
        assert sent["states"] == (ranks - 1) * 2 * state
        assert sent["scan"] == {2: 1, 8: 3, 64: 6}[ranks] * 2 * state
        both = {by: _way(by).sent(big, {"order": f"zigzag({ranks})"}, ranks, {}) for by in WAYS}
        assert both["chain"] == (state if ranks == 2 else 2 * state) and both["states"] == 2 * sent["states"]


def _way(by: str) -> OneWay:
    assert gated_delta_rule.crossing
    return gated_delta_rule.crossing.ways[by]


def test_what_a_rank_does_to_a_state_stays_home_in_a_chain() -> None:
    xs = operands(kimi_delta_attention, 8, b=2, k=3, v=2)
    asked = [a for a in counted(crossing(kimi_delta_attention, "chain", 4), xs)[1] if not isinstance(a, Cut)]
    assert [type(a) for a in asked] == [Hop] * 3 and all(a.x.shape == (2, 4, 3, 2) for a in asked)


def test_bfloat16_rounds_once() -> None:
    """Outputs are those of one device that sees the same rounded operands, to their own precision."""
    for op in FAMILY:
        xs = [x.bfloat16() if x is not None and x.is_floating_point() else x for x in operands(op, 12, b=2)]
        wide = [x.double() if x is not None and x.is_floating_point() else x for x in xs]
        found, wanted = many(crossing(op, "scan", 3), xs), one(op, wide, {"scale": 0.7})
        assert (found[0].dtype, found[1].dtype) == (torch.bfloat16, torch.float32)
        assert torch.allclose(found[0].double(), wanted[0], rtol=2**-8, atol=1e-5)
        close([found[1].double()], [wanted[1]], 1e-5)


# -- refusals ---------------------------------------------------------------------------------


def test_tokens_that_do_not_fit_are_refused() -> None:
    xs = operands(ssd, 12)
    with pytest.raises(PlacementError, match=r"zigzag\(4\), must be zigzag\(2\) over 2 ranks"):
        many(Crossing(ssd, "chain", 2, "zigzag(4)", {}), operands(ssd, 16))
    with pytest.raises(TypeMismatch, match="3 tokens in order zigzag\\(2\\); pad the sequence to a multiple of 4"):
        _run(crossing(ssd, "chain", 2, "zigzag(2)"), operands(ssd, 6))
    with pytest.raises(TypeMismatch, match="a packed segment of 6 tokens is no zigzag of 4 chunks; pad it"):
        _run(crossing(ssd, "chain", 2, "zigzag(2,packed)"), operands(ssd, 12, cu=[0, 6, 12]))
    with pytest.raises(TypeMismatch, match="it must rise from 0 to 12"):
        _run(crossing(ssd, "chain", 2), [*xs[:-1], torch.tensor([0, 5])])
    with pytest.raises(PlacementError, match="by is 'ring', must be one of chain, states, scan"):
        many(crossing(ssd, "ring", 2), xs)


def _run(c: Crossing, xs: list[Tensor | None]) -> None:
    """On ranks, without the check of types that a graph makes."""
    assert c.op.crossing
    shards = [
        x[:, : x.shape[1] // c.ranks] if x is not None and has_tokens(c.op, o.name) else x
        for o, x in zip(c.op.inputs, xs, strict=True)
    ]
    together([c.op.crossing.ways[c.by].run(Here.of(c.all_attrs, c.ranks, r, reference), *shards) for r in range(c.ranks)])
