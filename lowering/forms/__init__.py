"""Fast torch implementations of ops, each with its op's own call shape."""

from . import device, stencils
from .attention import attention
from .attention_biased import biased_attention
from .attention_part import attention_part, attention_part_gradients
from .cache import cache_write
from .cached import cached_attention, cached_write, page_write
from .conv import causal_conv1d
from .experts import combine, dispatch, grouped_linear, load_balance_loss, route, z_loss
from .head import head_parts, linear_token_losses
from .linear import linear
from .loss import cross_entropy, linear_cross_entropy
from .lru import rg_lru
from .paged import paged_attention
from .recurrence import delta_rule, gated_delta_rule, gated_linear_attention, kimi_delta_attention, retention, ssd
from .relay_op import gated_delta_final, kimi_delta_final
from .selective import selective_scan

__all__ = [
    "attention", "attention_part", "attention_part_gradients", "biased_attention",
    "cache_write", "cached_attention", "cached_write",
    "causal_conv1d", "combine", "cross_entropy", "page_write", "paged_attention",
    "delta_rule", "device", "dispatch", "gated_delta_final", "gated_delta_rule", "gated_linear_attention", "grouped_linear",
    "kimi_delta_attention", "kimi_delta_final", "head_parts", "linear", "linear_cross_entropy", "linear_token_losses",
    "load_balance_loss", "retention", "rg_lru", "route", "selective_scan",
    "ssd", "stencils", "z_loss",
]  # fmt: skip
