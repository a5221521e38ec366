"""Skeletons of the short causal convolution and of what it pulls back; `$name` stands for a line of `conv_source`.

y_t = act(sum_i w_i x_{t-K+1+i} + bias), where a segment's state stands before its first token. A tile is some tokens of all
segments, one behind the other, by some channels; `since` and `left` say how far each token is from its segment's borders.
"""

CONV = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """A tile of results."""
    $tile
    $sum_taps
    $bend
    o_y = start * C + (o_t[:, None] * C + o_c[None, :])
    tl.store(p_y + o_y, z.to(p_y.dtype.element_ty), mask=m)
'''

FINAL = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """The last K - 1 inputs of a segment, of its state where it has fewer tokens."""
    $run
    for j in tl.static_range(K - 1):
        place = end - begin - (K - 1) + j
        x = tl.load(p_x + (begin + place) * s_x_t + o_c, mask=m_c & (place >= 0), other=0.0)
        $past_one
        tl.store(p_final + i_state + j, x, mask=m_c)
'''

TAPS = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """What some blocks of tokens give to the gradients of taps and bias$also."""
    pid = tl.program_id(0).to(tl.int64)
    i_p = pid // tl.cdiv(C, BC)
    share = tl.cdiv(tl.cdiv(rows, BT), parts)
    o_k = tl.arange(0, BK)[:, None]
    sums = tl.zeros((BK, BC), tl.float32)
    for i_b in range(i_p * share, tl.minimum(i_p * share + share, tl.cdiv(rows, BT))):
        $block
        g = tl.load(p_g + start * s_g_t + (o_t[:, None] * s_g_t + o_c[None, :]), mask=m, other=0.0).to(tl.float32)
        $unbend
        for i in tl.static_range(K):
            $window
            sums += tl.where(o_k == i, tl.sum(g * x, 0)[None, :], 0.0)
        $sum_bias
    o_c = (pid % tl.cdiv(C, BC)).to(tl.int32) * BC + tl.arange(0, BC)
    tl.store(p_sums + i_p * BK * C + (o_k * C + o_c[None, :]), sums, mask=inside(o_c, C, BC)[None, :] & (o_k < BK))
'''

SPREAD = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """A tile of the gradient of inputs: each token's results, and its part in the last inputs."""
    $tile
    z = tl.zeros((BT, BC), tl.float32)
    for i in tl.static_range(K):
        ahead = K - 1 - i
        m_g = m & (left > ahead)[:, None]
        g = tl.load(p_g + (start + ahead) * s_g_t + (o_t[:, None] * s_g_t + o_c[None, :]), mask=m_g, other=0.0)
        z += g.to(tl.float32) * tl.load(p_w + o_c * K + i, mask=m_c, other=0.0).to(tl.float32)[None, :]
    $from_final
    tl.store(p_dx + start * C + (o_t[:, None] * C + o_c[None, :]), z.to(p_dx.dtype.element_ty), mask=m)
'''

PAST = '''
@triton.jit(do_not_specialize=[$loose])
def $name($arguments):
    """The gradient of a segment's state."""
    $run
    for j in tl.static_range(K - 1):
        z = tl.zeros((BC,), tl.float32)
        for u in tl.static_range(j + 1):
            g = tl.load(p_g + (begin + u) * s_g_t + o_c, mask=m_c & (begin + u < end), other=0.0).to(tl.float32)
            z += g * tl.load(p_w + o_c * K + (j - u), mask=m_c, other=0.0).to(tl.float32)
        $past_from_final
        tl.store(p_dstate + i_state + j, z.to(p_dstate.dtype.element_ty), mask=m_c)
'''
