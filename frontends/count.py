"""How many parameters a spec has, by formula: every tensor a checkpoint of it holds."""

from __future__ import annotations

from .kinds import Attention, Gdn, Kda, Mamba2, Mla, Mlp, Moe
from .parallel import Parallel
from .sequence import Kind
from .spec import ModelSpec


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the whole model."""
    return _outside(spec) + sum(block_parameters(block, spec.hidden) for block in spec.blocks)


def active_parameter_count(spec: ModelSpec) -> int:
    """Parameters that one token meets: of the routed experts only its top_k."""
    blocks = (block.model_copy(update={"experts": block.top_k}) if isinstance(block, Moe) else block for block in spec.blocks)
    routers = sum((b.experts - b.top_k) * (spec.hidden + b.route_bias) for b in spec.blocks if isinstance(b, Moe))
    return _outside(spec) + sum(block_parameters(block, spec.hidden) for block in blocks) + routers


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
        case Mlp():
            return _ffn(hidden, block.width, block.glu) + block.bias * ((1 + block.glu) * block.width + hidden)
        case Moe():
            return _moe(block, hidden)
        case Parallel():
            return sum(block_parameters(part, hidden) for part in block.parts)


def _outside(spec: ModelSpec) -> int:
    """Embedding, head and norms."""
    norm = spec.hidden * (2 if spec.norm == "layer" and spec.norm_bias else 1)
    apart = sum(len(b.parts) - 1 for b in spec.blocks if isinstance(b, Parallel) and b.own_norms)
    norms = norm * (len(spec.blocks) * (2 if spec.norm_place == "both" else 1) + 1 + apart)
    positions = spec.max_length * spec.hidden * spec.learned_positions
    return spec.vocab * spec.hidden * (1 if spec.tied else 2) + norms + positions


def _attention(block: Attention, hidden: int) -> int:
    width = block.query_width * (2 if block.gate else 1) + 2 * block.kv_width
    biases = block.bias * width + block.out_bias * hidden
    norms = (block.q_norm_width + block.k_norm_width) * block.qk_norm
    return hidden * (width + block.query_width) + biases + norms + block.sinks * block.heads


def _kda(block: Kda, hidden: int) -> int:
    projections = hidden * (4 * block.width + block.heads)
    low_rank = 2 * block.head_dim * (hidden + block.width)
    # A_log per head, dt_bias per channel, the output norm per head column.
    return projections + low_rank + 3 * block.width * block.conv + block.heads + block.width + block.head_dim


def _ffn(hidden: int, width: int, glu: bool) -> int:
    return hidden * width * (3 if glu else 2)


def _moe(block: Moe, hidden: int) -> int:
    router = block.experts * (hidden + block.route_bias)
    shared = _ffn(hidden, block.shared_width, block.glu) + block.shared_gate * hidden
    return router + block.experts * _ffn(hidden, block.width, block.glu) + shared
