"""gpt-oss: sinks, windows in every other layer, experts with biases and clamped gates."""

from __future__ import annotations

from typing import Any

from ..kinds import Attention, Moe
from ..sequence import Kind
from . import pieces, tables, tables_first
from .config import Config
from .decoders import each, rms, stack
from .pieces import FULL, SLIDING, read_attention
from .plan import Plan, make_plan

# What stretches positions where a config says nothing of them.
STRETCH = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def gpt_oss(c: Config) -> Plan:
    c.must("hidden_act", "silu")
    c.must("output_router_logits", False)
    c.idle("router_aux_loss_coef", "initial_context_length", "experts_per_token")
    count, bias = pieces.layers(c), c.flag("attention_bias", True)
    given = c if c.fields.get("rope_parameters") or c.fields.get("rope_scaling") else _stretched(c)
    plain = read_attention(given, theta=150000.0, sinks=True, bias=bias, out_bias=bias)
    c.used |= given.used
    c.problems = given.problems
    default = [SLIDING if (i + 1) % 2 else FULL for i in range(count)]
    attention: list[Attention] = each(plain, pieces.windows(c, count, default, pieces.window(c, 128)))
    ffn = (_moe(c), tables_first.GPT_OSS_MOE)
    pairs: list[tuple[Kind, str]] = [pair for a in attention for pair in ((a, tables_first.GPT_OSS_ATTENTION), ffn)]
    return make_plan(c, stack(pairs), tables.OUTSIDE, **rms(c, 1e-5))


def _stretched(c: Config) -> Config:
    """The config with the positions that it means when it says nothing."""
    theta: Any = c.fields.get("rope_theta")
    return Config({**c.fields, "rope_parameters": STRETCH | ({"rope_theta": theta} if theta else {})})


def _moe(c: Config) -> Moe:
    """The best logits are chosen first, and their softmax are the weights: the softmax of all, made to sum to one."""
    return Moe(
        experts=c.size("num_local_experts", 128), top_k=c.size("num_experts_per_tok", 4), width=c.size("intermediate_size"),
        bias=True, router_bias=True, limit=c.number("swiglu_limit", 7.0), gain=c.number("swiglu_alpha", 1.702), up_shift=1.0,
    )  # fmt: skip
