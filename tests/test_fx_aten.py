"""The op `aten`: torch's own ops as text, typed by torch's meta kernels, run, split, lowered; and what is refused."""

import pytest
import torch
from plait.ir import Graph, Mesh, PlacementError, TypeMismatch, dump, evaluate, parse, simulate
from plait.ir.ops.aten import arguments
from plait.ir.rearrange import composed, permuted, text, viewed
from plait.lowering import lower

MESH = Mesh((("cp", 2),))


def graph(inputs: str, *lines: str) -> Graph:
    return parse(f"def f({inputs}):\n" + "".join(f"    {x}\n" for x in lines) + "    return y\n")


CALLS = [
    ("x: f64[b, s, 6], m: f64[b, 1, 6]", "aten(x, m, target='aten.add.Tensor', args='x0, x1, alpha=2')", "f64[b, s, 6]"),
    ("x: f64[b, s, 6]", "aten(x, target='aten.view.default', args='x0, [x0[0]*x0[1], 2, 3]')", "f64[b*s, 2, 3]"),
    ("x: f64[b, s, 6]", "aten(x, target='aten.constant_pad_nd.default', args='x0, [0, 0, 2, 1]')", "f64[b, s+3, 6]"),
    ("x: f64[b, s, 6]", "aten(x, target='aten.arange.default', args='2*x0[1]+1')", "i64[2*s+1]"),
    ("x: f64[b, s, 6]", "aten(x, target='aten.zeros.default', args='[x0[1], x0[1]], dtype=bool')", "bool[s, s]"),
    ("x: f64[b, s, 6], w: f64[6, 6]", "aten(x, w, target='aten.cat.default', args='[x0, x0], -1')", "f64[b, s, 12]"),
    ("x: f64[b, s, 6]", "aten(x, target='aten.sum.default', args='x0')", "f64[()]"),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "call", "type_"), CALLS)
def test_a_call_is_typed_printed_run_and_lowered_alike(inputs: str, call: str, type_: str) -> None:
    made = graph(inputs, f"y = {call}")
    assert str(made.outputs[0].type) == type_ and parse(dump(made)) == made
    for b, s in ((2, 3), (1, 7)):
        env = {"b": b, "s": s}
        xs = [torch.randn([env.get(str(n), n) for n in v.type.shape], dtype=torch.float64) for v in made.inputs]
        want, entry = evaluate(made, *xs), lower(made).entry
        assert torch.equal(entry(*xs)[0], want)
        assert "ast" not in entry.code
        torch.testing.assert_close(torch.compile(entry, backend="eager", dynamic=True)(*xs)[0], want)


def test_several_results_are_several_values() -> None:
    made = graph("x: f64[b, s, 7]", "a, c, y = aten(x, target='aten.split.Tensor', args='x0, 3, 2')")
    x = torch.randn(2, 5, 7)
    assert torch.equal(evaluate(made, x), x[..., 6:]) and torch.equal(lower(made).entry(x)[0], x[..., 6:])


@pytest.mark.parametrize(("call", "why"), [
    ("target='aten.nothing.default', args='x0'", "torch .* has no op aten.nothing.default"),
    ("target='aten.add_.Tensor', args='x0, x0'", "changes what it is given"),
    ("target='aten.from_file.default', args=\"'/etc/passwd'\"", "must be an op of torch"),
    ("target='os.system.default', args='x0'", "must be an op of torch"),
    ("target='aten.sin.default', args='x3'", "there is no operand x3"),
    ("target='aten.sin.default', args='x0.__class__'", "an argument is a number"),
    ("target='aten.sin.default', args='x0)(x0'", "an operand is x0|an argument is a number|must be arguments"),
    ("target='aten.sin.default', args='**x0'", "must be arguments"),
    ("target='aten.sin.default', args='(x0, x0)'", "an argument is a number"),
    ("target='aten.sin.default', args='x0, x0'", "cannot be typed"),
    ("target='aten.view.default', args='x0, [7, 7]'", "cannot be typed"),
    ("target='aten.nonzero.default', args='x0'", "cannot be typed"),
    ("target='aten.view_as_complex.default', args='x0'", "cannot be typed|must be one of"),
])  # fmt: skip
def test_what_is_no_op_of_a_graph_is_refused(call: str, why: str) -> None:
    with pytest.raises(Exception, match=why) as caught:
        graph("x: f64[b, s, 6]", f"y = aten(x, {call})")
    assert "ParseError" in type(caught.value).__name__


def test_arguments_are_data() -> None:
    made = arguments("x0, [1, x1[0]], -1e-06, dtype=bf16, mode='tanh', none=None, low=-inf")
    assert made.positional[2] == -1e-06 and dict(made.named)["dtype"] is torch.bfloat16
    with pytest.raises(TypeMismatch, match="a size is a product"):
        arguments("(x0[1]+1)*x0[0]")


def test_pointwise_ops_take_a_split_of_what_all_have_and_others_refuse() -> None:
    made = graph("x: f64[b, s@cp, 6], w: f64[6]", "y = aten(x, w, target='aten.atan2.default', args='x0, x1')")
    assert str(made.outputs[0].type) == "f64[b, s@cp, 6]"
    x, w = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(simulate(made, MESH, x, w), torch.atan2(x, w))
    with pytest.raises(Exception, match="must see it whole"):
        graph("x: f64[b, s@cp, 6]", "y = aten(x, target='aten.cumsum.default', args='x0, 1')")
    with pytest.raises(Exception, match="partial"):
        graph("x: f64[b, s, 6]+cp", "y = aten(x, target='aten.sin.default', args='x0')")
    assert issubclass(PlacementError, Exception)


def test_rearrangements_compose() -> None:
    into, turn = viewed(("b", "s", 24), ("b", "s", 4, 6)), permuted(("b", "s", 4, 6), (0, 2, 1, 3))
    assert into is not None
    both = composed(into, turn)
    assert both is not None and text(both) == "a b (c d=6) -> a c b d"
    assert composed(turn, permuted(("b", 4, "s", 6), (0, 2, 1, 3))).nothing  # type: ignore[union-attr] # they share dims
    assert viewed((6,), (4,)) is None
    parted, turned = viewed(("b*s",), ("b", "s")), viewed((1, "s"), ("s", 1))
    assert parted is not None and text(parted) is None, "a product of symbols cannot be parted"
    assert turned is not None and text(turned) == "u=1 a -> a u=1"
