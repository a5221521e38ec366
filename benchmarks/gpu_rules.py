"""The recurrences of the GPU table: G1, G2, G6 and G7, beside fla, mamba-ssm and the torch forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from plait.ir import Graph
from plait.ir.sizes import value as size_value
from plait.lowering.gpu.report import moved
from torch import Tensor

HEAD_128 = 128**-0.5
CHECKED = 520  # tokens of the check against float64: some chunks, and a part of one
Function = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """A recurrence at one shape; `target` is the ratio over fla's or mamba-ssm's kernel."""

    id: str
    op: str
    batch: int
    tokens: int
    key_heads: int
    heads: int
    key: int
    value: int
    mode: str  # fwd, bwd or step
    target: float | None

    @property
    def shape(self) -> str:
        return f"{self.batch} x {self.tokens}, {self.key_heads} / {self.heads} heads, {self.key} x {self.value}"

    @property
    def name(self) -> str:
        return f"{self.op}_{self.batch}x{self.tokens}x{self.heads}"

    @property
    def text(self) -> str:
        head = f"q: bf16[b, s, {self.key_heads}, {self.key}], k: bf16[b, s, {self.key_heads}, {self.key}]"
        head += f", v: bf16[b, s, {self.heads}, {self.value}], decay: f32[b, s, {self.heads}], beta: f32[b, s, {self.heads}]"
        state = f", state: f32[b, {self.heads}, {self.key}, {self.value}]" if self.mode == "step" else ""
        given = "q, k, v, decay, beta, state" if state else "q, k, v, decay, beta"
        return f"def rule({head}{state}):\n    o, final = {self.op}({given}, scale={HEAD_128})\n    return o, final\n"


RULES = (
    Rule("G1", "gated_delta_rule", 1, 8192, 16, 32, 128, 128, "fwd", 1.7),
    Rule("G1", "gated_delta_rule", 8, 1024, 16, 32, 128, 128, "fwd", 1.7),
    Rule("G1", "gated_delta_rule", 1, 32768, 32, 64, 128, 128, "fwd", 1.7),
    Rule("G1", "gated_delta_rule", 1, 32768, 4, 8, 128, 128, "fwd", 1.7),
    Rule("G2", "gated_delta_rule", 1, 8192, 16, 32, 128, 128, "bwd", 1.5),
    Rule("G2", "gated_delta_rule", 1, 32768, 16, 32, 128, 128, "bwd", 1.5),
    Rule("G6", "gated_delta_rule", 1, 1, 16, 32, 128, 128, "step", None),
    Rule("G6", "gated_delta_rule", 64, 1, 16, 32, 128, 128, "step", 0.85),
    Rule("G6", "gated_delta_rule", 256, 1, 16, 32, 128, 128, "step", 0.85),
    Rule("G7", "ssd", 1, 8192, 1, 80, 128, 64, "fwd", 1.5),
)


def rule_rows() -> dict[str, tuple[Rule, str]]:
    """Every row by its key."""
    return {f"{r.name}:{r.mode}": (r, r.mode) for r in RULES}


def sizes(rule: Rule, tokens: int) -> dict[str, int]:
    return {"b": rule.batch, "s": tokens if rule.mode != "step" else 1}


def rule_bytes(rule: Rule, tokens: int) -> int:
    """Every operand and every result once: the floor that the table tells."""
    (node,) = graph_of(rule).nodes
    once = moved(node, sizes(rule, tokens))
    if rule.mode != "bwd":
        return once
    results = sum(v.type.bytes(sizes(rule, tokens)) for v in node.outputs[:1])
    return once + sum(v.type.bytes(sizes(rule, tokens)) for v in node.operands) + results - _final(rule)


def launched_bytes(rule: Rule, tokens: int) -> int:
    """What our launches read and write, each of its tensors once: the floor, and what one launch leaves for another."""
    from plait.lowering.recurrent.jobs import launches

    graph = graph_of(rule)
    (node,) = graph.nodes
    given = dict(zip(graph.inputs, operands(rule, tokens, "meta"), strict=True))
    half = {"fwd": "forward", "bwd": "backward", "step": "step"}[rule.mode]
    made = launches(node, halves=(half,), operands=[None if v is None else given[v] for v in node.inputs])
    each = [{x.data_ptr() or id(x): x for x in m.step.arguments.values() if isinstance(x, Tensor)} for m in made]
    return sum(x.nbytes for tensors in each for x in tensors.values())


def _final(rule: Rule) -> int:
    return 4 * rule.batch * rule.heads * rule.key * rule.value


def graph_of(rule: Rule) -> Graph:
    from plait.ir import parse

    return parse(rule.text)


def operands(rule: Rule, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Queries and keys of length one, decays and writes as trained models have them; the same numbers every time."""
    rng, made = torch.Generator("cpu" if device == "meta" else device).manual_seed(0), list[Tensor]()
    for value in graph_of(rule).inputs:
        shape = [size_value(d.size, sizes(rule, tokens)) for d in value.type.dims]
        x = torch.empty(shape, device=device) if device == "meta" else torch.randn(shape, generator=rng, device=device)
        x = F.normalize(x, dim=-1) if value.name in ("q", "k") else x
        x = -F.softplus(x) * 0.1 if value.name == "decay" else x.sigmoid() if value.name == "beta" else x
        made.append(x.to(dtype) if value.name in ("q", "k", "v") else x)
    return made


# -- the variants -------------------------------------------------------------------------


def functions(rule: Rule, device: str) -> Mapping[str, Callable[[], Function]]:
    """Each variant's maker, to be called when it is its turn: any may fail."""
    made: dict[str, Callable[[], Function]] = {"ours": partial(_ours, rule, device), "compile": partial(_torch, rule)}
    made["fla" if rule.op != "ssd" else "mamba-ssm"] = partial(_fla if rule.op != "ssd" else _mamba, rule)
    return made


def _ours(rule: Rule, device: str) -> Function:
    from plait.lowering.recurrent import faces

    face = faces(interpreted=device == "cpu")[rule.op]
    return lambda *xs: face(*xs, scale=HEAD_128)


def _torch(rule: Rule) -> Function:
    from plait.lowering import forms

    return lambda *xs: getattr(forms, rule.op)(*xs, scale=HEAD_128)


def _fla(rule: Rule) -> Function:
    from fla.ops import gated_delta_rule as ops  # pyright: ignore[reportMissingImports]

    run: Any = ops.fused_recurrent_gated_delta_rule if rule.mode == "step" else ops.chunk_gated_delta_rule

    def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None = None) -> Any:
        r = rule.heads // rule.key_heads  # it takes no grouped heads in its chunked form
        q, k = (x.repeat_interleave(r, 2) for x in (q, k)) if r > 1 else (q, k)
        return run(q, k, v, decay, beta, scale=HEAD_128, initial_state=state, output_final_state=True)

    return call


def _mamba(rule: Rule) -> Function:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]

    def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Any:
        a = -torch.ones(rule.heads, device=q.device)  # decay is dt times it there; the work is the same
        return mamba_chunk_scan_combined(v, beta, a, k, q, 256, return_final_states=True)

    return call


def call_of(rule: Rule, function: Function, xs: Sequence[Tensor]) -> Callable[[], Callable[[], Sequence[Tensor]]]:
    """What is not timed, and gives what is."""
    if rule.mode != "bwd":
        return lambda: _without(function, xs)

    def setup() -> Callable[[], Sequence[Tensor]]:
        leaves = [x.detach().clone().requires_grad_() for x in xs]
        o, _ = function(*leaves)
        head = torch.ones_like(o)
        return lambda: torch.autograd.grad(o, leaves, head)

    return setup


def _without(function: Function, xs: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            return function(*xs)

    return call


def small(rule: Rule) -> Rule:
    """A rule that an interpreter can run: one row, two key heads, a chunk and a part of one."""
    many = min(2, rule.heads // rule.key_heads)
    return replace(rule, batch=1, tokens=1 if rule.mode == "step" else 70, key_heads=1, heads=many)


def truth(rule: Rule, xs: Sequence[Tensor]) -> list[Tensor]:
    """In float64, by the torch form, which the tests hold against the op's own loop over tokens."""
    wide = [x.double() for x in xs]
    return [*call_of(rule, _torch(rule), wide)()()]
