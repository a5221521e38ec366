"""Random well-typed graphs: what the text form and the passes are tried on."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .errors import PlacementError, TypeMismatch
from .graph import Builder, Graph, Value
from .init import ONES, Init
from .op import OPS, OpDef
from .ops import COLLECTIVES, UNDER_WAY
from .sample import sample
from .types import DTYPES, Dim, TensorType

NAMES = ("x", "x", "x1", "y", "y_1", "lambda", "inf", "w", "silu", "params")  # hints clash, and some cannot be written
LOCS = ("", "", "layers.3.mixer", "model.a_b.0")
INITS = (ONES, Init("normal", (0.02,)), Init("uniform", (-1e-9, 1e300)), Init("step_bias", (0.001, 0.1, 1e-4)))
SPLITS: tuple[tuple[str, ...], ...] = ((), ("cp",), ("tp", "cp"))
PARTIALS: tuple[tuple[str, ...], ...] = ((), ("ep",), ("ep", "pp"))
Types = list[TensorType | None]


def random_graph(seed: int) -> Graph:
    """A graph that calls layers and kernels, over every op, symbolic sizes, splits, orders and partial sums.

    The entry has one op by the seed: as many seeds in a row as there are ops reach every one that has samples.
    """
    rng, made = random.Random(seed), list[Graph]()
    sampled = _sampled_ops()
    for role in ("kernel", "kernel", "layer", "layer", "graph"):
        grower = Grower(rng, Builder(rng.choice(["f", "g", "silu"]), role), tuple(made) if role != "kernel" else ())
        for _ in range(rng.randrange(1, 6)):
            grower.grow()
        if role == "graph":
            grower.grow_op(sampled[seed % len(sampled)])
        made.append(grower.finish())
    return made[-1]


@dataclass(frozen=True)
class Grower:
    """Adds samples of ops to a builder, over values it has, fresh inputs and fresh parameters."""

    rng: random.Random
    builder: Builder
    callees: tuple[Graph, ...]
    values: list[Value] = field(default_factory=list[Value])

    def grow(self) -> None:
        """Emit one call, one collective, or one op."""
        dice = self.rng.random()
        if self.callees and dice < 0.3:
            callee = self.rng.choice(self.callees)
            attrs = {"params": f"layers.{self.rng.randrange(3)}"} if callee.role == "layer" else {}
            self._emit(callee, [v.type for v in callee.inputs], attrs)
        elif self.values and dice < 0.5:
            self._move(self.rng.choice(self.values).type)
        else:
            self.grow_op(self.rng.choice(_sampled_ops()))

    def finish(self) -> Graph:
        """A graph of some of the results."""
        results = [v for v in self.values if v not in self.builder.inputs] or self.values
        return self.builder.finish(self.rng.sample(results, min(len(results), self.rng.randrange(1, 4))))

    def _emit(self, op: OpDef | Graph, types: Types, attrs: dict[str, Any]) -> None:
        many = isinstance(op, OpDef) and (op.name == "split" or any(o.optional for o in op.outputs))  # how many is not certain
        names = [] if many else [self.rng.choice(NAMES) for _ in op.outputs]
        self.values.extend(self.builder.emit(op, [self._operand(t) for t in types], attrs, names, self.rng.choice(LOCS)))

    def _operand(self, type_: TensorType | None) -> Value | None:
        if type_ is None:
            return None
        old = [v for v in self.values if v.type == type_]
        if old and self.rng.random() < 0.7:
            return self.rng.choice(old)
        if self.builder.role != "kernel" and type_.is_float and self.rng.random() < 0.4:
            return self.builder.param(f"p{len(self.builder.params)}", type_, self.rng.choice(INITS))
        self.values.append(self.builder.input(self.rng.choice(NAMES), type_))
        return self.values[-1]

    def _move(self, type_: TensorType) -> None:
        """The collective that a type asks for."""
        at = next((i for i, d in enumerate(type_.dims) if d.axes), None)
        if type_.partial:
            self._emit(OPS["all_reduce"], [type_], {"axis": min(type_.partial)})
        elif at is not None:
            self._emit(OPS["all_gather"], [type_], {"axis": type_.dims[at].axes[-1], "dim": at})
        elif type_.dims:
            self._emit(OPS["shard"], [type_], {"axis": "cp", "dim": 0})

    def grow_op(self, op: OpDef) -> None:
        """Emit a sample of an op."""
        xs, attrs = sample(op, torch.Generator().manual_seed(self.rng.randrange(99)))
        dtype = self.rng.choice(["f64", "bf16"])
        types = [_typed(x, dtype) if x is not None else None for x in xs]
        absent = {o.name for o in op.inputs if o.optional and o.name not in ("cu", "state") and self.rng.random() < 0.3}
        types = [None if o.name in absent else t for o, t in zip(op.inputs, types, strict=True)]
        self._emit(op, self._placed(op, types, {**op.attrs, **attrs}), attrs)

    def _placed(self, op: OpDef, types: Types, attrs: dict[str, Any]) -> Types:
        """One letter made symbolic, split and ordered, and the operands made partial, where the op can take that."""
        uses = op.bind(types, attrs).uses
        if not uses:  # scalars alone
            return types
        letter, size = self.rng.choice(sorted(uses)), self.rng.choice(["s", "4*b*s", "n+1"])
        dim, partial = (
            Dim(size, self.rng.choice(SPLITS), self.rng.choice(["", "zigzag(2)"])),
            frozenset(self.rng.choice(PARTIALS)),
        )
        made = list(types)
        for use in uses[letter]:
            type_ = made[use.operand]
            made[use.operand] = type_ and type_.with_dim(use.position, dim)
        made = [replace(t, partial=partial) if t and t.is_float else t for t in made]
        try:
            op.infer(made, attrs)
        except (TypeMismatch, PlacementError):
            return types
        return made


def _sampled_ops() -> list[OpDef]:
    """Ops that samples say how to call; a collective stands where a type asks for it."""
    return [o for o in OPS.values() if o not in (*COLLECTIVES, *UNDER_WAY)]


def _typed(x: torch.Tensor, dtype: str) -> TensorType:
    name = dtype if x.is_floating_point() else next(k for k, v in DTYPES.items() if v == x.dtype)
    return TensorType(name, tuple(Dim(n) for n in x.shape))
