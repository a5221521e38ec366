"""LFM2: gated short convolutions, some attention, and feed-forward layers."""

from __future__ import annotations

from ..kinds import Mlp
from ..kinds_scan import GatedConv
from . import pieces, tables_second
from .config import Config
from .decoders import stack
from .hybrids import Pair
from .pieces import FULL, read_attention
from .plan import Plan, make_plan
from .selective import listed

CONV = "conv"


def lfm2(c: Config) -> Plan:
    hidden, count = c.size("hidden_size"), pieces.layers(c)
    attention = read_attention(c, theta=1e6, qk_norm=True)
    conv = GatedConv(width=hidden, conv=c.size("conv_L_cache", 3), bias=c.flag("conv_bias"))
    mixers: dict[str, Pair] = {FULL: (attention, tables_second.LFM_ATTENTION), CONV: (conv, tables_second.LFM_CONV)}
    full = listed(c, "full_attn_idxs", count) if c.get("full_attn_idxs") is not None else range(count)
    kinds = c.names("layer_types", count, [FULL if i in full else CONV for i in range(count)], (FULL, CONV))
    ffn: Pair = (Mlp(width=_width(c)), tables_second.LFM_MLP)
    pairs = [pair for kind in kinds for pair in (mixers.get(kind, mixers[FULL]), ffn)]
    eps = c.number("norm_eps", 1e-5)
    _older(c, hidden, eps)
    tied = c.flag("tie_embedding", c.flag("tie_word_embeddings", True))
    return make_plan(c, stack(pairs), tables_second.LFM_OUTSIDE, hidden=hidden, norm_eps=eps, tied=tied)


def _width(c: Config) -> int:
    """Hidden columns: two thirds of what is said, times a factor, rounded up; or just that."""
    said = c.size("block_ff_dim", c.size("intermediate_size", 12288))
    factor, unit = c.number("block_ffn_dim_multiplier", 1.0), c.size("block_multiple_of", 256)
    if not c.flag("block_auto_adjust_ff_dim", True):
        return said
    width = int(2 * said / 3)
    if "block_ffn_dim_multiplier" in c.fields and c.fields["block_ffn_dim_multiplier"] is None:
        return width
    return -(-int(factor * width) // unit) * unit


def _older(c: Config, hidden: int, eps: float) -> None:
    """Other names of the same, and how first weights are drawn."""
    c.idle("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init")
    for name in ("block_dim", "conv_dim", "conv_dim_out"):
        c.must(name, hidden)
    c.must("block_norm_eps", eps)
    c.must("block_use_swiglu", True)
    c.must("use_pos_enc", True)
    c.must("num_heads", c.size("num_attention_heads"))
