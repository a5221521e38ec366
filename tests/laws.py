"""What the laws of ops and of their gradients share: samples of every op, in every variant, and how to compare."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from plait.ir import (
    OPS,
    Builder,
    Dim,
    Graph,
    Mesh,
    Node,
    OpDef,
    TensorType,
    Value,
    evaluate,
    pullback,
    reads,
    simulate,
)
from plait.ir.ops import COLLECTIVES, UNDER_WAY
from plait.ir.sample import sample
from plait.ir.signature import alias
from plait.ir.types import DTYPES

Tensor = torch.Tensor
Operands = list[Tensor | None]
ROUNDING = 1e-10  # of a gradient in float64, relative to its largest entry
MESH = Mesh((("cp", 2),))
LOCAL = [o for o in OPS.values() if o not in (*COLLECTIVES, *UNDER_WAY)]
VARIANTS: dict[str, list[dict[str, Any]]] = {  # attributes whose other values take another path
    "rms_norm": [{"zero_centered": True}, {"groups": 3}], "layer_norm": [{"zero_centered": True}],
    "gelu": [{"approximate": "tanh"}], "spread_rows": [{"mean": True}], "attention": [{"causal": False}],
    "rope": [
        {"fraction": 1.0, "inverse": True}, {"scaling": (8.0, 1.0, 4.0, 8192.0)}, {"interleaved": False},
        {"scaling": (8.0, 0.0, 1.5, 0.0), "amplitude": 1.3}, {"divisors": (1.5, 4.0), "rounded": True, "far": (5.0, 2.0, 3.0)},
    ],
    "route": [{"score": "sigmoid", "renormalize": False, "groups": 1, "scale": 2.5}, {"group_best": 1}],
    "causal_conv1d": [{"act": "none"}],
    "load_balance_loss": [{"score": "sigmoid"}], "linear_cross_entropy": [{"softcap": 3.0}],
    "reshape": [{"pattern": "b t d -> b (t d)"}, {"pattern": "... d -> d ..."}, {"pattern": "... (h d=2) -> ... d h"}],
}  # fmt: skip
UNSPLIT = (  # letters of role map that an attribute keeps whole
    ("reorder", {}, "...1"), ("reshape", {"pattern": "b t (h=2 d) -> b h t d"}, "...2"), ("spread_rows", {"mean": True}, "d"),
    ("reshape", {"pattern": "b t d -> b (t d)"}, "...2"),
)  # fmt: skip


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
    for seed in range(1 if op.name == "attention_backward" else seeds):  # one sample leaves out 16 sets of operands
        xs, attrs = _complete(op, seed)
        optional = [i for i, o in enumerate(op.inputs) if o.optional and xs[i] is not None]
        for variant in [{}, *VARIANTS.get(op.name.removesuffix("_backward"), [])]:
            for absent in itertools.chain.from_iterable(itertools.combinations(optional, n) for n in range(len(optional) + 1)):
                if not _parts_runs(op, xs, absent):
                    yield [None if i in absent else x for i, x in enumerate(xs)], {**attrs, **variant}


def _complete(op: OpDef, seed: int) -> tuple[Operands, dict[str, Any]]:
    """A sample with every operand; where the op has a rule for samples, with those that the rule gives."""
    for again in itertools.count(seed, 10):
        xs, attrs = sample(op, torch.Generator().manual_seed(again))
        if op.sample_rule or not any(x is None for x in xs):
            return xs, attrs
    raise AssertionError("seeds do not end")


def _parts_runs(op: OpDef, xs: Operands, absent: tuple[int, ...]) -> bool:
    """A state has one entry per run of `cu`; without `cu` it would need one per row."""
    present = {o.name for i, (o, x) in enumerate(zip(op.inputs, xs, strict=True)) if x is not None and i not in absent}
    cut = any(o.name == "cu" and i in absent for i, o in enumerate(op.inputs))
    return bool(op.same) and cut and bool({"state", "final", "d_final", "at"} & present)


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


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    assert got.shape == want.shape and got.isfinite().all()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def uses(op: OpDef, xs: Operands, attrs: dict[str, Any], letter: str) -> list[tuple[int, int]]:
    """(operand, dim) wherever a letter stands."""
    return [(u.operand, u.position) for u in op.bind(types_of(xs), full(op, attrs)).uses[letter]]


def placeable(op: OpDef, xs: Operands, attrs: dict[str, Any]) -> list[str]:
    """Letters that a type can place: those that always stand alone or outermost, and not shifted; packed runs have one row."""
    packed = any(o.name == "cu" and x is not None for o, x in zip(op.inputs, xs, strict=True))
    types = types_of(xs)
    axes = [a for o, x in zip(op.inputs, xs, strict=True) for a in alias(o, op._same(types)).axes if x is not None]
    inner = {x for a in axes for x in (*a.letters[1:], *(a.letters if a.offset else ()))}
    return [x for x in op.bind(types, full(op, attrs)).uses if not (x in inner or x.isdigit() or (packed and x == "b"))]


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


def splittable(op: OpDef, xs: Operands, attrs: dict[str, Any]) -> list[str]:
    """Letters that ranks may each have a part of."""
    kept = {x for name, given, x in UNSPLIT if name == op.name and given.items() <= attrs.items()}
    return [x for x in placeable(op, xs, attrs) if op.role(x) in ("map", "sum") and x not in kept]


# -- pullbacks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pullback:
    """A node, and a graph from operands, results and cotangents to the cotangents of its operands."""

    node: Node
    graph: Graph
    given: tuple[bool, ...]  # which results' cotangents are inputs
    made: tuple[int, ...]  # which operands' cotangents are results
    read: tuple[set[int], set[int]]  # which operands and results are inputs

    @property
    def types(self) -> list[tuple[TensorType, TensorType]]:
        """Of each operand, with that of its cotangent."""
        operands = [self.node.inputs[i] for i in self.made]
        return [(v.type, y.type) for v, y in zip(operands, self.graph.outputs, strict=True) if v is not None]


def derive(
    of: OpDef,
    types: Sequence[TensorType | None],
    attrs: dict[str, Any],
    *,
    wanted: Sequence[int] | None = None,
    given: Sequence[int] | None = None,
    partial: frozenset[str] = frozenset(),
    frugal: bool = False,
) -> Pullback:
    """The pullback of one op. The cotangent of a partial result is whole, unless it is said to be partial itself.

    `wanted` and `given` choose operands and results by index; `frugal` hands over only what `reads` asks for.
    """
    node = _node(of, types, attrs)
    want = [wanted is None or i in wanted for i in range(len(types))]
    there = [v.type.is_float and (given is None or i in given) for i, v in enumerate(node.outputs)]
    read = [set(r) for r in reads(node, there, want)]
    b = Builder("g")
    kept = [read[n] if frugal else {*range(len(vs))} for n, vs in enumerate((node.inputs, node.outputs))]
    xs, ys = (
        [b.input(v.name, v.type) if v is not None and i in kept[n] else None for i, v in enumerate(vs)]
        for n, vs in enumerate((node.inputs, node.outputs))
    )
    ds = [
        b.input(f"d_{v.name}", replace(v.type, partial=partial)) if t else None
        for v, t in zip(node.outputs, there, strict=True)
    ]
    made = pullback(b, node, xs, ys, ds, want)
    graph = b.finish(v for v in made if v is not None)
    return Pullback(node, graph, tuple(there), tuple(i for i, v in enumerate(made) if v is not None), (kept[0], kept[1]))


def _node(of: OpDef, types: Sequence[TensorType | None], attrs: dict[str, Any]) -> Node:
    b = Builder("f")
    values: list[Value | None] = [b.input(o.name, t) if t else None for o, t in zip(of.inputs, types, strict=True)]
    b.emit(of, values, attrs, loc="layers.3")
    return b.nodes[0]


def weights(results: Sequence[Tensor], given: Sequence[bool]) -> list[Tensor | None]:
    """A cotangent for each result that has one."""
    rng = torch.Generator().manual_seed(5)
    drawn = [torch.randn(y.shape, generator=rng, dtype=torch.float64) for y in results]
    return [d if there else None for d, there in zip(drawn, given, strict=True)]


def want(of: OpDef, xs: Operands, attrs: dict[str, Any], given: Sequence[bool]) -> list[Tensor | None]:
    """Autograd of the reference."""
    tracked = [x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in xs]
    ys = run(of, tracked, attrs)
    pairs = [(y, d) for y, d in zip(ys, weights(ys, given), strict=True) if d is not None and y.requires_grad]
    leaves = [x for x in tracked if x is not None and x.requires_grad]
    if not pairs or not leaves:
        return [None for _ in xs]
    found = iter(torch.autograd.grad([y for y, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in tracked]


def got(made: Pullback, xs: Operands, attrs: dict[str, Any], *, mesh: bool = False) -> list[Tensor | None]:
    """The pullback's numbers, one for each operand."""
    of = made.node.op
    assert isinstance(of, OpDef)
    ys = run(of, xs, attrs)
    read = [[x for i, x in enumerate(numbers) if i in kept] for numbers, kept in zip((xs, ys), made.read, strict=True)]
    inputs = [x for x in (*read[0], *read[1], *weights(ys, made.given)) if x is not None]
    if not made.made:
        return [None for _ in xs]
    out = simulate(made.graph, MESH, *inputs) if mesh else evaluate(made.graph, *inputs)
    out = iter(out if isinstance(out, tuple) else (out,))
    return [next(out) if i in made.made else None for i in range(len(xs))]


def agree(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None], only: Sequence[int] | None = None) -> None:
    """Equal to `ROUNDING` of the largest entry; an absent one is zero."""
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if only is not None and i not in only:
            assert a is None
        elif a is None or b is None:
            there = b if a is None else a
            assert there is None or not there.any(), f"operand {i} has a gradient on one side only"
        else:
            assert a.shape == b.shape and torch.isfinite(a).all()
            largest = float(b.abs().max()) if b.numel() else 0.0
            assert float((a - b).abs().max() if b.numel() else 0.0) <= ROUNDING * max(largest, 1e-3), f"operand {i}"
