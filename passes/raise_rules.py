"""What eager modules write out, and the op it is: rules as text, by family."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

from ..ir import Graph, ops
from .match import Match
from .raise_calls import BEHIND, FIRST, LOWEST, fills, masked_attention, partial_turns, routers, scales_behind, short_convs
from .raise_flat import FLAT
from .rewrite import Rule

# A last dim of one moves behind what is done to each number.
SINK = tuple(
    Rule.of(f"sink-{op}", f"a = reshape(x, pattern='... -> ... u=1')\ny = {op}(a{attrs})",
            f"b = {op}(x{attrs})\ny = reshape(b, pattern='... -> ... u=1')")
    for op, attrs in (("shift", ", by=e"), ("scale", ", by=e"), ("rsqrt", ""), ("widen", ""), ("cast", ", dtype=d"))
)  # fmt: skip


def _casts_back(found: Match) -> bool:
    return found.values["x"].type == found.values["y"].type


def _undone(found: Match) -> bool:
    return found.attrs["a"] * found.attrs["c"] == 1


def _bends(found: Match) -> bool:
    return abs(found.attrs["a"] * found.attrs["c"] - 1) < 1e-12


_MEAN_SQUARE = "s = mul(x, x)\nm = row_mean(s)\ne = shift(m, by=E)\nr = rsqrt(e)\ny = scale_rows(x, r)"
NORMS = (
    Rule.of("rms-norm", _MEAN_SQUARE, "y = rms_norm(x, eps=E)"),
    Rule.of("l2-norm", _MEAN_SQUARE.replace("row_mean", "row_sum"), "y = l2_norm(x, eps=E)"),
    Rule.of(
        "layer-norm",
        "m = row_mean(x)\na = reshape(m, pattern='... -> ... u=1')\n"
        "c = aten(x, a, target='aten.sub.Tensor', args='x0, x1')\ny = rms_norm(c, eps=E)",
        "y = layer_norm(x, eps=E)",
    ),
    Rule.of(
        "rms-norm-one-plus",
        "n = rms_norm(x, eps=E)\nv = shift(w, by=1.0)\ny = scale_columns(n, v)",
        "y = rms_norm(x, w, eps=E, zero_centered=True)",
    ),
    Rule.of(
        "rms-norm-one-plus-wide",
        "n = rms_norm(x, eps=E)\nz = widen(w)\nv = shift(z, by=1.0)\ny = scale_columns(n, v)",
        "y = rms_norm(x, w, eps=E, zero_centered=True)",
    ),
    Rule.of(
        "rms-norm-weight-wide",
        "n = rms_norm(x, eps=E)\nz = widen(w)\ny = scale_columns(n, z)",
        "y = rms_norm(x, w, eps=E)",
    ),
    Rule.of("rms-norm-weight", "n = rms_norm(x, eps=E)\ny = scale_columns(n, w)", "y = rms_norm(x, w, eps=E)"),
    Rule.of(
        "layer-norm-of-rms-norm-weight",
        "m = row_mean(x)\na = reshape(m, pattern='... -> ... u=1')\n"
        "c = aten(x, a, target='aten.sub.Tensor', args='x0, x1')\ny = rms_norm(c, w, eps=E, zero_centered=False, groups=1)",
        "y = layer_norm(x, w, eps=E)",
    ),
    Rule.of("layer-norm-weight", "n = layer_norm(x, eps=E)\ny = scale_columns(n, w)", "y = layer_norm(x, w, eps=E)"),
    Rule.of("layer-norm-bias", "n = layer_norm(x, w, eps=E)\ny = add_bias(n, c)", "y = layer_norm(x, w, c, eps=E)"),
    *(
        Rule.of(
            f"{op.replace('_', '-')}-island{'-weight' * bool(w)}",
            f"h = widen(x)\nn = {op}(h{w}, eps=E{z})\ny = cast(n, dtype=D)",
            f"y = {op}(x{w}, eps=E{z})",
            _casts_back,
        )
        for op, w, z in (
            ("rms_norm", "", ""), ("rms_norm", ", w", ", zero_centered=Z"), ("l2_norm", "", ""), ("layer_norm", "", ""),
        )
    ),
)  # fmt: skip

_TANH_GELU = """
    q = mul(x, x)
    c = mul(x, q)
    k = scale(c, by=0.044715)
    a = add(x, k)
    t = scale(a, by=0.7978845608028654)
    h = tanh(t)
    o = shift(h, by=1.0)
    g = scale(x, by=0.5)
    y = mul(g, o)
"""
_ERF_GELU = """
    d = scale(x, by={})
    f = aten(d, target='aten.erf.default', args='x0')
    o = shift(f, by=1.0)
    g = scale(x, by=0.5)
    y = mul(g, o)
"""
ACTIVATIONS = (
    Rule.of("scale-back", "s = scale(x, by=a)\ny = scale(s, by=c)", "x", _undone),
    Rule.of("silu", "s = sigmoid(x)\ny = mul(x, s)", "y = silu(x)"),
    Rule.of("relu2", "r = relu(x)\ny = mul(r, r)", "y = relu2(x)"),
    Rule.of("gelu-tanh", _TANH_GELU, "y = gelu(x, approximate='tanh')"),
    *(Rule.of(f"gelu-erf-{i}", _ERF_GELU.format(f), "y = gelu(x)") for i, f in enumerate((2**-0.5, 1 / 2**0.5, 0.5**0.5))),
    Rule.of("softcap", "s = scale(x, by=a)\nt = tanh(s)\ny = scale(t, by=c)", "y = softcap(x, cap=c)", _bends),
)

_TURN = "theta=T, scaling=S, divisors=D, amplitude=A, rounded=R"
_LAW = f"width=W, {_TURN}"
_TIMES = "target='aten.mul.Tensor', args='x0, x1'"
_HALVES = f"""
    c = rope_table(p, part='cos', layout='halves', shape=H, {_LAW})
    s = rope_table(p, part='sin', layout='halves', shape=H, {_LAW})
    m = aten(x, c, {_TIMES})
    a, b = split(x, sizes=Z)
    n = scale(b, by=-1.0)
    r = concat(n, a)
    u = aten(r, s, {_TIMES})
    y = add(m, u)
"""
_ONCE = f"""
    c = rope_table(p, part='cos', layout='once', shape=H, {_LAW})
    s = rope_table(p, part='sin', layout='once', shape=H, {_LAW})
    e = rope_table(p, part='cos', layout='once', shape=H, {_LAW})
    f = rope_table(p, part='sin', layout='once', shape=H, {_LAW})
    a, b = split(x, sizes=Z)
    k = aten(a, c, {_TIMES})
    l = aten(b, s, {_TIMES})
    m = sub(k, l)
    n = aten(b, e, {_TIMES})
    o = aten(a, f, {_TIMES})
    q = add(n, o)
    y = concat(m, q)
"""
_PAIRS = f"""
    c = rope_table(p, part='cos', layout='pairs', shape=H, {_LAW})
    s = rope_table(p, part='sin', layout='pairs', shape=H, {_LAW})
    m = aten(x, c, {_TIMES})
    d = reshape(x, pattern='... (n r=2) -> ... (r n)')
    a, b = split(d, sizes=Z)
    n = scale(b, by=-1.0)
    r = concat(n, a)
    v = reshape(r, pattern='... (r=2 n) -> ... n r')
    t = reshape(v, pattern='a b c d e -> a b c (d e)')
    u = aten(t, s, {_TIMES})
    y = add(m, u)
"""
_HEADS_BEHIND = f"y = rope(x, p, {_TURN}{{}})"
_HEADS_FIRST = f"""
    t = reshape(x, pattern='b h t d -> b t h d')
    z = rope(t, p, {_TURN}{{}})
    y = reshape(z, pattern='b t h d -> b h t d')
"""


def _turned(*shape: str) -> object:
    """Tables of this shape, on heads of their width, turned by halves."""

    def when(found: Match) -> bool:
        sizes, words = found.attrs["Z"], found.attrs["H"].split()
        dims = found.values["x"].type.dims
        alike = len(dims) == 4 and dims[-1].size == found.attrs["W"] and len(sizes) == 2 and sizes[0] == sizes[1]
        return alike and tuple(["1"] * (4 - len(words)) + words)[1:] == shape

    return when


ROPE = tuple(
    Rule.of(f"rope-{name}-{where}", before, after.format(pairs), _turned(*shape))  # type: ignore[arg-type] # a condition
    for name, before, pairs in (("halves", _HALVES, ""), ("once", _ONCE, ""), ("pairs", _PAIRS, ", interleaved=True"))
    for where, after, shape in (
        ("heads-first", _HEADS_FIRST, ("1", "t", "d")), ("heads-behind", _HEADS_BEHIND, ("t", "1", "d")),
    )
)  # fmt: skip


def _hides(found: Match) -> bool:
    """What is hidden is hidden for good; the table has one row per query of square logits."""
    return (
        found.attrs.get("N", -float("inf")) <= LOWEST
        and all(len(found.values[n].type.dims) == 4 for n in ("q", "k", "v"))
        and found.values["q"].type.shape[2] == _keys(found)
    )


def _keys(found: Match) -> object:
    return found.values["k"].type.shape[1 if found.values["k"].type.shape[2] != found.values["q"].type.shape[2] else 2]


_KEYS = {  # how keys become columns, and what keys they were
    "k": ("i = reshape(k, pattern='a b c d -> a b d c')", f"g = {BEHIND.format('k')}"),
    "t": ("i = reshape(k, pattern='a b c d -> a c d b')", ""),
}
_MASKS = {
    "plain": ("", "causal=False"),
    "masked": (
        "m = visible_table(p, window=W, causal=C, dtype=D, hidden=N, inverted=False)\n"
        "{} = aten({}, m, target='aten.add.Tensor', args='x0, x1')",
        "causal=C, window=W",
    ),
}


def eager_attention(graph: Graph) -> tuple[Rule, ...]:
    """softmax(scale q k^T + mask) v, with the heads first."""
    made = list[Rule]()
    for key, (turn, back) in _KEYS.items():
        for scaled in ("scaled", ""):
            for mask, (hide, seen) in (_MASKS | _filled(graph)).items():
                for island, cap in product(("", "cast", "island", "double"), ("", "capped")):
                    name = "-".join(filter(None, ("attention", key, scaled, cap, mask, island)))
                    made.append(_attention(name, *_eager(turn, back, scaled, cap, hide, seen, island)))
    return tuple(made)


@cache
def _attention(name: str, before: str, after: str) -> Rule:
    return Rule.of(name, before, after, _hides)


def _filled(graph: Graph) -> dict[str, tuple[str, str]]:
    """Masks that are filled in, with each number that this graph has for them."""
    made = dict[str, tuple[str, str]]()
    for text in fills(graph):
        hide = (
            "m = visible_table(p, window=W, causal=C, dtype='bool', inverted=True)\n"
            f"{{}} = aten({{}}, m, target='aten.masked_fill.Scalar', args={text!r})"
        )
        made[f"filled-{len(made)}"] = (hide, "causal=C, window=W")
    return made


_SUNK = """
    {turn}
    l = aten(q, i, target='aten.matmul.default', args='x0, x1')
    z = scale(l, by=S)
    {hide}
    e = reshape(r, pattern='a -> u=1 a u=1 u=1')
    n = aten(e, b, target='aten.expand.default', args=X)
    c = aten(a, n, target='aten.cat.default', args='[x0, x1], -1')
    t, o = aten(c, target='aten.max.dim', args='x0, -1, True')
    d = aten(c, t, target='aten.sub.Tensor', args='x0, x1')
    h = aten(d, target='aten.softmax.int', args='x0, -1')
    w = aten(h, target='aten.slice.Tensor', args='x0, 3, 0, -1')
    y = aten(w, v, target='aten.matmul.default', args='x0, x1')
"""


def sunk_attention(graph: Graph) -> tuple[Rule, ...]:
    """The same with one more logit per head, which takes its share of the softmax and adds nothing."""
    made = list[Rule]()
    for (key, (turn, back)), (mask, (hide, seen)) in product(_KEYS.items(), (_MASKS | _filled(graph)).items()):
        if hide:
            calls = [f"f = {BEHIND.format('q')}", *([back] if back else []), f"u = {BEHIND.format('v')}"]
            calls.append(f"o = attention(f, {'g' if back else 'k'}, u, r, {seen}, scale=S)")
            before = _SUNK.format(turn=turn, hide=hide.format("a", "z"))
            made.append(Rule.of(f"attention-sinks-{key}-{mask}", before, "\n".join([*calls, FIRST]), _hides))
    return tuple(made)


def _eager(turn: str, back: str, scaled: str, cap: str, hide: str, seen: str, island: str) -> tuple[str, str]:
    lines, last = [turn, "l = aten(q, i, target='aten.matmul.default', args='x0, x1')"], "l"
    if scaled:
        lines, last = [*lines, f"z = scale({last}, by=S)"], "z"
    if cap:
        lines, last = [*lines, f"j = softcap({last}, cap=P)"], "j"
    if hide:
        lines, last = [*lines, hide.format("a", last)], "a"
    if island == "island":
        lines, last = [*lines, f"h = widen({last})"], "h"
    if island == "double":
        lines, last = [*lines, f"h = cast({last}, dtype='f64')"], "h"
    lines, last = [*lines, f"w = aten({last}, target='aten.softmax.int', args='x0, -1')"], "w"
    if island == "double":
        lines, last = [*lines, f"c = aten({last}, target='aten.to.dtype', args=E)"], "c"
    elif island:
        lines, last = [*lines, f"c = cast({last}, dtype=E)"], "c"
    before = "\n".join([*lines, f"y = aten({last}, v, target='aten.matmul.default', args='x0, x1')"])
    keys = "g" if back else "k"
    calls = [f"f = {BEHIND.format('q')}", *([back] if back else []), f"u = {BEHIND.format('v')}"]
    calls.append(f"o = attention(f, {keys}, u, {seen}{', softcap=P' * bool(cap)}, scale={'S' if scaled else '1.0'})")
    return before, "\n".join([*calls, FIRST])


def _usual_scale(found: Match) -> bool:
    scale, width = found.attrs["S"], found.values["q"].type.shape[-1]
    return scale is not None and isinstance(width, int) and abs(scale - width**-0.5) < 1e-12


_OPTIONS = "causal=C, window=W, softcap=P, scale=S"
SHARED = (
    Rule.of(
        "usual-scale",
        f"y = attention(q, k, v, {_OPTIONS})",
        "y = attention(q, k, v, causal=C, window=W, softcap=P)",
        _usual_scale,
    ),
    *(
        Rule.of(
            f"shared-heads{sinks.replace(', ', '-')}",
            f"a = repeat_heads(k, r=R)\nb = repeat_heads(v, r=R)\ny = attention(q, a, b{sinks}, {_OPTIONS})",
            f"y = attention(q, k, v{sinks}, {_OPTIONS})",
        )
        for sinks in ("", ", s")
    ),
    *(
        Rule.of(
            f"shared-heads-{op.name.replace('_', '-')}",
            f"a = repeat_heads(q, r=R)\nb = repeat_heads(k, r=R)\ny, z = {op.name}(a, b, v{gates}, scale=S)",
            f"y, z = {op.name}(q, k, v{gates}, scale=S)",
        )
        for op, gates in ((ops.gated_delta_rule, ", d, e"), (ops.ssd, ", d, e"), (ops.kimi_delta_attention, ", d, e"))
    ),
)


def rules_of(graph: Graph, family: str) -> Sequence[Rule]:
    """A family's rules for this graph; those that leave its calls open are made once."""
    match family:
        case "activation":
            return (*ACTIVATIONS, *scales_behind(graph))
        case "attention":
            return (*eager_attention(graph), *sunk_attention(graph), *masked_attention(graph))
        case "heads":
            return (*SHARED, *partial_turns(graph))
        case "conv":
            return short_convs(graph)
        case "experts":
            return routers(graph)
        case _:
            return {"tidy": SINK, "norm": NORMS, "flat": FLAT, "rope": ROPE, "rows": FLAT}[family]
