"""What tells recurrence kernels apart, and the tile sizes that follow from head sizes and dtypes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

WIDEST = 256  # channels of a key head: a program holds a state's rows whole
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
    output: bool = True  # whether more than the final state is asked for

    @property
    def name(self) -> str:
        """`delta_head_decay_beta_packed`."""
        words = ["delta" if self.delta else "additive", "" if self.decay == "none" else f"{self.decay}_decay"]
        words += [word for word in ("beta", "packed", "state", "keep") if getattr(self, word)]
        words += [] if self.output else ["final"]
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

    chunk: int  # tokens that are worked on together; the same on every target
    split: int  # parts of the key channels, whose products are added up
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
    key, value, channel = padded(k), padded(v), decay == "channel"
    made = _half(key, value, channel, target) if dtype in HALF else _full(key, value, channel, target)
    return replace(made, product=dtype, tiny=2.0**-14 if dtype == torch.float16 else 1e-20)


def _half(key: int, value: int, channel: bool, target: str) -> Config:
    """For products of half types: tensor cores take 64 tokens at once."""
    amd, part = target.startswith("gfx"), min(key, 64)
    four = 4 if key <= {"sm_90": 128, "gfx942": 64}.get(target, 0) else 8
    # Two chunks at a time where shared memory holds them: loads then come in while products run.
    tight = (amd and channel) or (key > 128 and (channel or amd or target == "sm_80"))
    scan = Tile(key, min(value, 32 if key <= 128 else 16), four, 1 if tight else 2)
    if target == "sm_80":  # HMMA's operands stand in registers
        part = min(key, 16 if channel else 32)
    return Config(
        chunk=64,
        split=1,
        product=torch.bfloat16,
        precision="ieee",
        solve="ieee" if amd else "tf32",
        wide=torch.float32,
        tiny=0.0,
        gates=Tile(part, value, 4, 1),
        prepare=Tile(part, value, 8 if channel else 4, 1),
        scan=scan,
        back=scan,
        pulls=Tile(key, min(value, 64), 4, 1),
        gradients=Tile(min(part, 32) if channel else part, min(value, 64), 8, 1),
        decode=Tile(key, min(value, 16), 4, 1),
    )


def _full(key: int, value: int, channel: bool, target: str) -> Config:
    """For products of float32, three of tf32 each where there are such: few tokens, whose operands registers hold."""
    amd, few = target.startswith("gfx"), channel or key > 128
    part, lanes = min(key, 32), min(value, 32)
    scan = Tile(key, min(value, 16), 8, 1)
    gradients = Tile(part, lanes, 8, 1) if few else Tile(min(key, 64), lanes, 8, 1)
    if target == "sm_100" and not few:
        gradients = Tile(16, lanes, 4, 1)
    return Config(
        chunk=16 if few else 32,
        split=key // 16,
        product=torch.float32,
        precision="ieee" if amd else "tf32x3",
        solve="ieee" if amd else "tf32x3",
        wide=torch.float64,
        tiny=0.0,
        gates=Tile(part, value, 4, 1),
        prepare=Tile(part, value, 4 if key > 128 and not channel else 8, 1),
        scan=scan,
        back=scan,
        pulls=Tile(key, lanes, 4, 1),
        gradients=gradients,
        decode=Tile(key, min(value, 16), 4, 1),
    )


def unfit(dtype: torch.dtype, k: int, v: int) -> str:
    """Why products in a dtype, or heads of k and v channels, have no generated kernel; empty where they have one."""
    if dtype not in (*HALF, torch.float32):
        return f"products of {str(dtype)[6:]} are no tensor core's; cuBLAS takes them"
    if not 0 < k <= WIDEST or v < 1:
        return f"keys of {k} and values of {v} channels; a program takes keys of 1 to {WIDEST}"
    return ""


def padded(n: int) -> int:
    """The power of two that holds n channels; matrix products need 16."""
    return max(16, 1 << (n - 1).bit_length())
