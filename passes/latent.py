"""Attention whose keys and values are made of narrow rows: what is done to every key is done to queries and results instead."""

from __future__ import annotations

from collections.abc import Iterator

from ..ir import Graph, Node, OpDef
from .match import Match, Pattern
from .rewrite import Rule, rewrite
from .structure import orderly

_WIDE = """
    y = linear(c, w)
    z = reshape(y, pattern={pattern})
    a, v = split(z, sizes={sizes})
    r = repeat_heads(s, r={heads})
    k = concat(a, r)
    o = attention(q, k, v{cu}, causal=True, window=0, softcap=0.0, scale={scale})
"""
# Scores are q_h (W_h c) = (W_h^T q_h) c and results sum_j p_j (V_h c_j) = V_h sum_j p_j c_j: rows c are the keys and the
# values of one head that all queries share.
_NARROW = """
    t = reshape(w, pattern='(h={heads} d) r -> h r d')
    e, f = split(t, sizes={sizes})
    i, j = split(q, sizes=({own}, {shared}))
    l = head_linear(i, e)
    m = concat(l, j)
    x = reshape(c, pattern='b t r -> b t u=1 r')
    n = concat(x, s)
    b, d = split(n, sizes=({rank}, {shared}))
    g = attention(m, n, b{cu}, scale={factor!r})
    h = reshape(f, pattern='h r e -> h e r')
    o = head_linear(g, h)
"""
_ANY = Pattern.of(_WIDE.format(pattern="P", sizes="S", heads="H", cu="", scale="F"), loose=True)


def absorbed(graph: Graph) -> Graph:
    """The graph with attention to narrow rows where its keys and values are projections of them; exact but for rounding."""
    rules = {rule.name: rule for node in graph.nodes for rule in _rules(graph, node)}
    return rewrite(graph, (*rules.values(),))[0] if rules else graph


def _rules(graph: Graph, node: Node) -> Iterator[Rule]:
    """A rule with the sizes and the scale of an attention whose heads share a part of their keys."""
    for found in _ANY.find(node, graph.makers):
        sizes = _sizes(found)
        if sizes is None or not orderly(found.attrs["P"]):
            continue
        own, value, shared = sizes["own"], sizes["value"], sizes["shared"]
        scale = found.attrs["F"]
        factor = (own + shared) ** -0.5 if scale is None else scale
        written = {"pattern": repr(found.attrs["P"]), "scale": scale, "cu": ", cu=p" * _packed(node)}
        text = {**sizes, **written, "sizes": (own, value), "factor": factor}
        name = "-".join(["absorb-keys", *map(str, (*sizes.values(), factor)), *["packed"] * _packed(node)])
        yield Rule.of(name, _WIDE.format(**text), _NARROW.format(**text))


def _packed(node: Node) -> bool:
    assert isinstance(node.op, OpDef)
    return any(o.name == "cu" and v is not None for o, v in zip(node.op.inputs, node.inputs, strict=True))


def _sizes(found: Match) -> dict[str, int] | None:
    """Of heads and of rows, where a row is narrower than the keys and values of all heads."""
    (own, value), heads = found.attrs["S"], found.attrs["H"]
    rank, shared = (found.values[n].type.dims[-1].size for n in "cs")
    if not isinstance(rank, int) or not isinstance(shared, int) or rank + shared >= heads * (own + shared + value):
        return None
    return {"heads": heads, "own": own, "value": value, "shared": shared, "rank": rank}
