"""What tells attention kernels apart, and the tile sizes that follow from head sizes and dtypes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..gpu.tuned import tuned

HALF = (torch.bfloat16, torch.float16)
# Channels of a key or value head. Of float32 operands registers hold twice as many numbers: what is lost by rounding, too.
WIDEST = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 64}
FEW = 64  # queries times heads of a group up to which a step is split over its keys
SPLITS = 64  # parts that a step's keys are split into at most
Tensor = torch.Tensor


@dataclass(frozen=True)
class Traits:
    """An attention as its kernels see it."""

    causal: bool
    window: bool
    softcap: bool
    sinks: bool
    packed: bool
    at: bool  # whether the first query's place is data

    @property
    def name(self) -> str:
        """`causal_window_softcap`."""
        words = ["causal" if self.causal else "open"]
        return "_".join([*words, *(w for w in ("window", "softcap", "sinks", "packed", "at") if getattr(self, w))])


@dataclass(frozen=True)
class Tile:
    """How one function is launched."""

    queries: int  # queries of a block; rows of a step
    keys: int  # keys of a block
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """All tiles of an attention, and how it multiplies."""

    product: torch.dtype  # what matrix products multiply
    precision: str  # of products of float32
    attend: Tile
    queries: Tile  # of the gradient of queries
    keys: Tile  # of the gradient of keys
    values: Tile  # of the gradient of values
    split: Tile
    join: Tile


# What compiles without spills, with every option at once and with a cache alone, by the wider head's channels: queries, keys,
# warps, stages. On sm_80 operands of products stand in registers, on sm_100 sums move between them and tensor memory, and
# gfx942 has 64 KiB to share.
_TILES: Mapping[str, Mapping[str, Mapping[int, tuple[int, int, int, int]]]] = {
    "sm_80": {
        "attend": {64: (128, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
        "queries": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 64, 8, 2)},
        "keys": {64: (64, 64, 4, 1), 128: (32, 64, 4, 2), 256: (32, 64, 8, 2)},
        "values": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 2)},
        "split": {64: (16, 128, 4, 3), 128: (16, 64, 4, 3), 256: (16, 64, 8, 2)},
    },
    "sm_90": {
        "attend": {64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
        "queries": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
        "keys": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2)},
        "values": {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 128, 8, 2)},
        "split": {64: (16, 128, 4, 3), 128: (16, 64, 4, 3), 256: (16, 64, 4, 2)},
    },
    "sm_100": {
        "attend": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
        "queries": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
        "keys": {64: (64, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 64, 8, 1)},
        "values": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (16, 64, 8, 2)},
        "split": {64: (16, 128, 4, 3), 128: (16, 64, 4, 3), 256: (16, 64, 4, 3)},
    },
    "gfx942": {
        "attend": {64: (128, 64, 8, 1), 128: (64, 64, 8, 1), 256: (64, 32, 8, 1)},
        "queries": {64: (64, 64, 8, 1), 128: (64, 64, 8, 1), 256: (64, 32, 8, 1)},
        "keys": {64: (64, 64, 8, 1), 128: (32, 64, 8, 1), 256: (32, 64, 8, 1)},
        "values": {64: (64, 64, 8, 1), 128: (32, 64, 8, 1), 256: (32, 64, 8, 1)},
        "split": {64: (16, 64, 8, 1), 128: (16, 64, 8, 1), 256: (16, 64, 8, 1)},
    },
}


# The same for float32 and heads of up to 64 channels. Its products are three of tf32 each, on gfx942 exact ones.
_FULL: Mapping[str, Mapping[str, tuple[int, int, int, int]]] = {
    "sm_80": {
        "attend": (32, 32, 8, 1),
        "queries": (32, 32, 8, 1),
        "keys": (64, 32, 8, 1),
        "values": (32, 64, 8, 1),
        "split": (16, 64, 8, 1),
    },
    "sm_90": {
        "attend": (128, 64, 8, 1),
        "queries": (128, 64, 8, 1),
        "keys": (32, 64, 8, 1),
        "values": (32, 64, 8, 1),
        "split": (16, 64, 4, 1),
    },
    "sm_100": {
        "attend": (128, 32, 8, 1),
        "queries": (64, 32, 8, 1),
        "keys": (32, 64, 8, 1),
        "values": (64, 64, 8, 1),
        "split": (16, 128, 8, 1),
    },
    "gfx942": {
        "attend": (128, 64, 8, 1),
        "queries": (128, 64, 8, 1),
        "keys": (64, 64, 8, 1),
        "values": (64, 64, 8, 1),
        "split": (16, 128, 8, 1),
    },
}


def config(dtype: torch.dtype, d: int, e: int, *, rows: int = 16, target: str = "sm_90") -> Config:
    """The tiles for key heads of d, value heads of e channels and so many rows of a step: tuned ones, where there are."""
    half, width = dtype in HALF, max(64, padded(d), padded(e))
    known = {name: widths[width] for name, widths in _TILES[target].items()} if half else _FULL[target]
    kind = f"{str(dtype)[6:]} {width}"
    tiles = {name: tuned(target, f"attention {name} {kind}", Tile(*sizes)) for name, sizes in known.items()}
    tiles["split"] = replace(tiles["split"], queries=padded(rows))
    exact = half or target.startswith("gfx")
    return Config(dtype, "ieee" if exact else "tf32x3", **tiles, join=Tile(1, SPLITS, 4, 1))


def padded(n: int) -> int:
    """The power of two that holds n; matrix products need 16."""
    return max(16, 1 << (n - 1).bit_length())
