"""Rules for ways of calling torch's own ops that text cannot leave open: one for each way that a graph has."""

from __future__ import annotations

from ..ir import Graph, Node, OpDef, Value, ops
from ..ir.ops.aten import Ref, arguments
from .match import Match
from .rewrite import Rule

LOWEST = -6e4  # a number below this, added to a logit, hides it: the smallest of float16
BEHIND = "reshape({}, pattern='b h t d -> b t h d')"
FIRST = "y = reshape(o, pattern='b t h d -> b h t d')"


def masked_attention(graph: Graph) -> tuple[Rule, ...]:
    """Torch's own attention with a mask that positions alone say: one rule for each way it is called here."""
    name, made = "aten.scaled_dot_product_attention.default", dict[str, Rule]()
    for node in graph.nodes:
        if not (isinstance(node.op, OpDef) and node.op is ops.aten and node.attrs["target"] == name):
            continue
        text = node.attrs["args"]
        call = arguments(text)
        named = dict(call.named)
        if call.positional != tuple(Ref(i) for i in range(4)) or not named.keys() <= {"scale", "enable_gqa"}:
            continue
        scale = f", scale={named['scale']!r}" if named.get("scale") is not None else ""
        before = (
            "m = visible_table(p, window=W, causal=C, dtype=D, hidden=N, inverted=False)\n"
            f"y = aten(q, k, v, m, target='{name}', args={text!r})"
        )
        calls = [f"{a} = {BEHIND.format(b)}" for a, b in zip("fgu", "qkv", strict=True)]
        after = "\n".join([*calls, f"o = attention(f, g, u, causal=C, window=W{scale})", FIRST])
        made[text] = Rule.of(f"attention-torch-{len(made)}", before, after, _square)
    return tuple(made.values())


def _square(found: Match) -> bool:
    q, k = (found.values[n].type.shape for n in ("q", "k"))
    return len(q) == 4 and q[2] == k[2] and found.attrs["N"] <= LOWEST


def fills(graph: Graph) -> list[str]:
    """How masks are filled in here, with numbers that hide a logit."""
    found = dict.fromkeys(n.attrs["args"] for n in graph.nodes if _is(n, "masked_fill"))
    calls = [(text, arguments(text).positional) for text in found]
    return [
        t for t, a in calls if a[:2] == (Ref(0), Ref(1)) and len(a) == 3 and isinstance(a[2], int | float) and a[2] <= LOWEST
    ]


def scales_behind(graph: Graph) -> tuple[Rule, ...]:
    """Logits scaled after a mask was filled in are scaled before: what is hidden stays hidden."""
    return tuple(_scale_behind(f"scale-behind-mask-{i}", text) for i, text in enumerate(fills(graph)))


def _scale_behind(name: str, text: str) -> Rule:
    filled, hidden = f"target='aten.masked_fill.Scalar', args={text!r}", arguments(text).positional[2]
    before, after = f"f = aten(l, m, {filled})\ny = scale(f, by=S)", f"z = scale(l, by=S)\ny = aten(z, m, {filled})"
    return Rule.of(name, before, after, lambda found: found.attrs["S"] > 0 and hidden * found.attrs["S"] <= LOWEST)


def short_convs(graph: Graph) -> tuple[Rule, ...]:
    """A depthwise conv over [b c t], padded by what it looks back: one rule for each way it is called here."""
    made = dict[tuple[str, ...], Rule]()
    for node in graph.nodes:
        first = _foreign(graph, node.operands[0]) if _is(node, "slice") else None
        if first is not None and _is(first, "conv1d"):
            found = _padded(first, node)
        elif _is(node, "conv1d") and (first := _foreign(graph, node.operands[0])) is not None:
            found = _padded_first(node, first)
        else:
            continue
        if found is not None and found not in made:
            made[found] = Rule.of(f"causal-conv1d-{len(made)}", *found, _keeps_length)
    return (*made.values(), *CONV_SILU)


def _foreign(graph: Graph, value: Value) -> Node | None:
    maker = graph.makers.get(value)
    return maker if maker is not None and maker.is_op("aten") else None


def _is(node: Node, name: str) -> bool:
    return node.is_op("aten") and node.attrs["target"].split(".")[1] == name


def _call(node: Node, names: str, result: str) -> str:
    return f"{result} = aten({names}, target={node.attrs['target']!r}, args={node.attrs['args']!r})"


def _depthwise(node: Node, padding: int) -> str:
    """Names of the operands where it is a depthwise conv of stride 1, padded so."""
    call = arguments(node.attrs["args"])
    named = dict(zip(("x", "w", "bias", "stride", "padding", "dilation", "groups"), call.positional, strict=False))
    named |= dict(call.named)
    usual = {"stride": (1,), "dilation": (1,)}
    if any(named.get(k, v) != v for k, v in usual.items()) or named.get("padding", (0,)) != (padding,):
        return ""
    channels, biased = node.operands[1].type.shape[0], named.get("bias") is not None
    if named.get("groups", 1) != channels or node.operands[1].type.shape[1] != 1:
        return ""
    return "x, w, n" if biased else "x, w"


_CONV = """
    t = reshape(x, pattern='b c t -> b t c')
    k = reshape(w, pattern='c u=1 k -> c k')
    r, f = causal_conv1d(t, k{})
    y = reshape(r, pattern='b t c -> b c t')
"""


def _padded(conv: Node, cut: Node) -> tuple[str, str] | None:
    """Padded on both sides, and the end cut off."""
    names = _depthwise(conv, int(conv.operands[1].type.shape[2]) - 1)
    call = arguments(cut.attrs["args"])
    where = dict(zip(("x", "dim", "start", "end"), call.positional, strict=False)) | dict(call.named)
    if not names or where.get("dim") not in (2, -1) or where.get("start", 0) not in (0, None):
        return None
    others = ", ".join(["c", *(f"i{n}" for n in range(1, len(cut.operands)))])
    return f"{_call(conv, names, 'c')}\n{_call(cut, others, 'y')}", _CONV.format(", n" * ("n" in names))


def _padded_first(conv: Node, pad: Node) -> tuple[str, str] | None:
    """Padded in front by an op of its own."""
    behind = int(conv.operands[1].type.shape[2]) - 1
    call = arguments(pad.attrs["args"])
    padded = _is(pad, "pad") or _is(pad, "constant_pad_nd")
    names = _depthwise(conv, 0)
    if not names or not padded or call.positional[1:2] != ((behind, 0),) or len(call.positional) > 2 or call.named:
        return None
    return f"{_call(pad, 'x', 'p')}\n{_call(conv, names.replace('x', 'p'), 'y')}", _CONV.format(", n" * ("n" in names))


def _keeps_length(found: Match) -> bool:
    return found.values["x"].type == found.values["y"].type and len(found.values["x"].type.dims) == 3


CONV_SILU = tuple(
    Rule.of(
        f"causal-conv1d-silu{'-bias' * bool(bias)}",
        f"r, f = causal_conv1d(x, w{bias}, act='none')\nz = reshape(r, pattern=P)\ny = silu(z)",
        f"s, g = causal_conv1d(x, w{bias}, act='silu')\ny = reshape(s, pattern=P)",
    )
    for bias in ("", ", n")
)

_EXPERTS = """
    {}
    r, o, c = dispatch(x, i, e=E)
    h = grouped_linear(r, a, c)
    g, u = split(h, sizes=Z)
    v = activation(g)
    m = mul(v, u)
    d = grouped_linear(m, b, c)
    y = combine(d, o, {})
"""
_SHARES = "s = row_sum(w)\nt = reshape(s, pattern='... -> ... u=1')\nq = aten(w, t, target='aten.div.Tensor', args='x0, x1')"


def routers(graph: Graph) -> tuple[Rule, ...]:
    """The k best of a softmax are a route; weights that are made to sum to one belong to it."""
    ks = {dict(enumerate(arguments(n.attrs["args"]).positional)).get(1) for n in graph.nodes if _is(n, "topk")}
    best = tuple(
        Rule.of(
            f"route-{k}",
            "p = aten(l, target='aten.softmax.int', args='x0, -1')\n"
            f"w, i = aten(p, target='aten.topk.default', args='x0, {k}')",
            f"w, i = route(l, k={k}, renormalize=False)",
        )
        for k in sorted(k for k in ks if isinstance(k, int))
    )
    before = _EXPERTS.format(f"w, i = route(l, k=K, renormalize=False)\n{_SHARES}", "q")
    after = _EXPERTS.format("w, i = route(l, k=K)", "w")
    return (
        *best,
        Rule.of(
            "route-shares", "\n".join(x.strip() for x in before.splitlines()), "\n".join(x.strip() for x in after.splitlines())
        ),
    )


def partial_turns(graph: Graph) -> tuple[Rule, ...]:
    """Of heads of which a part is turned, that part is a fraction."""
    sizes = {n.attrs["sizes"] for n in graph.nodes if n.is_op("split") and len(n.attrs["sizes"]) == 2}
    made = list[Rule]()
    for turned, rest in sorted(sizes):
        fraction, options = turned / (turned + rest), "theta=T, scaling=S, divisors=D, amplitude=A, rounded=R, interleaved=I"
        if int((turned + rest) * fraction) != turned:
            continue
        first = (
            f"a, b = split(x, sizes=({turned}, {rest}))\nt = {BEHIND.format('a')}\nr = rope(t, p, {options}, fraction=1.0)\n"
            "c = reshape(r, pattern='b t h d -> b h t d')\ny = concat(c, b)"
        )
        after = f"t = {BEHIND.format('x')}\no = rope(t, p, {options}, fraction={fraction!r})\n{FIRST}"
        behind = f"a, b = split(x, sizes=({turned}, {rest}))\nr = rope(a, p, {options}, fraction=1.0)\ny = concat(r, b)"
        made.append(Rule.of(f"rope-part-{turned}-of-{turned + rest}-heads-first", first, after))
        made.append(
            Rule.of(f"rope-part-{turned}-of-{turned + rest}", behind, f"y = rope(x, p, {options}, fraction={fraction!r})")
        )
    return tuple(made)
