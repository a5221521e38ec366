"""Ling hybrids: Kimi delta attention with gates of full rank, latent attention with a gate for each head, experts in groups."""

from __future__ import annotations

from typing import Any

from ..kinds import Kda, Mla
from ..sequence import Kind
from . import pieces, tables, tables_first
from .config import Config
from .decoders import rms, stack
from .latent import read_latent, read_routed
from .pieces import FULL, LINEAR, layer_types, read_mlp
from .plan import Plan, make_plan
from .ropes import read_rope

Pair = tuple[Kind, str]
ROUTING = {
    "experts": "num_experts", "top_k": "num_experts_per_tok", "renormalize": "norm_topk_prob", "groups": "n_group",
    "shared": "n_shared_experts",
}  # fmt: skip
# The names that the family's own code has for what configs say in DeepSeek's words.
OLD = {
    "num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_token", "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group", "n_shared_experts": "num_shared_experts", "max_position_embeddings": "model_max_length",
    "num_mtp_layers": "num_nextn_predict_layers",
}  # fmt: skip
USUAL = {"num_experts": 512, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "max_position_embeddings": 262144}


def bailing_hybrid(c: Config) -> Plan:
    """Every sixth layer has latent attention, the others delta nets."""
    said = {new: c.fields[old] for new, old in OLD.items() if c.fields.get(old) is not None and c.fields.get(new) is None}
    named = Config({**USUAL, **{n: v for n, v in c.fields.items() if n not in OLD.values()}, **said})
    for old, new in ((o, n) for n, o in OLD.items()):
        if c.fields.get(old) is not None and c.fields.get(new) not in (None, c.fields[old]):
            named.problems.append(f"{old}: is {c.fields[old]}, and {new} is {c.fields[new]}; they mean the same")
    return _plan(named)


def _plan(c: Config) -> Plan:
    c.must("hidden_act", "silu")  # it is the convolution's too
    # Layers that predict more tokens stand behind the others; generation does without them.
    c.idle("num_mtp_layers", "mtp_loss_scaling_factor", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim")
    count, every = pieces.layers(c), c.size("layer_group_size", 6)
    kinds = layer_types(c, "layer_types", count, [LINEAR if (i + 1) % every else FULL for i in range(count)], FULL, LINEAR)
    first = int(c.number("first_k_dense_replace", 2))
    default = ["dense" if i < first else "sparse" for i in range(count)]
    sparse = c.names("mlp_layer_types", count, default, ("dense", "sparse"))
    routed = read_routed(c, ROUTING, groups=8, limit=4, scale=2.5)
    mixer: dict[str, Pair] = {FULL: (_latent(c), tables_first.LING_LATENT), LINEAR: (_kda(c), tables_first.LING_KDA)}
    ffn: dict[str, Pair] = {"dense": (read_mlp(c), tables.MLP), "sparse": (routed, tables_first.LING_MOE)}
    pairs = [p for mix, f in zip(kinds, sparse, strict=True) for p in (mixer.get(mix, mixer[FULL]), ffn.get(f, ffn["dense"]))]
    return make_plan(c, stack(pairs), tables_first.LING_OUTSIDE, derived=(rf"model\.layers\.{count}\..*",), **rms(c))


def _latent(c: Config) -> Mla:
    c.must("q_lora_rank", None)
    rope = read_rope(c, theta=6e6, width=c.size("qk_rope_head_dim", 64))
    kind, _ = read_latent(c, rope.model_copy(update={"interleaved": True}), gate=True)
    assert isinstance(kind, Mla)
    return kind


def _kda(c: Config) -> Kda:
    """Decays stay above a floor, unless the config says that they need not."""
    floor: Any = c.number("kda_lower_bound", -5.0)
    return Kda(
        heads=c.size("num_attention_heads"), head_dim=c.size("head_dim", 128), conv=c.size("short_conv_kernel_size", 4),
        full_rank=True, decay_floor=floor if c.flag("kda_safe_gate", True) else 0.0,
    )  # fmt: skip
