"""The lines in which attentions differ, by trait: what skeletons call `$name`."""

from __future__ import annotations

from collections.abc import Mapping

from ..recurrent.source import filled
from .backward_text import KEYS_BLOCK, QUERIES_BLOCK, VALUES_BLOCK, WEIGHTS_BLOCK
from .forward_text import ATTEND_BLOCK
from .traits import Traits

Parts = Mapping[str, str]

COMMON: Parts = {
    # The blocks with most keys go first, so that the short ones fill the gaps at the end.
    "query_block": """
pid = tl.program_id(0).to(tl.int64)
i_h, i_b = pid % (n * H) % H, pid % (n * H) // H
i_g = i_h // R
start = (tl.cdiv(t, BM) - 1 - pid // (n * H)) * BM
o_i, o_n, o_d, o_e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BE)
m_i, m_d, m_e = start + o_i < t, inside(o_d, D, BD), inside(o_e, E, BE)
o_c = tl.minimum(start.to(tl.int32) + o_i, t - 1)
$place
$seen_keys""",
    "walk_keys": """
first, last, inner, outer = spans(lo, hi, BN)
for i in range(inner, outer):
    $inner_block
for i in range(0, last - first - (outer - inner)):
    $outer_block""",
    "key_block": """
pid = tl.program_id(0).to(tl.int64)
i_g, i_b = pid % (n * (H // R)) % (H // R), pid % (n * (H // R)) // (H // R)
begin = pid // (n * (H // R)) * BN
o_n, o_i, o_d, o_e = tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BE)
o_j = begin.to(tl.int32) + o_n
m_j, m_d, m_e = o_j < s, inside(o_d, D, BD), inside(o_e, E, BE)
o_c = tl.minimum(o_j, s - 1)
m_k = m_j[:, None] & m_d[None, :]
k = tl.load(p_k + i_b * s_k_b + begin * s_k_t + i_g * s_k_h + (o_n[:, None] * s_k_t + o_d[None, :]), mask=m_k, other=0.0)
$place
$seeing_queries""",
    # One loop over heads and blocks: what two loops in a third hold does not fit the registers of a program.
    "walk_queries": """
first, last, _, _ = spans(lo, hi, BM)
for i in range(0, (last - first) * R):
    i_h = i_g * R + i // (last - first)
    i_lse = (i_b * H + i_h) * t
    $query_rows""",
    "load_q": """
o_q = i_b * s_q_b + start * s_q_t + i_h * s_q_h + (o_i[:, None] * s_q_t + o_d[None, :])
q = tl.load(p_q + o_q, mask=m_i[:, None] & m_d[None, :], other=0.0)""",
    "load_do": """
o_do = i_b * s_do_b + start * s_do_t + i_h * s_do_h + (o_i[:, None] * s_do_t + o_e[None, :])
do = tl.load(p_do + o_do, mask=m_i[:, None] & m_e[None, :], other=0.0)""",
    "load_k": """
o_k = i_b * s_k_b + begin * s_k_t + i_g * s_k_h + (o_n[:, None] * s_k_t + o_d[None, :])
k = tl.load(p_k + o_k, mask=m_j[:, None] & m_d[None, :], other=0.0)""",
    "load_v": """
o_v = i_b * s_v_b + begin * s_v_t + i_g * s_v_h + (o_n[:, None] * s_v_t + o_e[None, :])
v = tl.load(p_v + o_v, mask=m_j[:, None] & m_e[None, :], other=0.0)""",
    "edge_keys": """
begin = i.to(tl.int64) * BN
o_j = i * BN + o_n
m_j = o_j < s""",
}

# Blocks that every row sees whole lie inside the operands; the others are masked, and hide what a row does not see.
INNER_KEYS: Parts = {
    "keys": """
begin = i.to(tl.int64) * BN
m_j = tl.full((BN,), True, tl.int1)""",
    "hide": "",
    "drop": "",
}
OUTER_KEYS: Parts = {
    "keys": """
begin = tl.where(i < inner - first, first + i, outer - inner + first + i).to(tl.int64) * BN
o_j = begin.to(tl.int32) + o_n
m_j = o_j < s""",
    "hide": 'x = tl.where((o_j[None, :] >= lo[:, None]) & (o_j[None, :] < hi[:, None]), x, float("-inf"))',
    "drop": "p = tl.where((o_j[None, :] >= lo[:, None]) & (o_j[None, :] < hi[:, None]), p, 0.0)",
}
QUERIES: Parts = {
    "queries": """
start = (first + i % (last - first)).to(tl.int64) * BM
o_t = start.to(tl.int32) + o_i
m_i = o_t < t""",
    "drop": "p = tl.where((o_t[None, :] >= lo[:, None]) & (o_t[None, :] < hi[:, None]), p, 0.0)",
}

SOFTCAP: Mapping[bool, Parts] = {
    False: {"bend": "", "straighten": ""},
    True: {"bend": "x = libdevice.tanh(x * bend)", "straighten": "dx *= 1.0 - x * x"},
}
SINKS: Mapping[bool, Parts] = {
    False: {
        "first_logit": """
m = tl.full((BM,), -1e30, tl.float32)
l = tl.zeros((BM,), tl.float32)""",
        "join_sink": "extra = 0.0",
    },
    True: {
        "first_logit": """
sink = tl.load(p_sinks + i_h).to(tl.float32) * 1.4426950408889634
m = tl.full((BM,), 0.0, tl.float32) + tl.maximum(sink, -1e30)
l = tl.exp2(sink - m)""",
        "join_sink": """
sink = tl.load(p_sinks + i_h).to(tl.float32) * 1.4426950408889634
top = tl.maximum(top, sink)
extra = tl.exp2(sink - top)""",
    },
}
PLACE: Mapping[bool, Parts] = {
    False: {"place": "at = s - t"},
    True: {"place": "at = tl.load(p_at).to(tl.int32)"},
}


def seen(traits: Traits) -> Parts:
    """Which keys a query sees, and which queries see a key."""
    keys, queries = ["lo = tl.zeros_like(o_c)", "hi = tl.zeros_like(o_c) + s"], ["lo = tl.zeros_like(o_c)", "hi = lo + t"]
    if traits.causal:
        keys += ["hi = tl.minimum(hi, o_c + at + 1)"]
        queries += ["lo = tl.maximum(lo, o_c - at)"]
    if traits.window:
        keys += ["lo = tl.maximum(lo, o_c + at - window + 1)"]
        queries += ["hi = tl.minimum(hi, o_c - at + window)"]
    if traits.packed:
        borders = ["lo = tl.maximum(lo, tl.load(p_begins + o_c))", "hi = tl.minimum(hi, tl.load(p_ends + o_c))"]
        keys, queries = keys + borders, queries + borders
    return {"seen_keys": "\n".join(keys), "seeing_queries": "\n".join(queries)}


def parts(traits: Traits) -> dict[str, str]:
    """Every part of an attention."""
    found = {**COMMON, **SOFTCAP[traits.softcap], **SINKS[traits.sinks], **PLACE[traits.at], **seen(traits)}
    return found


def walked(traits: Traits, block: str) -> dict[str, str]:
    """Every part, with a walk over blocks of keys, inner ones and those at an edge, or of queries."""
    found, text = parts(traits), BLOCKS[block]
    if block in ("keys", "values"):
        return found | {"query_rows": filled(text, {**found, **QUERIES})}
    inner, outer = (filled(text, {**found, **kind}) for kind in (INNER_KEYS, OUTER_KEYS))
    return found | {"inner_block": inner, "outer_block": outer}


BLOCKS: Parts = {
    "attend": "$keys\n" + ATTEND_BLOCK,
    "queries": "$keys\n" + QUERIES_BLOCK,
    "keys": WEIGHTS_BLOCK + KEYS_BLOCK,
    "values": WEIGHTS_BLOCK + VALUES_BLOCK,
}
