"""Which form runs an op on a target; no entry means the op's reference runs, under `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..ir import OPS, Node, OpDef
from . import forms

TARGETS = ("cpu", "reference")


@dataclass(frozen=True)
class Form:
    """A fast implementation with its op's own call shape, and the reason it is chosen."""

    run: Callable[..., Any]
    why: str


_CHUNKED = "chunked and matmul-rich, opaque to Dynamo"
_CPU: dict[str, Form] = {k: v for k, v in {
    "gated_delta_rule": Form(getattr(forms, "gated_delta_rule", None), _CHUNKED),
    "delta_rule": Form(getattr(forms, "delta_rule", None), _CHUNKED),
    "kimi_delta_attention": Form(getattr(forms, "kimi_delta_attention", None), _CHUNKED),
    "ssd": Form(getattr(forms, "ssd", None), _CHUNKED),
    "gated_linear_attention": Form(getattr(forms, "gated_linear_attention", None), _CHUNKED),
    "retention": Form(getattr(forms, "retention", None), _CHUNKED),
    "causal_conv1d": Form(getattr(forms, "causal_conv1d", None), "k shifted multiply-adds, channels last"),
    "attention": Form(getattr(forms, "attention", None), "SDPA, masks in blocks of queries"),
    "cache_write": Form(getattr(forms, "cache_write", None), "in place: the cache that is read is dead"),
    "route": Form(getattr(forms, "route", None), "top-k without a full sort"),
    "dispatch": Form(getattr(forms, "dispatch", None), "one stable sort"),
    "grouped_linear": Form(getattr(forms, "grouped_linear", None), "a GEMM per expert that has rows"),
    "combine": Form(getattr(forms, "combine", None), "a gather and a sum, no atomics"),
    "cross_entropy": Form(getattr(forms, "cross_entropy", None), "softmax recomputed in the backward"),
    "linear_cross_entropy": Form(getattr(forms, "linear_cross_entropy", None), "in blocks of tokens, the logits never exist"),
}.items() if v.run}


def form_of(op: OpDef, target: str) -> Form | None:
    """The form that runs `op` on `target`, or None for its reference."""
    return _CPU.get(op.name) if target == "cpu" else None


def targets_of(op: OpDef) -> dict[str, Form]:
    """Every target with a form of this op."""
    return {t: f for t in TARGETS if (f := form_of(op, t))}


def choose(node: Node, target: str) -> tuple[Callable[..., Any], str, str]:
    """What runs a node: the callable, its name, and why."""
    op = OPS[node.op.name]
    form = form_of(op, target)
    if form is None:
        return op.reference, f"{op.name} (reference)", "fused with its neighbours by torch.compile"
    return form.run, f"{form.run.__module__.rpartition('.')[2]}.{op.name}", form.why
