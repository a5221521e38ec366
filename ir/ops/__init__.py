"""Every op there is."""

from .attention import (
    attention,
    attention_part,
    attention_part_gradients,
    cache_read,
    cache_write,
    repeat_heads,
    sum_heads,
)
from .backward import BACKWARD
from .collective import COLLECTIVES, all_gather, all_reduce, all_to_all, reduce_scatter, relabel, reorder, shard
from .conv import anticausal_conv1d, causal_conv1d, conv1d_taps
from .dropping import drop_at, rows_of, tokens_of
from .expert_rows import return_rows, send_rows
from .experts import (
    combine,
    dispatch,
    grouped_linear,
    grouped_outer,
    load_balance_loss,
    route,
    sum_rows,
    take_rows,
    weigh_rows,
    weight_products,
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
    gated_delta_final,
    gated_delta_rule,
    gated_linear_attention,
    kimi_delta_attention,
    kimi_delta_final,
    retention,
    segments,
    ssd,
)
from .reduce import column_sum, row_mean, row_sum, spread_columns, spread_rows
from .shape import concat, in_sections, join, last_token, put_last, reshape, sides, split
from .token_loss import (
    balance,
    choices_of,
    counted,
    head_parts,
    linear_token_losses,
    mean_of,
    router_scores,
    spread_total,
    token_losses,
    total,
    z_losses,
)
from .under_way import UNDER_WAY, begin_all_to_all, end_all_to_all

__all__ = [
    "ACTIVATIONS", "BACKWARD", "COLLECTIVES", "FAMILY", "Traits", "UNDER_WAY", "add", "add_bias", "all_gather",
    "all_reduce", "all_to_all", "anticausal_conv1d", "attention", "attention_part", "attention_part_gradients", "balance",
    "begin_all_to_all", "cache_read", "cache_write", "cast", "causal_conv1d", "choices_of", "clamp", "column_sum",
    "combine", "concat", "conv1d_taps", "counted", "cross_entropy", "delta_rule", "dispatch", "drop_at", "dropout",
    "embedding", "embedding_sum", "end_all_to_all", "fork_seed", "frequencies", "gated_delta_final", "gated_delta_rule",
    "gated_linear_attention", "gelu", "grouped_linear", "grouped_outer", "head_parts", "in_sections", "inside", "join",
    "kimi_delta_attention", "kimi_delta_final", "l2_norm", "last_token", "layer_norm", "linear", "linear_cross_entropy",
    "linear_token_losses", "load_balance_loss", "mean_of", "mul", "neg_exp", "normal_cdf", "outer", "positions", "put_last",
    "reduce_scatter", "relabel", "relu", "relu2", "reorder", "repeat_heads", "reshape", "retention", "return_rows",
    "rms_norm", "rope", "route", "router_scores", "row_mean", "row_sum", "rows_of", "rsqrt", "scale", "scale_columns",
    "scale_heads", "scale_rows", "segments", "send_rows", "shard", "shift", "sides", "sigmoid", "silu", "softcap",
    "softplus", "split", "spread_columns", "spread_rows", "spread_total", "ssd", "step", "sub", "sum_heads", "sum_rows",
    "take_rows", "tanh", "token_losses", "tokens_of", "total", "weigh_rows", "weight_products", "wide", "widen", "z_loss",
    "z_losses", "zeros_like",
]  # fmt: skip
