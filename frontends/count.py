"""How many parameters a spec has, by formula: every tensor a checkpoint of it holds."""

from __future__ import annotations

from collections.abc import Sequence

from .encoder import relative_of
from .kinds import Attention, Gdn, Kda, Mamba2, Mla, Mlp, Moe
from .kinds_cross import Cross
from .kinds_lightning import Lightning
from .kinds_scan import GatedConv, Lru, Mamba1
from .parallel import Parallel
from .sequence import Kind
from .shared import Shared
from .spec import ModelSpec


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the whole model."""
    return _outside(spec) + _encoder(spec) + sum(block_parameters(block, spec.hidden) for block in spec.blocks)


def active_parameter_count(spec: ModelSpec) -> int:
    """Parameters that one token meets: of the routed experts only its top_k."""
    blocks = (block.model_copy(update={"experts": block.top_k}) if isinstance(block, Moe) else block for block in spec.blocks)
    routers = sum((b.experts - b.top_k) * _routing(b, spec.hidden) for b in spec.blocks if isinstance(b, Moe))
    return _outside(spec) + _encoder(spec) + sum(block_parameters(block, spec.hidden) for block in blocks) + routers


def block_parameters(block: Kind, hidden: int) -> int:
    """Parameters of one mixer, the norm before it left out."""
    match block:
        case Attention():
            return _attention(block, hidden)
        case Mla():
            latent = block.kv_rank * (block.kv_width + 1) + block.q_rank * (block.query_width + 1)
            return hidden * (block.in_width + block.value_width) + latent
        case Gdn():
            per_head = 2 * block.value_heads + block.value_dim
            return hidden * (block.in_width + block.value_width) + block.conv_width * block.conv + per_head
        case Kda():
            return _kda(block, hidden)
        case Mamba2():
            conv = block.conv_width * (block.conv + block.conv_bias)
            return hidden * (block.in_width + block.inner) + conv + 3 * block.heads + block.inner * block.out_norm
        case Lightning():
            return 5 * hidden * block.width + block.width + block.heads
        case Mamba1():
            return _mamba1(block, hidden)
        case GatedConv():
            conv = block.width * (block.conv + 4 * block.bias) + hidden * block.bias
            return 4 * hidden * block.width + conv
        case Lru():
            gates = 2 * block.width * (block.block + 1)
            return 3 * hidden * block.width + block.width * (block.conv + 4) + gates + hidden
        case Mlp():
            return _ffn(hidden, block.width, block.glu) + block.bias * ((1 + block.glu) * block.width + hidden)
        case Moe():
            return _moe(block, hidden)
        case Cross():
            width = block.query_width + 2 * block.kv_width
            return hidden * (width + block.query_width) + block.bias * width + block.out_bias * hidden
        case Shared():
            return block_parameters(block.mixer, hidden) + hidden**2 + _adapters(block, hidden)
        case Parallel():
            return sum(block_parameters(part, hidden) for part in block.parts)


def _outside(spec: ModelSpec) -> int:
    """Embedding, head, norms, and what blocks share."""
    norm = _norm(spec)
    apart = sum(len(b.parts) - 1 for b in spec.blocks if isinstance(b, Parallel) and b.own_norms)
    norms = norm * (len(spec.blocks) + _twice(spec, spec.blocks) + 1 + apart)
    words = spec.vocab * (spec.hidden * (1 if spec.tied else 2) + spec.head_bias)
    return words + norms + _tables(spec, spec.blocks) + _shared_weights(spec)


def _twice(spec: ModelSpec, blocks: Sequence[Kind]) -> int:
    """How many blocks have a norm on either side."""
    return sum((b.norm_place or spec.norm_place) == "both" for b in blocks)


def _tables(spec: ModelSpec, blocks: Sequence[Kind]) -> int:
    """Learned positions and biases by distance, of a decoder or an encoder."""
    positions = spec.position_rows * spec.hidden * spec.learned_positions
    relative = relative_of(blocks)
    return positions + (relative[0].buckets * relative[1] if relative else 0)


def _encoder(spec: ModelSpec) -> int:
    """An encoder's blocks, norms and tables."""
    if spec.encoder is None:
        return 0
    blocks = spec.encoder.blocks
    norms = _norm(spec) * (len(blocks) + _twice(spec, blocks) + 1)
    return sum(block_parameters(b, spec.hidden) for b in blocks) + norms + _tables(spec, blocks)


def _norm(spec: ModelSpec) -> int:
    return spec.hidden * (2 if spec.norm == "layer" and spec.norm_bias else 1) * spec.norm_weight


def _attention(block: Attention, hidden: int) -> int:
    width = block.query_width * (2 if block.gate else 1) + 2 * block.kv_width
    biases = block.bias * width + block.out_bias * hidden
    norms = (block.q_norm_width + block.k_norm_width) * block.qk_norm
    return hidden * (width + block.query_width) + biases + norms + block.sinks * block.heads


def _kda(block: Kda, hidden: int) -> int:
    projections = hidden * (block.in_width + block.width)
    low_rank = 0 if block.full_rank else 2 * block.rank * block.width
    # A_log per head, dt_bias per channel, the output norm per head column.
    return projections + low_rank + 3 * block.width * block.conv + block.heads + block.width + block.head_dim


def _adapters(block: Shared, hidden: int) -> int:
    wide = {"attention_w_in": 2 * hidden, "mlp_w_in": hidden}
    return sum(rank * (len(sizes) * wide[name] + sum(sizes)) for name, (rank, sizes) in block.adapters.items())


def _shared_weights(spec: ModelSpec) -> int:
    """Every set of shared weights, once: attention reads twice the columns."""
    sets = {block.weights: block for block in spec.blocks if isinstance(block, Shared)}
    parts = ((block.attention, block.mlp) for block in sets.values())
    own = sum(block_parameters(part, spec.hidden) for pair in parts for part in pair)
    norm = _norm(spec)
    return own + sum(spec.hidden * (b.attention.query_width + 2 * b.attention.kv_width) + 3 * norm for b in sets.values())


def _mamba1(block: Mamba1, hidden: int) -> int:
    projections = 3 * hidden * block.width + block.width * (block.read_width + block.rank)
    conv = block.width * (block.conv + block.conv_bias)
    # A_log per state column, dt_bias and D per channel.
    own = block.width * (block.state + 2) + block.norms * block.read_width
    return projections + conv + own + block.bias * (2 * block.width + hidden)


def _ffn(hidden: int, width: int, glu: bool) -> int:
    return hidden * width * (3 if glu else 2)


def _routing(block: Moe, hidden: int) -> int:
    """What a router has for each expert."""
    return hidden + block.route_bias + block.router_bias


def _moe(block: Moe, hidden: int) -> int:
    router = block.experts * _routing(block, hidden)
    biases = block.experts * block.bias * (block.width * (2 if block.glu else 1) + hidden)
    shared = _ffn(hidden, block.shared_width, block.glu) + block.shared_gate * hidden
    return router + biases + block.experts * _ffn(hidden, block.width, block.glu) + shared
