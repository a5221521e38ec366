"""Every op there is."""

from .attention import attention, cache_write
from .collective import COLLECTIVES, all_gather, all_reduce, all_to_all, order_parts, reduce_scatter, reorder, shard, zigzag
from .conv import causal_conv1d
from .experts import combine, dispatch, grouped_linear, load_balance_loss, route, z_loss
from .linear import embedding, linear
from .loss import cross_entropy, linear_cross_entropy
from .norm import l2_norm, layer_norm, rms_norm
from .pointwise import (
    ACTIVATIONS,
    add,
    add_bias,
    cast,
    clamp,
    gelu,
    mul,
    neg_exp,
    relu,
    relu2,
    scale,
    scale_columns,
    scale_heads,
    scale_rows,
    sigmoid,
    silu,
    softcap,
    softplus,
    wide,
    widen,
)  # fmt: skip
from .position import frequencies, positions, rope
from .random import dropout, fork_seed
from .recurrence import (
    FAMILY,
    Traits,
    delta_rule,
    gated_delta_rule,
    gated_linear_attention,
    kimi_delta_attention,
    retention,
    segments,
    ssd,
)
from .shape import concat, last_token, reshape, sides, split

__all__ = [
    "ACTIVATIONS", "COLLECTIVES", "FAMILY", "Traits", "add", "add_bias", "all_gather", "all_reduce", "all_to_all",
    "attention", "cache_write", "cast", "causal_conv1d", "clamp", "combine", "concat", "cross_entropy", "delta_rule",
    "dispatch", "dropout", "embedding", "fork_seed", "frequencies", "gated_delta_rule", "gated_linear_attention", "gelu",
    "grouped_linear", "kimi_delta_attention", "l2_norm", "last_token", "layer_norm", "linear", "linear_cross_entropy",
    "load_balance_loss", "mul", "neg_exp", "order_parts", "positions", "reduce_scatter", "relu", "relu2", "reorder",
    "reshape", "retention", "rms_norm", "rope", "route", "scale", "scale_columns", "scale_heads", "scale_rows", "segments",
    "shard", "sides", "sigmoid", "silu", "softcap", "softplus", "split", "ssd", "wide", "widen", "z_loss", "zigzag",
]  # fmt: skip
