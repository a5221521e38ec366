"""Skeletons of attention's forward and of its split over keys: `$name` stands for a line or an expression of `parts`.

Row i sees keys [lo_i, hi_i): causal, windowed and packed attention are that. Blocks of keys that every row sees whole go first
and without a mask, those at the edges behind them. Softmax runs online: m is the largest logit in powers of two, l the sum.
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

SPANS = '''
@triton.jit
def spans(lo, hi, B: tl.constexpr):
    """Of blocks of B: [first, last) that some row sees, and in it [inner, outer) that every row sees whole."""
    first = tl.maximum(tl.min(lo, 0), 0) // B
    last = tl.maximum(tl.cdiv(tl.maximum(tl.max(hi, 0), 0), B), first)
    inner = tl.cdiv(tl.maximum(tl.max(lo, 0), 0), B)
    outer = tl.maximum(tl.min(hi, 0), 0) // B
    whole = inner < outer
    return first, last, tl.where(whole, inner, first), tl.where(whole, outer, first)
'''

ATTEND = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """The results of a block of one head's queries, and the log of each one's softmax denominator."""
    $query_block
    $load_q
    $first_logit
    acc = tl.zeros((BM, BE), tl.float32)
    $walk_keys
    i_o = ((i_b * t + start) * H + i_h) * E
    o_o = (o_i[:, None] * (H * E)) + o_e[None, :]
    total = tl.where(l > 0.0, l, 1.0)
    tl.store(p_o + i_o + o_o, (acc / total[:, None]).to(p_o.dtype.element_ty), mask=m_i[:, None] & m_e[None, :])
    tl.store(p_lse + (i_b * H + i_h) * t + start + o_i, (m + tl.log2(total)) * 0.6931471805599453, mask=m_i)
'''

ATTEND_BLOCK = """
$load_k
x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
$bend
$hide
top = tl.maximum(m, tl.max(x, 1) * rise)
p = tl.exp2(x * rise - top[:, None])
fade = tl.exp2(m - top)
l = l * fade + tl.sum(p, 1)
acc = acc * fade[:, None]
$load_v
acc = tl.dot(p.to(C), v, acc=acc, input_precision=PRECISION)
m = top
"""

SPLIT = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """What one part of the keys gives to a few queries of all heads of a group; queries stand as columns."""
    pid = tl.program_id(0).to(tl.int64)
    i_s, i_g, i_b = (pid % splits).to(tl.int32), pid // splits % (H // R), pid // splits // (H // R)
    o_r = tl.arange(0, BM)
    o_i, m_i = o_r // R, o_r < t * R
    o_c = tl.minimum(o_i, t - 1)
    $place
    $seen_keys
    first, last, _, _ = spans(lo, hi, BN)
    share = tl.cdiv(last - first, splits)
    first += i_s * share
    last = tl.minimum(last, first + share)
    o_n, o_d, o_e = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BE)
    m_d, m_e = inside(o_d, D, BD), inside(o_e, E, BE)
    o_q = (o_i * s_q_t + o_r % R * s_q_h)[:, None] + o_d[None, :]
    q = tl.load(p_q + i_b * s_q_b + i_g * R * s_q_h + o_q, mask=m_i[:, None] & m_d[None, :], other=0.0)
    m = tl.full((BM,), -1e30, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BE, BM), tl.float32)
    for i in range(first, last):
        $edge_keys
        $load_k
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        $bend
        x = tl.where((o_j[:, None] >= lo[None, :]) & (o_j[:, None] < hi[None, :]), x, float("-inf"))
        top = tl.maximum(m, tl.max(x, 0) * rise)
        p = tl.exp2(x * rise - top[None, :])
        fade = tl.exp2(m - top)
        l = l * fade + tl.sum(p, 0)
        acc = acc * fade[None, :]
        $load_v
        acc = tl.dot(tl.trans(v), p.to(C), acc=acc, input_precision=PRECISION)
        m = top
    i_row = ((i_b * (H // R) + i_g) * splits + i_s) * t * R
    tl.store(p_acc + i_row * E + (o_r[None, :] * E + o_e[:, None]), acc, mask=m_i[None, :] & m_e[:, None])
    tl.store(p_top + i_row + o_r, m, mask=m_i)
    tl.store(p_sum + i_row + o_r, l, mask=m_i)
'''

JOIN = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """One query's result from what all parts of its keys give, added up in their order."""
    pid = tl.program_id(0).to(tl.int64)
    i_r, i_bg = pid % (t * R), pid // (t * R)
    i_t, i_h, i_b = i_r // R, i_bg % (H // R) * R + i_r % R, i_bg // (H // R)
    o_s, o_e = tl.arange(0, BN), tl.arange(0, BE)
    m_s, m_e = o_s < splits, inside(o_e, E, BE)
    row = (i_bg * splits * R + o_s.to(tl.int64) * R) * t + i_r
    m = tl.load(p_top + row, mask=m_s, other=-1e30)
    l = tl.load(p_sum + row, mask=m_s, other=0.0)
    acc = tl.load(p_acc + (row[:, None] * E + o_e[None, :]), mask=m_s[:, None] & m_e[None, :], other=0.0)
    top = tl.max(m, 0)
    $join_sink
    fade = tl.exp2(m - top)
    total = tl.sum(l * fade, 0) + extra
    total = tl.where(total > 0.0, total, 1.0)
    o = tl.sum(acc * fade[:, None], 0) / total
    tl.store(p_o + ((i_b * t + i_t) * H + i_h) * E + o_e, o.to(p_o.dtype.element_ty), mask=m_e)
'''
