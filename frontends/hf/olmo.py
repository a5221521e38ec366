"""OLMo: norms without weights and clipped projections; OLMo Hybrid: delta nets normed before, attention after."""

from __future__ import annotations

from typing import Any

from ..kinds import Gdn, Mlp
from ..sequence import Kind
from . import pieces, tables, tables_first
from .config import Config
from .decoders import rms, stack
from .pieces import FULL, LINEAR, layer_types, read_attention, read_mlp, with_bias
from .plan import Plan, make_plan

Pair = tuple[Kind, str]


def olmo(c: Config) -> Plan:
    attention = read_attention(c, clip=c.number("clip_qkv", 0.0), **with_bias(c))
    fields: dict[str, Any] = {"hidden": c.size("hidden_size"), "norm": "layer", "norm_eps": 1e-5, "norm_weight": False}
    pairs: list[Pair] = [(attention, tables.ATTENTION), (read_mlp(c), tables.MLP)]
    return make_plan(c, stack(pairs * pieces.layers(c)), tables.OUTSIDE, **fields)


def olmo_hybrid(c: Config) -> Plan:
    """Positions only where the config gives them a base; a layer with attention is normed behind its mixers."""
    c.must("hidden_act", "silu")  # it is the convolution's too
    c.idle(*(f"linear_{name}" for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")))
    count = pieces.layers(c)
    default = [FULL if i % 4 == 3 else LINEAR for i in range(count)]
    default = default if FULL in default else [*default[:-1], FULL]
    kinds = layer_types(c, "layer_types", count, default, FULL, LINEAR)
    attention = read_attention(c, rope=_based(c), qk_norm=True, qk_norm_whole=True, norm_place="after", **with_bias(c))
    mlp = read_mlp(c)
    behind: Mlp = mlp.model_copy(update={"norm_place": "after"})
    near: dict[str, list[Pair]] = {
        FULL: [(attention, tables_first.OLMO_ATTENTION), (behind, tables_first.OLMO_MLP)],
        LINEAR: [(_gdn(c), tables_first.OLMO_GDN), (mlp, tables_first.OLMO_NEAR_MLP)],
    }
    return make_plan(c, stack([pair for kind in kinds for pair in near.get(kind, near[FULL])]), tables.OUTSIDE, **rms(c))


def _based(c: Config) -> bool:
    """Whether positions have a base; one that is null is none, one that is absent is the usual."""
    said: Any = c.get("rope_parameters", {})
    inner: dict[str, Any] = said if isinstance(said, dict) else {}
    return inner.get("rope_theta", c.fields.get("rope_theta", 1e4)) is not None


def _gdn(c: Config) -> Gdn:
    """Where eigenvalues may be negative, a step of the delta rule may go twice as far; the output norm has its own epsilon."""
    heads = c.size("num_attention_heads")
    keys = c.size("linear_num_key_heads", heads)
    key_dim = c.size("linear_key_head_dim", max(1, int(0.75 * c.size("hidden_size") / keys)))
    return Gdn(
        key_heads=keys, value_heads=c.size("linear_num_value_heads", heads), key_dim=key_dim,
        value_dim=c.size("linear_value_head_dim", 2 * key_dim), conv=c.size("linear_conv_kernel_dim", 4),
        beta_scale=2.0 if c.flag("linear_allow_neg_eigval", True) else 1.0, out_eps=1e-5,
    )  # fmt: skip
