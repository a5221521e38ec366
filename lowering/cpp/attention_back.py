"""The C++ of attention backward: one pass over a head's queries, which leaves the gradients of its keys and values behind."""

from __future__ import annotations

ROOM = """\
// What a unit of work holds besides a forward's: packed keys and values, and the sums for their gradients.
struct Back {
    float *keys, *sums, *rows, *d_o, *d_q, *p, *ds, *bend, *skew, lse[N], delta[N];
    Strip strips[STRIPS], across[STRIPS];
    int64_t held = -1;
};
constexpr int MARGIN = 16, LINE = N + 2 * MARGIN;

// Numbers of a block's keys channel by channel, keys, and values channel by channel.
static inline int64_t packed_of(const Heads& d) { return (2 * d.pk + d.pv) * BLOCK; }
static inline int64_t room_for(const Heads& d, int64_t blocks, bool sums)
{
    return (2 * d.pk + d.pv + 2) * BLOCK + N * LINE + blocks * (packed_of(d) + (sums ? d.both() : 0));
}

static void furnish(Back& r, const Heads& d, float* room, int64_t blocks)
{
    r.rows = room, r.d_o = r.rows + d.pk * BLOCK, r.d_q = r.d_o + d.pv * BLOCK, r.p = r.d_q + d.pk * BLOCK, r.ds = r.p + BLOCK;
    r.bend = r.skew = r.ds + BLOCK;
    r.keys = r.skew + N * LINE;
    r.sums = r.keys + blocks * packed_of(d);
    memset(r.skew, 0, sizeof(float) * N * LINE);
}
"""

WEIGHTS = """\
// Products become weights again, those of hidden keys 0; a bent logit leaves its slope behind.
template <int KIND> static void again(const Call& x, const Queries& q, const Strip& s, int64_t j, Back& r)
{
    const float cap = (float)x.cap;
    const Ints lane = lanes();
    for (int i = s.row; i < s.row + s.tall; i++) {
        float* line = r.p + i * N;
        const bool cut = !s.whole && i < q.n;
        const int64_t lo = cut ? q.lo[i] - j : 0, hi = cut ? least(q.hi[i] - j, N) : N;
        const float* bias = KIND == BIASED && i < q.n ? bias_of(x, q, i) + j : nullptr;
        const Vec lse = all(r.lse[i]);
        for (int c = s.from; c < s.to; c += W) {
            Vec y = at(line + c);
            if (KIND == CAPPED) {
                y = tanh_of(y);
                at(r.bend + i * N + c) = 1.0f - y * y;
                y *= cap;
            }
            if (KIND == BIASED && bias) y += at(bias + c);
            y = weight_of(y - lse);
            at(line + c) = cut ? pick(among(lane + c, lo, hi), y, Vec{}) : y;
        }
        for (int c = 0; c < s.from; c += W) at(line + c) = at(r.ds + i * N + c) = Vec{};
        for (int c = s.to; c < N; c += W) at(line + c) = at(r.ds + i * N + c) = Vec{};
    }
}

// Adds up the gradient of the bias by distance: rows are shifted so that a distance stands in one column.
static void skewed(const Queries& q, int count, float* d_bias, Back& r)
{
    int first = N, last = 0;
    for (const Strip* s = r.strips; s < r.strips + count; s++) {
        first = s->row < first ? s->row : first;
        last = (int)least(s->row + s->tall, q.n);
    }
    for (int i = first; i < last; i++) memcpy(r.skew + i * LINE + MARGIN, r.ds + i * N, sizeof(float) * N);
    for (int c = -(last - 1); c < N; c += W) {
        Vec total = {};
        for (int i = 1 - c - W > first ? 1 - c - W : first; i < last && i < N - c; i++)
            total += at(r.skew + i * LINE + MARGIN + c + i);
        at(d_bias + c) += total;
    }
}
"""

BACKWARD = """\
static void read_queries(const Call& x, const Queries& q, Back& r)
{
    const float* lse = x.lse + (q.b * x.heads + q.head) * x.queries + q.first;
    const Heads d(x);
    read_rows(r.rows, x.q, q.b, q.first, q.head, q.n, x.width, d.dk, into_scores(x));
    read_rows(r.d_o, x.o, q.b, q.first, q.head, q.n, x.out, d.dv, 1);
    float line[N];
    for (int i = 0; i < N; i++) {
        Vec total = {};
        if (i + SOON < q.n) ask<false>(x.d_o, q.b, q.first + i + SOON, q.head, x.out);
        for (int p = 0; p < x.out && i < q.n; p += N) {
            get_row(line, x.d_o, place(x.d_o, q.b, q.first + i, q.head), p, least(x.out - p, N), N, 1);
            float* o = r.d_o + p * N + i * N;
            for (int c = 0; c < (d.dv - p < N ? d.dv - p : N); c += W) {
                total += at(o + c) * at(line + c);
                at(o + c) = at(line + c);
            }
        }
        r.delta[i] = sum(total);
        r.lse[i] = i < q.n ? lse[i] : 0;
    }
    memset(r.d_q, 0, sizeof(float) * d.pk * BLOCK);
}

// The gradient of a logit from that of its weight.
struct Slope {
    float* to;
    const float *p, *delta;
    inline void operator()(int64_t i, int64_t j, Vec sum) const { at(to + i * N + j) = at(p + i * N + j) * (sum - delta[i]); }
};

static void unbend(const Strip* strips, int count, Back& r)
{
    for (const Strip* s = strips; s < strips + count; s++)
        for (int i = s->row; i < s->row + s->tall; i++)
            for (int c = s->from; c < s->to; c += W) at(r.ds + i * N + c) *= at(r.bend + i * N + c);
}

template <int KIND> static void against(const Call& x, const Queries& q, int64_t n, float* d_bias, Back& r)
{
    const int64_t j = n * N;
    const int there = (int)least(N, x.keys - j), count = see(r.strips, q, j, there);
    const Heads d(x);
    const float* keys = r.keys + n * packed_of(d);
    float* sums = r.sums + n * d.both();
    scores(r.strips, count, r.rows, keys, d.dk, Store{r.p});
    for (int s = 0; s < count; s++) again<KIND>(x, q, r.strips[s], j, r);
    scores(r.strips, count, r.d_o, keys + 2 * d.pk * BLOCK, d.dv, Slope{r.ds, r.p, r.delta});
    if (KIND == CAPPED) unbend(r.strips, count, r);
    if (KIND == BIASED && d_bias) skewed(q, count, d_bias + x.queries - 1 - q.first + N + j, r);
    gather<false>(r.strips, count, r.ds, keys + d.pk * BLOCK, d.dk, Add{r.d_q});
    const int met = seen(r.across, q, j, there);
    gather<true>(r.across, met, r.p, r.d_o, d.dv, Add{sums + d.pk * BLOCK});
    gather<true>(r.across, met, r.ds, r.rows, d.dk, Add{sums});
}

// What a head's keys and values come to: packed for all its queries.
static void take(const Call& x, int64_t b, int64_t group, Back& r)
{
    if (r.held == b * x.groups + group) return;
    r.held = b * x.groups + group;
    const Heads d(x);
    for (int64_t n = 0; n < blocks_of(x.keys); n++) {
        float* to = r.keys + n * packed_of(d);
        const int there = (int)least(N, x.keys - n * N);
        read_rows(to + d.pk * BLOCK, x.k, b, n * N, group, there, x.width, d.dk, 1);
        turn(to + d.pk * BLOCK, to, d.dk);
        read_rows(r.d_o, x.v, b, n * N, group, there, x.out, d.dv, 1);
        turn(r.d_o, to + 2 * d.pk * BLOCK, d.dv);
    }
}

static void give(const Call& x, int64_t b, int64_t group, int64_t n, const float* sums)
{
    const int there = (int)least(N, x.keys - n * N);
    write_rows(x.d_k, sums, b, n * N, group, there, x.width, (float)(x.scale / into_scores(x)));
    write_rows(x.d_v, sums + Heads(x).pk * BLOCK, b, n * N, group, there, x.out, 1);
}

// A share of a head's queries.
template <int KIND> static void pull(const Call& x, int64_t unit, Back& r)
{
    const int64_t share = unit % x.splits, head = unit / x.splits % x.heads, b = unit / x.splits / x.heads;
    const int64_t blocks = blocks_of(x.keys), group = head / (x.heads / x.groups);
    float* d_bias = x.d_bias ? x.d_bias + unit * x.reach : nullptr;
    const Heads d(x);
    if (x.partial) r.sums = x.partial + unit * blocks * d.both();
    take(x, b, group, r);
    memset(r.sums, 0, sizeof(float) * blocks * d.both());
    float d_sink = 0;
    for (int64_t block = share; block < blocks_of(x.queries); block += x.splits) {
        const Queries q = queries_of(x, b, head, block);
        read_queries(x, q, r);
        const int64_t low = q.lo[0] > 0 ? q.lo[0] / N : 0, high = blocks_of(least(q.hi[q.n - 1], x.keys));
        for (int64_t n = low; n < high; n++) against<KIND>(x, q, n, d_bias, r);
        write_rows(x.d_q, r.d_q, b, q.first, head, q.n, x.width, (float)x.scale);
        for (int i = 0; x.sinks && i < q.n; i++) d_sink -= expf(x.sinks[head] - r.lse[i]) * r.delta[i];
    }
    if (x.sinks) x.d_sinks[unit] = d_sink;
    for (int64_t n = 0; n < blocks && !x.partial; n++) give(x, b, group, n, r.sums + n * d.both());
}

// The sums of all units that read the same keys, one after another.
static void collect(const Call& x, int64_t unit)
{
    const int64_t blocks = blocks_of(x.keys), n = unit % blocks, group = unit / blocks % x.groups, b = unit / blocks / x.groups;
    const int64_t parts = x.heads / x.groups * x.splits, first = (b * x.groups + group) * parts;
    const int64_t each = Heads(x).both();
    float* total = x.partial + (first * blocks + n) * each;
    for (int64_t part = 1; part < parts; part++) {
        const float* other = total + part * blocks * each;
        for (int64_t i = 0; i < each; i += W) at(total + i) += at(other + i);
    }
    give(x, b, group, n, total);
}

ENTRY backward(const Call* call)
{
    const Call& x = *call;
    const int64_t blocks = blocks_of(x.keys), units = x.batch * x.heads * x.splits, ends = x.batch * x.groups * blocks;
    int failed = 0;
    const Heads d(x);
    const auto work = kind_of(x) == BIASED ? pull<BIASED> : kind_of(x) == CAPPED ? pull<CAPPED> : pull<PLAIN>;
    fresh(x.partial, x.partial ? sizeof(float) * units * blocks * d.both() : 0);
#pragma omp parallel num_threads((int)(units < x.threads ? units : x.threads)) reduction(| : failed)
    {
        Flushed flushed;
        Back r;
        float* room = room_of(OWN, room_for(d, blocks, !x.partial));
        failed = !room;
        if (room) furnish(r, d, room, blocks);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++)
            if (!failed) work(x, unit, r);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < (x.partial ? ends : 0); unit++) collect(x, unit);
        leave(OWN);
    }
    return failed;
}
"""
