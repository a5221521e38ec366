"""What tells recurrence kernels apart, and the tile sizes that follow from head sizes and dtypes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CHUNK = 64  # tokens that are worked on together
WIDEST = 256  # channels of a key or value head
HALF = (torch.bfloat16, torch.float16)
FEW = 4  # tokens that a decode step takes at most
Tensor = torch.Tensor


@dataclass(frozen=True)
class Traits:
    """A member of the family as its kernels see it."""

    decay: str  # none, head or channel; a constant per head is a head's, with strides of zero
    delta: bool
    beta: bool
    packed: bool
    state: bool  # whether there is one to begin with
    keep: bool  # whether a backward follows

    @property
    def name(self) -> str:
        """`delta_head_decay_beta_packed`."""
        words = ["delta" if self.delta else "additive", "" if self.decay == "none" else f"{self.decay}_decay"]
        words += [word for word in ("beta", "packed", "state", "keep") if getattr(self, word)]
        return "_".join(w for w in words if w)


@dataclass(frozen=True)
class Tile:
    """How one function is launched."""

    key: int  # key channels of a program
    value: int  # value channels of a program
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """All tiles of a recurrence, and how it multiplies."""

    product: torch.dtype  # what matrix products multiply
    precision: str  # of products of float32
    solve: str  # of the products that invert
    wide: torch.dtype  # of sums of decays
    tiny: float  # betas nearer to zero are that: their gradient is divided by them
    gates: Tile
    prepare: Tile
    scan: Tile
    back: Tile
    pulls: Tile
    gradients: Tile
    decode: Tile


def config(dtype: torch.dtype, k: int, v: int, *, decay: str = "head", target: str = "sm_90") -> Config:
    """The tiles for head sizes k and v: those that compile without spills for a target; nothing is timed."""
    half, amd = dtype in HALF, target.startswith("gfx")
    key, value, channel = padded(k), padded(v), decay == "channel"
    part, lean = min(key, 64), half and key <= 128
    four = 4 if lean and target not in ("sm_80", "sm_100") else 8
    # Two chunks at a time where shared memory holds them: loads then come in while products run.
    tight = (amd and channel) or (key > 128 and (channel or amd or target == "sm_80"))
    scan = Tile(key, min(value, 32 if key <= 128 else 16), four, 1 if tight else 2)
    if target == "sm_80":  # HMMA's operands stand in registers
        part = min(key, 16 if channel else 32)
    return Config(
        dtype,
        "ieee" if half or amd else "tf32x3",
        "ieee" if amd else "tf32" if half else "tf32x3",
        torch.float32 if half else torch.float64,
        2.0**-14 if dtype == torch.float16 else 1e-20,
        gates=Tile(part, value, 4, 1),
        prepare=Tile(part, value, 8 if channel or not half else 4, 1),
        scan=scan,
        back=scan,
        pulls=Tile(key, min(value, 64), 4, 1),
        gradients=Tile(min(part, 32) if channel else part, min(value, 64), 8, 1),
        decode=Tile(key, min(value, 16), 4, 1),
    )


def padded(n: int) -> int:
    """The power of two that holds n channels; matrix products need 16."""
    return max(16, 1 << (n - 1).bit_length())
