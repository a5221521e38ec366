"""The forms of caches with rows of their own lengths against their references, and under torch's own checks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from plait.ir.ops import cached_attention, cached_write, page_write
from plait.lowering.forms import cached

Tensor = torch.Tensor
F64 = torch.float64


def case(seed: int, dtype: torch.dtype) -> tuple[list[Tensor | None], dict[str, Any]]:
    """A cache of some rows, each filled so far or so often, and tokens for them, packed or not."""
    rng, pick = torch.Generator().manual_seed(seed), random.Random(seed)
    n, m = pick.choice([1, 2, 3]), pick.choice([5, 8, 130])
    t = pick.choice([1, 2, 5] if m < 100 else [1, 63, 129])
    g, r, (d, e) = pick.choice([1, 2]), pick.choice([1, 3]), pick.choice([(4, 4), (16, 16), (6, 5)])
    cu = None
    if pick.random() < 0.5:
        counts = [pick.choice([0, 1, t]) for _ in range(n - 1)] + [t]
        cu = torch.tensor([0, *counts]).cumsum(0)
    shape = (n, t) if cu is None else (1, int(cu[-1]))
    starts = [pick.choice([0, 1, m - t, m + 3]) for _ in range(n)]
    at = torch.tensor(starts if pick.random() < 0.7 else [starts[0]] * n)
    make = lambda *size: torch.randn(*size, generator=rng, dtype=F64).to(dtype)  # noqa: E731
    q, k, v = make(*shape, g * r, d), make(n, m, g, d), make(n, m, g, e)
    sinks = make(g * r) if pick.random() < 0.3 else None
    return [q, k, v, at, sinks, cu], {"window": pick.choice([0, 0, 1, 3]), "softcap": pick.choice([0.0, 2.0])}


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_attention_to_rings_means_what_the_op_means(dtype: torch.dtype) -> None:
    tolerance = {F64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
    for seed in range(60):
        xs, attrs = case(seed, dtype)
        wide = [x.double() if x is not None and x.is_floating_point() else x for x in xs]
        want = cached_attention.reference(*wide, **attrs)
        q, k, v, at, sinks, cu = xs
        close(cached.cached_attention(q, k, v, at, sinks, cu, **attrs), want, tolerance)  # type: ignore[arg-type] # none are absent
        if cu is None:  # what runs on a device, where no host waits
            close(cached.all_rows(q, k, v, at, sinks, **attrs, scale=q.shape[-1] ** -0.5), want, tolerance)  # type: ignore[union-attr, arg-type] # as above


def test_what_a_row_has_not_written_is_not_read() -> None:
    q, at = torch.randn(2, 1, 2, 4, dtype=F64), torch.tensor([0, 3])
    k = torch.randn(2, 6, 1, 4, dtype=F64)
    bad = k.clone()
    bad[0, 1:], bad[1, 4:] = torch.nan, torch.nan
    close(cached.cached_attention(q, bad, bad, at), cached.cached_attention(q, k, k, at), 0)


def test_gradients_go_by_the_reference() -> None:
    q, k = torch.randn(2, 3, 2, 4, dtype=F64, requires_grad=True), torch.randn(2, 6, 1, 4, dtype=F64, requires_grad=True)
    at = torch.tensor([0, 2])
    mine = torch.autograd.grad(cached.cached_attention(q, k, k, at).sin().sum(), (q, k))
    want = torch.autograd.grad(cached_attention.reference(q, k, k, at).sin().sum(), (q, k))
    for a, b in zip(mine, want, strict=True):
        close(a, b, 1e-12)


def test_the_op_passes_torchs_own_checks() -> None:
    for seed in (0, 1, 4):
        (q, k, v, at, sinks, cu), attrs = case(seed, torch.float32)
        given = (q, k, v, at, sinks, cu, attrs["window"], attrs["softcap"], 0.5)
        torch.library.opcheck(torch.ops.plait.cached_attention, given, test_utils=("test_schema", "test_faketensor"))


def test_writing_is_in_place_and_means_what_the_ops_mean() -> None:
    for seed in range(20):
        (q, k, *_, at, _, cu), _ = case(seed, F64)
        assert q is not None and k is not None
        x = torch.randn(*q.shape[:2], *k.shape[2:], dtype=F64)
        want, where = cached_write.reference(k, x, at, cu), k.data_ptr()
        got = cached.cached_write(k, x, at, cu)  # type: ignore[arg-type] # it is there
        assert torch.equal(got, want) and got.data_ptr() == where


@pytest.mark.parametrize("slots", [[[0, 7], [11, 3]], [[-1, 0], [5, -1]], [[-1, -1], [-1, -1]], [[4, -1], [-1, 0]]], ids=str)
def test_a_token_without_a_slot_is_not_written(slots: list[list[int]]) -> None:
    pool, x = torch.randn(4, 3, 2, 5), torch.randn(2, 2, 2, 5)
    want = pool.clone()
    for b, row in enumerate(slots):
        for t, slot in enumerate(row):
            if slot >= 0:
                want[slot // 3, slot % 3] = x[b, t]
    assert torch.equal(page_write.reference(pool, x, torch.tensor(slots)), want)
    where = pool.data_ptr()
    got = cached.page_write(pool, x, torch.tensor(slots))
    assert torch.equal(got, want) and got.data_ptr() == where
