"""Every op there is."""

from .aten import aten
from .aten_tables import rope_table, visible_table
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
from .biased import biased_attention, shift_positions
from .caches import CACHES, cached_attention, cached_positions, cached_write, page_write, paged_attention, segment_ends
from .collective import COLLECTIVES, all_gather, all_reduce, all_to_all, reduce_scatter, relabel, reorder, shard
from .conv import anticausal_conv1d, causal_conv1d, conv1d_taps
from .dropping import drop_at, rows_of, tokens_of
from .expert_bias import spread_experts, sum_experts
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
    fixed,
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
from .position import frequencies, positions, reach, rope
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
from .scan import SCANS, gated_input, head_linear, head_outer, rg_lru, selective_scan
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
    "ACTIVATIONS", "BACKWARD", "CACHES", "COLLECTIVES", "FAMILY", "SCANS", "Traits", "UNDER_WAY", "add", "add_bias",
    "all_gather", "all_reduce", "all_to_all", "anticausal_conv1d", "aten", "attention", "attention_part",
    "attention_part_gradients", "balance", "begin_all_to_all", "biased_attention", "cache_read", "cache_write",
    "cached_attention", "cached_positions", "cached_write", "cast", "causal_conv1d", "choices_of", "clamp", "column_sum",
    "combine", "concat", "conv1d_taps", "counted", "cross_entropy", "delta_rule", "dispatch", "drop_at", "dropout",
    "embedding", "embedding_sum", "end_all_to_all", "fixed", "fork_seed", "frequencies", "gated_delta_final",
    "gated_delta_rule", "gated_input", "gated_linear_attention", "gelu", "grouped_linear", "grouped_outer", "head_linear",
    "head_outer", "head_parts", "in_sections", "inside", "join", "kimi_delta_attention", "kimi_delta_final", "l2_norm",
    "last_token", "layer_norm", "linear", "linear_cross_entropy", "linear_token_losses", "load_balance_loss", "mean_of",
    "mul", "neg_exp", "normal_cdf", "outer", "page_write", "paged_attention", "positions", "put_last", "reach",
    "reduce_scatter", "relabel", "relu", "relu2", "reorder", "repeat_heads", "reshape", "retention", "return_rows",
    "rg_lru", "rms_norm", "rope", "rope_table", "route", "router_scores", "row_mean", "row_sum", "rows_of", "rsqrt",
    "scale", "scale_columns", "scale_heads", "scale_rows", "segment_ends", "segments", "selective_scan", "send_rows",
    "shard", "shift", "shift_positions", "sides", "sigmoid", "silu", "softcap", "softplus", "split", "spread_columns",
    "spread_experts", "spread_rows", "spread_total", "ssd", "step", "sub", "sum_experts", "sum_heads", "sum_rows",
    "take_rows", "tanh", "token_losses", "tokens_of", "total", "visible_table", "weigh_rows", "weight_products", "wide",
    "widen", "z_loss", "z_losses", "zeros_like",
]  # fmt: skip
