"""Sizes, types, signatures and meshes: what they are, and what they refuse."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plait.ir import (
    OPS,
    Builder,
    Dim,
    Mesh,
    ParseError,
    PlacementError,
    TensorType,
    TypeMismatch,
    gather,
    parse_type,
    scatter,
    tensor_type,
)
from plait.ir import sizes as algebra
from plait.ir.signature import parse_signature

SYMBOLS = {"b": 3, "s": 65, "n": 7}
products = st.tuples(st.integers(0, 9), st.lists(st.sampled_from(list(SYMBOLS)), max_size=3)).map(
    lambda x: algebra.times(x[0], *x[1])
)


def value(size: int | str) -> int:
    return algebra.value(size, SYMBOLS)


# -- sizes ------------------------------------------------------------------------------------


@given(st.lists(products, min_size=1, max_size=4), st.integers(-9, 9))
def test_sizes_are_an_algebra(parts: list[int | str], offset: int) -> None:
    """What is computed on symbols is what is computed on the numbers they stand for, whatever the order."""
    made, want = algebra.times(*parts), 1
    for part in parts:
        want *= value(part)
    assert value(made) == want and made == algebra.times(*reversed(parts)) == algebra.canonical(made)
    assert value(algebra.plus(made, offset)) == want + offset
    assert algebra.plus(algebra.plus(made, offset), -offset) == made
    assert algebra.symbols(made) <= set(SYMBOLS)


@given(products, products)
def test_division_is_exact_or_none(a: int | str, b: int | str) -> None:
    ratio = algebra.divide(a, b)
    if ratio is not None and b != 0:
        assert value(ratio) * value(b) == value(a)
    if b != 0:
        assert algebra.divide(algebra.times(a, b), b) == a


@pytest.mark.parametrize(("size", "by", "want"), [
    (12, 4, 3), (12, 5, None), ("4*b*s", "b", "4*s"), ("4*b*s", 4, "b*s"), ("4*b*s", "s*b", 4), ("b*s", "b*b", None),
    ("n+1", "n+1", 1),
    ("n+1", 1, None), ("s", "b", None), (0, 5, 0), (5, 0, None), ("b*b", "b", "b"),
])  # fmt: skip
def test_division(size: int | str, by: int | str, want: int | str | None) -> None:
    assert algebra.divide(size, by) == want


@pytest.mark.parametrize("bad", ["a b", "", "b/2", "+1", "2**b", "b;c"])
def test_text_that_is_no_size_is_refused(bad: str) -> None:
    with pytest.raises(TypeMismatch, match="not a size"):
        tensor_type("f32", bad)


# -- types ------------------------------------------------------------------------------------

AXES = ["cp", "tp", "ep"]


@st.composite
def types(draw: st.DrawFn) -> TensorType:
    """Any type that a value can have."""
    axes = draw(st.permutations(AXES))
    homes = [draw(st.integers(-2, 3)) for _ in axes]  # -1 is partial, -2 unused, else a dim
    dims = [
        Dim(
            algebra.plus(draw(products), draw(st.integers(0, 3))),
            tuple(a for a, h in zip(axes, homes, strict=True) if h == i),
            draw(st.sampled_from(["", "zigzag(2)"])),
        )
        for i in range(draw(st.integers(0, 4)))
    ]  # fmt: skip
    return TensorType(
        draw(st.sampled_from(["f64", "f32", "bf16", "i64", "bool"])),
        tuple(dims),
        frozenset(a for a, h in zip(axes, homes, strict=True) if h == -1),
    )


@given(types())
def test_a_type_is_read_as_it_is_written(type_: TensorType) -> None:
    assert parse_type(str(type_)) == type_
    assert Builder("f").input("x", type_).type == type_


@pytest.mark.parametrize(
    "text",
    ["bf16[b, s@cp:zigzag(2), 1024]+tp", "f32[()]", "i64[n+1]", "f64[(n+1)@cp@tp]+dp+ep", "f32[4*b*s@cp, 0]", "bool[2*n-1]"],
)
def test_types_are_written_so(text: str) -> None:
    assert str(parse_type(text)) == text


def test_what_a_type_knows_of_itself() -> None:
    type_ = parse_type("bf16[b, 2*s@cp, 5]+tp")
    assert (type_.count(SYMBOLS), type_.bytes(SYMBOLS), type_.symbols, type_.shape) == (
        3 * 130 * 5,
        2 * 3 * 130 * 5,
        {"b", "s"},
        ("b", "2*s", 5),
    )
    assert type_.is_float and not parse_type("i32[1]").is_float
    assert str(type_.with_dim(1, type_.dims[1].bare)) == "bf16[b, 2*s, 5]+tp" and str(type_) == "bf16[b, 2*s@cp, 5]+tp"
    assert tensor_type("f32", "s*b*4", Dim(3)) == parse_type("f32[4*b*s, 3]")


@pytest.mark.parametrize("type_", [
    TensorType("f32", (Dim(4, ("cp",)), Dim(4, ("cp",)))), TensorType("f32", (Dim(4, ("cp", "cp")),)),
    TensorType("f32", (Dim(4, ("cp",)),), frozenset({"cp"})),
], ids=str)  # fmt: skip
def test_no_value_uses_a_mesh_axis_twice(type_: TensorType) -> None:
    for add in (Builder("f").input, lambda n, t: Builder("f").param(n, t, None)):  # type: ignore[arg-type] # refused before the recipe is read
        with pytest.raises(PlacementError, match="cp twice"):
            add("x", type_)


def test_no_result_uses_a_mesh_axis_twice() -> None:
    """Rank r would hold only block (r, r) of x w^T; and of a partial w, only its own rows."""
    for x, w in (("f32[4@tp, 6]", "f32[8@tp, 6]"), ("f32[4@tp, 6]", "f32[8, 6]+tp")):
        with pytest.raises(PlacementError, match="tp twice"):
            OPS["linear"].infer([parse_type(x), parse_type(w), None], {})


@pytest.mark.parametrize("size", [-1, 2**62])
def test_no_value_has_a_size_past_all_bounds(size: int) -> None:
    with pytest.raises(TypeMismatch, match="at least 0 and under"):
        Builder("f").input("x", TensorType("f32", (Dim(size),)))


# -- signatures -------------------------------------------------------------------------------


def test_a_signature_is_read() -> None:
    (x, cu), (y,) = parse_signature("x[... (g r) k-1], cu:i64[n+1]? -> y:acc[... g]")
    assert [str(o) for o in (x, cu, y)] == ["x[... (g r) k-1]", "cu:i64[n+1]?", "y:acc[... g]"]
    assert (x.fixed, cu.optional, cu.dtype, y.axes[1].letters) == (2, True, "i64", ("g",))


MISFITS = [
    ("linear", ["f32[2, 3]", "f32[4, 5]", None], "linear: w.i is 5, must be 3 as in x"),
    ("linear", ["f32[2, 3]", None, None], r"operand w is missing; it must be w\[o i\]"),
    ("linear", ["f32[2, 3]", "f32[4]", None], r"w is f32\[4\], must be w\[o i\]"),
    ("linear", ["f32[2, 3]", "f32[4, 3]"], "takes 3 operands, got 2"),
    ("add", ["f32[2, 3]", "f32[2]"], r"b is f32\[2\], must be b\[...\]"),
    ("add", ["f32[2, s]", "f32[2, b]"], "b....1 is b, must be s as in a"),
    ("embedding", ["f32[2, 3]", "i32[5]"], "its dtype must be i64"), ("softplus", ["i64[2]"], "its dtype must be a float"),
    ("attention", ["f32[1, 5, 6, 3]", *["f32[1, 5, 4, 3]"] * 2, None, None, None], r"q.\(g r\) is 6, must be a multiple of 4"),
    ("causal_conv1d", ["f32[1, 5, 3]", "f32[3, 4]", None, "f32[2, 3, 3]", None], "state.b is 2, must be 1"),
    ("causal_conv1d", ["f32[1, 5, 3]", "f32[3, 4]", None, "f32[1, 3, 4]", None], "state.k is 5, must be 4"),
    ("split", ["f32[2, 7]"], "must add up to 7"), ("concat", ["f32[2, 7]", "f32[3, 7]"], "b....0 is 3, must be 2"),
    ("dispatch", ["f32[3, 5, 7]", "i64[3, 4, 2]"], "experts....1 is 4, must be 5"), ("cast", ["i64[3]"], "dtype"),
    ("reshape", ["f32[3]"], "must be"),
]  # fmt: skip
NEEDED = {
    "split": {"sizes": (3, 3)}, "dispatch": {"e": 3}, "cast": {"dtype": "f32"}, "reshape": {"pattern": "a b -> b a"},
    "reorder": {"was": "zigzag(2)"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "operands", "why"), MISFITS)
def test_what_does_not_fit_is_named(name: str, operands: list[str | None], why: str) -> None:
    with pytest.raises(TypeMismatch, match=why):
        OPS[name].infer([parse_type(t) if t else None for t in operands], {**OPS[name].attrs, **NEEDED.get(name, {})})


MISPLACED = [
    ("linear", ["f32[2, 6@tp]", "f32[4, 6]", None], "w.i is 6; x has it as 6@tp"),
    ("linear", ["f32[2, 6@tp]", "f32[4, 6@tp]", "f32[4]"], "another operand would be added once per rank"),
    ("rms_norm", ["f32[2, 6@tp]", None], "x.d is 6@tp; role whole must see it whole"),
    ("silu", ["f32[2]+tp"], "x is partial over tp, in which the op is not linear; all_reduce it first"),
    ("layer_norm", ["f32[2, 6]", None, "f32[6]+tp"], "bias is partial"),
    ("rms_norm", ["f32[2, 6]", "f32[6]+tp"], "w is partial"),
    ("positions", ["i64[2, 8@cp]", None, None], "role scan must see it whole"),
    ("positions", ["i64[2, 8:zigzag(2)]", None, None], "role scan needs the natural order"),
    ("add", ["f32[8:zigzag(2)]", "f32[8]"], r"b....0 is 8; a has it as 8:zigzag\(2\)"),
    ("mul", ["f32[2]+tp", "f32[2]+tp"], "is partial over tp"),
    ("dispatch", ["f32[3, 4@cp, 7]", "i64[3, 4, 2]"], "rows and tokens must be split alike"),
    ("dispatch", ["f32[3, 4, 7]", "i64[3, 4, 2]+cp"], "experts is partial"),
    ("concat", ["f32[2, 8]+tp", "f32[2, 8]"], "a is partial over tp"),
    ("concat", ["f32[2, 8:zigzag(2)]", "f32[2, 8]"], "natural order"),
    ("reorder", ["f32[2, 8]", None], r"must be in order 'zigzag\(2\)'"),
    ("reorder", ["f32[2, 8@cp:zigzag(2)]", None], "is split; permute it before"),
    ("cache_write", ["f32[1, 8, 2, 3]", "f32[1, 4:zigzag(2), 2, 3]", "i64[()]"], "x.t is 4:zigzag"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "operands", "why"), MISPLACED)
def test_what_lives_elsewhere_is_named(name: str, operands: list[str | None], why: str) -> None:
    with pytest.raises(PlacementError, match=why):
        OPS[name].infer([parse_type(t) if t else None for t in operands], {**OPS[name].attrs, **NEEDED.get(name, {})})


@pytest.mark.parametrize(("x", "pattern", "want"), [
    ("f32[b, s@cp, 8]", "b s (h=2 d) -> b h s d", "f32[b, 2, s@cp, 4]"),
    ("f32[b, s, 8@tp]", "... (h d=4) -> ... h d", "f32[b, s, 2@tp, 4]"),
    ("f32[b@cp, s, 8]+tp", "b s d -> (b s) d", "f32[b*s@cp, 8]+tp"), ("f32[b*s@cp, 8]", "(b s=5) d -> b s d", "multiple of 5"),
    ("f32[s:zigzag(2), 8]", "s d -> d s", "f32[8, s:zigzag(2)]"),
    ("f32[b, s@cp, 8]", "b s d -> (b s) d", "outermost"),
    ("f32[b, s, 8@tp]", "... (h=2 d) -> ... h d", "give the inner sizes"),
    ("f32[8:zigzag(2)]", "(a b=2) -> a b", "natural order"),
])  # fmt: skip
def test_a_reshape_carries_placement(x: str, pattern: str, want: str) -> None:
    if want.startswith("f32"):
        assert str(OPS["reshape"].infer([parse_type(x)], {"pattern": pattern})[0]) == want
    else:
        with pytest.raises((PlacementError, TypeMismatch), match=want):
            OPS["reshape"].infer([parse_type(x)], {"pattern": pattern})


# -- meshes -----------------------------------------------------------------------------------

MESH = Mesh((("cp", 2), ("tp", 3), ("ep", 2)))


def test_ranks_count_through_the_last_axis_fastest() -> None:
    mesh = Mesh((("cp", 2), ("tp", 3)))
    assert [tuple(at.values()) for at in mesh.ranks] == list(itertools.product(range(2), range(3)))
    assert mesh.groups("cp") == [[0, 3], [1, 4], [2, 5]] and mesh.groups("tp") == [[0, 1, 2], [3, 4, 5]]
    assert mesh["tp"] == 3 and "cp" in mesh and "ep" not in mesh
    with pytest.raises(PlacementError, match="no axis called ep; it has cp, tp"):
        _ = mesh["ep"]


@given(types())
def test_what_is_scattered_is_gathered(type_: TensorType) -> None:
    """Parts of a global tensor make it up again, and each is as large as the mesh says."""
    split = [[MESH[a] for a in d.axes] for d in type_.dims]
    whole = torch.randn([torch.Size(n).numel() * 3 for n in split], dtype=torch.float64)
    shards = scatter(whole, type_, MESH)
    assert torch.equal(gather(shards, type_, MESH), whole)
    assert all(s.shape == (3,) * len(split) for s in shards)


def test_two_axes_on_one_dim_split_it_outermost_first() -> None:
    whole = torch.arange(6)
    for text, want in (("i64[6@cp@tp]", [0, 1, 2, 3, 4, 5]), ("i64[6@tp@cp]", [0, 2, 4, 1, 3, 5])):
        mesh, type_ = Mesh((("cp", 2), ("tp", 3))), parse_type(text)
        assert [int(s) for s in scatter(whole, type_, mesh)] == want
        assert gather(scatter(whole, type_, mesh), type_, mesh).tolist() == whole.tolist()


def test_a_length_that_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(TypeMismatch, match=r"dim 0 of i64.* is 65 long, which cp=2 ranks do not divide"):
        scatter(torch.arange(65), parse_type("i64[s@cp]"), MESH)
    with pytest.raises(PlacementError, match="no axis called pp"):
        scatter(torch.arange(65), parse_type("i64[s@pp]"), MESH)


def test_replicas_that_differ_are_noticed() -> None:
    mesh, type_, x = Mesh((("cp", 2),)), parse_type("f64[3]"), torch.tensor([1.0, float("nan"), 3.0], dtype=torch.float64)
    assert gather([x, x.clone()], type_, mesh) is x
    with pytest.raises(PlacementError, match="ranks along cp hold different values"):
        gather([x, x + 1], type_, mesh)


def test_what_is_no_type_is_refused() -> None:
    with pytest.raises(ParseError, match="expected a type"):
        parse_type("f32[2]; f32[3]")
