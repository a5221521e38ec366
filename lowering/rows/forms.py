"""What each row op is for one element, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...ir import Node, ops
from ...ir.signature import Operand, bind, spread
from .expr import Expr
from .index import Declined, Index, Modulo, Swapped, side_of
from .pull import FORMS, Puller, Where, form, joined, number, sizes

# -- pointwise ----------------------------------------------------------------------------


def pointwise(name: str, fn: Callable[..., Expr]) -> None:
    """An op whose operands all stand at the result's own index; `fn` takes the puller, expressions and attributes."""

    def run(pull: Puller, node: Node, out: int, where: Where) -> Expr:
        return fn(pull, *(pull.at(v, where) for v in node.operands), **node.attrs)

    FORMS[name] = run


def _plain(op: str) -> Callable[..., Expr]:
    def run(p: Puller, *xs: Expr) -> Expr:
        return p.pool.make(op, *xs)

    return run


def _sigmoid(p: Puller, x: Expr) -> Expr:
    return p.pool.make("sigmoid", x)


def _silu(p: Puller, x: Expr) -> Expr:
    return p.pool.make("mul", x, _sigmoid(p, x))


def _relu(p: Puller, x: Expr) -> Expr:
    return p.pool.make("max", x, 0.0)


def _relu2(p: Puller, x: Expr) -> Expr:
    return p.pool.make("mul", _relu(p, x), _relu(p, x))


def _normal_cdf(p: Puller, x: Expr) -> Expr:
    return p.pool.make("mul", p.pool.make("add", p.pool.make("erf", p.pool.make("mul", x, math.sqrt(0.5))), 1.0), 0.5)


def _gelu(p: Puller, x: Expr, *, approximate: str) -> Expr:
    m = p.pool.make
    if approximate == "none":
        return m("mul", x, _normal_cdf(p, x))
    inner = m("mul", m("mul", x, m("add", m("mul", m("mul", x, x), 0.044715), 1.0)), math.sqrt(2 / math.pi))
    return m("mul", m("mul", x, 0.5), m("add", m("tanh", inner), 1.0))


def _softplus(p: Puller, x: Expr) -> Expr:
    return p.pool.make("where", p.pool.make("gt", x, 20.0), x, p.pool.make("log1p", p.pool.make("exp", x)))


def _neg_exp(p: Puller, x: Expr) -> Expr:
    return p.pool.make("neg", p.pool.make("exp", x))


def _clamp(p: Puller, x: Expr, *, low: float, high: float) -> Expr:
    x = p.pool.make("max", x, low) if low > -math.inf else x
    return p.pool.make("min", x, high) if high < math.inf else x


def _softcap(p: Puller, x: Expr, *, cap: float) -> Expr:
    return p.pool.make("mul", p.pool.make("tanh", p.pool.make("mul", x, 1 / cap)), cap)


def _scale(p: Puller, x: Expr, *, by: float) -> Expr:
    return p.pool.make("mul", x, by)


def _shift(p: Puller, x: Expr, *, by: float) -> Expr:
    return p.pool.make("add", x, by)


def _same(p: Puller, x: Expr) -> Expr:
    return x


def _cast(p: Puller, x: Expr, *, dtype: str) -> Expr:
    return x if dtype in ("f32", "f64") else p.pool.make("cast", x, params=(dtype,))


def _step(p: Puller, x: Expr) -> Expr:
    return p.pool.make("where", p.pool.make("gt", x, 0.0), 1.0, 0.0)


def _inside(p: Puller, x: Expr, *, low: float, high: float) -> Expr:
    m = p.pool.make
    above = m("where", m("gt", low, x), 0.0, 1.0) if low > -math.inf else p.pool.const(1.0)
    return m("where", m("gt", x, high), 0.0, above) if high < math.inf else above


def _zeros_like(p: Puller, x: Expr, *, partial: tuple[str, ...] = ()) -> Expr:
    return p.pool.const(0.0)


POINTWISE: dict[str, Callable[..., Expr]] = {
    "add": _plain("add"), "sub": _plain("sub"), "mul": _plain("mul"), "rsqrt": _plain("rsqrt"), "tanh": _plain("tanh"),
    "silu": _silu, "gelu": _gelu, "relu": _relu, "relu2": _relu2, "sigmoid": _sigmoid, "softplus": _softplus,
    "neg_exp": _neg_exp, "clamp": _clamp, "softcap": _softcap, "scale": _scale, "shift": _shift, "widen": _same, "cast": _cast,
    "step": _step, "inside": _inside, "normal_cdf": _normal_cdf, "zeros_like": _zeros_like,
}  # fmt: skip
for _name, _fn in POINTWISE.items():
    pointwise(_name, _fn)

# -- broadcasts ---------------------------------------------------------------------------


@form("add_bias", "scale_columns")
def _by_column(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    op = "add" if node.is_op("add_bias") else "mul"
    return pull.pool.make(op, pull.operand(node, 0, where), pull.operand(node, 1, where[-1:]))


@form("scale_rows")
def _by_row(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    return pull.pool.make("mul", pull.operand(node, 0, where), pull.operand(node, 1, where[:-1]))


@form("scale_heads")
def _by_head(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    return pull.pool.make("mul", pull.operand(node, 0, where), pull.operand(node, 1, where[-2:-1]))


@form("spread_rows")
def _spread_rows(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    made = pull.operand(node, 0, where[:-1])
    width = number(sizes(node.operands[1])[-1], node.op.name)
    return pull.pool.make("div", made, width) if node.attrs.get("mean") else made


@form("spread_columns")
def _spread_columns(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    return pull.operand(node, 0, where[-1:])


# -- reductions and norms -----------------------------------------------------------------


@form("row_sum", "row_mean")
def _row_sum(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    width = number(sizes(node.operands[0])[-1], node.op.name)
    total = pull.sum(where, width, lambda j: pull.operand(node, 0, (*where, j)))
    return pull.pool.make("div", total, width) if node.is_op("row_mean") else total


@form("rms_norm")
def _rms_norm(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    m, groups = pull.pool.make, node.attrs["groups"]
    width = number(sizes(node.operands[0])[-1], "rms_norm") // groups
    prefix, start = where[:-1], Index()
    if groups > 1:
        group, _ = where[-1].divided(width)
        prefix, start = (*prefix, group), group * width

    def square(j: Index) -> Expr:
        x = pull.operand(node, 0, (*where[:-1], start + j))
        return m("mul", x, x)

    mean = m("div", pull.sum(prefix, width, square), width)
    made = m("mul", pull.operand(node, 0, where), m("rsqrt", m("add", mean, node.attrs["eps"])))
    return _weighted(pull, node, made, where)


def _weighted(pull: Puller, node: Node, made: Expr, where: Where) -> Expr:
    """Times the weight of a norm, where it has one."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return made
    w = pull.operand(node, 1, where[-1:])
    return pull.pool.make("mul", made, pull.pool.make("add", w, 1.0) if node.attrs["zero_centered"] else w)


@form("layer_norm")
def _layer_norm(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    m, prefix = pull.pool.make, where[:-1]
    width = number(sizes(node.operands[0])[-1], "layer_norm")
    mean = m("div", pull.sum(prefix, width, lambda j: pull.operand(node, 0, (*prefix, j))), width)

    def centred(j: Index) -> Expr:
        return m("sub", pull.operand(node, 0, (*prefix, j)), mean)

    variance = m("div", pull.sum(prefix, width, lambda j: m("mul", centred(j), centred(j))), width)
    made = m("mul", centred(where[-1]), m("rsqrt", m("add", variance, node.attrs["eps"])))
    made = _weighted(pull, node, made, where)
    return made if node.inputs[2] is None else m("add", made, pull.operand(node, 2, where[-1:]))


@form("l2_norm")
def _l2_norm(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    m, prefix = pull.pool.make, where[:-1]
    width = number(sizes(node.operands[0])[-1], "l2_norm")

    def square(j: Index) -> Expr:
        x = pull.operand(node, 0, (*prefix, j))
        return m("mul", x, x)

    total = m("add", pull.sum(prefix, width, square), node.attrs["eps"])
    return m("mul", pull.operand(node, 0, where), m("rsqrt", total))


# -- views --------------------------------------------------------------------------------


@form("split")
def _split(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    return pull.operand(node, 0, (*where[:-1], where[-1] + sum(node.attrs["sizes"][:out])))


@form("concat")
def _concat(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    border = number(sizes(node.operands[0])[-1], "concat")
    if side_of(where[-1], border):
        return pull.operand(node, 0, where)
    return pull.operand(node, 1, (*where[:-1], where[-1] + -border))


@form("reshape")
def _reshape(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    left, right = ops.sides(node.attrs["pattern"])
    known = {y: int(y.split("=")[1]) for a in (*left, *right) for y in a.letters if "=" in y}
    bound = bind("reshape", [Operand("x", left)], [node.operands[0].type], known)
    at = dict[str, Index]()
    for axis, index in zip(spread(right, bound.rest), where, strict=True):
        rest = index
        for letter in reversed(axis.letters[1:]):
            rest, at[letter] = rest.divided(number(bound.size[letter], "a group"))
        at[axis.letters[0]] = rest
    groups = [a.letters for a in spread(left, bound.rest)]
    return pull.operand(node, 0, tuple(joined([at.get(x, Index()) for x in g], [bound.size[x] for x in g]) for g in groups))


# -- rope ---------------------------------------------------------------------------------


@form("rope")
def _rope(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    a, m, j = node.attrs, pull.pool.make, where[-1]
    if a["divisors"] or a["far"]:
        raise Declined("a divisor for each pair is a table, and what a row reaches over a sum, which rope here does not read")
    size = number(sizes(node.operands[0])[-1], "rope")
    width = int(size * a["fraction"])
    step = 2 if a["interleaved"] else math.gcd(width // 2, size)  # places that are turned alike stand together
    group, within = j.divided(step)
    partner, second, pair = (
        _neighbour(pull, group, within) if a["interleaved"] else _half(pull, group, within, width, step, size)
    )
    x, p = pull.operand(node, 0, where), pull.at(node.operands[1], where[:2])
    other = pull.operand(node, 0, (*where[:-1], partner))
    angle = (p, pull.pool.index(pair))
    table = (a["rounded"], width, a["theta"], *a["scaling"])
    cos, sin = m("rope_wave", *angle, params=(1, *table)), m("rope_wave", *angle, params=(0, *table))
    if a["amplitude"] != 1:
        cos, sin = (m("mul", y, pull.pool.const(a["amplitude"])) for y in (cos, sin))
    turn = m("where", second, m("neg", sin), sin) if a["inverse"] else m("where", second, sin, m("neg", sin))
    made = m("add", m("mul", x, cos), m("mul", other, turn))
    return made if width == size else m("where", m("ge", pull.pool.index(group), params=(width // step,)), x, made)


def _neighbour(pull: Puller, group: Index, within: Index) -> tuple[Index, Expr, Index]:
    """Neighbours turn together: the other place, whether this is the second, and which pair it is."""
    return group * 2 + within * -1 + 1, pull.pool.make("ge", pull.pool.index(within), params=(1,)), group


def _half(pull: Puller, group: Index, within: Index, width: int, step: int, size: int) -> tuple[Index, Expr, Index]:
    """Halves turn together, `step` places at a time."""
    half = width // 2 // step
    if width == size and half == 1:
        swapped, first = group * -1 + 1, Index()
    else:
        swapped = Index(((Swapped(group, half, size // step), 1),))
        first = Index(((Modulo(group, half, half), 1),)) if half > 1 else Index()
    second = pull.pool.make("ge", pull.pool.index(group), params=(half,))
    return swapped * step + within, second, first * step + within


# -- sums over rows -----------------------------------------------------------------------


@form("column_sum")
def _column_sum(pull: Puller, node: Node, out: int, where: Where) -> Expr:
    return pull.pool.partial(f"sum{pull.graph.nodes.index(node)}", where[-1])
