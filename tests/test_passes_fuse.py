"""Named fusions: each where it fires, each where it holds back and says why."""

from __future__ import annotations

import pytest
from plait.ir import Graph, parse
from plait.passes import check_types, fuse, inline, validate

INPUTS = """def f(
    x: f64[b, s, 12], z: f64[b, s, 12], o: f64[b, s, 3, 4], v: f64[b, s, 3, 4], wide: f64[b, s, 36], p: i64[b, s],
    k: f64[b, s, 3, 4], gate: f64[b, s, 3], *, D: f64[3] = normal(0.1), w: f64[12] = normal(0.1), w4: f64[4] = normal(0.1),
    c: f64[12, 4] = normal(0.1), m: f64[12, 12] = normal(0.1), A: f64[3] = normal(0.1), t: f64[3] = normal(0.1),
):
"""


def graph(body: str, inputs: str = INPUTS) -> Graph:
    return parse(inputs + "\n".join(f"    {line.strip()}" for line in body.strip().splitlines()) + "\n")


def ops_of(kernel: Graph) -> str:
    return " ".join(n.op.name for n in kernel.nodes)


# name, kernel, what the kernel holds, body
FIRES = [
    (
        "norm-gate", "norm_gate", "rms_norm reshape silu mul reshape",
        """
        n = rms_norm(o, w4)
        h = reshape(z, pattern='... (h=3 d) -> ... h d')
        s = silu(h)
        q = mul(n, s)
        y = reshape(q, pattern='b s h d -> b s (h d)')
        return y
        """,
    ),
    (
        "norm-gate", "norm_gate", "layer_norm sigmoid mul",
        """
        n = layer_norm(x, w, w)
        s = sigmoid(z)
        y = mul(s, n)
        return y
        """,
    ),
    (
        "norm-gate", "norm_gate", "silu mul rms_norm",
        """
        s = silu(z)
        g = mul(x, s)
        y = rms_norm(g, w, groups=3)
        return y
        """,
    ),
    (
        "norm-gate", "norm_gate", "scale_heads add reshape silu mul rms_norm",
        """
        d = scale_heads(v, D)
        a = add(o, d)
        r = reshape(a, pattern='b s h d -> b s (h d)')
        s = silu(z)
        g = mul(r, s)
        y = rms_norm(g, w)
        return y, v
        """,
    ),
    (
        "residual-norm", "residual_norm", "add rms_norm",
        """
        r = add(x, z)
        n = rms_norm(r, w)
        l = linear(n, m)
        return r, l
        """,
    ),
    (
        "glu", "glu", "split gelu mul",
        """
        g, u, a = split(wide, sizes=(12, 12, 12))
        b1 = concat(g, u)
        e, h = split(b1, sizes=(12, 12))
        s = gelu(e)
        y = mul(s, h)
        return y, a
        """,
    ),
    (
        "glu", "glu", "split silu mul",
        """
        g, u = split(x, sizes=(6, 6))
        s = silu(u)
        y = mul(g, s)
        return y
        """,
    ),
    (
        "glu", "glu", "silu mul",
        """
        g, u = split(x, sizes=(6, 6))
        s = silu(g)
        y = mul(s, u)
        return y, g
        """,
    ),
    (
        "glu", "glu", "relu2 mul",
        """
        g = linear(x, m)
        u = linear(z, m)
        s = relu2(g)
        y = mul(u, s)
        return y
        """,
    ),
    (
        "qkv-prep", "qkv_prep", "split reshape rms_norm rope reshape rope reshape",
        """
        a, e, h = split(wide, sizes=(12, 12, 12))
        q = reshape(a, pattern='... (h=3 d) -> ... h d')
        q2 = rms_norm(q, w4)
        q3 = rope(q2, p)
        k1 = reshape(e, pattern='... (h=3 d) -> ... h d')
        k2 = rope(k1, p)
        v2 = reshape(h, pattern='... (h=3 d) -> ... h d')
        y = attention(q3, k2, v2)
        return y
        """,
    ),
    (
        "recurrence-preamble", "preamble", "causal_conv1d reshape l2_norm l2_norm",
        """
        y1, f1 = causal_conv1d(x, c, act='silu')
        h = reshape(y1, pattern='... (h=3 d) -> ... h d')
        k2 = l2_norm(h)
        q2 = l2_norm(k)
        y, f2 = delta_rule(q2, k2, v, gate)
        return y
        """,
    ),
    (
        "recurrence-preamble", "gates", "widen add_bias softplus clamp neg_exp scale_columns sigmoid",
        """
        a = widen(gate)
        b1 = add_bias(a, t)
        d = softplus(b1)
        e = clamp(d, low=0.0, high=5.0)
        r = neg_exp(A)
        decay = scale_columns(e, r)
        beta = sigmoid(gate)
        y, f1 = gated_delta_rule(k, k, v, decay, beta)
        return y
        """,
    ),
    (
        "output-gate", "output_gate", "reshape sigmoid mul",
        """
        a = attention(k, k, v)
        o2 = reshape(a, pattern='b s h d -> b s (h d)')
        s = sigmoid(z)
        y = mul(o2, s)
        return y
        """,
    ),
    (
        "skip", "skip", "scale_heads add",
        """
        d = scale_heads(v, D)
        y = add(o, d)
        return y
        """,
    ),
]  # fmt: skip

# name, why not, body
HOLDS = [
    (
        "norm-gate", "the result of rms_norm is used elsewhere",
        """
        n = rms_norm(o, w4)
        s = silu(v)
        y = mul(n, s)
        return y, n
        """,
    ),
    (
        "norm-gate", "",
        """
        n = rms_norm(x, w)
        s = softplus(z)
        y = mul(n, s)
        return y
        """,
    ),
    (
        "residual-norm", "",
        """
        r = mul(x, z)
        n = rms_norm(r, w)
        return r, n
        """,
    ),
    (
        "residual-norm", "",
        """
        r = add(x, z)
        h = silu(r)
        n = rms_norm(h, w)
        return r, n
        """,
    ),
    (
        "glu", "the result of silu is used elsewhere",
        """
        g = linear(x, m)
        u = linear(z, m)
        s = silu(g)
        y = mul(s, u)
        return y, s
        """,
    ),
    (
        "glu", "gate and value do not come from a split or from projections",
        """
        s = silu(z)
        y = mul(s, x)
        return y
        """,
    ),
    (
        "qkv-prep", "nothing to compute: its split and reshapes stay views",
        """
        q = reshape(x, pattern='... (h=3 d) -> ... h d')
        y = attention(q, k, v)
        return y
        """,
    ),
    (
        "qkv-prep", "",
        """
        y = attention(k, k, v)
        return y
        """,
    ),
    (
        "recurrence-preamble", "nothing to compute: its split and reshapes stay views",
        """
        h = linear(x, m)
        k2 = reshape(h, pattern='... (h=3 d) -> ... h d')
        y, f1 = delta_rule(k2, k2, v, gate)
        return y
        """,
    ),
    (
        "output-gate", "what is gated is not the result of attention or a recurrence",
        """
        s = sigmoid(z)
        y = mul(x, s)
        return y
        """,
    ),
    (
        "output-gate", "",
        """
        a = attention(k, k, v)
        s = silu(o)
        y = mul(a, s)
        return y
        """,
    ),
    (
        "skip", "the result of scale_heads is used elsewhere",
        """
        d = scale_heads(v, D)
        y = add(o, d)
        return y, d
        """,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kernel", "inside", "body"), FIRES)
def test_a_fusion_fires(name: str, kernel: str, inside: str, body: str):
    before = graph(body)
    after, remarks = fuse(before, only=(name,))
    check_types(after)
    assert [(k.name, ops_of(k)) for k in after.callees] == [(kernel, inside)]
    assert [r.what for r in remarks if r.kind == "passed"] == [name]
    assert validate(before, after, "exact").ok and validate(before, inline(after), "exact").ok


@pytest.mark.parametrize(("name", "why", "body"), HOLDS)
def test_a_fusion_holds_back_and_says_why(name: str, why: str, body: str):
    before = graph(body)
    after, remarks = fuse(before, only=(name,))
    assert after == before
    expected = {("missed", why)} if why else {("note", "no match")}
    assert {(r.kind, r.why) for r in remarks} == expected


def test_a_reshape_that_moves_tokens_is_not_row_wise():
    before = graph("""
    a = reshape(k, pattern='b s h d -> b h s d')
    n = rms_norm(a, w4)
    q = reshape(n, pattern='b h s d -> b s h d')
    y = attention(q, k, v)
    return y
    """)
    after, remarks = fuse(before, only=("qkv-prep",))
    assert after == before and "reshape is not row-wise" in {r.why for r in remarks}


def test_reshapes_join_only_where_nothing_else_reads_them():
    body = "n = rms_norm(o, w4)\nh = reshape(z, pattern='... (h=3 d) -> ... h d')\ns = silu(h)\ny = mul(n, s)\nreturn y, h"
    after, _ = fuse(graph(body), only=("norm-gate",))
    assert [ops_of(k) for k in after.callees] == ["rms_norm silu mul"]


def test_a_reshape_behind_joins_only_where_it_alone_reads_the_result():
    body = "n = rms_norm(o, w4)\ns = silu(v)\nq = mul(n, s)\ny = reshape(q, pattern='b s h d -> b s (h d)')\nreturn y"
    kernels = [fuse(graph(text), only=("norm-gate",))[0].callees for text in (body, body + ", q")]
    assert [[ops_of(k) for k in each] for each in kernels] == [["rms_norm silu mul reshape"], ["rms_norm silu mul"]]


def test_keys_and_values_on_their_way_into_a_cache_are_prepared_too():
    inputs = INPUTS.replace("gate: f64[b, s, 3]", "gate: f64[b, s, 3], kc: f64[b, m0, 3, 4], at: i64[()]")
    body = "k2 = rope(k, p)\nq2 = rope(o, p)\nk3 = cache_write(kc, k2, at)\ny = attention(q2, k3, kc, at=at)\nreturn y, k3"
    before = graph(body, inputs)
    after, _ = fuse(before)
    assert [ops_of(k) for k in after.callees] == ["rope rope"] and validate(before, after, "exact").ok


def test_only_and_without_choose():
    before = graph("n = rms_norm(x, w)\ns = silu(z)\ny = mul(n, s)\nd = scale_heads(v, D)\na = add(o, d)\nreturn y, a")
    assert [k.name for k in fuse(before)[0].callees] == ["norm_gate", "skip"]
    assert [k.name for k in fuse(before, without=("skip",))[0].callees] == ["norm_gate"]
    assert [k.name for k in fuse(before, only=("skip",))[0].callees] == ["skip"]


def test_remarks_count_traffic_and_name_the_place():
    before = parse("""
def f(x: bf16[b, s, 10], d: bf16[b, s, 10], *, w: bf16[10] = normal(0.1)):
    r = add(x, d)  # bf16[b, s, 10] from layers.3.residual
    n = rms_norm(r, w)  # bf16[b, s, 10] from layers.3.norm
    return r, n
""")
    _, remarks = fuse(before, only=("residual-norm",))
    # add reads 40 and writes 20, the norm reads 20 and writes 20; the kernel reads 40 and writes 40
    assert [(r.where, r.why) for r in remarks] == [
        ("layers.3", "2 ops become one kernel, 20 bytes a token less memory traffic")
    ]


def test_a_big_flat_graph_fuses_every_place():
    step = "s{0} = silu(z)\nn{0} = rms_norm(x{0}, w)\ng{0} = mul(n{0}, s{0})\nx{1} = linear(g{0}, m)"
    before = graph("\n".join(["x0 = silu(x)", *(step.format(i, i + 1) for i in range(60)), "return x60"]))
    after, remarks = fuse(before)
    assert len([r for r in remarks if r.what == "norm-gate"]) == 60 and len(after.callees) == 1
