"""Ways across a split vocabulary and to experts: the numbers of one device, and as many bytes as the plan says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from plait.ir import DataError, OpDef, TensorType, ops, parse_type
from plait.ir.crossing import Here, Request, sent, together

Tensor = torch.Tensor


def reference(op: OpDef, *operands: Any, **attrs: Any) -> Any:
    return op.reference(*operands, **attrs)


def across(op: OpDef, by: str, operands: Sequence[Sequence[Tensor]], **attrs: Any) -> tuple[list[Any], list[int]]:
    """What the ranks of an axis make of their own operands, and the bytes that each of them sends."""
    ranks, crossing = len(operands), op.crossing
    assert crossing is not None
    full = {**op.attrs, **attrs, "over": "tp", "by": by, "order": ""}
    ways = [crossing.ways[by].run(Here.of(full, ranks, r, reference), *xs) for r, xs in enumerate(operands)]
    counted = [0] * ranks

    def watch(asked: Sequence[Request]) -> None:
        for rank, request in enumerate(asked):
            counted[rank] += sent(request, ranks, rank)

    return together(ways, watch), counted


def planned(op: OpDef, by: str, types: Sequence[TensorType], ranks: int) -> int:
    assert op.crossing is not None
    return op.crossing.ways[by].sent(types, op.attrs, ranks, {})


@pytest.mark.parametrize("name", ["f32", "f64", "bf16"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_split_vocabulary(name: str, fused: bool) -> None:
    dtype, rng = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}[name], torch.Generator().manual_seed(0)
    x, w = (torch.randn(*n, generator=rng, dtype=torch.float64).to(dtype) for n in ((2, 7, 5), (8, 5)))
    labels = torch.randint(0, 8, (2, 7), generator=rng)
    labels[0, 3] = -100
    logits, op = x @ w.T, ops.linear_token_losses if fused else ops.token_losses
    parts = [[x, w[2 * r : 2 * r + 2], labels] if fused else [logits[..., 2 * r : 2 * r + 2], labels] for r in range(4)]
    made, counted = across(op, "vocabulary", parts)
    want = op.reference(x, w, labels) if fused else op.reference(logits, labels)
    assert all(torch.allclose(y, want, rtol=1e-5 if name != "bf16" else 0.1) for y in made) and want[0, 3] == 0
    types = [f"{name}[2, 7, 5]", f"{name}[8@tp, 5]", "i64[2, 7]"] if fused else [f"{name}[2, 7, 8@tp]", "i64[2, 7]"]
    assert {*counted} == {planned(op, "vocabulary", [parse_type(t) for t in types], 4)}


def test_words_are_looked_up_where_they_are() -> None:
    w, tokens = torch.randn(6, 3, dtype=torch.float64), torch.tensor([[0, 5, 2], [3, 3, 4]])
    made, counted = across(ops.embedding, "vocabulary", [[w[:3], tokens], [w[3:], tokens]])
    assert torch.equal(made[0] + made[1], ops.embedding.reference(w, tokens)) and counted == [0, 0]
    assert not made[0][1, 0].any()


def test_a_word_of_no_rank_is_refused() -> None:
    """Each rank would take it for another's."""
    w, tokens = torch.randn(6, 3, dtype=torch.float64), torch.tensor([[0, 6]])
    with pytest.raises(DataError, match="a token is 6; it must be from 0 to 5"):
        across(ops.embedding, "vocabulary", [[w[:3], tokens], [w[3:], tokens]])
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    with pytest.raises(DataError, match=r"a label is 6; it must be -100 \(ignored\) or from 0 to 5"):
        across(ops.linear_token_losses, "vocabulary", [[x, w[:3], tokens], [x, w[3:], tokens]])


def test_rows_go_to_their_experts_and_back() -> None:
    """Every rank has another number of rows; where every expert has as many, bytes are those of the plan."""
    rng = torch.Generator().manual_seed(0)
    for counts in ([[2, 0, 3, 1], [0, 0, 0, 0]], [[0, 4, 0, 0], [1, 1, 1, 5]], [[2, 2, 2, 2], [2, 2, 2, 2]]):
        ns = [torch.tensor(c) for c in counts]
        rows = [torch.randn(sum(c), 3, generator=rng, dtype=torch.float64) for c in counts]
        there, counted = across(ops.send_rows, "exchange", [[x, n] for x, n in zip(rows, ns, strict=True)])
        runs = [x.split(c) for x, c in zip(rows, counts, strict=True)]
        for rank in range(2):
            assert torch.equal(there[rank], torch.cat([runs[source][2 * rank + e] for e in range(2) for source in range(2)]))
        back, _ = across(ops.return_rows, "exchange", [[x, n] for x, n in zip(there, ns, strict=True)])
        assert all(torch.equal(a, b) for a, b in zip(back, rows, strict=True))
        types = [parse_type("f64[16@tp, 3]"), parse_type("i64[4]+tp")]
        assert ({*counted} == {planned(ops.send_rows, "exchange", types, 2)}) == (counts[0] == counts[1])
