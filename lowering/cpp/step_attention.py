"""The C++ of a decode step: attention of one token a row to what waits in caches, rings and pages."""

from __future__ import annotations

ATTENTION = """\
constexpr int HEAD = 576, GROUP = 8, KEYS = 64;  // channels of a head, query heads and keys that are met at a time

struct Softmax {
    float q[HEAD], o[HEAD], most, total;
};

template <class T> static inline float dot(const T* a, const float* b, int64_t n)
{
    Vec total = {};
    int64_t i = 0;
    for (; i + W <= n; i += W) total += widen(a + i) * at(b + i);
    float y = sum(total);
    for (; i < n; i++) y += widen_one(a[i]) * b[i];
    return y;
}

// V vectors of o more: weights p of n values.
template <class T, int V> static inline void weigh(float* o, const float* p, char* const* v, int64_t from, int64_t n)
{
    Vec sums[V];
#pragma GCC unroll 4
    for (int u = 0; u < V; u++) sums[u] = at(o + from + u * W);
    for (int64_t j = 0; j < n; j++)
#pragma GCC unroll 4
        for (int u = 0; u < V; u++) sums[u] += p[j] * widen((const T*)v[j] + from + u * W);
#pragma GCC unroll 4
    for (int u = 0; u < V; u++) at(o + from + u * W) = sums[u];
}

// n keys more, with what is added to their logits: what is there so far is scaled to the new largest logit.
template <class T>
static void more(const Ins& x, Softmax& s, char* const* k, char* const* v, int64_t n, const float* bias)
{
    const int64_t d = x.whole[0], e = x.whole[1];
    const float scale = (float)x.num[0], cap = (float)x.num[1];
    float p[KEYS] = {}, most = s.most;
    for (int64_t j = 0; j < n; j++) {
        float y = dot((const T*)k[j], s.q, d) * scale;
        y = (cap > 0 ? tanhf(y / cap) * cap : y) + bias[j];
        p[j] = y;
        most = y > most ? y : most;
    }
    const float keep = s.total > 0 ? expf(s.most - most) : 0;
    for (int64_t i = 0; i < e; i++) s.o[i] *= keep;
    s.total *= keep, s.most = most;
    for (int i = 0; i < KEYS; i += W) at(p + i) = exp_of(at(p + i) - most);
    for (int64_t j = 0; j < n; j++) s.total += p[j];
    int64_t i = 0;
    for (; i + 4 * W <= e; i += 4 * W) weigh<T, 4>(s.o, p, v, i, n);
    for (; i + W <= e; i += W) weigh<T, 1>(s.o, p, v, i, n);
    for (; i < e; i++)
        for (int64_t j = 0; j < n; j++) s.o[i] += p[j] * widen_one(((const T*)v[j])[i]);
}

// Where tokens first to end of row b are in a cache [b, m, g, d], m of them a row, or in the pages of a pool [p, m, g, d].
static void find(const Tape& t, const Ins& x, int cache, int64_t b, int64_t g, int64_t first, int64_t end, char** to)
{
    static const float nothing[HEAD] = {};
    const Arg &a = x.arg[cache], &pages = x.arg[5];
    const int64_t m = t.rooms[a.slot];
    for (int64_t j = first; j < end; j++) {
        const int64_t page = pages.slot < 0 ? b : ((const int64_t*)start(t, pages))[b * pages.stride[2] + j / m];
        const int64_t place = page * m + (j < m ? j : j % m);
        to[j - first] = page < 0 ? (char*)nothing : start(t, a) + (place * a.stride[1] + g * a.stride[2]) * bytes(a.type);
    }
}

// What a head adds to the logits of keys so far from its token: a row of a table by distance, or a slope.
static void lean(const Tape& t, const Ins& x, int64_t head, int64_t at, int64_t first, int64_t end, float* bias)
{
    if (x.arg[7].slot < 0) return;
    const Line buckets = line(t, x.arg[8], 0, 0, 0);
    for (int64_t j = first; j < end; j++) {
        const int64_t away = at - j < x.whole[4] ? at - j : x.whole[4];
        const int64_t row = buckets.p ? ((const int64_t*)buckets.p)[away] : 0;
        const float own = number(line(t, x.arg[7], 0, 0, row), head);
        bias[j - first] = buckets.p ? own : own * (float)(j - at);
    }
}

// q [b, 1, h, d], k and v caches, sinks [h], at [b], pages [b, f], lengths [b], table [n, h], buckets, o [b, 1, h, e]: query
// heads first to last of a key head.
template <class T> static void attend(const Tape& t, const Ins& x, int64_t b, int64_t g, int64_t first, int64_t last)
{
    const int64_t d = x.whole[0], e = x.whole[1], window = x.whole[2], heads = last - first;
    const bool causal = x.arg[4].slot >= 0, paged = x.arg[5].slot >= 0;
    const int64_t room = paged ? INT64_MAX : t.rooms[x.arg[1].slot], now = causal ? whole(t, x.arg[4], b) : room - 1;
    const int64_t real = x.arg[6].slot < 0 ? INT64_MAX : whole(t, x.arg[6], b), seen = window && window < room ? window : room;
    const int64_t end = now + 1 < real ? now + 1 : real;
    Softmax s[GROUP];
    for (int64_t i = 0; i < heads; i++) {
        const Line q = line(t, x.arg[0], b, 0, first + i);
        for (int64_t n = 0; n < d; n++) s[i].q[n] = number(q, n);
        for (int64_t n = 0; n < e; n++) s[i].o[n] = 0;
        const bool sink = x.arg[3].slot >= 0;
        s[i].most = sink ? number(line(t, x.arg[3], 0, 0, 0), first + i) : -INFINITY;
        s[i].total = sink ? 1 : 0;
    }
    char *k[KEYS], *v[KEYS];
    float bias[KEYS] = {};
    for (int64_t j = now >= seen ? now - seen + 1 : 0; j < end; j += KEYS) {
        const int64_t until = j + KEYS < end ? j + KEYS : end;
        find(t, x, 1, b, g, j, until, k);
        find(t, x, 2, b, g, j, until, v);
        for (int64_t i = 0; i < heads; i++) {
            lean(t, x, first + i, now, j, until, bias);
            more<T>(x, s[i], k, v, until - j, bias);
        }
    }
    for (int64_t i = 0; i < heads; i++) {
        const Line o = line(t, x.arg[9], b, 0, first + i);
        for (int64_t n = 0; n < e; n++) put_number(o, n, s[i].o[n] / s[i].total);
    }
}

// A unit is some query heads of a key head of a row.
static void attention(const Tape& t, const Ins& x, Span s)
{
    const int64_t keys = x.size[1], r = x.size[2], groups = (r + GROUP - 1) / GROUP;
    for (int64_t i = s.first; i < s.end && i < x.size[0] * keys * groups; i++) {
        const int64_t b = i / (keys * groups), g = i / groups % keys, part = i % groups * GROUP;
        const int64_t first = g * r + part, last = g * r + (part + GROUP < r ? part + GROUP : r);
        if (x.arg[1].type == F32) attend<float>(t, x, b, g, first, last);
        else attend<uint16_t>(t, x, b, g, first, last);
    }
}
"""

WRITES = """\
// cache, x [b, 1, g, d], at; only a ring may turn. In a pool, pages and places are one number; -1 is written nowhere.
static bool cache_write(const Tape& t, const Ins& x)
{
    const Arg& a = x.arg[0];
    const int64_t d = x.size[3], m = t.rooms[a.slot];
    const bool ring = x.whole[0], pool = x.kind == PAGE_WRITE;
    for (int64_t b = 0; b < x.size[0]; b++) {
        const int64_t j = whole(t, x.arg[2], b);
        if (pool && j == -1) continue;
        if (j < 0 || (!ring && j >= (pool ? x.whole[1] * m : m))) return false;
        const int64_t place = pool ? j : b * m + (j < m ? j : j % m);
        for (int64_t h = 0; h < x.size[2]; h++) {
            const Line from = line(t, x.arg[1], b, 0, h);
            const Line to = {start(t, a) + (place * a.stride[1] + h * a.stride[2]) * bytes(a.type), a.type, 1};
            for (int64_t i = 0; i < d; i += W) put(to, i, few(i, d), get(from, i, few(i, d)));
        }
    }
    return true;
}
"""
