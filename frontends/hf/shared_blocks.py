"""Zamba2: Mamba-2 layers, and between them a few transformer blocks whose weights are used over and over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...ir.errors import SpecError
from ..kinds import Mamba2, Mlp
from ..shared import Shared
from . import pieces, tables, tables_second
from .config import Config
from .decoders import rms
from .pieces import LINEAR, NO_LIMIT, read_attention, read_mamba2
from .plan import Placed, Plan, make_plan
from .selective import expanded

HYBRID = "hybrid"
AT = "model.layers.{}."
DEFAULT = [LINEAR] + ([LINEAR] * 5 + [HYBRID]) * 7 + [LINEAR] * 4 + [HYBRID] + [LINEAR] * 3 + [HYBRID] + [LINEAR] * 2
NAMES = {
    "heads": "n_mamba_heads", "head_dim": "mamba_headdim", "state": "mamba_d_state", "groups": "mamba_ngroups",
    "conv": "mamba_d_conv", "conv_bias": "conv_bias",
}  # fmt: skip


def zamba2(c: Config) -> Plan:
    """A shared block sees the layer below and the embeddings, and adds to what one Mamba-2 layer sees."""
    kinds = pieces.layer_types(c, "layers_block_type", pieces.layers(c), DEFAULT, LINEAR, HYBRID)
    mamba, hidden = _mamba(c), c.size("hidden_size")
    rank = c.size("adapter_rank", 128)
    whole = _whole(c, mamba, rank * c.flag("use_shared_attention_adapter"), rank)
    places = [i for i, kind in enumerate(kinds) if kind == HYBRID]
    c.must("hybrid_layer_ids", places)
    c.problems += [f"layers_block_type: names {kind}; known: {LINEAR}, {HYBRID}" for kind in {*kinds} - {LINEAR, HYBRID}]
    sets = {at: n % c.size("num_mem_blocks", 1) for n, at in enumerate(places)}
    own = (tables_second.ZAMBA_MAMBA,)
    blocks = [Placed(mamba, AT.format(i), tables.GRANITE_MAMBA) for i in range(len(kinds))]
    for i, which in sets.items():
        blocks[i] = Placed(whole.model_copy(update={"weights": which}), AT.format(i), tables_second.ZAMBA_HYBRID, own)
    outside = tables.FALCON_OUTSIDE + "".join(_tables(whole, hidden, sets))
    c.must("tie_word_embeddings", True)  # the reference's shared blocks are shared by the same switch
    return make_plan(c, blocks, outside, tied=True, **rms(c, 1e-5))


def _mamba(c: Config) -> Mamba2:
    """Steps are bounded below as the parallel form of the reference does, in decoding too; its convolution has a bias."""
    for name in ("add_bias_linear", "use_long_context"):
        c.must(name, False)
    c.must("time_step_limit", None)
    c.must("rms_norm_eps", 1e-5)  # the norm behind the gate has it whatever the config says
    c.idle("time_step_max", "use_conv_bias", "use_mem_eff_path", "conv_bias")
    hidden, heads = c.size("hidden_size"), c.size("n_mamba_heads", 8)
    head_dim = expanded(c, "mamba_expand", hidden) // heads
    c.must("mamba_headdim", head_dim)
    inside = Config({**c.fields, "mamba_headdim": head_dim, "conv_bias": True, "n_mamba_heads": heads}, c.used, c.problems)
    return read_mamba2(inside, NAMES, dt_limit=(c.number("time_step_min", 0.001), NO_LIMIT))


def _whole(c: Config, mamba: Mamba2, attention_rank: int, mlp_rank: int) -> Shared:
    """A place with shared weights, whichever they are."""
    hidden, heads = c.size("hidden_size"), c.size("num_attention_heads", 32)
    if heads > hidden:
        raise SpecError(f"config.json: num_attention_heads: is {heads}; must be at most hidden_size = {hidden}")
    head_dim = 2 * hidden // heads
    derived = {"attention_head_dim": head_dim, "head_dim": head_dim, "attention_hidden_size": 2 * hidden}
    for name, value in {**derived, "kv_channels": hidden // heads, "num_query_groups": heads}.items():
        c.must(name, value)
    turned = c.flag("use_mem_rope")
    inside = Config({**c.fields, "head_dim": head_dim, "num_attention_heads": heads}, c.used, c.problems, c.notes)
    attention = read_attention(inside, rope=turned, scale=(head_dim / 2) ** -0.5)
    if not turned:
        c.idle("rope_parameters", "rope_theta", "rope_scaling")
    act: Any = c.act("hidden_act", "gelu")
    mlp = Mlp(width=c.size("intermediate_size", 4 * hidden), act=act)
    return Shared(attention=attention, mlp=mlp, mixer=mamba, attention_rank=attention_rank, mlp_rank=mlp_rank)


def _tables(kind: Shared, hidden: int, sets: Mapping[int, int]) -> Iterator[str]:
    """Where shared weights are: under the first layer that has them; and each place's adapters, under that layer too."""
    attention, width = kind.attention, kind.mlp.width
    sizes = {"hidden": hidden, "twice": 2 * hidden, "query": attention.query_width, "kv": attention.kv_width}
    sizes |= {"width": width, "wide": 2 * width, "rank": kind.mlp_rank}
    first = dict[int, int]()
    for use, (at, which) in enumerate(sets.items()):
        if which not in first:
            first[which] = at
            yield tables_second.ZAMBA_SHARED.format(which=which, first=at, **sizes)
        yield tables_second.ZAMBA_ADAPTERS.format(at=at, use=use, first=first[which], **sizes)
