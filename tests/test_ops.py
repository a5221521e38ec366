"""Laws of every op: its types, its roles, its linearity and its gradients, tried on its own reference."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from plait.ir import (
    OPS,
    Builder,
    Dim,
    Graph,
    Mesh,
    OpDef,
    PlacementError,
    TensorType,
    TypeMismatch,
    evaluate,
    parse_type,
    simulate,
)
from plait.ir.ops import COLLECTIVES, order_parts
from plait.ir.ops import reorder as reorder_op
from plait.ir.sample import sample
from plait.ir.signature import alias
from plait.ir.types import DTYPES

Tensor = torch.Tensor
Operands = list[Tensor | None]
MESH = Mesh((("cp", 2),))
LOCAL = [o for o in OPS.values() if o not in COLLECTIVES]
EVERY_OP = pytest.mark.parametrize("op", LOCAL, ids=lambda o: o.name)
VARIANTS: dict[str, list[dict[str, Any]]] = {  # attributes whose other values take another path
    "rms_norm": [{"zero_centered": True}], "layer_norm": [{"zero_centered": True}], "gelu": [{"approximate": "tanh"}],
    "rope": [{"fraction": 1.0}, {"scaling": (8.0, 1.0, 4.0, 8192.0)}, {"interleaved": False}], "attention": [{"causal": False}],
    "route": [{"score": "sigmoid", "renormalize": False, "groups": 1, "scale": 2.5}], "causal_conv1d": [{"act": "none"}],
    "load_balance_loss": [{"score": "sigmoid"}], "linear_cross_entropy": [{"softcap": 3.0}],
    "reshape": [{"pattern": "b t d -> b (t d)"}, {"pattern": "... d -> d ..."}, {"pattern": "... (h d=2) -> ... d h"}],
}  # fmt: skip
INDEXED = {  # dims whose places other numbers name; tokens never stand there, or two ops undo each other
    "rope": "d", "route": "e", "dispatch": "...0 ...1 k", "combine": "n ...0 ...1 k", "grouped_linear": "n e", "embedding": "v",
    "cross_entropy": "v", "linear_cross_entropy": "v", "load_balance_loss": "e k", "causal_conv1d": "k",
}  # fmt: skip
UNSPLIT = {("reorder", None): "...1", ("reshape", "b t (h=2 d) -> b h t d"): "...2", ("reshape", "b t d -> b (t d)"): "...2"}
PLACED = {  # what a collective can take, and what it gives
    "all_to_all": ("f64[3, 4@cp, 6]", "f64[3, 4, 6@cp]"), "all_gather": ("f64[3, 4@cp, 6]", "f64[3, 4, 6]"),
    "reduce_scatter": ("f64[3, 4, 6]+cp", "f64[3, 4@cp, 6]"), "all_reduce": ("f64[3, 4, 6]+cp", "f64[3, 4, 6]"),
    "shard": ("f64[3, 4, 6]", "f64[3, 4@cp, 6]"),
}  # fmt: skip


def typed(x: Tensor | None) -> TensorType | None:
    if x is None:
        return None
    name = next(k for k, v in DTYPES.items() if v == x.dtype)
    return TensorType(name, tuple(Dim(n) for n in x.shape))


def types_of(xs: Operands) -> list[TensorType | None]:
    return [typed(x) for x in xs]


def run(op: OpDef, xs: Operands, attrs: dict[str, Any]) -> tuple[Tensor, ...]:
    y = op.reference(*xs, **{**op.attrs, **attrs})
    return y if isinstance(y, tuple) else (y,)


def full(op: OpDef, attrs: dict[str, Any]) -> dict[str, Any]:
    return {**op.attrs, **attrs}


def cases(op: OpDef, seeds: int = 2) -> Iterator[tuple[Operands, dict[str, Any]]]:
    """Samples, with every choice of optional operands, and every variant of the attributes."""
    for seed in range(seeds):
        xs, attrs = sample(op, torch.Generator().manual_seed(seed))
        optional = [i for i, o in enumerate(op.inputs) if o.optional and xs[i] is not None]
        for variant in [{}, *VARIANTS.get(op.name, [])]:
            for absent in itertools.chain.from_iterable(itertools.combinations(optional, n) for n in range(len(optional) + 1)):
                if not _parts_runs(op, xs, absent):
                    yield [None if i in absent else x for i, x in enumerate(xs)], {**attrs, **variant}


def _parts_runs(op: OpDef, xs: Operands, absent: tuple[int, ...]) -> bool:
    """A state has one entry per run of `cu`; without `cu` it would need one per row."""
    at = {o.name: i for i, o in enumerate(op.inputs)}
    return bool(op.same) and at["cu"] in absent and xs[at["state"]] is not None and at["state"] not in absent


def graph_of(op: OpDef, types: list[TensorType | None], attrs: dict[str, Any]) -> Graph:
    b = Builder("g")
    values = [b.input(o.name, t) if t else None for o, t in zip(op.inputs, types, strict=True)]
    return b.finish(b.emit(op, values, attrs))


def gradients(outs: Any, xs: list[Tensor]) -> list[Tensor | None]:
    """Of one weighted sum of the float results; the weights do not depend on how the results were made."""
    outs = outs if isinstance(outs, tuple) else (outs,)
    rng = torch.Generator().manual_seed(5)
    terms = [(y * torch.randn(y.shape, generator=rng, dtype=y.dtype)).sum() for y in outs if y.is_floating_point()]
    total = sum(terms, torch.zeros((), dtype=torch.float64))
    floats = [x for x in xs if x.is_floating_point()]
    return list(torch.autograd.grad(total, floats, allow_unused=True)) if total.requires_grad else [None for _ in floats]


def tracked(xs: Operands) -> Operands:
    return [x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in xs]


def same(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    got, want = (y if isinstance(y, tuple | list) else (y,) for y in (got, want))
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:
            there = a if b is None else b
            assert there is None or not there.any(), "one side has a gradient, the other none"
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=False)


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
    for xs, attrs in cases(op):
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
            same(narrow.double(), wide, 1e-5)
            assert (half.dtype, narrow.dtype) == (torch.float32 if out.dtype == "acc" else torch.bfloat16, torch.float32)


@EVERY_OP
def test_an_op_says_what_it_is_and_what_it_costs(op: OpDef) -> None:
    line, _, rest = (op.__doc__ or "").partition("\n")
    assert line.strip() and (not rest or rest.startswith("\n")), "a docstring is one line, then a blank one"
    letters = {x for o in (*op.inputs,) for a in o.axes for x in a.letters}
    assert letters == set(op.roles)
    for xs, attrs in cases(op, 1):
        flops = op.flops(types_of(xs), full(op, attrs), {})
        assert (flops > 0) == (op.flops_text != "0") and isinstance(flops, int)


# -- placement ------------------------------------------------------------------------------


def uses(op: OpDef, xs: Operands, attrs: dict[str, Any], letter: str) -> list[tuple[int, int]]:
    """(operand, dim) wherever a letter stands."""
    return [(u.operand, u.position) for u in op.bind(types_of(xs), full(op, attrs)).uses[letter]]


def placeable(op: OpDef, xs: Operands, attrs: dict[str, Any]) -> list[str]:
    """Letters that a type can place: those that always stand alone or outermost, and not shifted; packed runs have one row."""
    packed = any(o.name == "cu" and x is not None for o, x in zip(op.inputs, xs, strict=True))
    types = types_of(xs)
    axes = [a for o, x in zip(op.inputs, xs, strict=True) for a in alias(o, op._same(types)).axes if x is not None]
    inner = {x for a in axes for x in (*a.letters[1:], *(a.letters if a.offset else ()))}
    return [x for x in op.bind(types, full(op, attrs)).uses if x not in inner and not (packed and x == "b")]


def marked(
    op: OpDef, xs: Operands, attrs: dict[str, Any], letter: str, axes: tuple[str, ...], order: str = ""
) -> list[TensorType | None]:
    """The operands' types with a letter split, or in an order."""
    types = types_of(xs)
    for i, position in uses(op, xs, attrs, letter):
        type_ = types[i]
        assert type_
        types[i] = type_.with_dim(position, replace(type_.dims[position], axes=axes, order=order))
    return types


def evened(op: OpDef, xs: Operands, attrs: dict[str, Any], letter: str, to: int = 2) -> Operands:
    """The operands with a letter's size made a multiple of `to`; what is added differs from what was there."""
    xs, size = list(xs), op.bind(types_of(xs), full(op, attrs)).size[letter]
    for i, position in uses(op, xs, attrs, letter) if int(size) % to else []:
        x = xs[i]
        assert x is not None
        xs[i] = torch.cat([x * 0.9**n if x.is_floating_point() else x for n in range(to)], position)
    return xs


def partial_mates(op: OpDef, types: list[TensorType | None], split: set[str]) -> list[TensorType | None]:
    """A sum that is put off needs the other operands of the linear group to be partial too."""
    group = next(g for g in op.linear if g & split)
    return [
        replace(t, partial=frozenset({"cp"})) if t and o.name in group - split else t
        for o, t in zip(op.inputs, types, strict=True)
    ]


@EVERY_OP
def test_roles_map_and_sum_are_true(op: OpDef) -> None:
    tried = 0
    for given, attrs in cases(op):
        for letter in placeable(op, given, attrs):
            if op.role(letter) not in ("map", "sum") or letter in UNSPLIT.get((op.name, attrs.get("pattern")), ""):
                continue
            xs = evened(op, given, attrs, letter)
            types = marked(op, xs, attrs, letter, ("cp",))
            if op.role(letter) == "sum":
                types = partial_mates(op, types, {op.inputs[i].name for i, _ in uses(op, xs, attrs, letter)})
            runs_alike(op, xs, types, attrs)
            tried += 1
    assert tried or not {"map", "sum"} & set(op.roles.values())


@EVERY_OP
def test_roles_scan_and_whole_refuse_a_split(op: OpDef) -> None:
    for xs, attrs in cases(op):
        for letter in placeable(op, xs, attrs):
            if op.role(letter) in ("scan", "whole"):
                with pytest.raises(PlacementError, match=op.name):
                    graph_of(op, marked(op, xs, attrs, letter, ("cp",)), attrs)


@EVERY_OP
def test_an_order_that_is_accepted_commutes(op: OpDef) -> None:
    """An op over permuted tokens gives the permuted result, or refuses; role scan always refuses."""
    for given, attrs in cases(op) if op.name != "reorder" else []:
        for letter in placeable(op, given, attrs):
            if letter in INDEXED.get(op.name, ""):
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
        if order_parts(dim.order):
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
    for xs, attrs in cases(op):
        present = [i for i, x in enumerate(xs) if x is not None]
        groups = [{i for i in present if op.inputs[i].name in g} for g in op.linear]
        for chosen in itertools.chain.from_iterable(itertools.combinations(present, n) for n in (1, 2)):
            if set(chosen) in groups:
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
