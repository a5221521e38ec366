"""The C++ of a decode step: scans of channels, whose state is a few numbers a channel."""

from __future__ import annotations

SCANS = """\
constexpr int64_t STRETCH = 64;  // channels in a unit of work

// x, step [b, 1, c], rate [c, s], k, q [b, 1, s], state [b, c, s], o, final: a unit is some channels of a row.
static void selective_scan(const Tape& t, const Ins& x, Span s)
{
    const int64_t channels = x.size[2], n = x.size[3], parts = (channels + STRETCH - 1) / STRETCH;
    for (int64_t unit = s.first; unit < s.end && unit < x.size[0] * parts; unit++) {
        const int64_t b = unit / parts, first = unit % parts * STRETCH;
        const Line lx = line(t, x.arg[0], 0, 0, b), steps = line(t, x.arg[1], 0, 0, b), o = line(t, x.arg[6], 0, 0, b);
        const Line k = line(t, x.arg[3], 0, 0, b), q = line(t, x.arg[4], 0, 0, b);
        for (int64_t c = first; c < channels && c < first + STRETCH; c++) {
            const Line rate = line(t, x.arg[2], 0, 0, c), past = line(t, x.arg[5], 0, b, c), next = line(t, x.arg[7], 0, b, c);
            const float step = number(steps, c), u = step * number(lx, c);
            Vec total = {};
            for (int64_t i = 0; i < n; i += W) {
                const int64_t w = few(i, n);
                Vec y = u * get(k, i, w);
                if (past.p) y += exp_of(step * get(rate, i, w)) * get(past, i, w);
                put(next, i, w, y);
                for (int64_t j = w; j < W; j++) y[j] = 0;
                total += y * get(q, i, w);
            }
            put_number(o, c, sum(total));
        }
    }
}

// x, decay [b, 1, c], p [b], state [b, c], h, final: a unit is a row.
static void rg_lru(const Tape& t, const Ins& x, Span s)
{
    for (int64_t b = s.first; b < s.end && b < x.size[2]; b++) {
        const Line in = line(t, x.arg[0], 0, 0, b), decay = line(t, x.arg[1], 0, 0, b), past = line(t, x.arg[3], 0, 0, b);
        const Line h = line(t, x.arg[4], 0, 0, b), next = line(t, x.arg[5], 0, 0, b);
        const bool begins = whole(t, x.arg[2], b) == 0;
        for (int64_t i = 0; i < x.size[3]; i += W) {
            const int64_t n = few(i, x.size[3]);
            Vec y = get(in, i, n);
            if (!begins) {
                const Vec d = get(decay, i, n);
                y *= each(-exp_less_one(2.0f * d), [](float z) { return sqrtf(z); });
                if (past.p) y += exp_of(d) * get(past, i, n);
            }
            put(next, i, n, y);
            put(h, i, n, y);
        }
    }
}
"""
