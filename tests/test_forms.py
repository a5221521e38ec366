"""The torch forms of convolution, attention, experts and losses against their ops' references, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from plait.ir import DataError, TypeMismatch
from plait.ir.ops import (
    attention,
    causal_conv1d,
    combine,
    cross_entropy,
    dispatch,
    grouped_linear,
    linear_cross_entropy,
    load_balance_loss,
    route,
    z_loss,
)
from plait.lowering.forms import conv, experts, loss
from plait.lowering.forms.attention import attention as attend

# The folder's face shows the function under the module's name.
attention_form = import_module("plait.lowering.forms.attention")
Tensor = torch.Tensor
F64 = torch.float64
RAGGED = [0, 1, 1, 3, 63, 64, 130]


def draw(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64).to(dtype).requires_grad_()


def bounds(cu: list[int] | None) -> Tensor | None:
    return None if cu is None else torch.tensor(cu)


def wave(like: Tensor) -> Tensor:
    return torch.arange(1.0, like.numel() + 1, dtype=F64).sin().view(like.shape)


def run(f: Callable[..., Any], operands: tuple[Tensor | None, ...], attrs: dict[str, Any]) -> list[Tensor]:
    """Outputs, then the gradients of a fixed mix of the outputs by every operand that has one."""
    out = f(*operands, **attrs)
    outs = list(out) if isinstance(out, tuple) else [out]
    leaves = [x for x in operands if x is not None and x.requires_grad]
    mixes = [(y.to(F64) * wave(y)).sum() for y in outs if y.requires_grad]
    grads = torch.autograd.grad(sum(mixes, torch.zeros((), dtype=F64)), leaves, allow_unused=True) if mixes else ()
    return [*outs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=bool(mixes)))]


def agree(form: Callable[..., Any], op: Any, *operands: Tensor | None, tolerance: float = 1e-12, **attrs: Any) -> None:
    """The form gives what the reference gives, to a tolerance relative to the largest entry of each result."""
    mine, theirs = run(form, operands, attrs), run(op.reference, operands, attrs)
    assert [(x.shape, x.dtype) for x in mine] == [(x.shape, x.dtype) for x in theirs]
    for got, want in zip(mine, theirs, strict=True):
        assert torch.isfinite(got).all()
        if want.numel():
            error = (got.to(F64) - want.to(F64)).abs().max() / want.to(F64).abs().max().clamp_min(1)
            assert error <= tolerance, f"{op.name}: off by {float(error):.2g}"


# -- causal_conv1d ------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1 << 17, 64], ids=["one block", "many blocks"])
def conv_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "BLOCK", request.param)


@pytest.mark.usefixtures("conv_block")
@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize(
    "shape", [(2, 65, 5, 4), (3, 2, 5, 4), (2, 1, 7, 4), (1, 3, 4, 2), (2, 9, 3, 1), (2, 100, 3, 3), (2, 0, 3, 4)]
)
@pytest.mark.parametrize("rich", [True, False])
def test_conv_of_dense_tokens(shape: tuple[int, int, int, int], act: str, rich: bool) -> None:
    b, t, c, k = shape
    bias, state = (draw(c), draw(b, c, k - 1)) if rich else (None, None)
    agree(conv.causal_conv1d, causal_conv1d, draw(b, t, c), draw(c, k), bias, state, act=act)


@pytest.mark.usefixtures("conv_block")
@pytest.mark.parametrize("cu", [RAGGED, [0, 0, 130], [0, 130], [0, 2, 4, 6, 8, 130, 130]])
@pytest.mark.parametrize("rich", [True, False])
def test_conv_of_packed_segments(cu: list[int], rich: bool) -> None:
    bias, state = (draw(3), draw(len(cu) - 1, 3, 3)) if rich else (None, None)
    agree(conv.causal_conv1d, causal_conv1d, draw(1, 130, 3), draw(3, 4), bias, state, bounds(cu), act="silu")


def test_conv_reads_a_slice_of_a_wider_projection() -> None:
    wide = draw(2, 65, 11)
    got, _ = conv.causal_conv1d(wide[..., 3:8], w := draw(5, 4), act="silu")
    want, _ = causal_conv1d.reference(wide[..., 3:8].contiguous(), w, act="silu")
    torch.testing.assert_close(got, want)


def test_conv_in_pieces_is_conv_at_once() -> None:
    x, w = draw(1, 66, 5), draw(5, 4)
    whole, final = conv.causal_conv1d(x, w, act="silu")
    parts, state = list[Tensor](), None
    for piece in x.split([1, 63, 1, 1], 1):
        y, state = conv.causal_conv1d(piece, w, None, state, act="silu")
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


def test_conv_keeps_a_neighbours_nan_out() -> None:
    x = draw(1, 130, 3).detach()
    x[0, 3:63] = torch.nan
    x.requires_grad_()
    y, _ = conv.causal_conv1d(x, draw(3, 4), cu=bounds(RAGGED), act="silu")
    (dx,) = torch.autograd.grad(y[:, 63:].sum() + y[:, :3].sum(), x)
    assert torch.isfinite(y[:, 63:]).all() and torch.isfinite(y[:, :3]).all()
    assert torch.isfinite(dx[:, 63:]).all() and torch.isfinite(dx[:, :3]).all()


def test_conv_refuses_an_unknown_activation() -> None:
    with pytest.raises(TypeMismatch, match="gelu"):
        conv.causal_conv1d(draw(1, 5, 3), draw(3, 4), act="gelu")


# -- attention ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(128, 1 << 20), (16, 3000)], ids=["few blocks", "many blocks"])
def query_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_form, "QUERIES", request.param[0])
    monkeypatch.setattr(attention_form, "LOGITS", request.param[1])


def heads(b: int, t: int, s: int, g: int = 2, r: int = 3, d: int = 5, e: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return draw(b, t, g * r, d), draw(b, s, g, d), draw(b, s, g, e)


@pytest.mark.parametrize("t,s", [(65, 65), (1, 100), (1, 1), (63, 130), (100, 1)])
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_plain_attention(t: int, s: int, r: int, causal: bool) -> None:
    agree(attend, attention, *heads(2, t, max(s, t) if causal else s, r=r), causal=causal)


@pytest.mark.usefixtures("query_block")
@pytest.mark.parametrize(
    "options", [{"window": 7}, {"window": 200}, {"softcap": 2.0}, {"window": 16, "softcap": 3.0, "scale": 0.3}, {}]
)
@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("e", [5, 7])
def test_attention_with_every_option(options: dict[str, Any], sinks: bool, e: int) -> None:
    agree(attend, attention, *heads(2, 65, 65, e=e), draw(6) if sinks else None, **options)


@pytest.mark.usefixtures("query_block")
@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 2.0}, {"causal": False}, {"causal": False, "window": 9}])
@pytest.mark.parametrize("sinks", [True, False])
def test_attention_of_packed_segments(options: dict[str, Any], sinks: bool) -> None:
    agree(attend, attention, *heads(1, 130, 130), draw(6) if sinks else None, bounds(RAGGED), **options)


@pytest.mark.usefixtures("query_block")
@pytest.mark.parametrize("t,at", [(1, 77), (1, 0), (1, 129), (3, 77), (63, 0), (63, 67)])
@pytest.mark.parametrize("options", [{}, {"window": 16}, {"softcap": 2.0}])
@pytest.mark.parametrize("sinks", [True, False])
def test_attention_against_a_cache(t: int, at: int, options: dict[str, Any], sinks: bool) -> None:
    agree(attend, attention, *heads(2, t, 130), draw(6) if sinks else None, None, torch.tensor(at), **options)


def test_attention_does_not_read_the_unwritten_cache() -> None:
    q, k, v = (x.detach() for x in heads(1, 1, 130))
    k[:, 78:], v[:, 78:] = torch.nan, torch.nan
    assert torch.isfinite(attend(q, k, v, at=torch.tensor(77))).all()


def test_a_query_that_sees_no_key_gives_zero() -> None:
    q, k, v = heads(1, 3, 2)
    o = attend(q, k, v)
    assert torch.equal(o[:, 0], torch.zeros_like(o[:, 0])) and o[:, 1].abs().sum() > 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(o.sum(), (q, k, v)))


# -- experts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"k": 2},
        {"k": 16, "renormalize": False},
        {"k": 3, "score": "sigmoid", "scale": 2.5, "groups": 4, "group_limit": 2},
        {"k": 4, "groups": 2, "group_limit": 1, "renormalize": False, "score": "sigmoid"},
        {"k": 2, "groups": 16, "group_limit": 3},
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_route(options: dict[str, Any], dtype: torch.dtype, biased: bool) -> None:
    """Logits on a coarse grid, so that many tie."""
    logits = draw(5, 13, 16).detach().mul(2).round().div(2).to(dtype).requires_grad_()
    bias = torch.randn(16).mul(4).round().to(dtype) if biased else None
    agree(experts.route, route, logits, bias, tolerance=1e-2 if dtype == torch.bfloat16 else 1e-6, **options)


def test_route_breaks_ties_by_lowest_index() -> None:
    for dtype in (torch.float32, F64):
        _, chosen = experts.route(torch.zeros(3, 65, dtype=dtype), k=5)
        assert torch.equal(chosen, torch.arange(5).expand(3, 5))


def test_route_refuses_more_choices_than_its_groups_leave() -> None:
    with pytest.raises(TypeMismatch, match="at most the 4"):
        experts.route(torch.zeros(3, 16), k=5, groups=4, group_limit=1)


def pairs(tokens: int, k: int, e: int, unused: int) -> Tensor:
    chosen = torch.stack([torch.randperm(e)[:k] for _ in range(tokens)])
    return torch.where(chosen == unused, (unused + 1) % e, chosen)


@pytest.mark.parametrize("tokens", [1, 63, 130])
def test_dispatch_and_combine(tokens: int) -> None:
    chosen = pairs(tokens, 3, 9, unused=4)
    agree(experts.dispatch, dispatch, x := draw(1, tokens, 7), chosen[None], e=9)
    rows, order, _ = experts.dispatch(x, chosen[None], e=9)
    agree(experts.combine, combine, rows.detach().requires_grad_(), order, draw(1, tokens, 3))


@pytest.mark.parametrize("counts", [[3, 0, 60, 2, 0], [0, 0, 65, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 61]])
def test_grouped_linear(counts: list[int]) -> None:
    agree(experts.grouped_linear, grouped_linear, draw(sum(counts), 7), draw(5, 11, 7), torch.tensor(counts))


def test_unused_experts_have_no_gradient_and_slack_rows_are_zero() -> None:
    x, w = draw(70, 7), draw(3, 11, 7)
    y = experts.grouped_linear(x, w, torch.tensor([30, 0, 35]))
    dx, dw = torch.autograd.grad(y.sin().sum(), (x, w))
    assert not y[65:].any() and not dx[65:].any() and not dw[1].any() and dw[0].any() and dw[2].any()


def test_grouped_linear_refuses_counts_beyond_its_rows() -> None:
    with pytest.raises(DataError, match="sum to 9"):
        experts.grouped_linear(draw(8, 7), draw(2, 11, 7), torch.tensor([4, 5]))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_router_losses(score: str) -> None:
    agree(experts.load_balance_loss, load_balance_loss, draw(1, 63, 9), pairs(63, 3, 9, unused=4)[None], score=score)
    agree(experts.z_loss, z_loss, draw(5, 13, 9))


# -- losses -------------------------------------------------------------------------------------------------------


def some_labels(v: int, ignored: int) -> Tensor:
    labels = torch.randint(v, (5, 13))
    labels.view(-1)[torch.randperm(65)[:ignored]] = -100
    return labels


@pytest.fixture(params=[True, False], ids=["small blocks", "one block"])
def loss_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(loss, "BLOCK", 100)
        monkeypatch.setattr(loss, "HEAD_ROWS", 10)


@pytest.mark.usefixtures("loss_block")
@pytest.mark.parametrize("ignored", [0, 5, 65])
def test_losses(ignored: int) -> None:
    labels = some_labels(31, ignored)
    agree(loss.cross_entropy, cross_entropy, draw(5, 13, 31).detach().mul(9).requires_grad_(), labels)
    for cap in (0.0, 2.0):
        agree(loss.linear_cross_entropy, linear_cross_entropy, draw(5, 13, 7), draw(31, 7), labels, softcap=cap)


def test_losses_ignore_what_they_are_told_and_refuse_a_wrong_label() -> None:
    agree(loss.cross_entropy, cross_entropy, draw(5, 13, 31), some_labels(31, 0), ignore=3)
    with pytest.raises(DataError, match="a label is 31"):
        loss.cross_entropy(draw(5, 13, 31), torch.full((5, 13), 31))


def test_an_ignored_token_may_hold_nan() -> None:
    logits, labels = draw(3, 31).detach(), torch.tensor([1, -100, 2])
    logits[1] = torch.nan
    value = loss.cross_entropy(logits.requires_grad_(), labels)
    (grad,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(value) and torch.isfinite(grad).all()


def test_linear_loss_makes_only_the_gradients_that_are_wanted() -> None:
    x, w = draw(5, 13, 7), draw(31, 7)
    (both, _) = torch.autograd.grad(loss.linear_cross_entropy(x, w, labels := some_labels(31, 5)), (x, w))
    (alone,) = torch.autograd.grad(loss.linear_cross_entropy(x, w.detach(), labels), x)
    assert torch.equal(both, alone)
    assert loss.linear_cross_entropy(x.detach(), w.detach(), labels).requires_grad is False


# -- half precision, tracing, the promises of a custom op -----------------------------------------------------------


def test_half_precision_stays_near_the_reference() -> None:
    def half(*shape: int) -> Tensor:
        return draw(*shape, dtype=torch.bfloat16)

    near = {"tolerance": 2e-2}
    agree(conv.causal_conv1d, causal_conv1d, half(2, 65, 5), half(5, 4), half(5), half(2, 5, 3), act="silu", **near)
    for options in ({}, {"window": 9, "softcap": 4.0}):
        q, k, v, sinks = half(2, 65, 6, 8), half(2, 65, 2, 8), half(2, 65, 2, 8), half(6) if options else None
        agree(attend, attention, q, k, v, sinks, **options, **near)
    rows, order, counts = experts.dispatch(half(1, 65, 8), pairs(65, 3, 9, unused=4)[None], e=9)
    agree(experts.grouped_linear, grouped_linear, rows.detach().requires_grad_(), half(9, 11, 8), counts, **near)
    agree(experts.combine, combine, rows.detach().requires_grad_(), order, half(1, 65, 3), **near)
    agree(loss.cross_entropy, cross_entropy, half(5, 13, 31), some_labels(31, 5), **near)
    agree(loss.linear_cross_entropy, linear_cross_entropy, half(5, 13, 7), half(31, 7), some_labels(31, 5), **near)


def mixture(x: Tensor, up: Tensor, logits: Tensor) -> Tensor:
    """A layer of experts with its losses."""
    weights, chosen = experts.route(logits, k=2)
    rows, order, counts = experts.dispatch(x, chosen, e=up.shape[0])
    y = experts.combine(experts.grouped_linear(rows, up, counts), order, weights)
    return y + experts.load_balance_loss(logits, chosen) + experts.z_loss(logits)


def block(x: Tensor, w: Tensor, up: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Every form in one small language model, at any batch and length."""
    y, _ = conv.causal_conv1d(x, w, act="silu")
    q = y.unflatten(-1, (4, -1))
    o = (attend(q, q[:, :, :2], q[:, :, :2]) + attend(q, q[:, :, :2], q[:, :, :2], window=9)).flatten(-2)
    y = mixture(o, up, o[..., :6]) + x
    return loss.linear_cross_entropy(y, head, labels) + loss.cross_entropy(y, labels.remainder(y.shape[-1]))


def compiled_is_eager(f: Callable[..., Tensor], backend: str, draws: list[tuple[Tensor, ...]]) -> None:
    """One graph, compiled once, gives on every draw what eager gives, gradients too."""
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for index, operands in enumerate(draws):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            got = run(compiled, operands, {})
        for mine, want in zip(got, run(f, operands, {}), strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-10, atol=1e-12)


def test_one_graph_serves_every_batch_and_length() -> None:
    w, up, head = draw(16, 4), draw(6, 16, 16), draw(31, 16)
    sizes = [(2, 65), (3, 100), (2, 130)]
    compiled_is_eager(block, "aot_eager", [(draw(b, t, 16), w, up, head, torch.randint(31, (b, t))) for b, t in sizes])


def test_inductor_takes_the_traced_forms() -> None:
    draws = [(draw(b, t, 16), draw(6, 16, 16), draw(b, t, 6)) for b, t in [(2, 65), (3, 100)]]
    compiled_is_eager(mixture, "inductor", [tuple(x.detach() for x in each) for each in draws])


def test_forms_export() -> None:
    class Block(torch.nn.Module):
        def forward(self, *operands: Tensor) -> Tensor:
            return block(*operands)

    def operands(b: int, t: int) -> tuple[Tensor, ...]:
        return (*(x.detach() for x in (draw(b, t, 16), draw(16, 4), draw(6, 16, 16), draw(31, 16))), torch.randint(31, (b, t)))

    b, t = torch.export.Dim("b", min=2, max=64), torch.export.Dim("t", min=2, max=4096)
    dims = ({0: b, 1: t}, None, None, None, {0: b, 1: t})
    exported = torch.export.export(Block(), operands(3, 65), dynamic_shapes=(dims,)).module()
    again = operands(2, 130)
    torch.testing.assert_close(exported(*again), block(*again))


PROMISES: list[tuple[str, Callable[[], tuple[Any, ...]]]] = [
    ("causal_conv1d", lambda: (draw(1, 65, 5), draw(5, 4), draw(5), draw(2, 5, 3), torch.tensor([0, 3, 65]), "silu")),
    ("causal_conv1d", lambda: (draw(2, 9, 5), draw(5, 4), None, None, None, "none")),
    ("attention", lambda: (*heads(2, 9, 9), draw(6), None, None, True, 3, 2.0, 0.5)),
    ("attention", lambda: (*heads(2, 1, 9), None, None, torch.tensor(5), True, 0, 0.0, 0.5)),
    ("grouped_linear", lambda: (draw(9, 5), draw(3, 4, 5), torch.tensor([3, 0, 6]))),
    ("cross_entropy", lambda: (draw(5, 13, 31), some_labels(31, 5), -100)),
    ("linear_cross_entropy", lambda: (draw(5, 13, 7), draw(31, 7), some_labels(31, 5), -100, 2.0, True, True)),
]


@pytest.mark.parametrize("name,operands", PROMISES, ids=[f"{name} {i}" for i, (name, _) in enumerate(PROMISES)])
def test_custom_ops_keep_torchs_promises(name: str, operands: Callable[[], tuple[Any, ...]]) -> None:
    torch.library.opcheck(getattr(torch.ops.plait, name), operands())
