"""How a recurrence's work is shared out among threads, the walk of a decode step, and a library's functions."""

from __future__ import annotations

DECODE = """\
// One token: the state fades, is read by key (delta), written, and read by query.
static void token(const Call& x, const Span& s, int64_t t, int64_t head, const float* from, float* to, Room& r)
{
    constexpr int V = DV / W;
    const int64_t key = head / (x.heads / x.keys), rows = x.width;
    float fade[DK], line[DV];
    Vec u[V], o[V] = {};
    read_row(r.q, place(x.q, s.row, t, key), x.q.type, x.width, DK, (float)x.scale);
    read_row(r.k, place(x.k, s.row, t, key), x.k.type, x.width, DK, 1);
    read_row(line, place(x.v, s.row, t, head), x.v.type, x.out, DV, 1);
    const float beta = x.beta.data ? number(x.beta, s.row, t, head) : 1.0f;
    fades(x, s.row, t, head, fade);
    for (int d = 0; d < V; d++) u[d] = at(line + d * W);
    for (int i = 0; DELTA && i < rows; i++)
        for (int d = 0; d < V; d++) u[d] -= at(from + i * DV + d * W) * (fade[i] * r.k[i]);
    for (int d = 0; d < V; d++) u[d] *= beta;
    for (int i = 0; i < rows; i++)
        for (int d = 0; d < V; d++) {
            const Vec y = at(from + i * DV + d * W) * fade[i] + u[d] * r.k[i];
            at(to + i * DV + d * W) = y;
            o[d] += y * r.q[i];
        }
    for (int d = 0; d < V; d++) at(line + d * W) = o[d];
    write_row(place(x.o, s.row, t, head), line, x.o.type, x.out, 1);
}

// A state whose rows need no padding goes straight from where it is to where it shall be.
static void walk_tokens(const Call& x, const Span& s, int64_t key, int64_t first, Room& r)
{
    const int64_t size = x.width * x.out;
    for (int64_t head = first; head < first + x.together; head++) {
        const int64_t ends = (s.index * x.heads + head) * size;
        const bool direct = x.out == DV;
        const float* from = direct && x.start ? x.start + ends : r.state;
        float* to = direct ? x.final + ends : r.state;
        if (from == r.state) read_state(r.state, x.start ? x.start + ends : nullptr, x.width, x.out);
        for (int64_t t = s.start; t < s.end; t++) {
            token(x, s, t, head, from, to, r);
            from = to;
        }
        if (!direct) write_state(x.final + ends, r.state, x.width, x.out);
    }
}
"""

ENTRIES = """\
// Every unit of work is alone with its results, so that the number of threads changes no bit.
// A thread's room stays with it: its pages are touched once.
struct Memory {
    float* start = nullptr;
    int64_t size = 0;
    ~Memory() { free(start); }
};

static float* room_of(int64_t floats)
{
    static thread_local Memory kept;
    if (kept.size < floats) {
        free(kept.start);
        kept.start = (float*)aligned_alloc(64, sizeof(float) * floats);
        kept.size = kept.start ? floats : 0;
    }
    return kept.start;
}

typedef void (*Walk)(const Call&, const Span&, int64_t, int64_t, Room&);

static int over_units(const Call& x, Walk walk, bool backward)
{
    const int64_t blocks = x.heads / x.keys / x.together, units = x.segments * x.keys * blocks;
    const int64_t floats = FORWARD_ROOM + (backward ? BACKWARD_ROOM : 0) + x.together * STATE;
    int failed = 0;
#pragma omp parallel num_threads((int)(units < x.threads ? units : x.threads)) reduction(| : failed)
    {
        Flushed flushed;
        Room r;
        float* room = room_of(floats);
        if (room) furnish(r, room, x.together, backward);
        else failed = 1;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++) {
            if (!room) continue;
            const int64_t block = unit % blocks, key = unit / blocks % x.keys;
            const Span s = span_of(x, unit / blocks / x.keys);
            const int64_t first = key * blocks * x.together + block * x.together;
            walk(x, s, key, first, r);
        }
    }
    return failed;
}

#define ENTRY extern "C" __attribute__((visibility("default"))) int
static int64_t bytes_of(const View& x, const Call& c, int64_t each)
{
    return c.batch * c.tokens * each * (x.type == F32 ? 4 : 2);
}

ENTRY forward(const Call* x)
{
    const int64_t chunks = (x->tokens / C + (x->borders ? x->segments : 1)) * x->batch * x->heads;
    fresh(x->o.data, bytes_of(x->o, *x, x->heads * x->out));
    fresh(x->u, chunks * C * x->out * 4);
    fresh(x->states, chunks * x->width * x->out * 4);
    return over_units(*x, walk, false);
}
ENTRY backward(const Call* x)
{
    const int64_t of_keys = x->keys * x->width;
    fresh(x->d_q.data, bytes_of(x->d_q, *x, of_keys));
    fresh(x->d_k.data, bytes_of(x->d_k, *x, of_keys));
    fresh(x->d_v.data, bytes_of(x->d_v, *x, x->heads * x->out));
    return over_units(*x, walk_back, true);
}
ENTRY decode(const Call* x) { return over_units(*x, walk_tokens, false); }
"""
