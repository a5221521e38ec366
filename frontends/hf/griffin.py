"""RecurrentGemma: Griffin's recurrent blocks, attention with a window, and gated feed-forward layers."""

from __future__ import annotations

from typing import Any

import torch

from ...ir.errors import SpecError
from ..kinds import Mlp
from ..kinds_scan import Lru
from ..problems import shown
from . import pieces, tables_second
from .config import Config
from .decoders import cap, rms, stack
from .hybrids import Pair
from .pieces import read_attention
from .plan import Plan, make_plan

RECURRENT, ATTENTION = "recurrent", "attention"


def recurrent_gemma(c: Config) -> Plan:
    """Norms with weights stored minus one; the embeddings' scale is kept as a bfloat16 number."""
    hidden, heads, act = c.size("hidden_size"), c.size("num_attention_heads"), c.act("hidden_activation", "gelu_pytorch_tanh")
    c.must("head_dim", hidden // heads)
    c.must("embeddings_scale_by_sqrt_dim", True)
    c.idle(
        "w_init_variance_scale",
        "final_w_init_variance_scale",
    )
    window = c.size("attention_window_size", 2048)
    c.must("sliding_window", window)
    attention = read_attention(c, fraction=0.5, bias=c.flag("attention_bias"), out_bias=True, window=window)
    chosen: Any = act
    unit = Lru(width=c.size("lru_width", hidden), heads=heads, conv=c.size("conv1d_width", 4), act=chosen)
    mlp = Mlp(width=c.size("intermediate_size") // 2, act=chosen, bias=True)
    mixers: dict[str, Pair] = {
        RECURRENT: (unit, tables_second.GRIFFIN_UNIT),
        ATTENTION: (attention, tables_second.GRIFFIN_ATTENTION),
    }
    kinds = _kinds(c, pieces.layers(c))
    for name in ("layer_types", "layers_block_type"):
        c.must(name, ["linear_attention" if kind == RECURRENT else "sliding_attention" for kind in kinds])
    pairs = [pair for kind in kinds for pair in (mixers[kind], (mlp, tables_second.GRIFFIN_MLP))]
    scale = float(torch.tensor(hidden**0.5, dtype=torch.bfloat16))
    fields = {"zero_centered": True, "embed_scale": scale, "logit_softcap": cap(c, "logits_soft_cap", 30.0)}
    tied = c.flag("tie_word_embeddings", True)
    return make_plan(c, stack(pairs), tables_second.GRIFFIN_OUTSIDE, tied=tied, max_length=2**20, **fields, **rms(c))


def _kinds(c: Config, count: int) -> list[str]:
    """What each layer is: a few names, said over and over."""
    said: Any = c.get("block_types", [RECURRENT, RECURRENT, ATTENTION])
    if not isinstance(said, list) or not said or any(kind not in (RECURRENT, ATTENTION) for kind in said):
        raise SpecError(f"config.json: block_types: is {shown(said)}; must be a list of {RECURRENT} and {ATTENTION}")
    c.must("_block_types", said)
    return [said[i % len(said)] for i in range(count)]
