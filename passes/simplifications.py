"""Identities, as rules: what stands on the left is what stands on the right."""

from __future__ import annotations

from ..ir import TensorType, Value
from .match import Match
from .rewrite import Rule
from .structure import mirrored, orderly


def _type(found: Match, name: str) -> TensorType:
    value: Value = found.values[name]
    return value.type


def _same_type(found: Match) -> bool:
    return _type(found, "x") == _type(found, "y")


def _reshape_does_nothing(found: Match) -> bool:
    return _same_type(found) and orderly(found.attrs["p"])


def _reshapes_cancel(found: Match) -> bool:
    """Both only regroup dims, or the second is the first read backwards."""
    p, q = found.attrs["p"], found.attrs["q"]
    return _same_type(found) and ((orderly(p) and orderly(q)) or mirrored(p, q))


def _is_one_part(found: Match) -> bool:
    return len(found.attrs["z"]) == 1


def _orders_meet(found: Match) -> bool:
    return found.attrs["o"] == found.attrs["w"]


def _lifts_nothing(found: Match) -> bool:
    """What is clamped is never below `low`, and there is no upper limit."""
    return found.attrs["low"] <= 0.0 and found.attrs["high"] == float("inf")


SCALE_BY_ONE = Rule.of("scale-by-one", "y = scale(x, by=1.0)", "x")
RESHAPE_NOTHING = Rule.of("reshape-nothing", "y = reshape(x, pattern=p)", "x", _reshape_does_nothing)
RESHAPE_BACK = Rule.of("reshape-back", "a = reshape(x, pattern=p)\ny = reshape(a, pattern=q)", "x", _reshapes_cancel)
CAST_TO_SAME = Rule.of("cast-to-same", "y = cast(x, dtype=d)", "x", _same_type)
CAST_BACK = Rule.of("cast-back", "a = widen(x)\ny = cast(a, dtype=d)", "x", _same_type)
WIDEN_WIDE = Rule.of("widen-wide", "y = widen(x)", "x", _same_type)
NO_DROPOUT = Rule.of("no-dropout", "y = dropout(x, seed, p=0.0)", "x")
SPLIT_ONE = Rule.of("split-one", "y = split(x, sizes=z)", "x", _is_one_part)
CONCAT_SPLIT = Rule.of("concat-split", "a, b = split(x, sizes=z)\ny = concat(a, b)", "x", _same_type)
SPLIT_CONCAT = Rule.of(
    "split-concat",
    "c = concat(x, y)\na, b = split(c, sizes=z)",
    "x, y",
    lambda m: _type(m, "x") == _type(m, "a") and _type(m, "y") == _type(m, "b"),
)
CLAMP_SOFTPLUS = Rule.of("clamp-softplus", "s = softplus(x)\ny = clamp(s, low=low, high=high)", "s", _lifts_nothing)
REORDER_NOTHING = Rule.of("reorder-nothing", "y = reorder(x, order=o, was=w)", "x", _orders_meet)
REORDER_BACK = Rule.of("reorder-back", "a = reorder(x, dim=i, order=o, was=w)\ny = reorder(a, dim=i, order=w, was=o)", "x")
REORDER_TWICE = Rule.of(
    "reorder-twice",
    "a = reorder(x, dim=i, order=o, was=w)\ny = reorder(a, dim=i, order=z, was=o)",
    "y = reorder(x, dim=i, order=z, was=w)",
)
GATHER_SHARD = Rule.of("gather-shard", "a = shard(x, axis=m, dim=i)\ny = all_gather(a, axis=m, dim=i)", "x", _same_type)
SHARD_GATHER = Rule.of("shard-gather", "a = all_gather(x, axis=m, dim=i)\ny = shard(a, axis=m, dim=i)", "x", _same_type)
EXCHANGE_BACK = Rule.of(
    "exchange-back", "a = all_to_all(x, axis=m, src=i, dst=j)\ny = all_to_all(a, axis=m, src=j, dst=i)", "x", _same_type
)

RULES = (
    SCALE_BY_ONE, RESHAPE_NOTHING, RESHAPE_BACK, CAST_TO_SAME, CAST_BACK, WIDEN_WIDE, NO_DROPOUT, SPLIT_ONE, CONCAT_SPLIT,
    SPLIT_CONCAT, CLAMP_SOFTPLUS, REORDER_NOTHING, REORDER_BACK, REORDER_TWICE, GATHER_SHARD, SHARD_GATHER, EXCHANGE_BACK,
)  # fmt: skip
