"""The linear-recurrence family: one token-by-token meaning, one face per named layer.

S_t' = D_t S_{t-1} with D_t = exp(decay_t), per head or per key channel;
delta:     S_t = S_t' + beta_t k_t (v_t - S_t'^T k_t)^T
additive:  S_t = S_t' + beta_t k_t v_t^T
o_t = scale * S_t^T q_t.  Value head (g r) reads key head g. `cu` are packed segment borders: the state starts anew at each.
Sources: Gated DeltaNet (arXiv 2412.06464), Kimi Linear (2510.26692), Mamba-2 (2405.21060), GLA (2312.06635),
RetNet (2307.08621).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ..errors import TypeMismatch
from ..op import OpDef, op
from .pointwise import wide

Tensor = torch.Tensor
Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Traits:
    """What tells the members of the family apart."""

    update: str  # delta or additive
    decay: str  # none, head, channel, or constant (one slope per head)
    beta: bool


def segments(batch: int, length: int, cu: Tensor | None) -> list[tuple[int, int, int]]:
    """(row of the batch, start, end) of every state's run of tokens."""
    if cu is None:
        return [(b, 0, length) for b in range(batch)]
    borders = [int(x) for x in cu]
    if batch != 1 or borders[0] != 0 or borders[-1] != length or borders != sorted(borders):
        raise TypeMismatch(f"cu is {borders} for {batch} x {length} tokens; it must rise from 0 to {length}, with a batch of 1")
    return [(0, a, b) for a, b in pairwise(borders)]


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    cu: Tensor | None,
    scale: float,
    update: str,
) -> Result:
    """Token by token, in at least float32: what every face means."""
    heads, r = v.shape[2], v.shape[2] // q.shape[2]
    q, k, x = (wide(y) for y in (q, k, v))
    q, k = (y.repeat_interleave(r, 2) for y in (q * scale, k))
    rows, finals = [list[Tensor]() for _ in range(v.shape[0])], list[Tensor]()
    for n, (b, start, end) in enumerate(segments(v.shape[0], v.shape[1], cu)):
        s = x.new_zeros(heads, q.shape[3], x.shape[3]) if state is None else state[n].to(x.dtype)
        for t in range(start, end):
            if decay is not None:
                s = s * _per_key(wide(decay)[b, t]).exp()
            target = x[b, t] - torch.einsum("hk,hkv->hv", k[b, t], s) if update == "delta" else x[b, t]
            key = k[b, t] if beta is None else k[b, t] * wide(beta)[b, t, :, None]
            s = s + key[:, :, None] * target[:, None, :]
            rows[b].append(torch.einsum("hk,hkv->hv", q[b, t], s))
        finals.append(s)
    empty = x.new_zeros(0, heads, x.shape[3])
    out = torch.stack([torch.stack(row) if row else empty for row in rows])
    return out.to(v.dtype), torch.stack(finals) if finals else x.new_zeros(0, heads, q.shape[3], x.shape[3])


def _per_key(decay: Tensor) -> Tensor:
    return decay[:, None, None] if decay.dim() == 1 else decay[:, :, None]


_QKV = "q[b t g k], k[b t g k], v[b t (g r) v]"
_STATE = "state[n (g r) k v]?, cu:i64[n+1]? -> o:v[b t (g r) v], final:acc[n (g r) k v]"
_ROLES: dict[str, Any] = {"map": "b g r v", "scan": "t", "whole": "k n", "same": "n b cu", "over": "t"}
_DELTA = "6*b*t*g*r*k*v"
_ADDITIVE = "4*b*t*g*r*k*v"


@op(f"{_QKV}, decay[b t (g r)], beta[b t (g r)], {_STATE}", **_ROLES, flops=_DELTA)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    cu: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Result:
    """S_t = e^decay_t S_{t-1} + beta_t k_t (v_t - e^decay_t S_{t-1}^T k_t)^T;  o_t = scale S_t^T q_t"""
    return recur(q, k, v, decay, beta, state, cu, scale, "delta")


@op(f"{_QKV}, beta[b t (g r)], {_STATE}", **_ROLES, flops=_DELTA)
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None = None, cu: Tensor | None = None, *, scale: float = 1.0
) -> Result:
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T;  o_t = scale S_t^T q_t"""
    return recur(q, k, v, None, beta, state, cu, scale, "delta")


@op(f"{_QKV}, decay[b t (g r) k], beta[b t (g r)], {_STATE}", **_ROLES, flops=_DELTA)
def kimi_delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    cu: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Result:
    """The gated delta rule with one decay per key channel: S' = diag(e^decay_t) S"""
    return recur(q, k, v, decay, beta, state, cu, scale, "delta")


@op(f"{_QKV}, decay[b t (g r)], beta[b t (g r)], {_STATE}", **_ROLES, flops=_ADDITIVE)
def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    cu: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Result:
    """Mamba-2 with q = C, k = B, v = x, beta = dt, decay = dt A: S_t = e^decay_t S_{t-1} + dt_t B_t x_t^T;  o_t = S_t^T C_t"""
    return recur(q, k, v, decay, beta, state, cu, scale, "additive")


@op(f"{_QKV}, decay[b t (g r) k], {_STATE}", **_ROLES, flops=_ADDITIVE)
def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None = None, cu: Tensor | None = None, *, scale: float = 1.0
) -> Result:
    """S_t = diag(e^decay_t) S_{t-1} + k_t v_t^T;  o_t = scale S_t^T q_t"""
    return recur(q, k, v, decay, None, state, cu, scale, "additive")


@op(f"{_QKV}, slope[(g r)], {_STATE}", **_ROLES, flops=_ADDITIVE)
def retention(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor | None = None, cu: Tensor | None = None, *, scale: float = 1.0
) -> Result:
    """S_t = e^slope S_{t-1} + k_t v_t^T, one constant slope per head;  o_t = scale S_t^T q_t"""
    return recur(q, k, v, slope.expand(*v.shape[:2], -1), None, state, cu, scale, "additive")


FAMILY: dict[OpDef, Traits] = {
    gated_delta_rule: Traits("delta", "head", True),
    delta_rule: Traits("delta", "none", True),
    kimi_delta_attention: Traits("delta", "channel", True),
    ssd: Traits("additive", "head", True),
    gated_linear_attention: Traits("additive", "channel", False),
    retention: Traits("additive", "constant", False),
}


def _sampler(traits: Traits) -> Any:
    def rule(sample: Any) -> list[Any]:
        cu = torch.tensor([0, 1, 1, 5]) if sample.coin() else None
        b, t, g, r, k, v = 1 if cu is not None else 2, 5, 2, 2, 3, 4
        runs = 3 if cu is not None else b
        rand = sample.randn
        decay = {"none": [], "head": [(b, t, g * r)], "channel": [(b, t, g * r, k)], "constant": [(g * r,)]}[traits.decay]
        gates = [-rand(*shape).abs() for shape in decay] + ([torch.sigmoid(rand(b, t, g * r))] if traits.beta else [])
        key = rand(b, t, g, k)
        return [
            rand(b, t, g, k),
            key / key.norm(dim=-1, keepdim=True),
            rand(b, t, g * r, v),
            *gates,
            rand(runs, g * r, k, v),
            cu,
            {"scale": 0.5},
        ]

    return rule


for _op, _traits in FAMILY.items():
    _op.samples(_sampler(_traits))


_KV = "k[b t g k], v[b t (g r) v]"
_FINAL = "state[n (g r) k v]?, cu:i64[n+1]? -> final:acc[n (g r) k v]"
_ALONE: dict[str, Any] = {k: v for k, v in _ROLES.items() if k != "over"} | {"flops": "4*b*t*g*r*k*v"}


@op(f"{_KV}, decay[b t (g r)]?, beta[b t (g r)], {_FINAL}", **_ALONE)
def gated_delta_final(
    k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor, state: Tensor | None = None, cu: Tensor | None = None
) -> Tensor:
    """The state that the (gated) delta rule ends in, without its outputs"""
    return recur(k, k, v, decay, beta, state, cu, 1.0, "delta")[1]


@op(f"{_KV}, decay[b t (g r) k], beta[b t (g r)], {_FINAL}", **_ALONE)
def kimi_delta_final(
    k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None = None, cu: Tensor | None = None
) -> Tensor:
    """The state that Kimi's delta rule ends in, without its outputs"""
    return recur(k, k, v, decay, beta, state, cu, 1.0, "delta")[1]


FINALS = {gated_delta_rule: gated_delta_final, delta_rule: gated_delta_final, kimi_delta_attention: kimi_delta_final}


@gated_delta_final.samples
def _(sample: Any) -> list[Any]:
    return _sampler(FAMILY[gated_delta_rule])(sample)[1:-1]


@kimi_delta_final.samples
def _(sample: Any) -> list[Any]:
    return _sampler(FAMILY[kimi_delta_attention])(sample)[1:-1]
