"""Attention to pages: every part of a row, side by side in the pool or scattered, is read once and weighed rightly."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from plait.ir.ops import paged_attention
from plait.lowering.forms import paged

Tensor = torch.Tensor
F64 = torch.float64


def case(seed: int, dtype: torch.dtype) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Rows in a pool of pages, in order, apart, or some of both, and tokens of theirs, packed or not."""
    rng, pick = torch.Generator().manual_seed(seed), random.Random(seed)
    n, size, t = pick.choice([1, 2, 3]), pick.choice([1, 3, 64, 100]), pick.choice([1, 1, 2, 5, 63, 130])
    g, r, (d, e) = pick.choice([1, 2]), pick.choice([1, 3]), pick.choice([(4, 4), (16, 16), (6, 5)])
    counts = [pick.choice([0, 1, t]) for _ in range(n - 1)] + [t]
    cu = torch.tensor([0, *counts]).cumsum(0) if pick.random() < 0.4 else None
    shape = (n, t) if cu is None else (1, int(cu[-1]))
    at = [pick.choice([0, 1, size, 3 * size + 1, 700]) for _ in range(n)]
    width = -(-(max(at) + t) // size) + 1
    order = torch.randperm(n * width + 2, generator=rng) if pick.random() < 0.5 else torch.arange(n * width + 2)
    if pick.random() < 0.4:
        order[: len(order) // 2] = order[: len(order) // 2].sort().values  # runs side by side, and then others
    table = order[: n * width].view(n, width).clone()
    for row, start in zip(table, at, strict=True):
        row[-(-(start + t) // size) :] = -1
    make = lambda *size: torch.randn(*size, generator=rng, dtype=F64).to(dtype)  # noqa: E731
    q, k, v = make(*shape, g * r, d), make(len(order), size, g, d), make(len(order), size, g, e)
    sinks = make(g * r) if pick.random() < 0.3 else None
    attrs = {"window": pick.choice([0, 0, 0, 1, 70]), "softcap": pick.choice([0.0, 0.0, 2.0])}
    return [q, k, v, table, torch.tensor(at), sinks, cu], attrs


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_attention_to_pages_means_what_the_op_means(dtype: torch.dtype) -> None:
    tolerance = {F64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    for seed in range(50):
        xs, attrs = case(seed, dtype)
        wide = [x.double() if x is not None and x.is_floating_point() else x for x in xs]
        want = paged_attention.reference(*wide, **attrs)
        got = paged.paged_attention(*xs, **attrs)  # type: ignore[arg-type] # none are absent
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_what_a_row_has_not_written_is_not_read() -> None:
    """Pages that others hold, and places behind a row's last token, may hold anything."""
    q, k, table, at = (
        torch.randn(2, 1, 2, 4),
        torch.randn(6, 4, 1, 4),
        torch.tensor([[0, -1, -1], [2, 3, 5]]),
        torch.tensor([1, 9]),
    )
    bad = k.clone()
    for page, first in ((0, 2), (1, 0), (4, 0), (5, 2)):
        bad[page, first:] = torch.nan
    assert torch.equal(paged.paged_attention(q, bad, bad, table, at), paged.paged_attention(q, k, k, table, at))


def test_a_step_copies_a_few_pages_at_most() -> None:
    """Pages side by side are read where they lie; of scattered ones 256 tokens are copied at a time."""
    k = torch.randn(512, 16, 2, 32)
    q, at = torch.randn(1, 1, 4, 32), torch.tensor([8000])
    side, apart = torch.arange(512)[None], torch.randperm(512, generator=torch.Generator().manual_seed(0))[None]
    most = {}
    for name, table in (("side", side), ("apart", apart)):
        with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as seen:
            paged.paged_attention(q, k, k, table, at)
        most[name] = max(e.cpu_memory_usage for e in seen.events())
    assert most["side"] < 2**16 and most["apart"] < 2**19, most  # all keys and values are 2 * 2**21 bytes


def test_the_op_passes_torchs_own_checks() -> None:
    for seed in (0, 3, 4):
        xs, attrs = case(seed, torch.float32)
        given = (*xs, attrs["window"], attrs["softcap"], 0.5)
        torch.library.opcheck(torch.ops.plait.paged_attention, given, test_utils=("test_schema", "test_faketensor"))


def test_gradients_go_by_the_reference() -> None:
    (q, k, v, *rest), attrs = case(2, F64)
    assert q is not None and k is not None and v is not None
    given = [x.requires_grad_() for x in (q, k, v)]
    mine = torch.autograd.grad(paged.paged_attention(*given, *rest, **attrs).sin().sum(), given)  # type: ignore[arg-type] # as above
    want = torch.autograd.grad(paged_attention.reference(*given, *rest, **attrs).sin().sum(), given)
    for a, b in zip(mine, want, strict=True):
        torch.testing.assert_close(a, b)
