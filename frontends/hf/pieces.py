"""What many families say alike: attention, windows, experts, Mamba-2."""

from __future__ import annotations

from typing import Any

import torch

from ..kinds import Attention, Mamba2, Mlp, Moe
from .config import Config
from .ropes import read_rope

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
# A spec's numbers are finite; no time step comes near this.
NO_LIMIT = 1e30
# Configs name layers differently from version to version.
ALIASES = {"mamba": LINEAR, "mamba2": LINEAR, "attention": FULL}


def layers(c: Config) -> int:
    return c.size("num_hidden_layers")


def read_attention(c: Config, *, rope: bool = True, theta: float = 10000.0, fraction: float = 1.0, **more: Any) -> Attention:
    """Grouped heads and their positions; `more` are what the family adds."""
    heads = c.size("num_attention_heads")
    c.training("attention_dropout")
    head_dim = c.size("head_dim", c.size("hidden_size") // heads)
    return Attention(
        heads=heads,
        kv_heads=c.size("num_key_value_heads", heads),
        head_dim=head_dim,
        rope=read_rope(c, theta, fraction, width=head_dim) if rope else None,
        **more,
    )


def with_bias(c: Config) -> dict[str, Any]:
    """Biases on all four projections, where the config asks for them."""
    bias = c.flag("attention_bias")
    return {"bias": bias, "out_bias": bias}


def window(c: Config, default: int | None = None) -> int:
    """The sliding window; null is none, and an absent one the family's default."""
    given = c.fields.get("sliding_window", default)
    return 0 if given is None else c.size("sliding_window", default)


def windows(c: Config, count: int, default: list[str], width: int) -> list[int]:
    """Each layer's window, by the config's layer types."""
    return [width if kind == SLIDING else 0 for kind in c.names("layer_types", count, default, (FULL, SLIDING))]


def qwen_windows(c: Config, count: int) -> list[int]:
    """Qwen's switch: only where it is on do the layers from `max_window_layers` on have a window."""
    used, first = c.flag("use_sliding_window"), c.number("max_window_layers", 28)
    width = window(c, 4096) if used else 0
    c.idle("sliding_window")
    return windows(c, count, [SLIDING if used and i >= first else FULL for i in range(count)], width)


def layer_types(c: Config, name: str, count: int, default: list[str], *known: str) -> list[str]:
    """What each layer is, by today's names."""
    found = c.names(name, count, default, (*known, *ALIASES))
    return [ALIASES.get(kind, kind) for kind in found]


def read_mlp(c: Config, **more: Any) -> Mlp:
    return Mlp(width=c.size("intermediate_size"), act=c.act("hidden_act"), **more)  # type: ignore[arg-type] # a known name


def read_moe(c: Config, experts: str, width: str, **more: Any) -> Moe:
    """Routed experts; `experts` and `width` are the names the family has for these sizes."""
    c.must("output_router_logits", False)
    c.idle("router_aux_loss_coef")
    count, top = c.size(experts), c.size("num_experts_per_tok")
    return Moe(experts=count, top_k=top, width=c.size(width), act=c.act("hidden_act"), **more)  # type: ignore[arg-type] # a known name


def sparse(c: Config, count: int) -> list[bool]:
    """Which layers have experts, as Qwen says it."""
    every: Any = c.size("decoder_sparse_step", 1)
    dense = c.listed("mlp_only_layers", [])
    return [i not in dense and (i + 1) % every == 0 for i in range(count)]


def read_mamba2(c: Config, names: dict[str, str], **more: Any) -> Mamba2:
    """Mamba-2 under the family's names for heads, head_dim, state, groups, conv and conv_bias."""
    heads, head_dim = c.size(names["heads"]), c.size(names["head_dim"])
    return Mamba2(
        heads=heads, head_dim=head_dim, state=c.size(names["state"]), groups=c.size(names["groups"], 1),
        conv=c.size(names["conv"], 4), conv_bias=c.flag(names["conv_bias"], True), **more,
    )  # fmt: skip


def step_limit(c: Config) -> tuple[float, float] | None:
    """Bounds of time steps; none where there are 0 and infinity."""
    low, high = c.numbers("time_step_limit", (0.0, float("inf")))
    return None if low <= 0 and high == float("inf") else (low, min(high, NO_LIMIT))


def single(x: float) -> float:
    """A number as it is kept in a float32 tensor."""
    return float(torch.tensor(x, dtype=torch.float32))
