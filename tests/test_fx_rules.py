"""Each rule of raising on text: where it fires, and where it must hold back; and views that become one."""

import pytest
import torch
from plait.ir import Graph, evaluate, parse
from plait.passes import join_views, raise_family, raise_ops

MUL = "target='aten.mul.Tensor', args='x0, x1'"
TABLES = (
    "c = rope_table(p, part='cos', width=4, theta={}, shape='{shape}', dtype='f64')\n"
    "s = rope_table(p, part='sin', width=4, shape='{shape}', dtype='f64')\n"
    f"m = aten(x, c, {MUL})\na, b = split(x, sizes=(2, 2))\nn = scale(b, by={{}})\nr = concat(n, a)\n"
    f"u = aten(r, s, {MUL})\ny = add(m, u)"
)
FIRST, BEHIND = "x: f64[b, 3, s, 4], p: i64[b, s]", "x: f64[b, s, 3, 4], p: i64[b, s]"
PAIRS = (
    TABLES.replace("width=4", "width=4, layout='pairs'")
    .replace("a, b = split(x,", "d = reshape(x, pattern='... (n r=2) -> ... (r n)')\na, b = split(d,")
    .replace(
        "r = concat(n, a)\nu = aten(r,",
        "e = concat(n, a)\nf = reshape(e, pattern='... (r=2 n) -> ... n r')\n"
        "r = reshape(f, pattern='a b c d e -> a b c (d e)')\nu = aten(r,",
    )
)
STRETCHED = PAIRS.replace("width=4", "width=4, amplitude=1.5, divisors=(1.0, 7.0)")
FILLED = "f = aten(l, m, target='aten.masked_fill.Scalar', args='x0, x1, -inf')\ny = scale(f, by={})"
QKV = "q: f64[b, 2, s, 4], k: f64[b, 2, s, 4], v: f64[b, 2, s, 4], p: i64[b, s]"
EAGER = """
i = reshape(k, pattern='a b c d -> a b d c')
l = aten(q, i, target='aten.matmul.default', args='x0, x1')
z = scale(l, by=0.5)
m = visible_table(p, shape='1 1 t t', dtype='f64', hidden={})
a = aten(z, m, target='aten.add.Tensor', args='x0, x1')
w = aten({}, target='aten.softmax.int', args='x0, {}')
y = aten(w, v, target='aten.matmul.default', args='x0, x1')
"""
SUNK = (
    EAGER.split("w = ")[0].format("-inf")
    + """
e = reshape(r, pattern='a -> u=1 a u=1 u=1')
n = aten(e, q, target='aten.expand.default', args='x0, [x1[0], -1, x1[2], -1]')
c = aten(a, n, target='aten.cat.default', args='[x0, x1], -1')
t, o = aten(c, target='aten.{1}.dim', args='x0, -1, True')
d = aten(c, t, target='aten.sub.Tensor', args='x0, x1')
h = aten(d, target='aten.softmax.int', args='x0, -1')
w = aten(h, target='aten.slice.Tensor', args='x0, 3, 0, {0}')
y = aten(w, v, target='aten.matmul.default', args='x0, x1')
"""
)
TORCH = """
m = visible_table(p, shape='{}', dtype='bool', window=2)
y = aten(q, k, v, m, target='aten.scaled_dot_product_attention.default', args='x0, x1, x2, x3, {}')
"""
CONV = """
c = aten(x, w, target='aten.conv1d.default', args='x0, x1, padding=[{}], groups={}')
y = aten(c, t, target='aten.slice.Tensor', args='x0, 2, {}end=x1[1]')
"""
CONV_IN = "x: f64[b, 6, s], w: f64[6, 1, 3], t: i64[b, s]"
SQUARE = "s = mul({}, x)\nm = {}(s)\ne = shift(m, by=0.001)\nr = rsqrt(e)\ny = scale_rows(x, r)"
HALF = SQUARE.replace("e = shift(m, by=0.001)", "e = scale(m, by=0.5)")
TWICE = SQUARE.replace("s = mul({}, x)", "s = add({}, x)")
ROWS = "x: f64[b, s, 6]"
VIEW = "aten(z, t, target='aten.view.default', args='x0, [x1[0], x1[1], 5]')"
LESS_MEAN = (
    "m = row_mean(x)\na = reshape(m, pattern='... -> ... u=1')\n"
    "c = aten({}, a, target='aten.sub.Tensor', args='x0, x1')\ny = rms_norm(c, w)"
)
ONE_PLUS = "n = rms_norm(x)\nv = shift(w, by={})\ny = scale_columns(n, v)"

CASES = [  # family, inputs, the op, what fires, what holds back
    ("norm", ROWS, "rms_norm", SQUARE.format("x", "row_mean"), HALF.format("x", "row_mean")),
    ("norm", ROWS, "l2_norm", SQUARE.format("x", "row_sum"), TWICE.format("x", "row_sum")),
    ("norm", f"{ROWS}, w: f64[6]", "rms_norm(x, w",
     "n = rms_norm(x)\ny = scale_columns(n, w)", "n = rms_norm(x)\nz = scale_columns(n, w)\ny = add(z, n)"),
    ("norm", f"{ROWS}, w: f64[6]", "zero_centered=True",
     ONE_PLUS.format("1.0"), ONE_PLUS.format("2.0")),
    ("norm", f"{ROWS}, w: f64[6], c: f64[6]", "layer_norm(x, w, c",
     "n = layer_norm(x, w)\ny = add_bias(n, c)", "n = layer_norm(x, w)\ny = scale_columns(n, c)"),
    ("norm", ROWS, "layer_norm",
     "m = row_mean(x)\na = reshape(m, pattern='... -> ... u=1')\n"
     "c = aten(x, a, target='aten.sub.Tensor', args='x0, x1')\ny = rms_norm(c)",
     "m = row_sum(x)\na = reshape(m, pattern='... -> ... u=1')\n"
     "c = aten(x, a, target='aten.sub.Tensor', args='x0, x1')\ny = rms_norm(c)"),
    ("norm", f"{ROWS}, w: f64[6]", "layer_norm", LESS_MEAN.format("x"), LESS_MEAN.format("w")),
    ("activation", ROWS, "silu", "s = sigmoid(x)\ny = mul(x, s)", "s = tanh(x)\ny = mul(x, s)"),
    ("activation", ROWS, "relu2", "s = relu(x)\ny = mul(s, s)", "s = relu(x)\ny = mul(s, x)"),
    ("activation", ROWS, "softcap", "s = scale(x, by=0.25)\nt = tanh(s)\ny = scale(t, by=4.0)",
     "s = scale(x, by=0.25)\nt = tanh(s)\ny = scale(t, by=3.0)"),
    ("activation", ROWS, "gelu",
     "d = scale(x, by=0.7071067811865476)\nf = aten(d, target='aten.erf.default', args='x0')\no = shift(f, by=1.0)\n"
     "g = scale(x, by=0.5)\ny = mul(g, o)",
     "d = scale(x, by=0.7)\nf = aten(d, target='aten.erf.default', args='x0')\no = shift(f, by=1.0)\n"
     "g = scale(x, by=0.5)\ny = mul(g, o)"),
    ("rope", FIRST, "rope(", TABLES.format("10000.0", "-1.0", shape="1 1 t d"),
     TABLES.format("500.0", "-1.0", shape="1 1 t d")),
    ("rope", BEHIND, "rope(", TABLES.format("10000.0", "-1.0", shape="b t 1 d"),
     TABLES.format("10000.0", "1.0", shape="b t 1 d")),
    ("rope", BEHIND, "interleaved=True", PAIRS.format("10000.0", "-1.0", shape="b t 1 d"),
     PAIRS.format("10000.0", "-2.0", shape="b t 1 d")),
    ("rope", FIRST, " rope(", STRETCHED.format("10000.0", "-1.0", shape="1 1 t d"),
     STRETCHED.format("10000.0", "-1.0", shape="1 1 t d").replace("amplitude=1.5", "amplitude=1.0", 1)),
    ("activation", "l: f64[b, 2, s, s], m: bool[s, s]", "scale(l,", FILLED.format("0.5"), FILLED.format("-0.5")),
    ("attention", QKV, "attention", EAGER.format("-inf", "a", "-1"), EAGER.format("-3.0", "a", "-1")),
    ("attention", QKV, "attention", EAGER.format("-1e+30", "a", "-1"), EAGER.format("-inf", "a", "-2")),
    ("attention", f"{QKV}, r: f64[2]", "attention(f, g, u, r", SUNK.format("-1", "max"), SUNK.format("-1", "min")),
    ("attention", QKV, "= attention(", TORCH.format("1 1 t t", "scale=0.25"), TORCH.format("1 1 t t", "dropout_p=0.0")),
    ("heads", "q: f64[b, s, 4, 6], k: f64[b, s, 2, 6], v: f64[b, s, 2, 6]", "attention(q, k, v)",
     "a = repeat_heads(k, r=2)\nb = repeat_heads(v, r=2)\ny = attention(q, a, b)",
     "a = repeat_heads(k, r=2)\ny = attention(q, a, a)"),
    ("conv", CONV_IN, "causal_conv1d", CONV.format(2, 6, ""), CONV.format(4, 6, "start=2, ")),
    ("conv", CONV_IN, "causal_conv1d",
     "c = aten(x, target='aten.constant_pad_nd.default', args='x0, [2, 0]')\n"
     "y = aten(c, w, target='aten.conv1d.default', args='x0, x1, groups=6')",
     "c = aten(x, target='aten.constant_pad_nd.default', args='x0, [1, 1]')\n"
     "y = aten(c, w, target='aten.conv1d.default', args='x0, x1, groups=6')"),
    ("conv", "x: f64[b, s, 6], w: f64[6, 3]", "act='silu'",
     "r, f = causal_conv1d(x, w)\nz = reshape(r, pattern='a b c -> a c b')\ny = silu(z)",
     "r, f = causal_conv1d(x, w)\nz = reshape(r, pattern='a b c -> a c b')\ny = relu(z)"),
    ("flat", f"{ROWS}, w: f64[5, 6], t: i64[b, s]", "linear(x, w)",
     "f = reshape(x, pattern='a b c -> (a b) c')\nz = linear(f, w)\ny = " + VIEW,
     "f = reshape(x, pattern='a b c -> (b a) c')\nz = linear(f, w)\ny = " + VIEW),
    ("flat", f"{ROWS}, w: f64[9, 6], t: i64[b, s]", "= add(x",
     "p = positions(t)\ni = aten(p, target='aten.narrow.default', args='x0, 0, 0, 1')\ne = embedding(w, i)\n"
     "y = aten(x, e, target='aten.add.Tensor', args='x0, x1')",
     "i = aten(t, target='aten.narrow.default', args='x0, 0, 0, 1')\ne = embedding(w, i)\n"
     "y = aten(x, e, target='aten.add.Tensor', args='x0, x1')"),
    ("experts", "l: f64[n, 5]", "route(l, k=2, renormalize=False)",
     "p = aten(l, target='aten.softmax.int', args='x0, -1')\ny, i = aten(p, target='aten.topk.default', args='x0, 2')",
     "p = aten(l, target='aten.softmax.int', args='x0, -1')\n"
     "y, i = aten(p, target='aten.topk.default', args='x0, 2, largest=False')"),
]  # fmt: skip


def graph(inputs: str, body: str) -> Graph:
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    return parse(f"def f({inputs}):\n{lines}    return y\n")


def numbers(of: Graph) -> list[torch.Tensor]:
    """Operands of 2 x 5 tokens; integers are positions."""
    rng, env = torch.Generator().manual_seed(0), {"b": 2, "s": 5, "n": 7}
    made = list[torch.Tensor]()
    for v in of.inputs:
        shape = [env.get(str(n), n) for n in v.type.shape]
        integers = torch.arange(5).expand(2, 5).contiguous()
        if v.type.dtype == "bool":
            made.append(torch.ones(shape, dtype=torch.bool).triu(1))
            continue
        made.append(integers if v.type.dtype == "i64" else torch.randn(shape, generator=rng, dtype=torch.float64))
    return made


@pytest.mark.parametrize(("family", "inputs", "op", "fires", "holds"), CASES)
def test_a_rule_fires_and_holds_back(family: str, inputs: str, op: str, fires: str, holds: str) -> None:
    before, other = graph(inputs, fires), graph(inputs, holds)
    after, said = raise_family(before, family)
    assert said and op in str(after), f"{after}"
    xs = numbers(before)
    torch.testing.assert_close(evaluate(after, *xs), evaluate(before, *xs), rtol=1e-9, atol=1e-9)
    kept, _ = raise_family(other, family)
    torch.testing.assert_close(evaluate(kept, *xs), evaluate(other, *xs), rtol=1e-9, atol=1e-9, equal_nan=True)
    assert op not in str(kept), f"{kept}"


def test_views_of_views_are_one_view() -> None:
    made = graph(
        "x: f64[b, s, 24]",
        """
a = reshape(x, pattern='a b (c d=6) -> a b c d')
c = reshape(a, pattern='a b c d -> a c b d')
d = reshape(c, pattern='a b c d -> a b u=1 c d')
e = reshape(d, pattern='a b u=1 c d -> a c b d')
y = reshape(e, pattern='a b c d -> a (b c) d')
""",
    )
    after, said = join_views(made)
    assert len(said) == 4 and after.nodes[-1].operands == after.inputs
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    assert torch.equal(evaluate(after, x), evaluate(made, x))
    back = graph(
        "x: f64[b, s, 4, 6]", "a = reshape(x, pattern='a b c d -> a c b d')\ny = reshape(a, pattern='a b c d -> a c b d')"
    )
    assert "return x" in str(join_views(back)[0])


def test_only_the_families_that_are_wanted_are_raised() -> None:
    both = graph(f"{ROWS}", "s = sigmoid(x)\nz = mul(x, s)\nq = mul(z, z)\nm = row_mean(q)\ne = shift(m, by=0.1)\n"
                 "r = rsqrt(e)\ny = scale_rows(z, r)")  # fmt: skip
    assert "silu" in str(raise_ops(both)[0]) and "rms_norm" in str(raise_ops(both)[0])
    assert "rms_norm" not in str(raise_ops(both, without=("norm",))[0])
    assert "silu" not in str(raise_ops(both, only=("norm",))[0])
