"""The lines in which members of the family differ, by trait: what skeletons call `$name`."""

from __future__ import annotations

from collections.abc import Mapping

from .traits import Traits

Parts = Mapping[str, str]

COMMON: Parts = {
    "rows": """
o_i = tl.arange(0, CHUNK)
last = tl.minimum(end - start, CHUNK).to(tl.int32) - 1
m = o_i <= last""",
    "key_columns": """
o_k = i_k + tl.arange(0, BK)
m_k = m[:, None] & inside(o_k, K, BK)[None, :]""",
    "meeting": """
$load_q
$load_k""",
    "gradient_gates": "$gates",
    "load_q_read": "",
    "value_columns": "m_v = m[:, None] & inside(o_v, V, BV)[None, :]",
    "load_q": "q = tl.load(p_q + start * s_q_t + i_g * s_q_h + (o_i[:, None] * s_q_t + o_k[None, :]), mask=m_k, other=0.0)",
    "load_k": "k = tl.load(p_k + start * s_k_t + i_g * s_k_h + (o_i[:, None] * s_k_t + o_k[None, :]), mask=m_k, other=0.0)",
    "load_v": "v = tl.load(p_v + start * s_v_t + i_h * s_v_h + (o_i[:, None] * s_v_t + o_v[None, :]), mask=m_v, other=0.0)",
    "load_do": """
o_do = o_i[:, None] * s_do_t + o_v[None, :]
do = tl.load(p_do + start * s_do_t + i_h * s_do_h + o_do, mask=m_v, other=0.0)""",
    "load_w": "w = tl.load(p_w + (start * H + i_h) * V + (o_i[:, None] * (H * V) + o_v[None, :]), mask=m_v, other=0.0)",
    "load_s": "s = tl.load(p_states + i_state + o_kv, mask=m_s, other=0.0)",
    "load_ds": "ds = tl.load(p_dstates + i_state + o_kv, mask=m_s, other=0.0)",
}

LENGTHS = {
    False: {
        "chunk": """
i_n = i_c // chunks
start, end = i_n * t + (i_c - i_n * chunks) * CHUNK, i_n * t + t""",
        "segment": "begin, end, first = i_n * t, i_n * t + t, i_n * chunks",
    },
    True: {
        "chunk": """
i_n = tl.load(p_segment + i_c)
if i_n < 0:
    return
start = tl.load(p_cu + i_n) + (i_c - tl.load(p_first + i_n)) * CHUNK
end = tl.load(p_cu + i_n + 1)""",
        "segment": "begin, end, first = tl.load(p_cu + i_n), tl.load(p_cu + i_n + 1), tl.load(p_first + i_n)",
    },
}

_HEAD_SUMS = """
g = tl.load(p_decay + start * s_decay_t + i_h * s_decay_h + o_i * s_decay_t, mask=m, other=0.0).to(WIDE)
g = tl.maximum(g, -128.0)
sums = tl.cumsum(g, 0)"""
_CHANNEL = "(start * H + i_h) * K + (o_i[:, None] * (H * K) + o_k[None, :])"
# Keys stand in front of a chunk, queries where they are used: registers need not hold all three at once.
_Q_READ, _K_READ, _K_WRITE = (f"tl.load(p_{x} + {_CHANNEL}, mask=m_k, other=0.0)" for x in ("q_read", "k_read", "k_write"))
_CHANNEL_SUMS = f"sums = tl.load(p_sums + {_CHANNEL}, mask=m_k, other=0.0)"
_HEAD_GATES = """
total = tl.sum(g, 0)
rise = tl.exp(sums.to(tl.float32))[:, None]
fall = tl.exp(tl.minimum(total - sums, 0.0).to(tl.float32))[:, None]
fade = tl.exp(total.to(tl.float32))"""
_CHANNEL_GATES = """
total = tl.load(p_sums + (start + last) * (H * K) + i_h * K + o_k, mask=inside(o_k, K, BK), other=0.0)
rise = tl.exp(sums.to(tl.float32))
fall = tl.exp(tl.minimum(total[None, :] - sums, 0.0).to(tl.float32))
fade = tl.exp(total.to(tl.float32))[:, None]"""

# Value heads are walked twice, so that scores need no registers while keys are solved for.
_VALUE_HEADS = """
for i_r in range(R):
    i_h = i_g * R + i_r
    $sums
    $pairs
    i_s, o_s = (i_c * H + i_h) * CHUNK * CHUNK, o_i[:, None] * CHUNK + o_i[None, :]"""

_KEPT: Parts = {
    "no_kept": "kept = tl.zeros((BK,), tl.float32)",
    "pull_kept": "kept += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)",
    "scale_rise": "rise * scale",
    "times_fall": "writes *= fall",
    "rise_k": " * rise",
}

DECAY: Mapping[str, Parts] = {
    "none": {
        "sums": "",
        "gates": "",
        "pairs": "",
        "weighted_qk": "tl.where(o_i[:, None] >= o_i[None, :], qk, 0.0)",
        "weighted_kk": "kk",
        "read_q": "reads(q, s_c, SPLIT, C, PRECISION)",
        "read_k": "reads(k, s_c, SPLIT, C, PRECISION)",
        "write": "added(s, tl.trans(k), u, C, PRECISION)",
        "fade_one": "",
        "write_back": "reads(k, ds, SPLIT, C, PRECISION)",
        "fade_back": "added(ds, tl.trans(q), do * scale, C, PRECISION)",
        "read_back_k": "ds = added(ds, tl.trans(k), -dv, C, PRECISION)",
        "weights": "",
        "no_kept": "",
        "pull_kept": "",
        "scale_rise": "scale",
        "times_fall": "",
        "rise_k": "",
        "pair_gradients": "$head_pairs",
        "add_left_k": "$head_left_k",
        "store_ddecay": "",
    },
    "head": {
        "sums": _HEAD_SUMS,
        "gates": _HEAD_SUMS + _HEAD_GATES,
        "pairs": "pairs = tl.exp(tl.minimum(sums[:, None] - sums[None, :], 0.0).to(tl.float32))",
        "weighted_qk": "tl.where(o_i[:, None] >= o_i[None, :], qk * pairs, 0.0)",
        "weighted_kk": "kk * pairs",
        "read_q": "reads(q, s_c, SPLIT, C, PRECISION) * rise",
        "read_k": "reads(k, s_c, SPLIT, C, PRECISION) * rise",
        "write": "added(s * fade, tl.trans(k), u * fall, C, PRECISION)",
        "fade_one": "s *= tl.exp(tl.load(p_decay + row * s_decay_t + i_h * s_decay_h).to(tl.float32))",
        "write_back": "reads(k, ds, SPLIT, C, PRECISION) * fall",
        "fade_back": "added(ds * fade, tl.trans(q), do * (rise * scale), C, PRECISION)",
        "read_back_k": "ds = added(ds, tl.trans(k), -dv * rise, C, PRECISION)",
        "weights": """
$sums
$pairs
dp *= pairs
$weigh_da""",
        "pair_gradients": "$head_pairs",
        "add_left_k": "$head_left_k",
        **_KEPT,
        "store_ddecay": """
moved = tl.sum($moved, 1)
written = tl.sum(k * writes, 1)
past = tl.cumsum(moved, 0, reverse=True) + tl.cumsum(written, 0) - written + tl.sum(kept, 0) * fade
tl.store(p_ddecay + (i_part * n_rows + start) * H + i_h + o_i * H, past, mask=m)""",
    },
    "channel": {
        "sums": _CHANNEL_SUMS,
        "load_q_read": f"q_read = {_Q_READ}",
        "meeting": f"""
$load_k_read
k_write = {_K_WRITE}""",
        "gates": "fade = tl.load(p_fade + (i_c * H + i_h) * K + o_k, mask=inside(o_k, K, BK), other=0.0)[:, None]",
        "gradient_gates": f"{_CHANNEL_SUMS}\n{_CHANNEL_GATES}",
        "weighted_kk": "kk",
        "read_q": "reads(q_read, s_c, SPLIT, C, PRECISION)",
        "read_k": "reads(k_read, s_c, SPLIT, C, PRECISION)",
        "write": "added(s * fade, tl.trans(k_write), u, C, PRECISION)",
        "fade_one": """
g = tl.load(p_decay + row * s_decay_t + i_h * s_decay_h + o_k, mask=m_k, other=0.0).to(tl.float32)
s *= tl.exp(g)[:, None]""",
        "write_back": "reads(k_write, ds, SPLIT, C, PRECISION)",
        "fade_back": "added(ds * fade, tl.trans(q_read), do * scale, C, PRECISION)",
        "read_back_k": "ds = added(ds, tl.trans(k_read), -dv, C, PRECISION)",
        "weights": "",
        "add_left_k": "",
        "pair_gradients": """
moved = $pulled
right = $first_right
for level in $levels:
    near = span(p_sums + (start * H + i_h) * K, sums, o_i, o_k, last, level, H * K, K, BK)
    meets = across(o_i, level)
    part = tl.where(meets, dp, 0.0)
    near_q, near_k = (q * near).to(L), (k * near).to(L)
    row, column = product(part, near_k, L, SOLVE), product(tl.trans(part), near_q, L, SOLVE)
    left += row * near
    right += column * near
    moved += near_q * row - near_k * column
    $pair_gradients_k""",
        **_KEPT,
        "store_ddecay": """
written = k * writes
past = tl.cumsum(moved, 0, reverse=True) + tl.cumsum(written, 0) - written + (kept * tl.reshape(fade, (BK,)))[None, :]
o_decay = (start * H + i_h) * K + (o_i[:, None] * (H * K) + o_k[None, :])
tl.store(p_ddecay + o_decay, past.to(p_ddecay.dtype.element_ty), mask=m_k)""",
    },
}

BETA: Mapping[bool, Parts] = {
    False: {
        "beta": "",
        "times_beta": "",
        "update_one_beta": "",
        "no_dbeta": "",
        "pull_beta": "",
        "pull_beta_late": "",
        "store_dbeta": "",
    },
    True: {
        # Where w is not rounded yet: what w and u lose would add up in their product.
        "pull_beta": """
if EARLY:
    $load_written
    pulled = tl.sum(w * $written.to(tl.float32), 1)
    tl.store(p_pulled + (i_v * n_rows + start) * H + i_h + o_i * H, pulled, mask=m)""",
        "no_dbeta": "dbeta = tl.zeros((CHUNK,), tl.float32)",
        "pull_beta_late": """
if not EARLY:
    $load_written
    dbeta += tl.sum(w.to(tl.float32) * $written.to(tl.float32), 1)""",
        "store_dbeta": """
if EARLY:
    for i_v in range(0, tl.cdiv(V, BW)):
        dbeta += tl.load(p_pulled + (i_v * n_rows + start) * H + i_h + o_i * H, mask=m, other=0.0)
tl.store(p_dbeta + start * H + i_h + o_i * H, $dbeta, mask=m)""",
        "beta": """
beta = tl.load(p_beta + start * s_beta_t + i_h * s_beta_h + o_i * s_beta_t, mask=m, other=0.0).to(tl.float32)[:, None]
$beta_guard""",
        "times_beta": " * beta",
        "update_one_beta": "u *= tl.load(p_beta + row * s_beta_t + i_h * s_beta_h).to(tl.float32)",
    },
}

UPDATE: Mapping[bool, Parts] = {
    False: {
        "load_k_read": "",
        "kk": "",
        "no_kk": "",
        "meets": "",
        "beta_guard": "",
        **{"solve": "", "solve_heads": ""},
        "store_k_read": "",
        "update": "u = v$times_beta",
        "keep_u": "",
        "update_one": "$update_one_beta",
        "unsolve": "",
        "read_back": "",
        "no_da": "",
        "load_u": """
$load_v
u = v$times_beta""",
        "pull_da": "",
        **{"load_written": "$load_v", "written": "v", "dbeta": "dbeta"},
        "weigh_da": "",
        "store_da": "",
        "no_left_k": "",
        "pull_left_k": "",
        "times_left_k": "",
        "load_da": "",
        "head_pairs": """
dp = tl.where(same, 0.0, dp)
left = added(left, dp, k, C, PRECISION)
right = product(tl.trans(dp), q, C, PRECISION)""",
        "pair_gradients_k": "",
        "moved": "q * left - k * right",
        "pulled": "q * left",
        "first_right": "tl.zeros((CHUNK, BK), tl.float32)",
        # What is the same at every level is made again there: registers hold operands of float32 instead.
        "levels": "tl.range(0, LEVELS, disable_licm=True)",
        "head_left_k": "",
        "beta_of_u": "$beta",
        "beta_of_left_k": "",
    },
    True: {
        "load_k_read": f"k_read = {_K_READ}",
        "kk": "kk = added(kk, k, tl.trans(k), C, PRECISION)",
        "no_kk": "kk = tl.zeros((CHUNK, CHUNK), tl.float32)",
        "meets": "kk += tl.where(meets, product(near_k, tl.trans(near_k), L, SOLVE), 0.0)",
        "solve": """
solve = invert(tl.where(o_i[:, None] > o_i[None, :], $weighted_kk$times_beta, 0.0), CHUNK, SOLVE)
tl.store(p_solve + i_s + o_s, solve.to(C))""",
        "solve_heads": f"{_VALUE_HEADS}\n    $beta\n    $solve",
        "store_k_read": "tl.store(p_k_read + i_x + o_x, (k * rise).to(C), mask=m_k)",
        "update": """
u = (v - $read_k)$times_beta
u = solved(tl.load(p_solve + i_s + o_s), u, C, PRECISION)""",
        "keep_u": "tl.store(p_u + (start * H + i_h) * V + (o_i[:, None] * (H * V) + o_v[None, :]), u.to(C), mask=m_v)",
        "unsolve": "w = solved(tl.trans(tl.load(p_solve + i_s + o_s)), w, C, PRECISION)",
        "read_back": "$read_back_k",
        "no_da": "da = tl.zeros((CHUNK, CHUNK), tl.float32)",
        "load_u": "u = tl.load(p_u + (start * H + i_h) * V + (o_i[:, None] * (H * V) + o_v[None, :]), mask=m_v, other=0.0)",
        "pull_da": "da = added(da, -w, tl.trans(u), C, PRECISION)",
        **{"load_written": "$load_u", "written": "u", "dbeta": "dbeta / tl.reshape(beta, (CHUNK,))"},
        "weigh_da": "da *= pairs",
        "store_da": "tl.store(p_da + i_s + o_s, (tl.where(o_i[:, None] > o_i[None, :], da, 0.0)$times_beta).to(C))",
        "no_left_k": "left_k = tl.zeros((CHUNK, BK), tl.float32)",
        "pull_left_k": """
$load_w
left_k = added(left_k, -w, tl.trans(s), C, PRECISION)""",
        "times_left_k": "left_k = left_k$rise_k$times_beta",
        "load_da": "da = tl.load(p_da + i_s + o_s)",
        "head_pairs": """
dp = tl.where(same, 0.0, dp)
left = added(left, dp, k, C, PRECISION)
left_k = added(left_k, da, k, C, PRECISION)
right = added(product(tl.trans(dp), q, C, PRECISION), tl.trans(da), k, C, PRECISION)""",
        "pair_gradients_k": """
part = tl.where(meets, da, 0.0)
row, column = product(part, near_k, L, SOLVE), product(tl.trans(part), near_k, L, SOLVE)
right += (row + column) * near
moved += near_k * (row - column)""",
        "moved": "q * left + k * left_k - k * right",
        "pulled": "q * left + k * left_k",
        "beta_of_u": "",
        "beta_of_left_k": "$beta",
        "first_right": "left_k",
        "levels": "range(LEVELS)",
        "head_left_k": "right += left_k",
        "beta_guard": "beta = tl.where(tl.abs(beta) < TINY, TINY, beta)",
        "update_one": """
u -= tl.sum(k[:, None] * s, 0)
$update_one_beta""",
    },
}

OUTPUT: Mapping[bool, Parts] = {
    False: {
        **dict.fromkeys(("load_q", "store_q_read", "no_qk", "qk", "scale_qk", "store_heads"), ""),
        **dict.fromkeys(("no_scores", "own_scores", "scores", "store_scores", "output"), ""),
    },
    True: {
        "store_q_read": "tl.store(p_q_read + i_x + o_x, (q * rise).to(C), mask=m_k)",
        "no_qk": "qk = tl.zeros((CHUNK, CHUNK), tl.float32)",
        "qk": "qk = added(qk, q, tl.trans(k), C, PRECISION)",
        "scale_qk": "qk *= scale",
        "store_heads": f"{_VALUE_HEADS}\n    $store_qk",
        "store_qk": "tl.store(p_scores + i_s + o_s, ($weighted_qk).to(L))",
        "no_scores": "scores = tl.zeros((CHUNK, CHUNK), tl.float32)",
        "own_scores": """
own = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
scores += tl.where(o_i[:, None] == o_i[None, :], own[:, None], 0.0)""",
        "scores": "scores += tl.where(meets, product(q * near, tl.trans(near_k), L, SOLVE), 0.0)",
        "store_scores": "tl.store(p_scores + i_s + o_s, (scores * scale).to(L))",
        "output": """
$load_q_read
o = added($read_q * scale, tl.load(p_scores + i_s + o_s), u, L, SOLVE)
tl.store(p_o + (start * H + i_h) * V + (o_i[:, None] * (H * V) + o_v[None, :]), o.to(p_o.dtype.element_ty), mask=m_v)""",
    },
}

STATE: Mapping[bool, Parts] = {
    False: {"first_state": "s = tl.zeros((BK, BV), tl.float32)"},
    True: {"first_state": "s = tl.load(p_state + i_state + o_kv, mask=m_s, other=0.0).to(tl.float32)"},
}
KEEP: Mapping[bool, Parts] = {
    False: {"keep_state": "", "keep_u": ""},
    True: {
        "keep_state": """
tl.store(p_states + (i_c * H + i_h) * K * V + o_kv, s.to(C), mask=m_s)"""
    },
}


def parts(traits: Traits) -> dict[str, str]:
    """Every part of a member."""
    chosen = (LENGTHS[traits.packed], DECAY[traits.decay], UPDATE[traits.delta], BETA[traits.beta], STATE[traits.state])
    found = dict(COMMON)
    for part in (*chosen, KEEP[traits.keep], OUTPUT[traits.output]):
        found |= part
    return found
