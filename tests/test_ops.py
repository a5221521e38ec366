"""Laws of every op: its types, its roles, its linearity and its gradients, tried on its own reference."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from plait.ir import OpDef, PlacementError, TensorType, TypeMismatch, evaluate, parse_type, simulate
from plait.ir.ops import COLLECTIVES
from plait.ir.ops import reorder as reorder_op
from plait.ir.orders import parse_order
from plait.ir.sample import sample
from plait.ir.types import DTYPES

from tests.laws import (
    LOCAL,
    MESH,
    Operands,
    Tensor,
    cases,
    evened,
    full,
    gradients,
    graph_of,
    marked,
    partial_mates,
    placeable,
    run,
    same,
    splittable,
    tracked,
    types_of,
    uses,
)

EVERY_OP = pytest.mark.parametrize("op", LOCAL, ids=lambda o: o.name)
INDEXED = {  # dims whose places other numbers name; tokens never stand there, or two ops undo each other
    "drop_at": "d", "head_parts": "v", "send_rows": "n e", "return_rows": "n e",
    "rope": "d", "route": "e k", "rms_norm": "d", "dispatch": "...0 ...1 k", "combine": "n ...0 ...1 k",
    "grouped_linear": "n e", "embedding": "v", "spread_experts": "n e", "sum_experts": "n e",
    "weigh_rows": "n ...0 ...1 k", "weight_products": "n ...0 ...1 k",
    "cross_entropy": "v", "sum_rows": "n ...0 ...1 k", "take_rows": "n ...0 ...1 k", "grouped_outer": "n e",
    "conv1d_taps": "k", "anticausal_conv1d": "k", "linear_cross_entropy": "v", "load_balance_loss": "e k", "causal_conv1d": "k",
}  # fmt: skip
OWN_ROWS = {"dispatch": "...0 ...1"}  # every rank sorts the rows of its own tokens: alone, an order of its own
PLACED = {  # what a collective can take, and what it gives
    "all_to_all": ("f64[3, 4@cp, 6]", "f64[3, 4, 6@cp]"), "all_gather": ("f64[3, 4@cp, 6]", "f64[3, 4, 6]"),
    "reduce_scatter": ("f64[3, 4, 6]+cp", "f64[3, 4@cp, 6]"), "all_reduce": ("f64[3, 4, 6]+cp", "f64[3, 4, 6]"),
    "shard": ("f64[3, 4, 6]", "f64[3, 4@cp, 6]"),
}  # fmt: skip


def runs_alike(op: OpDef, xs: Operands, types: list[TensorType | None], attrs: dict[str, Any]) -> None:
    """Two ranks, each on its shard, compute what one device computes: values and gradients."""
    graph, given = graph_of(op, types, attrs), [x for x in tracked(xs) if x is not None]
    one, many = evaluate(graph, *given), simulate(graph, MESH, *given)
    same(many, one)
    same(gradients(many, given), gradients(one, given))


# -- types ----------------------------------------------------------------------------------


@EVERY_OP
@pytest.mark.parametrize(("first", "others"), [("f64", "f64"), ("bf16", "bf16"), ("bf16", "f32"), ("f32", "bf16")])
def test_inferred_types_are_those_of_the_results(op: OpDef, first: str, others: str) -> None:
    for xs, attrs in cases(op, 2 if first == "f64" else 1):
        dtypes = [DTYPES[others if i else first] for i in range(len(xs))]
        xs = [x.to(d) if x is not None and x.is_floating_point() else x for x, d in zip(xs, dtypes, strict=True)]
        inferred = [(v.type.dtype, v.type.shape) for v in graph_of(op, types_of(xs), attrs).outputs]
        assert inferred == [(t.dtype, t.shape) for t in types_of(list(run(op, xs, attrs))) if t]


@EVERY_OP
def test_float32_is_close_and_bf16_stays_bf16(op: OpDef) -> None:
    for xs, attrs in cases(op):
        low = lambda dtype, xs=xs: [x.to(dtype) if x is not None and x.is_floating_point() else x for x in xs]  # noqa: E731
        for wide, narrow, half, out in zip(
            run(op, xs, attrs),
            run(op, low(torch.float32), attrs),
            run(op, low(torch.bfloat16), attrs),
            op.outputs * len(xs),
            strict=False,
        ):
            if op.name == "cast" or not wide.is_floating_point():
                continue
            same(narrow.double(), wide.double(), 1e-5)
            assert (half.dtype, narrow.dtype) == (torch.float32 if out.dtype == "acc" else torch.bfloat16, torch.float32)


@EVERY_OP
def test_an_op_says_what_it_is_and_what_it_costs(op: OpDef) -> None:
    line, _, rest = (op.__doc__ or "").partition("\n")
    assert line.strip() and (not rest or rest.startswith("\n")), "a docstring is one line, then a blank one"
    letters = {x for o in op.inputs for a in o.axes for x in a.letters if not x.isdigit()}
    assert letters == set(op.roles)
    for xs, attrs in cases(op, 1):
        flops = op.flops(types_of(xs), full(op, attrs), {})
        assert (flops > 0) == (op.flops_text != "0") and isinstance(flops, int)


# -- placement ------------------------------------------------------------------------------


@EVERY_OP
def test_roles_map_and_sum_are_true(op: OpDef) -> None:
    tried = 0
    for given, attrs in cases(op):
        for letter in splittable(op, given, attrs):
            xs = evened(op, given, attrs, letter)
            types = marked(op, xs, attrs, letter, ("cp",))
            if op.role(letter) == "sum":
                types = partial_mates(op, types, {op.inputs[i].name for i, _ in uses(op, xs, attrs, letter)})
            runs_alike(op, xs, types, attrs)
            tried += 1
    assert tried or not {"map", "sum"} & set(op.roles.values())


@EVERY_OP
def test_roles_scan_and_whole_refuse_a_split(op: OpDef) -> None:
    for xs, attrs in cases(op, 1):
        for letter in placeable(op, xs, attrs):
            if op.role(letter) in ("scan", "whole") and letter not in OWN_ROWS.get(op.name, ""):
                with pytest.raises(PlacementError, match=op.name):
                    graph_of(op, marked(op, xs, attrs, letter, ("cp",)), attrs)


@EVERY_OP
def test_an_order_that_is_accepted_commutes(op: OpDef) -> None:
    """An op over permuted tokens gives the permuted result, or refuses; role scan always refuses."""
    for given, attrs in cases(op, 1) if op.name not in ("reorder", "relabel", "join") else []:  # these make an order
        for letter in placeable(op, given, attrs):
            if letter in INDEXED.get(op.name.removesuffix("_backward"), ""):
                continue
            xs = evened(op, given, attrs, letter, 4)
            types = marked(op, xs, attrs, letter, (), "zigzag(2)")
            try:
                graph = graph_of(op, types, attrs)
            except PlacementError:
                assert op.role(letter) in ("scan", "whole") or op.name == "reshape"
                continue
            assert op.role(letter) != "scan"
            permuted = [_reordered(x, t) if x is not None and t else x for x, t in zip(xs, types, strict=True)]
            want = [_reordered(y, v.type) for y, v in zip(run(op, xs, attrs), graph.outputs, strict=True)]
            same(list(run(op, permuted, attrs)), want)


def _reordered(x: Tensor, type_: TensorType) -> Tensor:
    for i, dim in enumerate(type_.dims):
        if parse_order(dim.order):
            x = reorder_op.reference(x, dim=i, order=dim.order)
    return x


# -- linearity ------------------------------------------------------------------------------


@EVERY_OP
def test_linear_groups_are_true(op: OpDef) -> None:
    """The op of a sum is the sum of the ops, in the operands of a group together; a partial operand runs so on ranks."""
    for xs, attrs in cases(op):
        for group in op.linear:
            inside = [i for i, o in enumerate(op.inputs) if o.name in group and xs[i] is not None]
            parts = [torch.randn_like(x) if x is not None and i in inside else x for i, x in enumerate(xs)]
            rest = [
                x - p if i in inside and x is not None and p is not None else x
                for i, (x, p) in enumerate(zip(xs, parts, strict=True))
            ]
            for whole, a, b in zip(run(op, xs, attrs), run(op, parts, attrs), run(op, rest, attrs), strict=True):
                if whole.is_floating_point():
                    same(a + b, whole)
            types = [replace(t, partial=frozenset({"cp"})) if t and i in inside else t for i, t in enumerate(types_of(xs))]
            runs_alike(op, xs, types, attrs)


@EVERY_OP
def test_a_partial_operand_outside_every_group_is_refused(op: OpDef) -> None:
    for xs, attrs in cases(op, 1):
        present = [i for i, x in enumerate(xs) if x is not None]
        groups = [{i for i in present if op.inputs[i].name in g} for g in op.linear]
        for chosen in itertools.chain.from_iterable(itertools.combinations(present, n) for n in (1, 2)):
            if {i for i in chosen if op.inputs[i].name not in op.shapes} in [set[int](), *groups]:
                continue
            types = [replace(t, partial=frozenset({"cp"})) if t and i in chosen else t for i, t in enumerate(types_of(xs))]
            with pytest.raises(PlacementError, match=op.name):
                graph_of(op, types, attrs)


# -- gradients ------------------------------------------------------------------------------


@EVERY_OP
def test_the_reference_has_the_gradient_of_what_it_computes(op: OpDef) -> None:
    for xs, attrs in itertools.islice(cases(op, 1), 2):
        floats = [i for i, x in enumerate(xs) if x is not None and x.is_floating_point()]

        def of(
            *given: Tensor, xs: Operands = xs, attrs: dict[str, Any] = attrs, floats: list[int] = floats
        ) -> tuple[Tensor, ...]:
            full = [given[floats.index(i)] if i in floats else x for i, x in enumerate(xs)]
            return tuple(y for y in run(op, full, attrs) if y.requires_grad)

        given = [x for x in tracked(xs) if x is not None and x.is_floating_point()]
        if given and of(*given):
            assert torch.autograd.gradcheck(of, given, fast_mode=True)


# -- collectives ----------------------------------------------------------------------------


@pytest.mark.parametrize("op", COLLECTIVES, ids=lambda o: o.name)
def test_a_collective_changes_where_and_never_what(op: OpDef) -> None:
    _, attrs = sample(op, torch.Generator().manual_seed(0))
    before, after = (parse_type(t) for t in PLACED[op.name])
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    graph = graph_of(op, [before], attrs)
    assert graph.outputs[0].type == after
    runs_alike(op, [x], [before], attrs)
    with pytest.raises(PlacementError, match=op.name):
        graph_of(op, [after], attrs)
    with pytest.raises((TypeMismatch, PlacementError), match=op.name):
        graph_of(op, [TensorType("f64", ())], attrs)
