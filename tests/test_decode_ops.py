"""Every op of a decode step's tape against its reference in float64."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from plait import parse
from plait.ir import Graph, evaluate
from plait.lowering.cpp import compiler
from plait.lowering.cpp.step import machine, plan, source
from plait.lowering.cpp.step_forms import FORMS
from plait.lowering.cpp.step_record import KINDS, Step
from plait.lowering.cpp.step_run import Stepper

Tensor = torch.Tensor
pytestmark = pytest.mark.skipif(compiler() is None, reason="generated C++ needs a compiler")


def run(text: str, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A graph of one token a row through the tape alone."""
    graph = parse(text)
    found = planned(graph, values)
    assert found is not None and not any(isinstance(p, Step) for p in found.parts), "something has no form"
    results = Stepper(graph, "cpu", {})([x.clone() for x in values], [], False)
    assert results is not None
    return results


def planned(graph: Graph, values: Sequence[Tensor]) -> Any:
    sizes = {
        str(d.size): n for v, x in zip(graph.inputs, values, strict=True) for d, n in zip(v.type.dims, x.shape, strict=True)
    }
    return plan(graph, "cpu", {}, values, [], sizes)


def close(text: str, values: Sequence[Tensor], tolerance: float = 3e-6) -> None:
    """The tape against the reference in float64."""
    found = run(text, values)
    exact = evaluate(parse(text), *(x.double() if x.is_floating_point() else x for x in values))
    exact = exact if isinstance(exact, tuple) else (exact,)
    for got, want in zip(found, exact, strict=True):
        assert got.shape == want.shape
        assert not got.is_floating_point() or (got.double() - want.double()).abs().max() <= tolerance * want.abs().max() + 1e-30
        assert got.is_floating_point() or torch.equal(got, want)


def tokens(*shape: int, below: int = 9) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(0))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


POINTWISE = (
    "silu(x)", "sigmoid(x)", "relu(x)", "relu2(x)", "neg_exp(x)", "tanh(x)", "softplus(x)", "scale(x, by=0.3)",
    "shift(x, by=-1.5)", "softcap(x, cap=2.0)", "clamp(x, low=-0.5, high=0.7)", "gelu(x)", "gelu(x, approximate='tanh')",
    "add(x, z)", "sub(x, z)", "mul(x, z)", "add_bias(x, w)", "scale_columns(x, w)", "scale_rows(x, r)", "rms_norm(x, w)",
    "rms_norm(x)", "rms_norm(x, w, zero_centered=True)", "layer_norm(x, w, w)", "layer_norm(x)", "l2_norm(x)",
    "concat(x, z)", "fixed(x)",
)  # fmt: skip


# A norm of one number is left to torch.
@pytest.mark.parametrize(("call", "width"), [(c, n) for c in POINTWISE for n in (1, 16, 63, 100) if n > 1 or "norm" not in c])
def test_pointwise_and_norms(call: str, width: int) -> None:
    text = f"""
def f(tokens: i64[b, s], x: f32[b, s, {width}], z: f32[b, s, {width}], w: f32[{width}], r: f32[b, s]):
    y = {call}
    return y
"""
    close(text, [tokens(3, 1), 2 * randn(3, 1, width), randn(3, 1, width, seed=1), randn(width), randn(3, 1)])


@pytest.mark.parametrize("groups", [1, 4])
def test_norms_of_groups_and_heads(groups: int) -> None:
    text = f"""
def f(tokens: i64[b, s], x: f32[b, s, 120], w: f32[60]):
    a, c = split(x, sizes=(60, 60))
    n = rms_norm(c, w, groups={groups}, eps=1e-05)
    h = reshape(a, pattern='... (h=3 d) -> ... h d')
    m = l2_norm(h)
    k = reshape(m, pattern='b t h d -> b t (d h)')
    return n, k
"""
    close(text, [tokens(3, 1), randn(3, 1, 120), randn(60)])


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [(1, 1), (63, 65), (100, 130), (512, 200)])
def test_linear(batch: int, sizes: tuple[int, int]) -> None:
    i, o = sizes
    text = f"""
def f(tokens: i64[b, s], x: f32[b, s, {i}], w: f32[{o}, {i}], c: f32[{o}]):
    y = linear(x, w, c)
    z = linear(x, w)
    return y, z
"""
    close(text, [tokens(batch, 1), randn(batch, 1, i), randn(o, i), randn(o)], 3e-6 * math.sqrt(i))


@pytest.mark.parametrize("batch", [1, 3])
def test_positions_rope_and_embedding(batch: int) -> None:
    text = """
def f(tokens: i64[b, s], at: i64[()], w: f32[9, 30], x: f32[b, s, 3, 20]):
    e = embedding(w, tokens)
    p = positions(tokens, at)
    y = rope(x, p, theta=100.0, fraction=0.5)
    z = rope(x, p, interleaved=True, inverse=True, amplitude=1.25)
    return e, p, y, z
"""
    close(text, [tokens(batch, 1), torch.tensor(37), randn(9, 30), randn(batch, 1, 3, 20)], 3e-5)


ATTENTION = """
def f(tokens: i64[b, s], at: i64[{rows}], kc: f32[b, {room}, 2, {d}], vc: f32[b, {room}, 2, {e}], q: f32[b, s, 6, {d}],
      k: f32[b, s, 2, {d}], v: f32[b, s, 2, {e}], sinks: f32[6]):
    kw = {write}(kc, k, at)
    vw = {write}(vc, v, at)
    o = {attention}
    return o
"""


@pytest.mark.parametrize("options", ["", ", window=5", ", window=70, softcap=1.5", ", sinks=sinks, scale=0.4"])
@pytest.mark.parametrize("at", [0, 4, 64, 129])
def test_attention(options: str, at: int) -> None:
    text = ATTENTION.format(
        rows="()", room="m", d=20, e=33, write="cache_write", attention=f"attention(q, kw, vw, at=at{options})"
    )
    close(text, [tokens(2, 1), torch.tensor(at), *operands(2, 130, 20, 33)], 2e-5)


@pytest.mark.parametrize("options", ["", ", window=5", ", sinks=sinks, softcap=2.0"])
def test_attention_of_rows_with_lengths_of_their_own(options: str) -> None:
    call = f"cached_attention(q, kw, vw, at{options})"
    text = ATTENTION.format(rows="b", room="m", d=16, e=16, write="cached_write", attention=call)
    close(text, [tokens(3, 1), torch.tensor([2, 29, 6]), *operands(3, 7, 16, 16)], 2e-5)


@pytest.mark.parametrize("options", ["", ", window=5, sinks=sinks, softcap=2.0"])
def test_attention_in_pages(options: str) -> None:
    text = f"""
def f(tokens: i64[b, s], at: i64[b], kc: f32[p, c, 2, 20], vc: f32[p, c, 2, 33], slots: i64[b, s], pages: i64[b, f],
      q: f32[b, s, 6, 20], k: f32[b, s, 2, 20], v: f32[b, s, 2, 33], sinks: f32[6]):
    kw = page_write(kc, k, slots)
    vw = page_write(vc, v, slots)
    o = paged_attention(q, kw, vw, pages, at{options})
    return o
"""
    pages, slots = torch.tensor([[3, -1], [0, 4], [2, 6]]), torch.tensor([[14], [-1], [26]])
    rest = operands(3, 4, 20, 33)[2:]
    pools = [randn(7, 4, 2, 20), randn(7, 4, 2, 33, seed=1)]
    close(text, [tokens(3, 1), torch.tensor([2, 4, 6]), *pools, slots, pages, *rest], 2e-5)


def test_values_that_are_a_part_of_their_keys() -> None:
    """One head of latent keys for more query heads than are met at a time."""
    text = """
def f(tokens: i64[b, s], at: i64[()], kc: f32[b, m, 1, 28], q: f32[b, s, 19, 28], k: f32[b, s, 1, 28]):
    kw = cache_write(kc, k, at)
    v, r = split(kw, sizes=(20, 8))
    o = attention(q, kw, v, at=at)
    return o
"""
    close(text, [tokens(2, 1), torch.tensor(70), randn(2, 80, 1, 28), randn(2, 1, 19, 28), randn(2, 1, 1, 28, seed=1)], 2e-5)


@pytest.mark.parametrize(
    "call", ["table, at=at, reach=11", "slope, at=at, slopes=True", "lengths=lengths, causal=False", "lengths=lengths, at=at"]
)
def test_attention_with_a_bias_or_lengths(call: str) -> None:
    text = f"""
def f(tokens: i64[b, s], at: i64[()], kc: f32[b, m, 2, 20], vc: f32[b, m, 2, 33], lengths: i64[b], q: f32[b, s, 6, 20],
      table: f32[8, 6], slope: f32[1, 6]):
    o = biased_attention(q, kc, vc, {call})
    return o
"""
    kc, vc, q, *_ = operands(2, 90, 20, 33)
    close(text, [tokens(2, 1), torch.tensor(77), kc, vc, torch.tensor([90, 66]), q, randn(8, 6), randn(1, 6)], 2e-5)


def operands(batch: int, room: int, d: int, e: int) -> list[Tensor]:
    caches = [randn(batch, room, 2, d), randn(batch, room, 2, e, seed=1)]
    return [*caches, randn(batch, 1, 6, d), randn(batch, 1, 2, d, seed=2), randn(batch, 1, 2, e, seed=3), randn(6)]


@pytest.mark.parametrize("taps", [2, 3, 4, 5])
@pytest.mark.parametrize("act", ["none", "silu"])
def test_conv(taps: int, act: str) -> None:
    text = f"""
def f(tokens: i64[b, s], x: f32[b, s, 37], w: f32[37, {taps}], bias: f32[37], state: f32[b, 37, {taps - 1}]):
    y, final = causal_conv1d(x, w, bias, state, act='{act}')
    z, first = causal_conv1d(x, w)
    return y, final, z, first
"""
    close(text, [tokens(3, 1), randn(3, 1, 37), randn(37, taps), randn(37), randn(3, 37, taps - 1)])


RULES = {
    "gated_delta_rule": "q, k, v, decay, beta", "delta_rule": "q, k, v, beta", "kimi_delta_attention": "q, k, v, fade, beta",
    "ssd": "q, k, v, decay, beta", "gated_linear_attention": "q, k, v, fade", "retention": "q, k, v, slope",
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [(16, 16), (63, 33), (1, 7)])
def test_recurrence(rule: str, sizes: tuple[int, int]) -> None:
    d, e = sizes
    text = f"""
def f(tokens: i64[b, s], q: f32[b, s, 2, {d}], k: f32[b, s, 2, {d}], v: f32[b, s, 6, {e}], decay: f32[b, s, 6],
      fade: f32[b, s, 6, {d}], beta: f32[b, s, 6], slope: f32[6], state: f32[b, 6, {d}, {e}]):
    o, final = {rule}({RULES[rule]}, state=state, scale=0.7)
    p, first = {rule}({RULES[rule]})
    return o, final, p, first
"""
    heads = [randn(3, 1, 2, d), randn(3, 1, 2, d, seed=1) / math.sqrt(d), randn(3, 1, 6, e)]
    rates = [-randn(3, 1, 6).abs(), -randn(3, 1, 6, d).abs(), randn(3, 1, 6).sigmoid(), -randn(6).abs()]
    close(text, [tokens(3, 1), *heads, *rates, randn(3, 6, d, e)], 1e-5)


@pytest.mark.parametrize("channels", [1, 63, 150])
def test_scans_of_channels(channels: int) -> None:
    text = f"""
def f(tokens: i64[b, s], x: f32[b, s, {channels}], step: f32[b, s, {channels}], rate: f32[{channels}, 18], k: f32[b, s, 18],
      q: f32[b, s, 18], state: f32[b, {channels}, 18], p: i64[b, s], one: f32[b, {channels}]):
    o, final = selective_scan(x, step, rate, k, q, state=state)
    a, first = selective_scan(x, step, rate, k, q)
    d = scale(step, by=-1.0)
    h, last = rg_lru(x, d, p, state=one)
    return o, final, a, first, h, last
"""
    step, rate = randn(3, 1, channels).abs(), -randn(channels, 18).abs()
    keys = [randn(3, 1, 18), randn(3, 1, 18, seed=1), randn(3, channels, 18)]
    places = torch.tensor([[3], [0], [9]])
    close(text, [tokens(3, 1), randn(3, 1, channels), step, rate, *keys, places, randn(3, channels, seed=2)], 1e-5)


@pytest.mark.parametrize("batch", [1, 5])
def test_weights_of_heads_and_of_columns(batch: int) -> None:
    """Matrices whose columns lie side by side are read as they lie."""
    text = """
def f(tokens: i64[b, s], x: f32[b, s, 60], w: f32[3, 20, 90], c: f32[3, 90, 20], y: f32[b, s, 3, 20]):
    columns = reshape(w, pattern='h d r -> h r d')
    a = head_linear(y, columns)
    d = head_linear(y, c)
    flat = reshape(w, pattern='h d r -> r (h d)')
    z = linear(x, flat)
    return a, d, z
"""
    close(text, [tokens(batch, 1), randn(batch, 1, 60), randn(3, 20, 90), randn(3, 90, 20), randn(batch, 1, 3, 20)], 2e-5)


@pytest.mark.parametrize("far", ["(5.0, 3.0)", "(5.0, 1.5, 2.0, 2.5, 3.0)"])
def test_rotations_of_texts_that_reach_far(far: str) -> None:
    text = f"""
def f(tokens: i64[b, s], at: i64[b], x: f32[b, s, 3, 8]):
    p = cached_positions(tokens, at)
    n = reach(p)
    y = rope(x, p, n, theta=100.0, far={far}, rounded=True)
    z = shift_positions(p, by=2)
    return y, z
"""
    close(text, [tokens(2, 1), torch.tensor([3, 17]), randn(2, 1, 3, 8)], 3e-5)


@pytest.mark.parametrize("options", ["score='softmax'", "score='sigmoid', scale=2.5", "groups=4, group_limit=2"])
@pytest.mark.parametrize("biased", [False, True])
def test_experts(options: str, biased: bool) -> None:
    text = f"""
def f(tokens: i64[b, s], logits: f32[b, s, 8], bias: f32[8], x: f32[b, s, 37], w: f32[8, 21, 37], c: f32[8, 21]):
    weights, experts = route(logits, {"bias, " if biased else ""}k=3, {options})
    rows, order, counts = dispatch(x, experts, e=8)
    h = grouped_linear(rows, w, counts)
    more = spread_experts(c, counts, h)
    g = add(h, more)
    y = combine(g, order, weights)
    return weights, experts, y
"""
    close(text, [tokens(5, 1), randn(5, 1, 8), randn(8), randn(5, 1, 37), randn(8, 21, 37), randn(8, 21)], 3e-5)


def test_experts_that_are_equally_good() -> None:
    text = """
def f(tokens: i64[b, s], logits: f32[b, s, 8]):
    weights, experts = route(logits, k=3)
    return weights, experts
"""
    close(text, [tokens(2, 1), torch.zeros(2, 1, 8)])


def test_every_kind_of_instruction_is_in_the_source() -> None:
    assert all(kind in source() for kind in KINDS)
    assert machine() is not None and "gated_delta_rule" in FORMS


def test_threads_change_no_bit() -> None:
    """Neither where they share an instruction, nor where one reads what another has written."""
    text = """
def f(tokens: i64[b, s], beta: f32[b, s, 8], x: f32[b, s, 512], w: f32[700, 512], u: f32[512, 700], q: f32[b, s, 8, 64],
      state: f32[b, 8, 64, 64]):
    y = linear(x, w)
    g = silu(y)
    h = linear(g, u)
    n = rms_norm(h)
    z = linear(n, w)
    o, final = delta_rule(q, q, q, beta, state=state)
    return y, z, o, final
"""
    weights = [randn(700, 512), randn(512, 700)]
    values = [tokens(3, 1), randn(3, 1, 8), randn(3, 1, 512), *weights, randn(3, 1, 8, 64) / 8, randn(3, 8, 64, 64)]
    made = planned(parse(text), values)
    (part,) = made.parts
    assert [bool(ins.wait) for ins in part] == [False, True, True, True, True, False]
    assert [ins.units > 1 for ins in part] == [True, False, True, False, True, True]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(text, values)
        torch.set_num_threads(2)
        two = run(text, values)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
