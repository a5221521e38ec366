"""Row kernels, generated and interpreted: numbers, memory, determinism, and what they decline."""

import itertools
import re

import pytest
import torch
from plait.ir import OPS, TypeMismatch, parse
from plait.ir.gradient import backward
from plait.lowering.rows import Declined, row_form, row_kernel
from plait.lowering.rows.kernel import _row_kernel

from tests.row_cases import CASES, ROWS, errors, exact, gradient_of, graph_of, interpreted, operands

LIMIT = {"f32": 3e-6, "bf16": 1e-2, "f16": 1e-2}
SHAPES = [
    pytest.param(name, text, width, rows, dtype, id=f"{name}-{width}-{rows[0] * rows[1]}-{dtype}")
    for name, (text, widths) in CASES.items()
    for width, rows, dtype in zip(widths, ROWS, itertools.cycle(("f32", "bf16", "f32", "f16")), strict=False)
]
EVERY = pytest.mark.parametrize("name", CASES)


@pytest.mark.parametrize(("name", "text", "width", "rows", "dtype"), SHAPES)
def test_forward_and_backward_mean_what_the_graph_means(
    name: str, text: str, width: int, rows: tuple[int, int], dtype: str
) -> None:
    sizes = dict(zip("bs", rows, strict=True))
    graph = graph_of(text, width, dtype)
    xs = operands(graph, sizes)
    for made, given in ((graph, xs), gradient_of(graph, xs, sizes)):
        found = errors(interpreted(made, given).results, exact(made, given))
        assert all(e < LIMIT[dtype] for e in found), (made.name, found)


@pytest.mark.parametrize("width", [8192, 9001])
def test_long_rows(width: int) -> None:
    graph = graph_of(CASES["norms"][0], width)
    xs = operands(graph, {"b": 1, "s": 3})
    for made, given in ((graph, xs), gradient_of(graph, xs, {"b": 1, "s": 3})):
        found = errors(interpreted(made, given).results, exact(made, given))
        assert all(e < LIMIT["f32"] for e in found), (made.name, found)
    looped = [s.looped for s in row_kernel(graph).launches[0].sections]
    assert looped == [width > 8192]


@EVERY
def test_every_operand_is_read_once_and_every_result_written_once(name: str) -> None:
    text, widths = CASES[name]
    sizes = {"b": 2, "s": 35}
    graph = graph_of(text, widths[3])
    xs = operands(graph, sizes)
    for made, given in ((graph, xs), gradient_of(graph, xs, sizes)):
        ran = interpreted(made, given)
        behind = "conv" in made.name or "preamble" in made.name  # neighbours' rows are read too
        for i, (value, x) in enumerate(zip(made.inputs, given, strict=True)):
            count = ran.traffic[f"p_x{i}"]
            assert count.stores == 0
            if value.type.symbols and value.type.is_float:
                limit = 3 if behind else 1
                assert count.distinct_loads <= limit * x.numel(), (made.name, value.name, count)
        stored = [ran.traffic[n] for n in ran.traffic if ".p_y" in n]
        assert len(stored) == len({v for v in made.outputs if v in made.makers})
        assert all(not c.stored_twice and not c.raced for c in stored)


@EVERY
def test_strides_are_the_operands_own(name: str) -> None:
    text, widths = CASES[name]
    sizes = {"b": 3, "s": 7}
    graph = graph_of(text, widths[2])
    xs = operands(graph, sizes)
    for made, given in ((graph, xs), gradient_of(graph, xs, sizes)):
        want = interpreted(made, given).results
        for odd in ([_wide(x) for x in given], [_turned(x) for x in given], [_behind(x) for x in given]):
            got = interpreted(made, odd).results
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), made.name


def _wide(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as part of longer rows."""
    return torch.cat([x, x + 1], -1)[..., : x.shape[-1]]


def _turned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with the dims in reverse order in memory."""
    order = list(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _behind(x: torch.Tensor) -> torch.Tensor:
    """The same numbers behind an offset that no vector load likes."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def test_expanded_operands() -> None:
    graph = graph_of(CASES["norm_gate"][0], 64)
    o, w, z = operands(graph, {"b": 3, "s": 5})
    xs = [o[:1, :1].expand_as(o), w[:1].expand_as(w), z[:, :1].expand_as(z)]
    assert max(errors(interpreted(graph, xs).results, exact(graph, xs))) < LIMIT["f32"]


@EVERY
def test_the_same_bits_every_time(name: str) -> None:
    text, widths = CASES[name]
    sizes = {"b": 2, "s": 33}
    graph = graph_of(text, widths[1])
    made, given = gradient_of(graph, operands(graph, sizes), sizes)
    first, again = (interpreted(made, given).results for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert "atomic" not in row_kernel(made).source
    _row_kernel.cache_clear()
    assert row_kernel(graph_of(text, widths[1])).source == row_kernel(graph).source


@EVERY
def test_no_rows_at_all(name: str) -> None:
    text, widths = CASES[name]
    for sizes in ({"b": 0, "s": 3}, {"b": 2, "s": 0}):
        graph = graph_of(text, widths[1])
        made, given = gradient_of(graph, operands(graph, sizes), sizes)
        for y, v in zip(interpreted(made, given).results, made.outputs, strict=True):
            assert not y.isnan().any() and (v.type.symbols or not y.any()), v.name


def test_far_positions_stay_sharp() -> None:
    graph = graph_of(CASES["qkv"][0], 64)
    x, w, p = operands(graph, {"b": 1, "s": 5})
    p = p + 1_000_000
    assert max(errors(interpreted(graph, [x, w, p]).results, exact(graph, [x, w, p]))) < LIMIT["f32"]


def test_not_a_number_stays_one() -> None:
    graph = graph_of(CASES["activations"][0], 48)
    x, y, w = operands(graph, {"b": 1, "s": 3})
    x[0, 1, 5] = float("nan")
    (n, _), (want, _) = interpreted(graph, [x, y, w]).results, exact(graph, [x, y, w])
    assert torch.equal(n.isnan(), want.isnan()) and n.isnan().sum() == 1


def test_a_kernel_whose_dims_are_numbers() -> None:
    text = CASES["norm_gate"][0].replace("b, s", "2, 5")
    graph = graph_of(text, 48)
    xs = operands(graph, {})
    for made, given in ((graph, xs), gradient_of(graph, xs, {})):
        assert max(errors(interpreted(made, given).results, exact(made, given))) < LIMIT["f32"]


@pytest.mark.parametrize(("body", "why"), [
    ("y = rms_norm(x)\n    z, r = causal_conv1d(y, w, cu=cu)", "packed segments"),
    ("y = dropout(x, at, p=0.5)\n    z = scale(y, by=2.0)", "dropout has no row form"),
    ("s = column_sum(x)\n    z = scale_columns(x, s)", "needs a sum over all rows"),
])  # fmt: skip
def test_what_has_no_row_kernel_says_why(body: str, why: str) -> None:
    text = f"@kernel\ndef k(x: f32[b, s, 8], w: f32[8, 4], cu: i64[n+1], at: i64[()]):\n    {body}\n    return z\n"
    with pytest.raises(Declined, match=why):
        row_kernel(parse(text.replace("f32[b, s, 8]", "f32[1, s, 8]") if "cu=" in body else text))


def test_float64_is_not_computed_in_float32() -> None:
    with pytest.raises(Declined, match="float64"):
        row_kernel(graph_of(CASES["glu"][0], 8, "f64"))


def test_operands_that_do_not_fit_are_refused() -> None:
    graph = graph_of(CASES["norm_gate"][0], 64)
    o, w, z = operands(graph, {"b": 2, "s": 3})
    for xs, what in (
        ([o, w], "takes 3 operands, got 2"),
        ([o.bfloat16(), w, z], r"o is torch.bfloat16\[2, 3, 4, 16\], must be f32"),
        ([o, w, z[:, :2]], r"z is \[2, 2, 64\], its s must be 3"),
        ([o, w[:15], z], r"w is \[15\], its 16 must be 16"),
        ([o, w, z.to("meta")], "z is on meta, must be on cpu"),
    ):
        with pytest.raises(TypeMismatch, match=what):
            interpreted(graph, xs)


def test_source_reads_well() -> None:
    source = row_kernel(graph_of(CASES["norm_gate"][0], 64)).source
    assert max(map(len, source.splitlines())) < 200
    assert re.search(r'^"""Row kernel made by plait of$', source, re.MULTILINE)
    assert "rms_norm(o, w)" in source and "def plait_norm_gate(" in source


def test_names_from_a_file_stay_in_the_comment() -> None:
    text = CASES["glu"][0].replace("def glu", "def triton").replace("x:", "tl:").replace("split(x", "split(tl")
    graph = graph_of(text, 48)
    xs = operands(graph, {"b": 1, "s": 3})
    made, given = backward(graph).graph, gradient_of(graph, xs, {"b": 1, "s": 3})[1]
    assert max(errors(interpreted(made, given).results, exact(made, given))) < LIMIT["f32"]


def test_a_result_that_is_read_on_is_rounded_first() -> None:
    text = "@kernel\ndef k(x: bf16[s, 33], z: bf16[s, 33]):\n    r = add(x, z)\n    y = scale(r, by=3.0)\n    return r, y\n"
    xs = operands(parse(text), {"s": 7})
    r, y = interpreted(parse(text), xs).results
    assert torch.equal(y, (r.float() * 3).bfloat16()) and torch.equal(r, xs[0] + xs[1])
    once = interpreted(parse(text.replace("return r, y", "return y")), xs).results[0]
    assert not torch.equal(once, y)  # inside, nothing is rounded


def test_sums_along_axes_that_a_value_does_not_vary_on() -> None:
    text = "@kernel\ndef k(w: f32[5], x: f32[s, 3, 5]):\n    v = spread_columns(w, x)\n    t = column_sum(v)\n"
    text += "    u = mul(v, x)\n    c = column_sum(u)\n    return t, c\n"
    xs = operands(parse(text), {"s": 41})
    assert max(errors(interpreted(parse(text), xs).results, exact(parse(text), xs))) < LIMIT["f32"]


def test_every_op_that_works_row_by_row_has_a_row_form() -> None:
    assert not [op.name for op in OPS.values() if op.row and row_form(op.name) is None]
