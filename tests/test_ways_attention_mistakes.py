"""Attention over split tokens: mistakes that are planted are found, and what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from plait.ir import ParseError, PlacementError, TypeMismatch, parse, parse_mesh, simulate
from plait.ir.crossing import Here, Shift, Way
from plait.ir.ops import attention
from plait.ir.ways import attention as ways

from tests.attention_cases import GIVEN, UNEVEN, WAYS, Given, Tensor, check, draw


def averaged(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return (a[0] + b[0]) / 2, torch.logaddexp(a[1], b[1])


def natural(order: str, length: int, cu: Tensor | None = None) -> Tensor:
    return torch.arange(length)


def test_what_is_merged_without_its_denominators_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_merged", averaged)
    with pytest.raises(AssertionError, match="not close"):
        check(GIVEN["plain"], "ring")


@pytest.mark.parametrize("way", WAYS)
def test_an_order_that_is_ignored_is_found(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "permutation", natural)
    with pytest.raises(AssertionError, match="not close"):
        check(GIVEN["zigzag"], way)


def test_sinks_that_every_step_counts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    once = ways._seen  # pyright: ignore[reportPrivateUsage] # what is planted stands in its place

    def seen(asked: Any, part: Any) -> tuple[Tensor, Tensor]:
        o, lse = once(asked, part)
        norm = torch.logaddexp(lse, asked.sinks.expand_as(lse))
        return o * torch.exp(lse - norm)[..., None], norm

    monkeypatch.setattr(ways, "_seen", seen)
    with pytest.raises(AssertionError, match="not close"):
        check(GIVEN["sinks"], "ring")


def test_a_shift_that_is_left_out_with_its_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that has nothing to compute must pass keys on all the same."""

    def ring(here: Here, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Way:
        for _turn in range(here.rank):
            yield Shift(torch.cat([k, v], -1))
        return q

    known = attention.crossing.ways if attention.crossing else {}
    monkeypatch.setitem(known, "ring", replace(known["ring"], run=ring))
    with pytest.raises(PlacementError, match="ranks ask for different things"):
        check(Given(3, 15), "ring")


TYPED = """def f(q: f64[b, {s}, 4, 3], k: f64[b, {s}, 2, 3], v: f64[b, {s}, 2, 3]):
    y = attention(q, k, v{more})
    return y
"""
RING = ", over='cp', by='ring'"


@pytest.mark.parametrize(
    "s,more,says",
    [
        ("s", RING, "no operand's tokens are split over it"),
        ("s@cp", ", over='cp', by='rings'", "by is 'rings', must be one of kv, ring"),
        ("s@cp:zigzag(2)", RING, "t is s@cp:zigzag\\(2\\), must be split @cp"),
        ("s@cp", RING + ", order='sections(2,4)'", "ring runs over tokens in order natural or zigzag"),
        ("s@cp@tp", RING, "must be split @cp \\(innermost\\)"),
    ],
)
def test_what_cannot_be_is_no_program(s: str, more: str, says: str) -> None:
    with pytest.raises(ParseError, match=says):
        parse(TYPED.replace("{s}", s).replace("{more}", more))


@pytest.mark.parametrize("cu", [[0, 5], [1, 12], [0, 7, 3, 12], [0, 13]])
@pytest.mark.parametrize("way", WAYS)
def test_segments_that_are_not_those_of_the_tokens_are_refused(cu: list[int], way: str) -> None:
    with pytest.raises(TypeMismatch, match="it must rise from 0 to 12"):
        check(replace(Given(2, 12), cu=tuple(cu)), way)


@pytest.mark.parametrize("way", WAYS)
def test_packed_queries_that_are_not_as_many_as_keys_are_refused(way: str) -> None:
    text = UNEVEN.replace("at: i64[()]", "cu: i64[n]").replace("{at}", ", cu=cu").replace("{options}", "").replace("{way}", way)
    leaves = draw(1, 4, 4, 3), draw(1, 12, 2, 3), draw(1, 12, 2, 5)
    with pytest.raises(TypeMismatch, match="4 queries from place 8 on see 12 packed keys; cu needs as many, from 0 on"):
        simulate(parse(text), parse_mesh("cp=2"), *leaves, torch.tensor([0, 12]))


def test_tokens_that_have_no_equal_chunks_are_refused() -> None:
    with pytest.raises(TypeMismatch, match="14 tokens do not divide into 4 chunks; pad"):
        check(Given(2, 14, "zigzag"), "ring")
