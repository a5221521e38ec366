"""The C++ of attention forward: a softmax that goes block by block, and who does what."""

from __future__ import annotations

FORWARD = """\
struct Room {
    float *rows, *s, *o, top[N], keep[N], total[N * W];
    Strip strips[STRIPS];
};
static inline int kind_of(const Call& x) { return x.bias ? BIASED : x.cap > 0 ? CAPPED : PLAIN; }
static inline float into_scores(const Call& x) { return x.cap > 0 ? (float)(x.scale / x.cap) : (float)x.scale; }

// The bias of a query row, so that key j's stands at j.
static inline const float* bias_of(const Call& x, const Queries& q, int row)
{
    return x.bias + q.head * x.reach + x.queries - 1 - q.first - row + N;
}

// Products become logits, those of hidden keys -inf; each row's largest is kept.
template <int KIND> static void logits(const Call& x, const Queries& q, const Strip& s, int64_t j, Room& r)
{
    const float cap = (float)x.cap;
    const Ints lane = lanes();
    for (int i = s.row; i < s.row + s.tall; i++) {
        float* line = r.s + i * N;
        const bool cut = !s.whole && i < q.n;
        const int64_t lo = cut ? q.lo[i] - j : 0, hi = cut ? least(q.hi[i] - j, N) : N;
        const float* bias = KIND == BIASED && i < q.n ? bias_of(x, q, i) + j : nullptr;
        Vec most = all(r.top[i]);
        for (int c = s.from; c < s.to; c += W) {
            Vec y = at(line + c);
            if (KIND == CAPPED) y = tanh_of(y) * cap;
            if (KIND == BIASED && bias) y += at(bias + c);
            if (cut) y = pick(among(lane + c, lo, hi), y, all(-INFINITY));
            if (KIND != PLAIN || cut) at(line + c) = y;
            most = larger(y, most);
        }
        r.keep[i] = top_of(most);
    }
}

// Logits become weights over e^top.
static inline void weigh(const Strip& s, Room& r)
{
    for (int i = s.row; i < s.row + s.tall; i++) {
        float* line = r.s + i * N;
        const Vec top = all(r.top[i]);
        Vec total = at(r.total + i * W) * r.keep[i];
        for (int c = s.from; c < s.to; c += W) {
            const Vec p = weight_of(at(line + c) - top);
            at(line + c) = p;
            total += p;
        }
        at(r.total + i * W) = total;
    }
}

template <int KIND> static void soften(const Call& x, const Queries& q, int count, int64_t j, Room& r)
{
    memcpy(r.keep, r.top, sizeof(r.top));
    for (int n = 0; n < count; n++) logits<KIND>(x, q, r.strips[n], j, r);
    for (int i = 0; i < N; i += W) {
        const Vec top = at(r.keep + i);
        at(r.keep + i) = weight_of(at(r.top + i) - top);
        at(r.top + i) = top;
    }
    for (int n = 0; n < count; n++) weigh(r.strips[n], r);
}

// Denominators and sinks: rows are scaled and written. A row that sees nothing is 0.
static void finish(const Call& x, const Queries& q, Room& r)
{
    float* lse = x.lse + (q.b * x.heads + q.head) * x.queries + q.first;
    for (int i = 0; i < q.n; i++) {
        if (i + SOON < q.n) ask<true>(x.o, q.b, q.first + i + SOON, q.head, x.out);
        float total = sum(at(r.total + i * W)), keep = 1;
        if (x.sinks) {
            const float sink = x.sinks[q.head], top = sink > r.top[i] ? sink : r.top[i];
            keep = expf(r.top[i] - top);
            total = total * keep + expf(sink - top);
            r.top[i] = top;
        }
        const float share = total == 0 ? 0 : keep / total;
        for (int64_t p = 0; p < x.out; p += N) {
            put_row(x.o, place(x.o, q.b, q.first + i, q.head), p, r.o + p * N + i * N, least(N, x.out - p), share);
        }
        lse[i] = r.top[i] + logf(total == 0 ? 1.17549435e-38f : total);
    }
}

template <int KIND> static void attend(const Call& x, int64_t b, int64_t head, int64_t block, Room& r)
{
    const Queries q = queries_of(x, b, head, block);
    const Heads d(x);
    const int64_t blocks = blocks_of(x.keys), group = b * x.groups + head / (x.heads / x.groups);
    read_rows(r.rows, x.q, b, q.first, head, q.n, x.width, d.dk, into_scores(x));
    memset(r.o, 0, sizeof(float) * BLOCK * d.pv);
    memset(r.total, 0, sizeof(r.total));
    for (int i = 0; i < N; i++) r.top[i] = NEVER;
    const int64_t low = q.lo[0] > 0 ? q.lo[0] / N : 0, high = blocks_of(least(q.hi[q.n - 1], x.keys));
    for (int64_t n = low; n < high; n++) {
        const float* keys = x.packed + (group * blocks + n) * d.both();
        const int count = see(r.strips, q, n * N, (int)least(N, x.keys - n * N));
        scores(r.strips, count, r.rows, keys, d.dk, Store{r.s});
        soften<KIND>(x, q, count, n * N, r);
        gather<false>(r.strips, count, r.s, keys + d.pk * BLOCK, d.dv, Blend{r.o, r.keep});
    }
    finish(x, q, r);
}

// Keys of a block channel by channel, and its values: all query heads of a group and all blocks of queries read the same.
static void pack(const Call& x, int64_t unit, Room& r)
{
    const int64_t blocks = blocks_of(x.keys), n = unit % blocks, group = unit / blocks % x.groups, b = unit / blocks / x.groups;
    const int there = (int)least(N, x.keys - n * N);
    const Heads d(x);
    float* to = x.packed + unit * d.both();
    read_rows(r.rows, x.k, b, n * N, group, there, x.width, d.dk, 1);
    turn(r.rows, to, d.dk);
    read_rows(to + d.pk * BLOCK, x.v, b, n * N, group, there, x.out, d.dv, 1);
}
"""

ENTRIES = """\
// A thread's room stays with it: its pages are touched once. What is very large is given back.
struct Memory {
    float* start = nullptr;
    int64_t size = 0;
    ~Memory() { free(start); }
};
constexpr int64_t KEPT = 1 << 21;
enum { OWN, SHARED };  // a thread's room, and what the thread that calls packs for all

static Memory& memory(int which)
{
    static thread_local Memory kept[2];
    return kept[which];
}

static float* room_of(int which, int64_t floats)
{
    Memory& kept = memory(which);
    if (kept.size < floats) {
        free(kept.start);
        kept.start = (float*)aligned_alloc(1 << 12, (sizeof(float) * floats + 4095) / 4096 * 4096);
        kept.size = kept.start ? floats : 0;
        fresh(kept.start, sizeof(float) * kept.size);
    }
    return kept.start;
}

static void leave(int which)
{
    Memory& kept = memory(which);
    if (kept.size <= KEPT) return;
    free(kept.start);
    kept.start = nullptr, kept.size = 0;
}

#define ENTRY extern "C" __attribute__((visibility("default"))) int

// Every unit is alone with its results, so that the number of threads changes no bit. What is longest under a causal mask
// goes first, so that threads end together.
ENTRY forward(const Call* call)
{
    Call x = *call;
    const int64_t blocks = blocks_of(x.queries), units = x.batch * x.heads * blocks;
    const int64_t packs = x.batch * x.groups * blocks_of(x.keys);
    const Heads d(x);
    const auto work = kind_of(x) == BIASED ? attend<BIASED> : kind_of(x) == CAPPED ? attend<CAPPED> : attend<PLAIN>;
    x.packed = room_of(SHARED, packs * d.both());
    int failed = !x.packed;
#pragma omp parallel num_threads((int)(units < x.threads ? units : x.threads)) reduction(| : failed)
    {
        Flushed flushed;
        Room r;
        r.rows = room_of(OWN, d.both() + BLOCK);
        failed |= !r.rows || !x.packed;
        r.s = r.rows + d.pk * BLOCK, r.o = r.s + BLOCK;
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < packs; unit++)
            if (!failed) pack(x, unit, r);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++) {
            const int64_t row = unit % (x.batch * x.heads), block = blocks - 1 - unit / (x.batch * x.heads);
            if (!failed) work(x, row / x.heads, row % x.heads, block, r);
        }
        leave(OWN);
    }
    leave(SHARED);
    return failed;
}
"""
