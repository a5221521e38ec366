"""The smallest model with a spec's structure, on which passes are validated."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .encoder import Encoder
from .kinds import Attention, Gdn, Kda, Mamba2, Mla, Mlp, Moe
from .kinds_cross import Cross
from .kinds_lightning import Lightning
from .kinds_scan import GatedConv, Lru, Mamba1
from .parallel import Parallel
from .sequence import Kind
from .shared import Shared
from .spec import ModelSpec


def shrink(spec: ModelSpec) -> ModelSpec:
    """Same distinct kinds in the same order, at most two of each, every size small; choices and epsilons stay."""
    small: dict[str, Any] = {
        **_fields(spec),
        "vocab": min(spec.vocab, 61),
        "hidden": min(spec.hidden, 28),
        "max_length": min(spec.max_length, 128),
        "blocks": tuple(_small(block) for block in _representative(spec.blocks)),
        "stages": (),
        "encoder": spec.encoder and _encoder(spec.encoder),
    }
    return ModelSpec(**small)


def _encoder(encoder: Encoder) -> Encoder:
    vocab = {"start": min(encoder.start, 1), "pad": min(encoder.pad, 1)}
    return Encoder(blocks=tuple(_small(block) for block in _representative(encoder.blocks)), **vocab)


def _representative(blocks: tuple[Kind, ...]) -> tuple[Kind, ...]:
    """A prefix that has every distinct kind and a little more, without the third of any."""
    first = {block: i for i, block in reversed(list(enumerate(blocks)))}
    end = max(first.values()) + 1 + len(first)
    kept: list[Kind] = []
    seen: Counter[Kind] = Counter()
    for block in blocks[:end]:
        seen[block] += 1
        kept += [block] if seen[block] <= 2 else []
    return tuple(kept)


def _fields(record: ModelSpec | Kind) -> dict[str, Any]:
    return {name: getattr(record, name) for name in type(record).model_fields}


def _small(block: Kind) -> Kind:
    small: dict[str, Any]
    match block:
        case Attention():
            small = _attention(block)
        case Mla():
            small = _mla(block)
        case Gdn():
            small = _gdn(block)
        case Kda() | Lightning():
            small = {"heads": min(block.heads, 2), "head_dim": min(block.head_dim, 6)}
        case Mamba2():
            small = _mamba2(block)
        case Mamba1():
            small = {"width": min(block.width, 10), "state": min(block.state, 6), "rank": min(block.rank, 3)}
        case GatedConv():
            small = {"width": min(block.width, 12)}
        case Lru():
            small = {"heads": _two(block.heads), "width": _two(block.heads) * min(block.block, 6)}
        case Cross():
            kv_heads = _two(block.kv_heads)
            small = {"heads": kv_heads * _two(block.heads // block.kv_heads), "kv_heads": kv_heads}
            small["head_dim"] = min(block.head_dim, 6)
        case Mlp():
            small = {"width": min(block.width, 44)}
        case Moe():
            small = _moe(block)
        case Shared():
            ranks = {"attention_rank": min(block.attention_rank, 3), "mlp_rank": min(block.mlp_rank, 5)}
            small = {n: _small(getattr(block, n)) for n in ("attention", "mlp", "mixer")} | ranks
        case Parallel():
            small = {"parts": tuple(_small(part) for part in block.parts)}
    fields: dict[str, Any] = {**_fields(block), **small}
    return type(block)(**fields)


def _two(n: int) -> int:
    """A count or ratio of two where there is more than one."""
    return min(n, 2)


def _attention(block: Attention) -> dict[str, Any]:
    kv_heads = _two(block.kv_heads)
    heads = kv_heads * _two(block.heads // block.kv_heads)
    window = min(block.window, 7)
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": _head_dim(block), "window": window}


def _head_dim(block: Attention) -> int:
    """The least head of at least six columns of which rope rotates exactly its share, an even number."""
    share = block.rope.fraction if block.rope else 1.0
    fits = (n for n in range(6, block.head_dim) if (n * share).is_integer() and n * share % 2 == 0)
    return next(fits, block.head_dim) if block.rope else min(block.head_dim, 6)


def _mla(block: Mla) -> dict[str, Any]:
    ranks = {"kv_rank": min(block.kv_rank, 10), "q_rank": min(block.q_rank, 14)}
    dims = {"own_dim": min(block.own_dim, 6), "shared_dim": min(block.shared_dim, 4), "value_dim": min(block.value_dim, 10)}
    return {"heads": _two(block.heads), **ranks, **dims}


def _gdn(block: Gdn) -> dict[str, Any]:
    key_heads = _two(block.key_heads)
    value_heads = key_heads * _two(block.value_heads // block.key_heads)
    same = block.key_dim == block.value_dim
    value_dim = min(block.value_dim, 6 if same else 10)
    return {"key_heads": key_heads, "value_heads": value_heads, "key_dim": min(block.key_dim, 6), "value_dim": value_dim}


def _mamba2(block: Mamba2) -> dict[str, Any]:
    groups = _two(block.groups)
    heads = groups * _two(block.heads // block.groups)
    head_dim = min(block.head_dim, 6)
    norm_groups = groups if block.norm_groups == block.groups else _two(block.norm_groups)
    # An odd width cannot be normed in two groups.
    norm_groups = norm_groups if heads * head_dim % norm_groups == 0 else 1
    return {"heads": heads, "groups": groups, "head_dim": head_dim, "state": min(block.state, 10), "norm_groups": norm_groups}


def _moe(block: Moe) -> dict[str, Any]:
    groups = _two(block.groups)
    experts = min(block.experts, 4)
    limit = 1 if block.group_limit < block.groups else groups
    choices = experts // groups * limit
    return {
        "experts": experts,
        "groups": groups,
        "group_limit": limit,
        "top_k": min(block.top_k, 2, choices),
        "width": min(block.width, 20),
        "shared_width": min(block.shared_width, 12),
    }
