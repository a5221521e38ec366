"""What tells recurrence kernels apart, and the tile sizes that follow from head sizes and dtypes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch

from ...ir import PlaitError
from ..gpu.tuned import place, tuned

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
class Keys:
    """What is open where value channels are not seen in parts."""

    key: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Values:
    """What is open where a state's rows stand whole."""

    value: int
    warps: int
    stages: int


OPEN: Mapping[str, type[Keys | Values | Tile]] = {
    **dict.fromkeys(("gates", "prepare"), Keys),
    **dict.fromkeys(("scan", "back", "pulls", "decode"), Values),
    "gradients": Tile,
}


@dataclass(frozen=True)
class Config:
    """All tiles of a recurrence, and how it multiplies."""

    chunk: int  # tokens that are worked on together; the same on every target
    split: int  # parts of the key channels, whose products are added up
    product: torch.dtype  # what matrix products multiply
    inner: torch.dtype  # and those within a chunk
    early: bool  # whether beta's gradient is made where what it reads is not rounded yet
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


def config(dtype: torch.dtype, k: int, v: int, *, decay: str = "head", delta: bool = True, target: str = "sm_90") -> Config:
    """The tiles for head sizes k and v: those that compile without spills for a target; nothing is timed."""
    key, value, channel = padded(k), padded(v), decay == "channel"
    made = _half(key, value, channel, target) if dtype in HALF else _full(key, value, channel, target)
    # Keys that decay channel by channel are rounded at every halving of a chunk, unless registers hold them whole.
    inner = torch.float32 if channel and not delta else dtype
    return replace(made, product=dtype, inner=inner, tiny=2.0**-14 if dtype == torch.float16 else 1e-20)


def measured(made: Config, function: str, traits: Traits, k: int, v: int, target: str) -> Tile:
    """How a function is launched: as was measured for such heads on a target, else as `config` says.

    The key holds no length; what a state to begin with, borders or a backward add to the code is measured with the rest.
    """
    default: Tile = getattr(made, function)
    kind = f"{'delta' if traits.delta else 'additive'} {traits.decay}"
    key = f"{function} {kind} {str(made.product)[6:]} k{k} v{v}"
    fields = asdict(default)
    free = OPEN[function]
    found = asdict(tuned(target, key, free(**{n: fields[n] for n in free.__dataclass_fields__})))
    if wrong := [n for n in found if n != "stages" and found[n] & (found[n] - 1)]:
        must = "it must be a power of two; delete the entry, tune again"
        raise PlaitError(f"{place()}: {key}: {wrong[0]} is {found[wrong[0]]}; {must}")
    return replace(default, **found)


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
        inner=torch.bfloat16,
        early=not (target == "sm_100" and channel and key > 128),
        precision="ieee",
        solve="ieee" if amd else "tf32",
        wide=torch.float32,
        tiny=0.0,
        gates=Tile(part, value, 4, 1),
        prepare=Tile(part, value, 8 if channel else 4, 1),
        scan=scan,
        back=scan,
        pulls=Tile(key, min(value, 32 if target == "sm_80" and value > 128 else 64), 4, 1),
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
        inner=torch.float32,
        early=False,
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
