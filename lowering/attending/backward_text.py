"""Skeletons of attention's backward: the gradients of queries, of keys, of values; nothing is added atomically.

Keys and values have a kernel each: one for both holds more than the registers of a program from heads of 128 channels on.

p = exp(x - lse);   dx = p (do v^T - delta), delta = sum(do o);   dq = dx k;   dk = dx^T q;   dv = p^T do
"""

QUERIES = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """The gradient of a block of one head's queries, and sum(do o) of each."""
    $query_block
    $load_q
    $load_do
    m_o = m_i[:, None] & m_e[None, :]
    o = tl.load(p_o + ((i_b * t + start) * H + i_h) * E + (o_i[:, None] * (H * E) + o_e[None, :]), mask=m_o, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    i_lse = (i_b * H + i_h) * t + start
    tl.store(p_delta + i_lse + o_i, delta, mask=m_i)
    lse = tl.load(p_lse + i_lse + o_i, mask=m_i, other=0.0) * 1.4426950408889634
    dq = tl.zeros((BM, BD), tl.float32)
    $walk_keys
    o_dq = ((i_b * t + start) * H + i_h) * D + (o_i[:, None] * (H * D) + o_d[None, :])
    tl.store(p_dq + o_dq, (dq * scale).to(p_dq.dtype.element_ty), mask=m_i[:, None] & m_d[None, :])
'''

QUERIES_BLOCK = """
$load_k
x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
$bend
p = tl.exp2(x * rise - lse[:, None])
$drop
$load_v
dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
dx = p * (dp - delta[:, None])
$straighten
dq = tl.dot(dx.to(C), k, acc=dq, input_precision=PRECISION)
"""

KEYS = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """The gradient of a block of one group's keys, over its heads in order."""
    $key_block
    m_v = m_j[:, None] & m_e[None, :]
    v = tl.load(p_v + i_b * s_v_b + begin * s_v_t + i_g * s_v_h + (o_n[:, None] * s_v_t + o_e[None, :]), mask=m_v, other=0.0)
    dk = tl.zeros((BN, BD), tl.float32)
    $walk_queries
    o_dk = ((i_b * s + begin) * (H // R) + i_g) * D + (o_n[:, None] * (H // R * D) + o_d[None, :])
    tl.store(p_dk + o_dk, (dk * scale).to(p_dk.dtype.element_ty), mask=m_k)
'''

KEYS_BLOCK = """
$load_do
delta = tl.load(p_delta + i_lse + start + o_i, mask=m_i, other=0.0)
dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
dx = p * (dp - delta[None, :])
$straighten
dk = tl.dot(dx.to(C), q, acc=dk, input_precision=PRECISION)
"""

VALUES = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """The gradient of a block of one group's values, over its heads in order."""
    $key_block
    dv = tl.zeros((BN, BE), tl.float32)
    $walk_queries
    o_dv = ((i_b * s + begin) * (H // R) + i_g) * E + (o_n[:, None] * (H // R * E) + o_e[None, :])
    tl.store(p_dv + o_dv, dv.to(p_dv.dtype.element_ty), mask=m_j[:, None] & m_e[None, :])
'''

VALUES_BLOCK = """
$load_do
dv = tl.dot(p.to(C), do, acc=dv, input_precision=PRECISION)
"""

WEIGHTS_BLOCK = """
$queries
$load_q
lse = tl.load(p_lse + i_lse + start + o_i, mask=m_i, other=0.0) * 1.4426950408889634
x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
$bend
p = tl.exp2(x * rise - lse[None, :])
$drop
"""
