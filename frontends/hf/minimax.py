"""MiniMax: lightning attention beside softmax attention, experts, and a residual stream that is normed itself."""

from __future__ import annotations

from typing import Any

from ..kinds_lightning import Lightning
from ..sequence import Kind
from . import pieces, tables, tables_first
from .config import Config
from .decoders import rms
from .pieces import FULL, LINEAR, layer_types, read_attention
from .plan import Placed, Plan, make_plan

# Tables that follow from the layer and the number of heads.
DERIVED = (r".*\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)",)


def minimax(c: Config) -> Plan:
    c.must("router_jitter_noise", 0.0, 0)
    c.idle("block_size")
    count = pieces.layers(c)
    default = [LINEAR if i % 2 else FULL for i in range(count)]
    kinds = layer_types(c, "layer_types", count, default, FULL, LINEAR)
    full = read_attention(c, theta=1e6, window=pieces.window(c), **_stream(c, "full_attn"))
    c.must("rotary_dim", None, full.head_dim)
    act: Any = c.act("hidden_act")
    near = Lightning(heads=full.heads, head_dim=full.head_dim, act=act, **_stream(c, "linear_attn"))
    moe = pieces.read_moe(c, "num_local_experts", "intermediate_size", **_stream(c, "mlp"))
    blocks = list[Placed]()
    for i, kind in enumerate(kinds):
        at = f"model.layers.{i}."
        made = (("slope", slopes(full.heads, i, count)),) if kind == LINEAR else ()
        mixer: tuple[Kind, str] = (near, tables_first.LIGHTNING) if kind == LINEAR else (full, tables.ATTENTION)
        blocks += [Placed(mixer[0], at, mixer[1], made=made), Placed(moe, at, tables.MIXTRAL_MOE)]
    return make_plan(c, blocks, tables.OUTSIDE, derived=DERIVED, **rms(c, 1e-5))


def _stream(c: Config, what: str) -> dict[str, Any]:
    """A block adds to the normed stream, both with factors."""
    alpha, beta = c.number(f"{what}_alpha_factor", 1.0), c.number(f"{what}_beta_factor", 1.0)
    return {"norm_place": "stream", "skip_scale": alpha, "add_scale": beta}


def slopes(heads: int, layer: int, layers: int) -> tuple[float, ...]:
    """Log decays of a layer's heads: halved eight times from first to last, and flatter in later layers."""
    factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return tuple(-(2 ** (-8 * (h + 1) / heads)) * factor for h in range(heads))
