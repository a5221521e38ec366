"""Gradients that are ops of their own: of softmax attention, the recurrences, routing and the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import torch

from ..crossing import Crossing
from ..errors import TypeMismatch
from ..op import OPS, Gradient, OpDef
from ..sample import sample as draw
from ..signature import Binding, Operand, alias, spread
from ..types import TensorType
from .attention import attention
from .biased import biased_attention
from .caches import CACHES
from .experts import load_balance_loss, route, z_loss
from .linear import embedding
from .loss import cross_entropy, linear_cross_entropy
from .pointwise import wide
from .recurrence import FAMILY, gated_delta_final, kimi_delta_final
from .scan import SCANS
from .token_loss import balance, head_parts, linear_token_losses, router_scores, token_losses, z_losses

Tensor = torch.Tensor


def backward_op(op: OpDef) -> OpDef:
    """`<op>_backward`: the op's operands and its results' cotangents to those of its operands, by autograd of its reference."""
    given = tuple(Operand(f"d_{o.name}", o.axes, "", True) for o in op.outputs if _is_float(op, o))
    made = tuple(Operand(f"d_{o.name}", o.axes, o.name, o.optional) for o in op.inputs if not o.dtype)
    inputs = (*op.inputs, *given)
    letters = {x for o in inputs for a in o.axes for x in a.letters}
    back = OpDef(
        f"{op.name}_backward",
        inputs,
        made,
        {x: op.roles.get(x, "whole") for x in sorted(letters)},
        _reference(op),
        op.attrs,
        f"2*({op.flops_text})" if op.flops_text != "0" else "0",
        linear=(frozenset(o.name for o in given),),
        same=op.same,
    )
    back.gradient_of = op
    # Its ways are those of the op, found when they are asked for: a way may be said after the gradient was.
    back.crossing = Crossing(op.crossing.letters, ways=op.crossing.ways) if op.crossing else None
    back.__doc__ = f"The cotangents of {op.name}'s operands, given those of its results"
    back.infers(_types(op, back))
    back.samples(_samples(op))
    back.no_gradient("the gradient of a gradient is derived only where it is text over ops")
    if op.vjp_rule is None:
        op.vjp(_call(op, back))
    OPS[back.name] = back
    return back


def _is_float(op: OpDef, output: Operand) -> bool:
    """Whether a result has a cotangent: its dtype is open, or that of a named operand."""
    return output.dtype in ("", "acc") or op.has_operand(output.dtype)


def _reference(op: OpDef) -> Any:
    @wraps(op.reference)
    def reference(*operands: Tensor | None, **named: Any) -> Any:
        attrs = {k: v for k, v in named.items() if k in op.attrs}
        values = OPS[f"{op.name}_backward"].arrange(operands, {k: v for k, v in named.items() if k not in attrs})  # type: ignore[arg-type] # tensors here
        made = _gradients(op, values[: len(op.inputs)], values[len(op.inputs) :], attrs)  # type: ignore[arg-type] # as above
        return made[0] if len(made) == 1 else made

    return reference


def _gradients(
    op: OpDef, operands: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], attrs: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    """Autograd of the reference, in at least float32; an absent cotangent is zero."""
    floats = [i for i, x in enumerate(operands) if x is not None and x.is_floating_point()]
    found = [x.detach() for x in operands if x is not None and x.is_floating_point()]

    def results(*leaves: Tensor) -> tuple[Tensor, ...]:
        xs = [leaves[floats.index(i)] if i in floats else x for i, x in enumerate(operands)]
        out = op.reference(*xs, **attrs)
        return tuple(y for y in (out if isinstance(out, tuple) else (out,)) if y.is_floating_point())

    made = torch.func.vjp(results, *map(wide, found))  # unlike autograd.grad, torch.compile traces it
    pairs = zip(made[0], cotangents, strict=True)
    weights = tuple(torch.zeros_like(y) if d is None else d.detach().to(y.dtype) for y, d in pairs)
    return tuple(g.to(x.dtype) for g, x in zip(made[1](weights), found, strict=True))


def _types(op: OpDef, back: OpDef) -> Any:
    def rule(*types: TensorType | None, **attrs: Any) -> tuple[TensorType, ...]:
        """An operand's cotangent lives as it does, partial over what splits a letter that it does not have."""
        for operand, type_ in zip(back.inputs, types, strict=True):
            if type_ is not None and not operand.dtype and not type_.is_float:
                raise TypeMismatch(f"{back.name}: {operand.name} is {type_}, its dtype must be a float")
        bound, _, partial = back.placed(types, attrs)
        operands = [(alias(o, back._same(types)), t) for o, t in zip(op.inputs, types, strict=False) if not o.dtype]  # type: ignore[reportPrivateUsage] # letters that equal others
        return tuple(replace(t, partial=partial | _elsewhere(o, bound)) for o, t in operands if t is not None)

    return rule


def _elsewhere(operand: Operand, bound: Binding) -> set[str]:
    """The mesh axes that split letters which this operand does not have."""
    own = {x for a in spread(operand.axes, bound.rest) for x in a.letters}
    return {axis for letter, uses in bound.uses.items() if letter not in own for use in uses for axis in use.dim.axes}


def _samples(op: OpDef) -> Any:
    def rule(sample: Any) -> list[Any]:
        """The op's own sample, and a cotangent for each result."""
        xs, attrs = draw(op, sample.rng)
        out = op.reference(*xs, **{**op.attrs, **attrs})
        floats = [y for y in (out if isinstance(out, tuple) else (out,)) if y.is_floating_point()]
        return [*xs, *(sample.randn(*y.shape) for y in floats), attrs]

    return rule


def _call(op: OpDef, back: OpDef) -> Gradient:
    operands = [*(o.name for o in back.inputs), *(f"{a}={a}" for a in op.attrs)]

    def rule(types: Mapping[str, TensorType | None], attrs: Mapping[str, Any]) -> str:
        """Absent operands have no cotangent."""
        made = [o.name for o in back.outputs if types[o.dtype] is not None]
        return f"{', '.join(made)} = {back.name}({', '.join(operands)})"

    return rule


BACKWARD = {
    op: backward_op(op)
    for op in (
        attention,
        biased_attention,
        *FAMILY,
        gated_delta_final,
        kimi_delta_final,
        *SCANS,
        *CACHES,
        route,
        cross_entropy,
        linear_cross_entropy,
        load_balance_loss,
        z_loss,
        token_losses,
        linear_token_losses,
        head_parts,
        z_losses,
        router_scores,
        balance,
        embedding,
    )
}
