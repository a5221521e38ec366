"""Small programs, and how each is placed, in which tests/mutants.py plants mistakes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from plait.ir import Graph, parse
from plait.passes import Pipeline, differentiate, place
from plait.passes.tensor import split_features

ATTENTION = """
def f(x: f64[b, s, 6], tokens: i64[b, s], *, w: f64[32, 6] = normal(0.5), sinks: f64[4] = constant(0.5),
      o: f64[6, 16] = normal(0.5)):
    p = positions(tokens)
    y = linear(x, w)
    q0, k0, v0 = split(y, sizes=(16, 8, 8))
    q1 = reshape(q0, pattern='... (h=4 d) -> ... h d')
    k1 = reshape(k0, pattern='... (h=2 d) -> ... h d')
    v = reshape(v0, pattern='... (h=2 d) -> ... h d')
    q = rope(q1, p)
    k = rope(k1, p)
    a = attention(q, k, v, sinks)
    m = reshape(a, pattern='b t h d -> b t (h d)')
    z = linear(m, o)
    r = add(x, z)
    return r
"""
DELTA = """
def f(x: f64[b, s, 22], gate: f64[b, s, 2], raw: f64[b, s, 2], *, w: f64[22, 4] = normal(0.5)):
    y, end = causal_conv1d(x, w, act='silu')
    a, e, c = split(y, sizes=(6, 6, 10))
    q1 = reshape(a, pattern='... (h=2 d) -> ... h d')
    k1 = reshape(e, pattern='... (h=2 d) -> ... h d')
    q = l2_norm(q1)
    k = l2_norm(k1)
    v = reshape(c, pattern='... (h=2 d) -> ... h d')
    step = softplus(gate)
    decay = scale(step, by=-0.5)
    beta = sigmoid(raw)
    o, final = gated_delta_rule(q, k, v, decay, beta)
    m = reshape(o, pattern='b t h d -> b t (h d)')
    r = mul(m, c)
    return r
"""
SSD = """
def f(q: f64[b, s, 2, 3], k: f64[b, s, 2, 3], v: f64[b, s, 4, 5], gate: f64[b, s, 4]):
    step = softplus(gate)
    decay = scale(step, by=-0.5)
    o, final = ssd(q, k, v, decay, step)
    return o
"""
CONV = """
def f(x: f64[b, s, 6], *, w: f64[6, 4] = normal(0.5)):
    y, end = causal_conv1d(x, w, act='silu')
    return y
"""
LOSS = """
def f(x: f64[b, s, 6], labels: i64[b, s], *, w: f64[11, 6] = normal(0.5)):
    loss = linear_cross_entropy(x, w, labels)
    return loss
"""
BALANCE = """
def f(logits: f64[b, s, 5], experts: i64[b, s, 2]):
    loss = load_balance_loss(logits, experts)
    return loss
"""
DROPOUT = """
def f(x: f64[b, s, 6], seed: i64[()]):
    y = dropout(x, seed, p=0.4)
    return y
"""
MLP = """
def f(x: f64[b, s, 6], *, n: f64[6] = constant(1.0), w: f64[20, 6] = normal(0.5), c: f64[6, 8] = normal(0.5),
      e: f64[6, 4] = normal(0.5), bias: f64[6] = normal(0.5)):
    h = rms_norm(x, n)
    u = linear(h, w)
    g, v, t = split(u, sizes=(8, 8, 4))
    a = silu(g)
    m = mul(a, v)
    y = linear(m, c, bias)
    j = silu(t)
    l = linear(j, e)
    k = add(y, l)
    z = add(x, k)
    return z
"""
WORDS = """
def f(tokens: i64[b, s], *, table: f64[10, 6] = normal(0.5)):
    x = embedding(table, tokens)
    y = silu(x)
    return y
"""
HEAD = """
def f(x: f64[b, s, 6], labels: i64[b, s], *, w: f64[12, 6] = normal(0.5)):
    l = linear_token_losses(x, w, labels)
    return l
"""
REORDER = """
def f(x: f64[b, s@cp:zigzag(2), 6]):
    y = reorder(x, was='zigzag(2)', over='cp', by='exchange')
    return y
"""
LAYER = """
def f(x: f64[b, s, 5], *, w: f64[26, 5] = normal(0.5), c: f64[22, 4] = normal(0.5)):
    p = linear(x, w)
    y, g, r = split(p, sizes=(22, 2, 2))
    n, end = causal_conv1d(y, c)
    a, e, v0 = split(n, sizes=(6, 6, 10))
    q1 = reshape(a, pattern='... (h=2 d) -> ... h d')
    k1 = reshape(e, pattern='... (h=2 d) -> ... h d')
    q = l2_norm(q1)
    k = l2_norm(k1)
    v = reshape(v0, pattern='... (h=2 d) -> ... h d')
    step = softplus(g)
    decay = scale(step, by=-0.5)
    beta = sigmoid(r)
    o, final = gated_delta_rule(q, k, v, decay, beta)
    m = reshape(o, pattern='b t h d -> b t (h d)')
    return m
"""
EXPERTS = """
def f(x: f64[b, s, 6], *, r: f64[4, 6] = normal(0.5), w: f64[4, 8, 6] = normal(0.5), c: f64[4, 6, 8] = normal(0.5)):
    l = linear(x, r)
    weights, chosen = route(l, k=2)
    rows, order, counts = dispatch(x, chosen, e=4)
    h = grouped_linear(rows, w, counts)
    a = silu(h)
    y = grouped_linear(a, c, counts)
    z = combine(y, order, weights)
    return z
"""


@dataclass(frozen=True)
class Program:
    """A program, and how it is placed; with `back` its gradients are placed too, as text over ops."""

    text: str
    placing: Callable[[Graph], Graph]
    back: bool = False

    @property
    def before(self) -> Graph:
        return parse(self.text)

    def after(self) -> Graph:
        made = self.placing(self.before)
        return differentiate(made)[0] if self.back else made


def packed(text: str) -> str:
    """The program of packed segments."""
    text = text.replace(", *,", ", cu: i64[n+1], *,") if ", *," in text else text.replace("):\n", ", cu: i64[n+1]):\n", 1)
    for call in ("positions(tokens", "attention(q, k, v, sinks", "delta_rule(q, k, v, decay, beta", "ssd(q, k, v, decay, step"):
        text = text.replace(call, f"{call}, cu=cu")
    return text.replace("causal_conv1d(x, w", "causal_conv1d(x, w, cu=cu")


def over(**options: Any) -> Callable[[Graph], Graph]:
    """Tokens over ranks."""
    return lambda graph: place(graph, **options)[0]


def features(**options: Any) -> Callable[[Graph], Graph]:
    """Features over ranks."""
    return lambda graph: split_features(graph, **options)[0]


def through(pipeline: str) -> Callable[[Graph], Graph]:
    """Passes by name."""
    return lambda graph: Pipeline.parse(pipeline).run(graph)


def written(text: str) -> Callable[[Graph], Graph]:
    """Placed by hand."""
    return lambda graph: parse(text)


_FOUR: Mapping[str, Any] = {"mesh": "cp=4", "order": "zigzag"}

PROGRAMS = {
    "heads": Program(ATTENTION, over()),
    "heads, one key head": Program(ATTENTION, over(**_FOUR)),
    "heads, zigzag": Program(ATTENTION, over(order="zigzag")),
    "kv": Program(ATTENTION, over(attention="kv")),
    "ring": Program(ATTENTION, over(attention="ring")),
    "ring, zigzag": Program(ATTENTION, over(attention="ring", order="zigzag")),
    "ring, four ranks": Program(ATTENTION, over(attention="ring", **_FOUR)),
    "ring, packed": Program(packed(ATTENTION), over(attention="ring")),
    "gather": Program(ATTENTION, over(attention="gather"), back=True),
    "delta heads": Program(DELTA, over()),
    "delta heads, zigzag": Program(DELTA, over(order="zigzag")),
    "delta states": Program(DELTA, over(recurrence="states")),
    "delta states, back": Program(DELTA, over(recurrence="states"), back=True),
    "delta chain, zigzag": Program(DELTA, over(recurrence="chain", order="zigzag")),
    "delta chain, packed": Program(packed(DELTA), over(recurrence="chain")),
    "delta scan, four ranks": Program(DELTA, over(recurrence="scan", **_FOUR)),
    "ssd chain": Program(SSD, over(recurrence="chain")),
    "ssd chain, four ranks": Program(SSD, over(recurrence="chain", **_FOUR)),
    "conv": Program(CONV, over()),
    "conv, back": Program(CONV, over(), back=True),
    "loss": Program(LOSS, over()),
    "loss, back": Program(LOSS, over(), back=True),
    "balance": Program(BALANCE, over()),
    "dropout": Program(DROPOUT, over()),
    "mlp": Program(MLP, features()),
    "mlp, back": Program(MLP, features(), back=True),
    "mlp, sequence": Program(MLP, features(sequence=True)),
    "words": Program(WORDS, features()),
    "head": Program(HEAD, written(HEAD.replace("12,", "12@tp,").replace("labels)\n", "labels, over='tp', by='vocabulary')\n"))),
    "packed features": Program(LAYER, through("place,hoist-exchanges,merge-exchanges,fold-orders,dce")),
    "overlap": Program(LAYER, through("place,overlap,dce")),
    "experts": Program(EXPERTS, through("place{mesh='ep=2'}")),
    "batch": Program(LOSS, through("place{mesh='dp=2'}")),
    "two axes": Program(ATTENTION, through("place{mesh='cp=2,tp=2' attention=ring}")),
    "exchange": Program("def f(x: f64[b, s, 6]):\n    return x\n", written(REORDER)),
}
