"""Fast torch implementations of ops, each with its op's own call shape."""

from . import device
from .attention import attention
from .cache import cache_write
from .conv import causal_conv1d
from .experts import combine, dispatch, grouped_linear, load_balance_loss, route, z_loss
from .linear import linear
from .loss import cross_entropy, linear_cross_entropy
from .recurrence import delta_rule, gated_delta_rule, gated_linear_attention, kimi_delta_attention, retention, ssd

__all__ = [
    "attention", "cache_write", "causal_conv1d", "combine", "cross_entropy", "delta_rule", "device", "dispatch",
    "gated_delta_rule", "gated_linear_attention", "grouped_linear", "kimi_delta_attention", "linear", "linear_cross_entropy",
    "load_balance_loss", "retention", "route", "ssd", "z_loss",
]  # fmt: skip
