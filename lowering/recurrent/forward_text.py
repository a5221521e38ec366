"""Skeletons of the forward kernels and of the decode step: `$name` stands for a line or an expression of `parts`.

o = q read S + scores u;   u = solve beta (v - k read S);   S' = fade S + (k write)^T u
"""

INSIDE = '''
@triton.jit
def inside(o, N: tl.constexpr, B: tl.constexpr):
    """Which of a tile's channels there are: all, known when compiled, where tiles of B fill N."""
    if N % B == 0:
        return tl.full(o.shape, True, tl.int1)
    else:
        return o < N
'''

PRODUCT = '''
@triton.jit
def product(a, b, C: tl.constexpr, PRECISION: tl.constexpr):
    """A matrix product of operands in C, added up in float32."""
    return tl.dot(a.to(C), b.to(C), input_precision=PRECISION)


@triton.jit
def added(total, a, b, C: tl.constexpr, PRECISION: tl.constexpr):
    """The total and a matrix product more, in the total's registers."""
    return tl.dot(a.to(C), b.to(C), acc=total, input_precision=PRECISION)
'''

SOLVED = '''
@triton.jit
def solved(t, x, C: tl.constexpr, PRECISION: tl.constexpr):
    """A product with what is not rounded to C: its nearest in C, and the nearest of what that leaves."""
    if C == tl.float32:
        return tl.dot(t, x, input_precision=PRECISION)
    else:
        near = x.to(C)
        return tl.dot(t, (x - near.to(tl.float32)).to(C), acc=tl.dot(t, near))
'''

READS = '''
@triton.jit
def reads(x, s, SPLIT: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Rows that meet a state; key channels in SPLIT parts, so that no warp holds a whole row."""
    if SPLIT == 1:
        return tl.dot(x.to(C), s.to(C), input_precision=PRECISION)
    else:
        rows = tl.permute(tl.reshape(x.to(C), (x.shape[0], SPLIT, x.shape[1] // SPLIT)), (1, 0, 2))
        state = tl.reshape(s.to(C), (SPLIT, s.shape[0] // SPLIT, s.shape[1]))
        return tl.sum(tl.dot(rows, state, input_precision=PRECISION), 0)
'''

INVERT = '''
@triton.jit
def invert(a, N: tl.constexpr, SOLVE: tl.constexpr):
    """(I + a)^-1 of a strictly lower a[N, N]: blocks of 16 row by row, all at once, then pairs of blocks."""
    B: tl.constexpr = N // 16
    o = tl.arange(0, N)
    b_i, b_j = (o // 16)[:, None], (o // 16)[None, :]
    blocks = tl.sum(tl.reshape(tl.where(b_i == b_j, a, 0.0), (B, 16, B, 16)), 2)
    o_b = tl.arange(0, 16)
    t = tl.broadcast_to(tl.where(o_b[:, None] == o_b[None, :], 1.0, 0.0)[None, :, :], (B, 16, 16))
    for i in range(1, 16):
        here = (o_b == i)[None, :, None]
        line = tl.sum(tl.where(here, blocks, 0.0), 1)
        t = tl.where(here, t - tl.sum(line[:, :, None] * t, 1)[:, None, :], t)
    x = tl.reshape(tl.broadcast_to(t[:, :, None, :], (B, 16, B, 16)), (N, N))
    x = tl.where(b_i == b_j, x, 0.0)
    if N > 16:
        pair = tl.where((b_i % 2 == 1) & (b_j == b_i - 1), a, 0.0)
        x -= tl.dot(tl.dot(x, pair, input_precision=SOLVE), x, input_precision=SOLVE)
    if N > 32:
        pair = tl.where((b_i >= 2) & (b_j < 2), a, 0.0)
        x -= tl.dot(tl.dot(x, pair, input_precision=SOLVE), x, input_precision=SOLVE)
    return x
'''

SPAN = '''
@triton.jit
def span(p_sums, sums, o_i, o_k, last, level, ROW: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """What remains between each row and the middle of its pair of halves, each of 2^level rows."""
    o_m = tl.minimum((o_i >> (level + 1) << (level + 1)) + (1 << level) - 1, last)
    middle = tl.load(p_sums + (o_m[:, None] * ROW + o_k[None, :]), mask=inside(o_k, K, BK)[None, :], other=0.0)
    return tl.exp(-tl.abs(sums - middle).to(tl.float32))


@triton.jit
def across(o_i, level):
    """Where the row is in a later half and the column in the earlier one beside it."""
    part = o_i >> level
    return (part[:, None] % 2 == 1) & (part[None, :] == part[:, None] - 1)
'''

GATES = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """The decay of one chunk and head since its start, some key channels, and queries and keys as they meet the state."""
    pid = tl.program_id(0).to(tl.int64)
    i_part, i_c, i_h = (pid % tl.cdiv(K, BK)).to(tl.int32), pid // tl.cdiv(K, BK) // H, pid // tl.cdiv(K, BK) % H
    i_g = i_h // R
    i_k = i_part * BK
    $chunk
    $rows
    $key_columns
    $load_q
    $load_k
    g = tl.load(p_decay + start * s_decay_t + i_h * s_decay_h + (o_i[:, None] * s_decay_t + o_k[None, :]), mask=m_k, other=0.0)
    g = tl.maximum(g.to(WIDE), -128.0)
    sums = tl.cumsum(g, 0)
    total = tl.sum(g, 0)
    rise = tl.exp(sums.to(tl.float32))
    i_x, o_x = (start * H + i_h) * K, o_i[:, None] * (H * K) + o_k[None, :]
    tl.store(p_sums + i_x + o_x, sums, mask=m_k)
    $store_q_read
    $store_k_read
    fall = tl.exp(tl.minimum(total[None, :] - sums, 0.0).to(tl.float32))
    tl.store(p_k_write + i_x + o_x, (k * fall).to(C), mask=m_k)
    tl.store(p_fade + (i_c * H + i_h) * K + o_k, tl.exp(total.to(tl.float32)), mask=inside(o_k, K, BK))
'''

PREPARE = {
    "head": '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """Of one chunk and key head: how queries meet keys, and the inverse of how keys meet keys, for each value head."""
    pid = tl.program_id(0).to(tl.int64)
    i_c, i_g = pid // (H // R), pid % (H // R)
    $chunk
    $rows
    $no_qk
    $no_kk
    for i_k in range(0, K, BK):
        $key_columns
        $load_q
        $load_k
        $qk
        $kk
    $scale_qk
    $store_heads
    $solve_heads
''',
    "channel": '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """Of one chunk and head: how queries meet keys, and the inverse of how keys meet keys, halves of halves at a time."""
    pid = tl.program_id(0).to(tl.int64)
    i_c, i_h = pid // H, pid % H
    i_g = i_h // R
    $chunk
    $rows
    $no_scores
    $no_kk
    for i_k in range(0, K, BK):
        $key_columns
        $load_q
        $load_k
        $sums
        $own_scores
        for level in range(LEVELS):
            near = span(p_sums + (start * H + i_h) * K, sums, o_i, o_k, last, level, H * K, K, BK)
            meets = across(o_i, level)
            near_k = (k * near).to(L)
            $scores
            $meets
    i_s, o_s = (i_c * H + i_h) * CHUNK * CHUNK, o_i[:, None] * CHUNK + o_i[None, :]
    $store_scores
    $beta
    $solve
''',
}

SCAN = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """The state of one head, some of its value channels, through all chunks of a sequence: outputs on its way."""
    pid = tl.program_id(0).to(tl.int64)
    i_v, i_n, i_h = (pid % tl.cdiv(V, BV)).to(tl.int32), pid // tl.cdiv(V, BV) // H, pid // tl.cdiv(V, BV) % H
    i_g = i_h // R
    $segment
    i_k = 0
    o_v = i_v * BV + tl.arange(0, BV)
    i_state, o_kv = (i_n * H + i_h) * K * V, tl.arange(0, BK)[:, None] * V + o_v[None, :]
    m_s = inside(tl.arange(0, BK), K, BK)[:, None] & inside(o_v, V, BV)[None, :]
    $first_state
    for i in range(0, tl.cdiv(end - begin, CHUNK)):
        i_c, start = first + i, begin + i * CHUNK
        $rows
        $key_columns
        $value_columns
        $meeting
        $load_v
        $gates
        i_s, o_s = (i_c * H + i_h) * CHUNK * CHUNK, o_i[:, None] * CHUNK + o_i[None, :]
        $keep_state
        s_c = s.to(C)
        $beta
        $update
        $keep_u
        $output
        s = $write
    tl.store(p_final + i_state + o_kv, s, mask=m_s)
'''

DECODE = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """A few tokens of one head, some of its value channels, one after the other; the state may be updated in place."""
    pid = tl.program_id(0).to(tl.int64)
    i_v, i_n, i_h = (pid % tl.cdiv(V, BV)).to(tl.int32), pid // tl.cdiv(V, BV) // H, pid // tl.cdiv(V, BV) % H
    i_g = i_h // R
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = inside(o_k, K, BK), inside(o_v, V, BV)
    i_state, o_kv = (i_n * H + i_h) * K * V, o_k[:, None] * V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :]
    $first_state
    for i in range(0, t):
        row = i_n * t + i
        q = tl.load(p_q + row * s_q_t + i_g * s_q_h + o_k, mask=m_k, other=0.0).to(tl.float32)
        k = tl.load(p_k + row * s_k_t + i_g * s_k_h + o_k, mask=m_k, other=0.0).to(tl.float32)
        u = tl.load(p_v + row * s_v_t + i_h * s_v_h + o_v, mask=m_v, other=0.0).to(tl.float32)
        $fade_one
        $update_one
        s += k[:, None] * u[None, :]
        o = tl.sum(q[:, None] * s, 0) * scale
        tl.store(p_o + row * H * V + i_h * V + o_v, o.to(p_o.dtype.element_ty), mask=m_v)
    tl.store(p_final + i_state + o_kv, s.to(p_final.dtype.element_ty), mask=m_s)
'''
