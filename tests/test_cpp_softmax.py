"""The softmax of a head in C++: against float64, its gradients in place, odd numbers, and bits whatever the threads."""

from __future__ import annotations

import math

import pytest
import torch
from plait.lowering.cpp import compiler, softmax
from plait.lowering.forms import linear_cross_entropy, linear_token_losses
from torch import Tensor

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


def made(rows: int, words: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(rows, words, generator=rng) * 5, torch.randint(0, words, (rows,), generator=rng)


def exact(logits: Tensor, words: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    logits = (logits / cap).tanh() * cap if cap else logits
    return logits.logsumexp(-1), logits.gather(1, words[:, None])[:, 0]


def close(x: Tensor, want: Tensor) -> bool:
    return float((x - want).abs().max() / want.abs().max()) < 3e-6


@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize("rows,words", [(70, 1003), (1, 70001), (9400, 7)])
def test_values_and_gradients(rows: int, words: int, cap: float) -> None:
    logits, place = made(rows, words)
    wide, scales, picks = logits.double().requires_grad_(), torch.rand(rows) - 0.5, torch.rand(rows)
    lse, own = exact(wide, place, cap)
    (loss,) = torch.autograd.grad(((lse - own) / rows).sum(), wide, retain_graph=True)
    (mixed,) = torch.autograd.grad((lse * scales + own * picks).sum(), wide)
    given = logits.clone()
    parts, both = softmax.losses(logits.clone(), place, cap=cap), softmax.losses(given, place, cap=cap, share=1 / rows)
    assert parts and both and torch.equal(parts[0], both[0]) and torch.equal(parts[1], both[1])
    assert close(parts[0], lse.detach()) and close(parts[1], own.detach()) and close(given, loss)
    pulled = logits.clone()
    assert softmax.pull(pulled, place, parts[0], scales, picks, cap=cap) and close(pulled, mixed)


def test_odd_numbers_and_threads() -> None:
    logits, place = made(80, 1003)
    for odd in (math.nan, math.inf, -math.inf):
        logits[0], logits[1, 5], logits[2, 1002] = odd, odd, odd
        found = softmax.losses(logits.clone(), place)
        assert found and torch.allclose(found[0], logits.logsumexp(-1), equal_nan=True)
    bits, before = list[Tensor](), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            bits.append(logits.clone())
            assert softmax.losses(bits[-1], place, share=0.5)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits[0][1:], bits[1][1:])


def test_what_is_not_ours_is_left_to_torch() -> None:
    logits, place = made(80, 1003)
    assert softmax.losses(logits.double(), place) is None and softmax.losses(logits[:5], place[:5]) is None
    assert not softmax.pull(logits.t().contiguous().t(), place, *logits.new_zeros(3, 80))


@pytest.mark.parametrize("cap", [0.0, 20.0])
def test_heads_in_blocks(cap: float) -> None:
    """Two blocks of tokens, some of them ignored, in both ops that have a head of their own."""
    rng = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 150, 17, generator=rng), torch.randn(1003, 17, generator=rng)
    labels = torch.randint(0, 1003, (2, 150), generator=rng)
    labels[0, :7] = -100
    kept, found = labels != -100, list[tuple[Tensor, ...]]()
    for dtype, blocks in ((torch.float64, 0), (torch.float32, 1), (torch.float32, 2)):
        a, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        if blocks == 1:
            loss = linear_cross_entropy(a, b, labels, softcap=cap)
        elif blocks == 2:
            loss = linear_token_losses(a, b, labels, softcap=cap).sum() / kept.sum()
        else:
            lse, own = exact((a[kept] @ b.t()), labels[kept], cap)
            loss = (lse - own).mean()
        found.append((loss.detach(), *torch.autograd.grad(loss, [a, b])))
    assert all(close(y, want) for some in found[1:] for y, want in zip(some, found[0], strict=True))
