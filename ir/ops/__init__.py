"""Every op there is."""

from .attention import attention, cache_read, cache_write
from .backward import BACKWARD
from .collective import COLLECTIVES, all_gather, all_reduce, all_to_all, reduce_scatter, reorder, shard
from .conv import anticausal_conv1d, causal_conv1d, conv1d_taps
from .experts import (
    combine,
    dispatch,
    grouped_linear,
    grouped_outer,
    load_balance_loss,
    route,
    sum_rows,
    take_rows,
    z_loss,
)
from .linear import embedding, embedding_sum, linear, outer
from .loss import cross_entropy, linear_cross_entropy
from .norm import l2_norm, layer_norm, rms_norm
from .pointwise import (
    ACTIVATIONS,
    add,
    add_bias,
    cast,
    clamp,
    gelu,
    inside,
    mul,
    neg_exp,
    normal_cdf,
    relu,
    relu2,
    rsqrt,
    scale,
    scale_columns,
    scale_heads,
    scale_rows,
    shift,
    sigmoid,
    silu,
    softcap,
    softplus,
    step,
    sub,
    tanh,
    wide,
    widen,
    zeros_like,
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
from .reduce import column_sum, row_mean, row_sum, spread_columns, spread_rows
from .shape import concat, last_token, put_last, reshape, sides, split

__all__ = [
    "ACTIVATIONS", "BACKWARD", "COLLECTIVES", "FAMILY", "Traits", "add", "add_bias", "all_gather", "all_reduce",
    "all_to_all", "anticausal_conv1d", "attention", "cache_read", "cache_write", "cast", "causal_conv1d", "clamp",
    "column_sum", "combine", "concat", "conv1d_taps", "cross_entropy", "delta_rule", "dispatch", "dropout", "embedding",
    "embedding_sum", "fork_seed", "frequencies", "gated_delta_rule", "gated_linear_attention", "gelu", "grouped_linear",
    "grouped_outer", "inside", "kimi_delta_attention", "l2_norm", "last_token", "layer_norm", "linear",
    "linear_cross_entropy", "load_balance_loss", "mul", "neg_exp", "normal_cdf", "outer", "positions",
    "put_last", "reduce_scatter", "relu", "relu2", "reorder", "reshape", "retention", "rms_norm", "rope", "route",
    "row_mean", "row_sum", "rsqrt", "scale", "scale_columns", "scale_heads", "scale_rows", "segments", "shard", "shift",
    "sides", "sigmoid", "silu", "softcap", "softplus", "split", "spread_columns", "spread_rows", "ssd", "step", "sub",
    "sum_rows", "take_rows", "tanh", "wide", "widen", "z_loss", "zeros_like",
]  # fmt: skip
