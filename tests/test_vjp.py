"""Laws of every gradient: its numbers, its types, what it reads, and where it lives on a mesh."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from plait.ir import (
    OPS,
    OpDef,
    ParseError,
    PlacementError,
    PlaitError,
    TensorType,
    TypeMismatch,
    dump,
    evaluate,
    op,
    parse,
    parse_type,
    reads,
    simulate,
)
from plait.ir.ops import BACKWARD, COLLECTIVES, attention_part_gradients
from plait.ir.types import DTYPES
from plait.ir.vjp import Branch, parsed

from tests.laws import (
    LOCAL,
    MESH,
    Operands,
    Pullback,
    Tensor,
    agree,
    cases,
    derive,
    evened,
    got,
    marked,
    partial_mates,
    run,
    splittable,
    types_of,
    uses,
    want,
)

DERIVED = [o for o in LOCAL if not o.constant]
STENCILS = ("anticausal_conv1d", "conv1d_taps")  # their gradients run causal_conv1d, not linear for its activation's sake
EVERY_GRADIENT = pytest.mark.parametrize("of", DERIVED, ids=lambda o: o.name)


# -- numbers ----------------------------------------------------------------------------------


@EVERY_GRADIENT
def test_a_gradient_is_that_of_the_reference(of: OpDef) -> None:
    for xs, attrs in cases(of):
        made = derive(of, types_of(xs), attrs)
        agree(got(made, xs, attrs), want(of, xs, attrs, made.given))
        assert not made.made or parse(dump(made.graph)) == made.graph


@EVERY_GRADIENT
def test_a_part_of_a_gradient_is_that_part(of: OpDef) -> None:
    """One wanted operand, one given cotangent: the same numbers, from only what is said to be read."""
    for xs, attrs in cases(of, 1):
        floats = [i for i, x in enumerate(xs) if x is not None and x.is_floating_point()]
        for wanted, given in itertools.product(floats, [None, *range(len(run(of, xs, attrs)))]):
            only = None if given is None else [given]
            made = derive(of, types_of(xs), attrs, wanted=[wanted], given=only, frugal=True)
            agree(got(made, xs, attrs), want(of, xs, attrs, made.given), [wanted])
            read = [v for v in made.graph.inputs if not v.name.startswith("d_")]
            assert all(v in made.graph.uses for v in read), "what is read is used"


@EVERY_GRADIENT
def test_without_cotangents_or_wishes_there_is_nothing(of: OpDef) -> None:
    for xs, attrs in cases(of, 1):
        for none in ({"wanted": []}, {"given": []}):
            made = derive(of, types_of(xs), attrs, frugal=True, **none)
            assert made.made == () and not made.graph.nodes


POINTS = [
    ("relu", [-1.0, -0.0, 0.0, 1e-300, 2.0], {}), ("relu2", [-1.0, -0.0, 0.0, 2.0], {}),
    ("clamp", [-3.0, -2.0, 0.5, 1.0, 1.5], {"low": -2.0, "high": 1.0}), ("clamp", [-1.0, 0.0, 1e300], {}),
    ("softplus", [-800.0, -20.0, 0.0, 19.0, 20.0, 20.000000000000004, 21.0, 800.0], {}), ("silu", [-800.0, 0.0, 800.0], {}),
    ("gelu", [-40.0, 0.0, 40.0], {}), ("gelu", [-40.0, 0.0, 40.0], {"approximate": "tanh"}), ("sigmoid", [-800.0, 800.0], {}),
    ("softcap", [-1e9, 0.0, 1e9], {"cap": 30.0}), ("tanh", [-800.0, 800.0], {}), ("normal_cdf", [-40.0, 40.0], {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "at", "attrs"), POINTS)
def test_corners_and_ends_agree_too(name: str, at: list[float], attrs: dict[str, Any]) -> None:
    xs: Operands = [torch.tensor(at, dtype=torch.float64)]
    made = derive(OPS[name], types_of(xs), attrs)
    agree(got(made, xs, attrs), want(OPS[name], xs, attrs, made.given))


def test_above_twenty_softplus_passes_its_cotangent_through() -> None:
    for dtype in ("f64", "f32"):
        made = derive(OPS["softplus"], [parse_type(f"{dtype}[3]")], {})
        x = torch.tensor([20.5, 30.0, 90.0], dtype=DTYPES[dtype])
        assert torch.equal(evaluate(made.graph, x, x, x + 1), x + 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (65, 100), (3, 130)])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "l2_norm"])
def test_norms_of_odd_sizes(name: str, shape: tuple[int, int]) -> None:
    of = OPS[name]
    xs: Operands = [torch.randn(shape, dtype=torch.float64), *(torch.randn(shape[1]).double() for _ in of.inputs[1:])]
    made = derive(of, types_of(xs), {})
    agree(got(made, xs, {}), want(of, xs, {}, made.given))


# -- types ------------------------------------------------------------------------------------


@EVERY_GRADIENT
@pytest.mark.parametrize(("first", "others"), [("bf16", "bf16"), ("bf16", "f32"), ("f32", "bf16"), ("f16", "f16")])
def test_a_cotangent_has_the_type_of_its_operand(of: OpDef, first: str, others: str) -> None:
    for xs, attrs in cases(of, 1):
        types = [replace(t, dtype=others if i else first) if t and t.is_float else t for i, t in enumerate(types_of(xs))]
        made = derive(of, types, attrs)
        assert all(a == b for a, b in made.types)
        low = [x.to(DTYPES[t.dtype]) if x is not None and t is not None else None for x, t in zip(xs, types, strict=True)]
        for x, d in zip(low, _in_dtypes(made, low, attrs), strict=True):
            assert d is None or (x is not None and d.dtype == x.dtype and torch.isfinite(d).all())


def _in_dtypes(made: Pullback, xs: Operands, attrs: dict[str, Any]) -> list[Tensor | None]:
    """The pullback on tensors of the dtypes that its types say."""
    assert isinstance(made.node.op, OpDef)
    ys = run(made.node.op, xs, attrs)
    ds = [torch.ones_like(y) for y, there in zip(ys, made.given, strict=True) if there]
    out = evaluate(made.graph, *[x for x in xs if x is not None], *ys, *ds) if made.made else ()
    out = iter(out if isinstance(out, tuple) else (out,))
    return [next(out) if i in made.made else None for i in range(len(xs))]


def test_symbolic_sizes_pass_through() -> None:
    made = derive(OPS["linear"], [parse_type("bf16[b, s, 6]"), parse_type("f32[4, 6]"), None], {})
    assert [str(d) for _, d in made.types] == ["bf16[b, s, 6]", "f32[4, 6]"]


def test_only_what_is_wanted_is_emitted() -> None:
    types = [parse_type("bf16[b, s, 6]"), parse_type("bf16[4, 6]"), None]
    assert [n.op.name for n in derive(OPS["linear"], types, {}, wanted=[1]).graph.nodes] == ["outer"]
    node = derive(OPS["linear"], types, {}).node
    assert reads(node, [True], [True, False, False]) == (frozenset({1}), frozenset())
    assert reads(node, [True], [False, True, False]) == (frozenset({0}), frozenset())
    assert reads(node, [False], [True, True, False]) == (frozenset(), frozenset())
    assert {n.loc for n in derive(OPS["linear"], types, {}).graph.nodes} == {"layers.3"}


# -- placement --------------------------------------------------------------------------------


def _splits(of: OpDef) -> Iterator[tuple[Operands, list[TensorType | None], dict[str, Any]]]:
    """Every sample with every letter split that may be."""
    for xs, attrs in cases(of, 1):
        for letter in splittable(of, xs, attrs):
            even = evened(of, xs, attrs, letter)
            types = marked(of, even, attrs, letter, ("cp",))
            if of.role(letter) == "sum":
                types = partial_mates(of, types, {of.inputs[i].name for i, _ in uses(of, even, attrs, letter)})
            yield even, types, attrs


@EVERY_GRADIENT
def test_ranks_with_their_shards_make_up_the_gradient(of: OpDef) -> None:
    """Where an operand is split so is its cotangent; where ranks see parts of what it meets, theirs is a partial sum."""
    for xs, types, attrs in _splits(of):
        made = derive(of, types, attrs)
        agree(got(made, xs, attrs, mesh=True), want(of, xs, attrs, made.given))
        assert all(a.dims == b.dims for a, b in made.types)


@EVERY_GRADIENT
def test_a_gradient_is_linear_in_its_cotangents(of: OpDef) -> None:
    """Cotangents that are still to be summed give cotangents that are."""
    for xs, attrs in cases(of, 1) if of.name not in STENCILS else ():
        made = derive(of, types_of(xs), attrs, partial=frozenset({"cp"}))
        assert all(b.partial == {"cp"} for _, b in made.types)
        agree(got(made, xs, attrs, mesh=True), want(of, xs, attrs, made.given))


@EVERY_GRADIENT
def test_a_partial_operand_has_a_whole_cotangent(of: OpDef) -> None:
    """Every part of a sum has the cotangent of the sum."""
    for xs, attrs in cases(of, 1):
        for group in of.linear if of not in BACKWARD and of.name not in STENCILS else ():
            partial = frozenset({"cp"})
            types = [
                replace(t, partial=partial) if t and o.name in group else t
                for o, t in zip(of.inputs, types_of(xs), strict=True)
            ]
            made = derive(of, types, attrs)
            for i, (a, b) in zip(made.made, made.types, strict=True):
                assert b.partial == (frozenset() if a.partial else b.partial), of.inputs[i].name
            agree(got(made, xs, attrs, mesh=True), want(of, xs, attrs, made.given))


TOKENS = [
    ("linear", ["f64[2, s@cp, 3]", "f64[4, 3]", "f64[4]"], {}), ("rms_norm", ["f64[2, s@cp, 3]", "f64[3]"], {}),
    ("scale_columns", ["f64[2, s@cp, 3]", "f64[3]"], {}), ("add_bias", ["f64[2, s@cp, 3]", "f64[3]"], {}),
    ("embedding", ["f64[9, 3]", "i64[2, s@cp]"], {}), 
    ("causal_conv1d", ["f64[s@cp, 5, 3]", "f64[3, 4]", "f64[3]", None, None], {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "types", "attrs"), TOKENS, ids=[t[0] for t in TOKENS])
def test_a_weight_that_meets_split_tokens_has_a_partial_gradient(
    name: str, types: list[str | None], attrs: dict[str, Any]
) -> None:
    made = derive(OPS[name], [parse_type(t) if t else None for t in types], attrs)
    for operand, cotangent in made.types:
        split = any(d.axes for d in operand.dims)
        assert cotangent == (operand if split else replace(operand, partial=frozenset({"cp"})))


def test_a_sharded_weight_leaves_a_partial_cotangent() -> None:
    """Column parallel: each rank's outputs add to the gradient of the whole input."""
    made = derive(OPS["linear"], [parse_type("f64[b, 6]"), parse_type("f64[4@tp, 6]"), None], {})
    assert [str(d) for _, d in made.types] == ["f64[b, 6]+tp", "f64[4@tp, 6]"]


MOVES = [  # op, operand, cotangent, the gradient's op and type
    ("all_gather", "f64[3, 4@cp]", "f64[3, 4]", "shard", "f64[3, 4@cp]"),
    ("all_gather", "f64[3, 4@cp]", "f64[3, 4]+cp", "reduce_scatter", "f64[3, 4@cp]"),
    ("reduce_scatter", "f64[3, 4]+cp", "f64[3, 4@cp]", "all_gather", "f64[3, 4]"),
    ("all_reduce", "f64[3, 4]+cp", "f64[3, 4]", "", "f64[3, 4]"),
    ("all_reduce", "f64[3, 4]+cp", "f64[3, 4]+cp", "all_reduce", "f64[3, 4]"),
    ("shard", "f64[3, 4]", "f64[3, 4@cp]", "all_gather", "f64[3, 4]"),
    ("all_to_all", "f64[4@cp, 2]", "f64[4, 2@cp]", "all_to_all", "f64[4@cp, 2]"),
    ("all_gather", "f64[3, 4@tp@cp]", "f64[3, 4@tp]+cp", "reduce_scatter", "f64[3, 4@tp@cp]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "x", "d", "by", "back"), MOVES)
def test_a_collective_goes_back_the_way_it_came(name: str, x: str, d: str, by: str, back: str) -> None:
    of, type_ = OPS[name], parse_type(x)
    attrs: dict[str, Any] = {"axis": "cp", "src": 0, "dst": 1, "dim": 1}
    made = derive(of, [type_], {k: v for k, v in attrs.items() if k in of.attrs}, partial=parse_type(d).partial)
    assert made.graph.inputs[-1].type == parse_type(d) and str(made.graph.outputs[0].type) == back
    assert [n.op.name for n in made.graph.nodes] == ([by] if by else [])
    if "tp" not in x:
        numbers = torch.randn(4 if name == "all_to_all" else 3, 2 if name == "all_to_all" else 4, dtype=torch.float64)
        assert torch.allclose(simulate(made.graph, MESH, numbers, numbers, numbers), numbers, rtol=1e-14)


# -- what there is ----------------------------------------------------------------------------


@pytest.mark.parametrize("of", OPS.values(), ids=OPS)
def test_every_op_has_a_gradient_or_a_reason_for_none(of: OpDef) -> None:
    assert (of.vjp_rule is None) == bool(of.constant)
    integers = all(o.dtype not in ("", "acc") and not of.has_operand(o.dtype) for o in of.outputs)
    assert bool(of.constant) == (integers or of in (*BACKWARD.values(), attention_part_gradients))


@pytest.mark.parametrize("of", OPS.values(), ids=OPS)
def test_gradients_are_made_of_ops_that_have_gradients(of: OpDef) -> None:
    def callees(lines: Sequence[Any]) -> set[str]:
        branches = [x for x in lines if isinstance(x, Branch)]
        inner = [callees((*x.body, *x.otherwise)) for x in branches]
        return {x.callee for x in lines if not isinstance(x, Branch)}.union(*inner)

    if isinstance(of.vjp_rule, str):
        assert all(name == "=" or OPS[name].vjp_rule is not None for name in callees(parsed(of.vjp_rule)))


@pytest.mark.parametrize("of", BACKWARD, ids=lambda o: o.name)
def test_a_derived_gradient_is_refused_a_second_time(of: OpDef) -> None:
    back = BACKWARD[of]
    xs, attrs = next(cases(back, 1))
    with pytest.raises(PlaitError, match=rf"{of.name}_backward has no gradient: .* \(at layers.3\)"):
        derive(back, types_of(xs), attrs)


def test_a_derived_gradient_takes_operands_by_name() -> None:
    x, d = torch.randn(3, 5), torch.tensor(2.0)
    torch.testing.assert_close(OPS["z_loss_backward"](x, d_loss=d), OPS["z_loss_backward"](x, d))
    with pytest.raises(TypeMismatch, match=r"q is i64.*must be a float"):
        derived = BACKWARD[OPS["attention"]]
        derived.infer(
            [parse_type("i64[1, 5, 6, 3]"), *[parse_type("f32[1, 5, 3, 3]")] * 2, None, None, None, None], derived.attrs
        )


def test_a_rope_of_a_rope_is_undone() -> None:
    x, p = torch.randn(2, 65, 3, 8, dtype=torch.float64), torch.arange(65).expand(2, 65)
    turned = OPS["rope"].reference(x, p, interleaved=True)
    torch.testing.assert_close(OPS["rope"].reference(turned, p, interleaved=True, inverse=True), x, rtol=1e-12, atol=1e-12)


# -- mistakes ---------------------------------------------------------------------------------


@pytest.fixture
def twice() -> Iterator[OpDef]:
    """An op of a test's own."""

    @op("x[...], w[...]? -> y[...]", map="...")
    def twice(x: Tensor, w: Tensor | None = None, *, by: float = 2.0) -> Tensor:
        """y = by * x"""
        return x * by

    yield twice
    del OPS["twice"]


MISTAKES = [
    ("d_x = double(d_y)", ValueError, "twice.vjp: no op called double"),
    ("d_x = mul(d_y, z)", ValueError, "z is not defined before it is used"),
    ("x = scale(d_y, by=by)\nd_x = x", ValueError, "x is defined twice"),
    ("d_x = scale(d_y, by=of)", ValueError, "no attribute or letter called of"),
    ("if by < 3:\n    d_x = d_y", ValueError, "no test: `if by < 3`"),
    ("if z:\n    d_x = d_y", ValueError, "no test: `if z`"),
    ("d_x = mul(d_y, w)", ValueError, "operand w is absent where a value must stand"),
    ("d_x = d_y + d_y", ParseError, "expected `y = op"), ("d_x = scale(d_y, by=1 + 1)", ParseError, "an attribute is a number"),
    ("d_x = mul(d_y,", ParseError, "line 1"),
    ("d_x = row_sum(d_y)", AssertionError, "twice.vjp"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "error", "why"), MISTAKES)
def test_a_mistake_in_a_text_is_named(twice: OpDef, text: str, error: type[Exception], why: str) -> None:
    twice.vjp(text)
    with pytest.raises(error, match=why):
        derive(twice, [parse_type("f64[3]"), None], {})


def test_an_op_without_a_rule_says_so(twice: OpDef) -> None:
    with pytest.raises(PlaitError, match=r"twice has no gradient: none was written for it \(at layers.3\)"):
        derive(twice, [parse_type("f64[3]"), None], {})
    assert not derive(twice, [parse_type("f64[3]"), None], {}, wanted=[]).made


def test_a_wrong_gradient_is_caught(twice: OpDef) -> None:
    xs: Operands = [torch.randn(3, dtype=torch.float64), None]
    for text, right in (("d_x = scale(d_y, by=by)", True), ("d_x = scale(d_y, by=2.0001)", False)):
        twice.vjp(text)
        made = derive(twice, types_of(xs), {})
        try:
            agree(got(made, xs, {}), want(twice, xs, {}, made.given))
        except AssertionError:
            assert not right
        else:
            assert right


def test_an_untangled_reshape_needs_numbers() -> None:
    made = derive(OPS["reshape"], [parse_type("f32[b, 4, 6]")], {"pattern": "b t d -> (b t) d"})
    assert made.graph.nodes[0].attrs["pattern"] == "(b t=4) d -> b t d"
    with pytest.raises(TypeMismatch, match=r"reshape 'b t d -> \(b t\) d' has no gradient: b and s cannot be told apart"):
        derive(OPS["reshape"], [parse_type("f32[b, s, 6]")], {"pattern": "b t d -> (b t) d"})


PATTERNS = [
    ("f64[2, 3, 8]", "... (h=2 d) -> ... h d"), ("f64[2, 3, 8]", "... (h=1 d) -> ... h d"),
    ("f64[2, 3, 8]", "a b c -> (a b c)"),
    ("f64[2, 3, 8]", "... d -> (... d)"), ("f64[2, 3, 1]", "... u=1 -> ..."), ("f64[2, 3]", "... -> ... u=1"),
    ("f64[2, 3, 8]", "... (a=2 b=2 c) -> c ... (b a)"), ("f64[2, 3, 4, 5]", "... d -> d ..."),
]  # fmt: skip


@pytest.mark.parametrize(("x", "pattern"), PATTERNS)
def test_a_pattern_is_read_backwards(x: str, pattern: str) -> None:
    xs: Operands = [torch.randn([int(d.size) for d in parse_type(x).dims], dtype=torch.float64)]
    made = derive(OPS["reshape"], types_of(xs), {"pattern": pattern})
    agree(got(made, xs, {"pattern": pattern}), want(OPS["reshape"], xs, {"pattern": pattern}, made.given))


def test_floats_of_two_families_are_refused() -> None:
    with pytest.raises(TypeMismatch, match=r"cotangent of w is f64.*must be f32"):
        derive(OPS["scale_columns"], [parse_type("f64[2, 3]"), parse_type("f32[3]")], {})


def test_a_partial_operand_that_a_derived_gradient_cannot_take_is_refused() -> None:
    with pytest.raises(PlacementError, match="all_reduce it first"):
        derive(OPS["balance"], [parse_type("f64[5]+tp"), parse_type("f64[5]"), parse_type("f64[()]")], {})


def test_collectives_are_all_tried() -> None:
    assert {m[0] for m in MOVES} == {o.name for o in COLLECTIVES}
