"""What tests of ways across split tokens share: an op on one device, on ranks in one process, and the bytes between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from plait.ir import Dim, Mesh, OpDef, TensorType, simulate
from plait.ir.crossing import Here, Request, sent, together
from plait.ir.orders import permutation

from tests.laws import derive, graph_of, typed

Tensor = torch.Tensor
Operands = Sequence[Tensor | None]


@dataclass(frozen=True)
class Crossing:
    """An op, and how it runs over the tokens."""

    op: OpDef
    by: str
    ranks: int
    order: str
    attrs: Mapping[str, Any]

    @property
    def all_attrs(self) -> dict[str, Any]:
        return {**self.op.attrs, **self.attrs, "over": "cp", "by": self.by, "order": self.order}

    @property
    def mesh(self) -> Mesh:
        return Mesh((("cp", self.ranks),))


def has_tokens(op: OpDef, name: str) -> bool:
    """Whether an operand or a result has tokens, which are its second dim then."""
    found = next(o for o in (*op.inputs, *op.outputs) if o.name == name)
    return any("t" in a.letters for a in found.axes)


def types(c: Crossing, xs: Operands, op: OpDef | None = None) -> list[TensorType | None]:
    """Tokens split in the crossing's order, all else whole."""
    op = op or c.op
    made = [typed(x) for x in xs]
    for i, (o, t) in enumerate(zip(op.inputs, made, strict=True)):
        if t is not None and has_tokens(op, o.name):
            made[i] = t.with_dim(1, Dim(t.dims[1].size, ("cp",), c.order))
    return made


def index(c: Crossing, xs: Operands) -> tuple[Tensor, Tensor]:
    """The natural place of every token in the crossing's order, and back."""
    by_name = dict(zip((o.name for o in c.op.inputs), xs, strict=True))
    length = next(x.shape[1] for o, x in zip(c.op.inputs, xs, strict=True) if x is not None and has_tokens(c.op, o.name))
    there = permutation(c.order, length, by_name.get("cu"))
    return there, torch.argsort(there)


def one(op: OpDef, xs: Operands, attrs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    y = op.reference(*xs, **{**op.attrs, **attrs})
    return y if isinstance(y, tuple) else (y,)


def many(c: Crossing, xs: Operands, op: OpDef | None = None) -> tuple[Tensor, ...]:
    """The op on ranks; takes and gives tokens in natural order."""
    op = op or c.op
    there, back = index(c, xs[: len(c.op.inputs)])
    moved = [x[:, there] if x is not None and has_tokens(op, o.name) else x for o, x in zip(op.inputs, xs, strict=True)]
    graph = graph_of(op, types(c, xs, op), c.all_attrs)
    y = simulate(graph, c.mesh, *[x for x in moved if x is not None])
    names = _results(op, xs)
    return tuple(
        r[:, back] if has_tokens(op, n) else r for n, r in zip(names, y if isinstance(y, tuple) else (y,), strict=True)
    )


def _results(op: OpDef, xs: Operands) -> list[str]:
    absent = {o.name for o, x in zip(op.inputs, xs, strict=True) if x is None}
    return [o.name for o in op.outputs if o.dtype not in absent]


def leaves(xs: Operands) -> list[Tensor | None]:
    return [x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in xs]


def gradients(ys: Sequence[Tensor], xs: Operands) -> list[Tensor]:
    """Of a weighted sum of all results."""
    floats = [x for x in xs if x is not None and x.is_floating_point()]
    return list(torch.autograd.grad([*ys], floats, weights(ys), materialize_grads=True))


def weights(ys: Sequence[Tensor]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(5)
    return [torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y.dtype) for y in ys]


def close(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape, f"{i}: {a.shape} for {b.shape}"
        wrong = float((a - b).detach().abs().max()) if b.numel() else 0.0
        assert wrong <= tolerance * max(1.0, float(b.detach().abs().max()) if b.numel() else 0.0), f"{i} is off by {wrong:.1e}"


def agrees(c: Crossing, xs: Operands, tolerance: float = 1e-9) -> None:
    """Values and gradients on ranks are those of one device."""
    a, b = leaves(xs), leaves(xs)
    found, wanted = many(c, a), one(c.op, b, c.attrs)
    close(found, wanted, tolerance)
    close(gradients(found, a), gradients(wanted, b), tolerance)


def agrees_back(c: Crossing, back: OpDef, xs: Operands) -> None:
    """So does the op that a gradient is in a program."""
    given = leaves(xs)
    wanted = one(c.op, given, c.attrs)
    ds = weights(wanted)
    close(many(c, [*xs, *ds], back), gradients(wanted, given))


def agrees_pulled(c: Crossing, xs: Operands) -> None:
    """So does the gradient that is text over ops."""
    given = leaves(xs)
    wanted = one(c.op, given, c.attrs)
    ds, (there, back) = weights(wanted), index(c, xs)
    made = derive(c.op, types(c, xs), c.all_attrs)
    moved = [x[:, there] if x is not None and has_tokens(c.op, o.name) else x for o, x in zip(c.op.inputs, xs, strict=True)]
    ys = many(c, xs)
    results = [y[:, there] if has_tokens(c.op, o.name) else y for o, y in zip(c.op.outputs, ys, strict=True)]
    moved_ds = [d[:, there] if has_tokens(c.op, o.name) else d for o, d in zip(c.op.outputs, ds, strict=True)]
    found = simulate(made.graph, c.mesh, *[x for x in [*moved, *results, *moved_ds] if x is not None])
    found = found if isinstance(found, tuple) else (found,)
    natural = [d[:, back] if has_tokens(c.op, c.op.inputs[i].name) else d for i, d in zip(made.made, found, strict=True)]
    close(natural, gradients(wanted, given))


def reference(op: OpDef, *operands: Any, **attrs: Any) -> Any:
    return op.reference(*operands, **attrs)


def counted(c: Crossing, xs: Operands) -> tuple[int, list[Request]]:
    """Bytes that the busiest rank sends, and what the first rank asks for."""
    there, _ = index(c, xs)
    moved = [x[:, there] if x is not None and has_tokens(c.op, o.name) else x for o, x in zip(c.op.inputs, xs, strict=True)]
    assert c.op.crossing
    way, total, asked = c.op.crossing.ways[c.by], [0] * c.ranks, list[Request]()

    def watch(round_: Sequence[Request]) -> None:
        asked.append(round_[0])
        for rank, request in enumerate(round_):
            total[rank] += sent(request, c.ranks, rank)

    shards = [
        [
            x.chunk(c.ranks, 1)[r] if x is not None and has_tokens(c.op, o.name) else x
            for o, x in zip(c.op.inputs, moved, strict=True)
        ]
        for r in range(c.ranks)
    ]
    together([way.run(Here.of(c.all_attrs, c.ranks, r, reference), *shards[r]) for r in range(c.ranks)], watch)
    return max(total), asked


def predicted(c: Crossing, xs: Operands) -> int:
    assert c.op.crossing
    return c.op.crossing.ways[c.by].sent([typed(x) for x in xs], c.all_attrs, c.ranks, {})
