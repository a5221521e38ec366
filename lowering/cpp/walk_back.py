"""A chunked recurrence in C++: the way back. Gradients of queries and keys are made with tokens side by side, [channel, C]."""

from __future__ import annotations

BACKWARD = """\
// x = (1 + a)^-T y, last block row first; y is used up.
static void solve_turned(Room& r, const float* a, float* y, float* x, int rows)
{
    for (int o = rows - 16; o >= 0; o -= 16) {
        const int later = o + 16;
        if (later < rows)
            product<true, ALL, DV>(a + later * C + o, C, x + later * DV, DV, 16, rows - later,
                                   Blend{y + o * DV, DV, r.minus, r.ones});
        product<true, UPPER, DV>(r.diagonal + o * 16, 16, y + o * DV, DV, 16, 16, Blend{x + o * DV, DV, r.ones, nullptr});
    }
}

// What the way forward saved, in padded rows.
struct Kept { const float *u, *state; };

static Kept read_kept(const Call& x, const Chunk& c, int64_t head, Room& r)
{
    const int64_t at = lane_of(x, c, head);
    const float *u = x.u + at * C * DV, *state = x.states + at * STATE;
    if (!DELTA) {
        read_rows(r.u, x.v, c, head, x.out, DV, 1);
        weigh(r.u, r.u, r.beta, c.rows, DV);
        u = r.u;
    } else if (x.out != DV) {
        for (int t = 0; t < c.rows; t++) read_row(r.u + t * DV, x.u + (at * C + t) * x.out, F32, x.out, DV, 1);
        u = r.u;
    }
    if (x.width != DK || x.out != DV) {
        read_state(r.before, x.states + at * x.width * x.out, x.width, x.out);
        state = r.before;
    }
    return {u, state};
}

// The gradient of the values, in r.d_u or, of a delta rule, in r.values.
static float* pull_values(const Call& x, const Chunk& c, const float* after, Room& r)
{
    if (!x.d_o.data) memset(r.d_u, 0, sizeof(float) * c.rows * DV);
    else product<true, UPPER, DV>(r.scores[0], C, r.o, DV, c.rows, c.rows, Blend{r.d_u, DV, r.ones, nullptr});
    if (!c.last) product<false, ALL, DV>(r.write, DK, after, DV, c.rows, DK, Blend{r.d_u, DV, r.tail, r.ones});
    if (!DELTA) return r.d_u;
    invert(r.scores[1], r.diagonal, c.rows);
    solve_turned(r, r.scores[1], r.d_u, r.values, c.rows);
    return r.values;
}

static void pull_reads(const Call& x, const Chunk& c, const float* state, const float* after, Room& r)
{
    if (!c.last) product<false, ALL, C>(after, DV, r.turned[1], C, DK, DV, pull(r, 2));
    if (c.blank) return;
    if (x.d_o.data) product<false, ALL, C>(state, DV, r.turned[0], C, DK, DV, pull(r, 0));
    if (DELTA) product<false, ALL, C>(state, DV, r.turned[2], C, DK, DV, pull(r, 1));
}

// The gradient of the state, from after the chunk to before it: queries' rows and keys' rows are one product.
static void pull_state(const Call& x, const Chunk& c, const float* values, float* after, Room& r)
{
    const int queries = x.d_o.data ? c.rows : 0, keys = DELTA ? c.rows : 0;
    weigh(r.pulled, r.o, r.weight[0], queries, DV);
    weigh(r.pulled + queries * DV, values, r.weight[1], keys, DV);
    product<true, ALL, DV>(r.read[queries ? 0 : 1], DK, r.pulled, DV, DK, queries + keys, Blend{after, DV, r.ones, r.fade});
}

static void write_values(const Call& x, const Chunk& c, int64_t head, const float* values, Room& r)
{
    for (int t = 0; t < c.length; t++)
        write_row(place(x.d_v, c.row, c.start + t, head), values + t * DV, x.d_v.type, x.out, r.beta[t]);
    if (!x.beta.data) return;
    // values . u is what the gradient of the delta rule's scores has on its diagonal.
    for (int t = 0; t < c.rows; t += W) {
        Vec sum = {};
        for (int d = 0; d < DV; d++) sum += at(r.turned[2] + d * C + t) * at(r.turned[1] + d * C + t);
        float d_beta[W];
        at(d_beta) = sum / at(r.beta + t);
        for (int i = 0; i < W && t + i < c.length; i++)
            write_row(place(x.d_beta, c.row, c.start + t + i, head), d_beta + i, x.d_beta.type, 1, 1);
    }
}

static void step_back(const Call& x, const Chunk& c, int64_t head, float* after, Room& r)
{
    read_beta(x, c, head, r);
    factors(x, c, head, r);
    const Kept kept = read_kept(x, c, head, r);
    if (x.d_o.data) read_rows(r.o, x.d_o, c, head, x.out, DV, 1);
    const float* values = pull_values(x, c, after, r);
    if (x.d_o.data) transpose(r.o, DV, r.turned[0], C, c.rows, DV);
    transpose(kept.u, DV, r.turned[1], C, c.rows, DV);
    transpose(values, DV, r.turned[2], C, c.rows, DV);
    begin_pulls(r);
    pull_reads(x, c, kept.state, after, r);
    for (int i = 0; i < DK; i++) r.d_fade[i] = c.blank || c.last ? 0 : dot(kept.state + i * DV, after + i * DV, DV);
    if (x.d_o.data) pairs(r.o, DV, r.turned[1], C, c.rows, Blend{r.d_scores[0], C, r.ones, nullptr});
    else memset(r.d_scores[0], 0, sizeof(float) * c.rows * C);
    if (DELTA) pairs(values, DV, r.turned[1], C, c.rows, Blend{r.d_scores[1], C, r.minus, nullptr});
    if (!c.blank) pull_state(x, c, values, after, r);
    write_values(x, c, head, values, r);
    factor_gradients(x, c, head, r);
}

static void walk_back(const Call& x, const Span& s, int64_t key, int64_t first, Room& r)
{
    const int64_t size = x.width * x.out, ends = (s.index * x.heads + first) * size;
    const int64_t part = (first - key * (x.heads / x.keys)) / x.together * x.part;
    View d_q = x.d_q, d_k = x.d_k;
    if (d_q.data) d_q.data = (char*)d_q.data + part * 4;
    d_k.data = (char*)d_k.data + part * 4;
    for (int64_t h = 0; h < x.together; h++)
        read_state(r.state + h * STATE, x.d_final ? x.d_final + ends + h * size : nullptr, x.width, x.out);
    for (int64_t i = (s.end - s.start + C - 1) / C - 1; i >= 0; i--) {
        const Chunk c = chunk_of(x, s, i);
        read_keys(x, c, key, r);
        begin_gradients(c, r);
        for (int64_t h = 0; h < x.together; h++) step_back(x, c, first + h, r.state + h * STATE, r);
        finish_gradients(c, r);
        for (int t = 0; t < c.length; t++) {
            if (d_q.data) write_row(place(d_q, c.row, c.start + t, key), r.d_q + t * DK, d_q.type, x.width, (float)x.scale);
            write_row(place(d_k, c.row, c.start + t, key), r.d_k + t * DK, d_k.type, x.width, 1);
        }
    }
    for (int64_t h = 0; h < x.together && x.d_start; h++)
        write_state(x.d_start + ends + h * size, r.state + h * STATE, x.width, x.out);
}
"""
