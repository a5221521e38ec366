"""The C++ of a decode step: what reads positions and states, and the experts."""

from __future__ import annotations

PLACES = """\
static inline int64_t whole(const Tape& t, const Arg& a, int64_t i) { return ((const int64_t*)start(t, a))[i * a.stride[3]]; }

// w [v, d], tokens [m], y [m, d]
static bool embedding(const Tape& t, const Ins& x)
{
    for (int64_t m = 0; m < x.size[2]; m++) {
        const int64_t token = whole(t, x.arg[1], m);
        if (token < 0 || token >= x.whole[0]) return false;
        const Line from = line(t, x.arg[0], 0, 0, token), to = line(t, x.arg[2], 0, 0, m);
        for (int64_t i = 0; i < x.size[3]; i += W) put(to, i, few(i, x.size[3]), get(from, i, few(i, x.size[3])));
    }
    return true;
}

// at [b] or one for all, p [b], so much later
static void positions(const Tape& t, const Ins& x)
{
    int64_t* p = (int64_t*)start(t, x.arg[1]);
    for (int64_t b = 0; b < x.size[0]; b++) p[b] = (x.arg[0].slot < 0 ? 0 : whole(t, x.arg[0], b)) + x.whole[0];
}

// Frequencies of a row that reaches further than `far`: others, or of a base that grows with the reach.
static inline float frequency(const Tape& t, const Ins& x, int64_t b, int64_t i)
{
    const float near = ((const float*)start(t, x.arg[1]))[i];
    const int64_t reach = x.arg[2].slot < 0 ? 0 : whole(t, x.arg[2], b);
    const float length = (float)x.num[1];
    if (x.arg[2].slot < 0 || (float)reach <= length) return near;
    if (x.arg[3].slot >= 0) return ((const float*)start(t, x.arg[3]))[i];
    const float factor = (float)x.num[2], width = 2.0f * x.whole[0], grown = factor * reach / length - (factor - 1);
    const float base = (float)x.num[3] * powf(grown < 1 ? 1 : grown, width / (width - 2));
    return 1 / powf(base, 2.0f * i / width);
}

// p [b], frequencies [pairs], reach [b], frequencies of rows that reach far, y [b, cosines and sines]
static void turns(const Tape& t, const Ins& x)
{
    const int64_t pairs = x.whole[0];
    for (int64_t b = 0; b < x.size[0]; b++) {
        float* y = (float*)start(t, x.arg[4]) + b * 2 * pairs;
        const float p = (float)whole(t, x.arg[0], b);
        for (int64_t i = 0; i < pairs; i++) {
            const float angle = p * frequency(t, x, b, i);
            y[i] = cosf(angle) * (float)x.num[0];
            y[pairs + i] = sinf(angle) * (float)x.num[0];
        }
    }
}

// x [b, 1, h, d], turns [b, 2 pairs], y: a unit is a head of a row.
static void rope(const Tape& t, const Ins& x, Span s)
{
    const int64_t pairs = x.whole[0], heads = x.size[2], d = x.size[3];
    const float way = x.whole[2] ? -1 : 1;
    for (int64_t r = s.first; r < s.end && r < x.size[0] * heads; r++) {
        const float* turn = (const float*)start(t, x.arg[1]) + r / heads * 2 * pairs;
        const Line from = line(t, x.arg[0], r / heads, 0, r % heads), to = line(t, x.arg[2], r / heads, 0, r % heads);
        int64_t i = 0;
        for (; !x.whole[1] && i + W <= pairs; i += W) {
            const Vec a = get(from, i, W), c = get(from, i + pairs, W), sine = way * at(turn + pairs + i);
            put(to, i, W, a * at(turn + i) - c * sine);
            put(to, i + pairs, W, c * at(turn + i) + a * sine);
        }
        for (; i < pairs; i++) {
            const int64_t first = x.whole[1] ? 2 * i : i, second = x.whole[1] ? 2 * i + 1 : i + pairs;
            const float a = number(from, first), c = number(from, second), sine = way * turn[pairs + i];
            put_number(to, first, a * turn[i] - c * sine);
            put_number(to, second, c * turn[i] + a * sine);
        }
        for (i = 2 * pairs; i < d; i++) put_number(to, i, number(from, i));
    }
}
"""

STATES = """\
static inline float read(const float* p) { return *p; }
static inline float read(const uint16_t* p) { return from_bf16(*p); }
static inline void write(float* p, float x) { *p = x; }
static inline void write(uint16_t* p, float x) { *p = to_bf16(x); }

// x [b, 1, c], w [c, k], bias [c], state [b, c, k-1], y, final, side by side and of one type but for w and bias; the state may
// be where the final goes. K = 0: any number of taps.
template <int K, class T, class U> static void conv_taps(const Tape& t, const Ins& x, Span s)
{
    const int64_t k = K ? K : x.whole[0], channels = x.size[2];
    const Line bias = line(t, x.arg[2], 0, 0, 0);
    const U* w = (const U*)start(t, x.arg[1]);
    for (int64_t b = s.first; b < s.end && b < x.size[0]; b++) {
        const T *now = (const T*)line(t, x.arg[0], b, 0, 0).p, *past = (const T*)line(t, x.arg[3], b, 0, 0).p;
        T* next = (T*)line(t, x.arg[5], b, 0, 0).p;
        const Line y = line(t, x.arg[4], b, 0, 0);
        for (int64_t c = 0; c < channels; c += W) {
            const int64_t n = few(c, channels);
            float total[W] = {};
            for (int64_t j = 0; j < n; j++) {
                float window[8], sum = bias.p ? number(bias, c + j) : 0;
#pragma GCC unroll 8
                for (int64_t i = 0; i < k - 1; i++) window[i] = past ? read(past + (c + j) * (k - 1) + i) : 0;
                window[k - 1] = read(now + c + j);
#pragma GCC unroll 8
                for (int64_t i = 0; i < k; i++) sum += window[i] * read(w + (c + j) * k + i);
#pragma GCC unroll 8
                for (int64_t i = 0; i < k - 1; i++) write(next + (c + j) * (k - 1) + i, window[i + 1]);
                total[j] = sum;
            }
            put(y, c, n, x.whole[1] ? at(total) / (exp_of(-at(total)) + 1.0f) : at(total));
        }
    }
}

template <class T, class U> static void conv_of(const Tape& t, const Ins& x, Span s)
{
    switch (x.whole[0]) {
    case 2: return conv_taps<2, T, U>(t, x, s);
    case 3: return conv_taps<3, T, U>(t, x, s);
    case 4: return conv_taps<4, T, U>(t, x, s);
    default: return conv_taps<0, T, U>(t, x, s);
    }
}

// A unit is a row.
static void conv(const Tape& t, const Ins& x, Span s)
{
    const bool f = x.arg[0].type == F32, wide = x.arg[1].type == F32;
    if (f && wide) conv_of<float, float>(t, x, s);
    else if (f) conv_of<float, uint16_t>(t, x, s);
    else if (wide) conv_of<uint16_t, float>(t, x, s);
    else conv_of<uint16_t, uint16_t>(t, x, s);
}

constexpr int WIDEST = 512;  // channels of a head of a recurrence

// to = from fade + u k^T over the rows of a state, o = to^T q; delta: u is first what the key reads less.
template <bool DELTA> static void one_head(const float* q, const float* k, const float* fade, float beta, float* u, float* o,
                                            const float* from, float* to, int64_t rows, int64_t n)
{
    const int64_t full = n / W * W;
    for (int64_t i = 0; DELTA && from && i < rows; i++) {
        const float by = fade[i] * k[i];
        const float* s = from + i * n;
        for (int64_t j = 0; j < full; j += W) at(u + j) -= at(s + j) * by;
        for (int64_t j = full; j < n; j++) u[j] -= s[j] * by;
    }
    for (int64_t j = 0; j < n; j++) u[j] *= beta, o[j] = 0;
    for (int64_t i = 0; i < rows; i++) {
        const float key = k[i], query = q[i], keep = from ? fade[i] : 0;
        const float* s = from ? from + i * n : u;
        float* y = to + i * n;
        for (int64_t j = 0; j < full; j += W) {
            const Vec next = at(s + j) * keep + at(u + j) * key;
            at(y + j) = next;
            at(o + j) += next * query;
        }
        for (int64_t j = full; j < n; j++) {
            y[j] = s[j] * keep + u[j] * key;
            o[j] += y[j] * query;
        }
    }
}

// q, k [b, 1, g, k], v [b, 1, h, v], decay [b, 1, h, k or one], beta [b, 1, h], state [b, h, k, v], o, final
static void recur(const Tape& t, const Ins& x, int64_t b, int64_t h)
{
    const int64_t rows = x.whole[0], n = x.whole[1], heads = x.size[2], key = h / (heads / x.whole[2]);
    const Line lq = line(t, x.arg[0], b, 0, key), lk = line(t, x.arg[1], b, 0, key), lv = line(t, x.arg[2], b, 0, h);
    const Line decay = line(t, x.arg[3], b, 0, h), lb = line(t, x.arg[4], b, 0, h), lo = line(t, x.arg[6], b, 0, h);
    float q[WIDEST], k[WIDEST], fade[WIDEST], u[WIDEST], o[WIDEST];
    const float same = decay.p && decay.stride == 0 ? expf(number(decay, 0)) : 1;
    for (int64_t i = 0; i < rows; i++) {
        q[i] = number(lq, i) * (float)x.num[0];
        k[i] = number(lk, i);
        fade[i] = decay.p && decay.stride ? expf(number(decay, i)) : same;
    }
    for (int64_t i = 0; i < n; i++) u[i] = number(lv, i);
    const int64_t place = (b * heads + h) * rows * n;
    const float* from = x.arg[5].slot < 0 ? nullptr : (const float*)start(t, x.arg[5]) + place;
    float* to = (float*)start(t, x.arg[7]) + place;
    const float beta = lb.p ? number(lb, 0) : 1;
    if (x.whole[3]) one_head<true>(q, k, fade, beta, u, o, from, to, rows, n);
    else one_head<false>(q, k, fade, beta, u, o, from, to, rows, n);
    for (int64_t i = 0; i < n; i++) put_number(lo, i, o[i]);
}

// A unit is a head of a row.
static void recurrence(const Tape& t, const Ins& x, Span s)
{
    const int64_t heads = x.size[2];
    for (int64_t i = s.first; i < s.end && i < x.size[0] * heads; i++) recur(t, x, i / heads, i % heads);
}
"""

EXPERTS = """\
constexpr int CHOICES = 1024;  // experts

// The k largest of n, lowest index first among equals; what is taken becomes the least.
static void first(float* scores, int64_t n, int64_t k, int64_t* taken)
{
    for (int64_t i = 0; i < k; i++) {
        int64_t best = 0;
        for (int64_t j = 1; j < n; j++) best = scores[j] > scores[best] ? j : best;
        taken[i] = best;
        scores[best] = -INFINITY;
    }
}

// Experts outside the best groups are not to be chosen: a group counts by its few best.
static void limit(float* choice, int64_t n, int64_t groups, int64_t keep, int64_t best)
{
    float sums[CHOICES], scores[CHOICES];
    int64_t kept[CHOICES], each = n / groups;
    bool open[CHOICES] = {};
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t j = 0; j < each; j++) scores[j] = choice[g * each + j];
        const int64_t count = best < each ? best : each;
        first(scores, each, count, kept);
        sums[g] = 0;
        for (int64_t j = 0; j < count; j++) sums[g] += choice[g * each + kept[j]];
    }
    first(sums, groups, keep, kept);
    for (int64_t i = 0; i < keep; i++) open[kept[i]] = true;
    for (int64_t j = 0; j < n; j++) choice[j] = open[j / each] ? choice[j] : -INFINITY;
}

// logits [m, e], bias [e], weights [m, k], experts [m, k]
static void route(const Tape& t, const Ins& x, Span s)
{
    const int64_t n = x.size[3], k = x.whole[0];
    for (int64_t m = s.first; m < s.end && m < x.size[2]; m++) {
        const Line logits = line(t, x.arg[0], 0, 0, m), bias = line(t, x.arg[1], 0, 0, 0);
        float scores[CHOICES], choice[CHOICES], most = -INFINITY, total = 0;
        for (int64_t j = 0; j < n; j++) most = number(logits, j) > most ? number(logits, j) : most;
        for (int64_t j = 0; j < n; j++) {
            const float y = number(logits, j);
            scores[j] = x.whole[1] ? 1 / (1 + expf(-y)) : expf(y - most);
            total += scores[j];
        }
        for (int64_t j = 0; j < n; j++) {
            scores[j] = x.whole[1] ? scores[j] : scores[j] / total;
            choice[j] = scores[j] + (bias.p ? number(bias, j) : 0);
        }
        if (x.whole[3] > 1) limit(choice, n, x.whole[3], x.whole[4], x.whole[5]);
        int64_t* experts = (int64_t*)start(t, x.arg[3]) + m * k;
        float* weights = (float*)start(t, x.arg[2]) + m * k;
        first(choice, n, k, experts);
        float sum = 0;
        for (int64_t i = 0; i < k; i++) sum += scores[experts[i]];
        const float over = x.whole[2] ? sum + (x.whole[1] ? 1e-20f : 0.0f) : 1;
        for (int64_t i = 0; i < k; i++) weights[i] = scores[experts[i]] / over * (float)x.num[0];
    }
}

// x [m, d], experts [m, k], rows [m k, d], order [m k], counts [e]
static void dispatch(const Tape& t, const Ins& x)
{
    const int64_t k = x.whole[0], n = x.size[2] * k, d = x.size[3];
    const int64_t* experts = (const int64_t*)start(t, x.arg[1]);
    int64_t *order = (int64_t*)start(t, x.arg[3]), *counts = (int64_t*)start(t, x.arg[4]), at = 0;
    for (int64_t e = 0; e < x.whole[1]; e++) {
        counts[e] = 0;
        for (int64_t i = 0; i < n; i++)
            if (experts[i] == e) order[at++] = i, counts[e]++;
    }
    for (int64_t i = 0; i < n; i++) {
        const Line from = line(t, x.arg[0], 0, 0, order[i] / k), to = line(t, x.arg[2], 0, 0, i);
        for (int64_t j = 0; j < d; j += W) put(to, j, few(j, d), get(from, j, few(j, d)));
    }
}

// rows [n, i] in float32, w [e, o, i], counts [e], y [n, o]: a unit is a block of outputs, of all experts.
static void grouped(const Tape& t, const Ins& x, Span s)
{
    const int64_t* counts = (const int64_t*)start(t, x.arg[2]);
    const int64_t depth = x.size[2];
    const Span own = outputs(s, x.size[1]);
    const Line none = {nullptr, F32, 0};
    Line y[MOST];
    for (int64_t e = 0, at = 0; e < x.whole[0]; at += counts[e], e++) {
        if (!counts[e]) continue;
        for (int64_t m = 0; m < counts[e]; m++) y[m] = line(t, x.arg[3], 0, 0, at + m);
        const Line w = line(t, x.arg[1], 0, e, 0);
        const Matrix one = {w.p, w.type, x.arg[1].stride[2], x.arg[1].stride[3], depth};
        linear((const float*)start(t, x.arg[0]) + at * depth, depth, one, none, y, counts[e], own.first, own.end);
    }
}

// w [e, d], counts [e], y [n, d]
static void spread_experts(const Tape& t, const Ins& x)
{
    const int64_t* counts = (const int64_t*)start(t, x.arg[1]);
    for (int64_t e = 0, n = 0; e < x.whole[0]; e++)
        for (int64_t i = 0; i < counts[e]; i++, n++) {
            const Line from = line(t, x.arg[0], 0, 0, e), to = line(t, x.arg[2], 0, 0, n);
            for (int64_t j = 0; j < x.size[3]; j += W) put(to, j, few(j, x.size[3]), get(from, j, few(j, x.size[3])));
        }
}

// rows [n, d], order [n], weights [m, k] in float32, y [m, d]
static void combine(const Tape& t, const Ins& x, Span s)
{
    const int64_t k = x.whole[0], n = x.size[2] * k, d = x.size[3];
    const int64_t* order = (const int64_t*)start(t, x.arg[1]);
    const float* weights = (const float*)start(t, x.arg[2]);
    int64_t back[MOST];
    for (int64_t i = 0; i < n; i++) back[order[i]] = i;
    for (int64_t m = s.first; m < s.end && m < x.size[2]; m++) {
        const Line y = line(t, x.arg[3], 0, 0, m);
        for (int64_t j = 0; j < d; j += W) {
            Vec total = {};
            for (int64_t i = 0; i < k; i++)
                total += get(line(t, x.arg[0], 0, 0, back[m * k + i]), j, few(j, d)) * weights[m * k + i];
            put(y, j, few(j, d), total);
        }
    }
}
"""
