"""Skeletons of the backward kernels: the state's gradient from last chunk to first, then every chunk by itself.

w = solve^T (scores^T do + k write dS');   dv = beta w;   dS = fade dS' + (q read)^T do - (beta k read)^T w
dP = do u^T,  dA = -w u^T beneath the diagonal;   dbeta = w . u / beta
Decay is exp(sum_i - sum_j) wherever it stands: what rows pull less what columns pull is the gradient of the sums, of operands
as products have them, rounded, so that a pair within what is added up leaves nothing.
"""

BACK = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """The gradient of one head's state, some of its value channels, back through all chunks; those of values on its way."""
    pid = tl.program_id(0).to(tl.int64)
    i_v, i_n, i_h = (pid % tl.cdiv(V, BV)).to(tl.int32), pid // tl.cdiv(V, BV) // H, pid // tl.cdiv(V, BV) % H
    i_g = i_h // R
    $segment
    i_k = 0
    o_v = i_v * BV + tl.arange(0, BV)
    i_state, o_kv = (i_n * H + i_h) * K * V, tl.arange(0, BK)[:, None] * V + o_v[None, :]
    m_s = inside(tl.arange(0, BK), K, BK)[:, None] & inside(o_v, V, BV)[None, :]
    ds = tl.load(p_dfinal + i_state + o_kv, mask=m_s, other=0.0).to(tl.float32)
    count = tl.cdiv(end - begin, CHUNK)
    for i in range(0, count):
        i_c, start = first + count - 1 - i, begin + (count - 1 - i) * CHUNK
        $rows
        $key_columns
        $value_columns
        $meeting
        $load_do
        $gates
        i_s, o_s = (i_c * H + i_h) * CHUNK * CHUNK, o_i[:, None] * CHUNK + o_i[None, :]
        tl.store(p_dstates + (i_c * H + i_h) * K * V + o_kv, ds.to(C), mask=m_s)
        w = added($write_back, tl.trans(tl.load(p_scores + i_s + o_s)), do, L, SOLVE)
        $beta
        $unsolve
        $pull_beta
        i_w, o_w = (start * H + i_h) * V, o_i[:, None] * (H * V) + o_v[None, :]
        tl.store(p_w + i_w + o_w, w.to(C), mask=m_v)
        dv = w$times_beta
        tl.store(p_dv + i_w + o_w, dv.to(p_dv.dtype.element_ty), mask=m_v)
        $load_q_read
        ds = $fade_back
        $read_back
    tl.store(p_dstate + i_state + o_kv, ds, mask=m_s)
'''

PULLS = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """The gradients of one chunk's and head's scores, and of beta."""
    pid = tl.program_id(0).to(tl.int64)
    i_c, i_h = pid // H, pid % H
    $chunk
    $rows
    $beta
    dp = tl.zeros((CHUNK, CHUNK), tl.float32)
    $no_da
    $no_dbeta
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        $value_columns
        $load_do
        $load_w
        $load_u
        dp = added(dp, do, tl.trans(u), C, PRECISION)
        $pull_da
        $pull_beta_late
    $weights
    i_s, o_s = (i_c * H + i_h) * CHUNK * CHUNK, o_i[:, None] * CHUNK + o_i[None, :]
    tl.store(p_dp + i_s + o_s, (tl.where(o_i[:, None] >= o_i[None, :], dp, 0.0) * scale).to(L))
    $store_da
    $store_dbeta
'''

GRADIENTS = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """The gradients of one chunk's and head's queries, keys and decays, some key channels."""
    pid = tl.program_id(0).to(tl.int64)
    i_part, i_c, i_h = (pid % tl.cdiv(K, BK)).to(tl.int32), pid // tl.cdiv(K, BK) // H, pid // tl.cdiv(K, BK) % H
    i_g = i_h // R
    i_k = i_part * BK
    $chunk
    $rows
    $key_columns
    left = tl.zeros((CHUNK, BK), tl.float32)
    writes = tl.zeros((CHUNK, BK), tl.float32)
    $no_left_k
    $no_kept
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        $value_columns
        m_s = inside(o_k, K, BK)[:, None] & inside(o_v, V, BV)[None, :]
        i_state, o_kv = (i_c * H + i_h) * K * V, o_k[:, None] * V + o_v[None, :]
        $load_do
        $beta_of_u
        $load_u
        $load_s
        $load_ds
        left = added(left, do, tl.trans(s), C, PRECISION)
        writes = added(writes, u, tl.trans(ds), C, PRECISION)
        $pull_left_k
        $pull_kept
    $gradient_gates
    left *= $scale_rise
    $times_fall
    $beta_of_left_k
    $times_left_k
    i_s, o_s = (i_c * H + i_h) * CHUNK * CHUNK, o_i[:, None] * CHUNK + o_i[None, :]
    dp = tl.load(p_dp + i_s + o_s)
    same = o_i[:, None] == o_i[None, :]
    own = tl.sum(tl.where(same, dp, 0.0).to(tl.float32), 1)[:, None]
    $load_da
    $load_q
    $load_k
    $pair_gradients
    $store_ddecay
    i_x, o_x = (start * H + i_h) * K, o_i[:, None] * (H * K) + o_k[None, :]
    tl.store(p_dq + i_x + o_x, (left + own * k).to(p_dq.dtype.element_ty), mask=m_k)
    right += writes + own * q
    $add_left_k
    tl.store(p_dk + i_x + o_x, right.to(p_dk.dtype.element_ty), mask=m_k)
'''
