"""From a convolution's tensors to launches: sizes, strides, buffers, and how many programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..recurrent.source import Source
from .conv_source import ConvTraits, conv_source, spread_source, taps_source
from .run import Run, Step

Tensor = torch.Tensor
Maybe = Tensor | None

TOKENS, CHANNELS, WARPS = 16, 128, 4  # of a tile, whatever the sizes: rows of 16 bytes a thread, no registers spilled
MOST = 512  # programs that share out tokens for sums over them
TAPS = 8  # that a kernel has at most


@dataclass(frozen=True)
class Conv:
    """What all launches of a convolution share: x stands for whatever has its shape [b t c]."""

    x: Tensor
    taps: int
    cu: Maybe

    @property
    def count(self) -> int:
        """Segments."""
        return self.x.shape[0] if self.cu is None else self.cu.shape[0] - 1

    @property
    def rows(self) -> int:
        return self.x.shape[0] * self.x.shape[1]

    @property
    def columns(self) -> int:
        """Tiles side by side."""
        return -(-self.x.shape[2] // CHANNELS)

    @property
    def blocks(self) -> int:
        return -(-self.rows // TOKENS)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.count, self.x.shape[2], self.taps - 1

    @property
    def values(self) -> dict[str, Any]:
        """Arguments by name."""
        sizes = {"t": self.x.shape[1], "rows": self.rows, "C": self.x.shape[2], "K": self.taps, "BT": TOKENS, "BC": CHANNELS}
        return sizes if self.cu is None else {**sizes, **_segments(self.cu, self.rows)}


def _segments(cu: Tensor, rows: int) -> dict[str, Tensor]:
    """Borders, and each token's segment; borders that fall or lie outside do no harm."""
    borders = cu.to(torch.int64).clamp(0, rows).cummax(0).values
    of = torch.searchsorted(borders[1:].contiguous(), torch.arange(rows, device=cu.device), right=True)
    return {"p_cu": borders, "p_of": of.clamp(max=max(cu.shape[0] - 2, 0)).to(torch.int32)}


def rows_of(name: str, x: Tensor) -> dict[str, Any]:
    """The pointer and stride of x[b t c] with batch and tokens as one; strides are compiled in."""
    flat = x.flatten(0, 1)
    flat = flat if flat.stride(1) == 1 and flat.stride(0) > 0 else flat.contiguous()
    return {f"p_{name}": flat, f"s_{name}_t": flat.stride(0)}


def _go(run: Run, source: Source, name: str, programs: int, values: Mapping[str, Any]) -> None:
    if programs:
        function = source.functions[name]
        run(Step(source, function.name, programs, {a: values[a] for a in function.arguments}, WARPS, 1))


def _dense(x: Maybe) -> Maybe:
    return None if x is None else x.contiguous()


def forward(
    x: Tensor, w: Tensor, bias: Maybe, state: Maybe, cu: Maybe, run: Run, *, act: str = "none"
) -> tuple[Tensor, Tensor]:
    """y[b t c], and each segment's last inputs [n c k-1]."""
    call = Conv(x, w.shape[1], cu)
    source = conv_source(ConvTraits(act, bias is not None, state is not None, cu is not None))
    y, final = x.new_empty(x.shape), x.new_empty(call.state_shape)
    given = {"p_w": w.contiguous(), "p_bias": _dense(bias), "p_state": _dense(state), "p_y": y, "p_final": final}
    values = {**call.values, **rows_of("x", x), **given}
    _go(run, source, "conv", call.blocks * call.columns, values)
    _go(run, source, "final", call.count * call.columns * (call.taps > 1), values)
    return y, final


def taps(
    x: Tensor, g: Tensor, state: Maybe, cu: Maybe, run: Run, *, k: int, w: Maybe = None, bias: Maybe = None, act: str = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of taps [c k] and of the bias [c] in float32, and the cotangents of what was activated [b t c].

    Of what was not, these are g itself; `w` and `bias` serve to make again what was activated.
    """
    call = Conv(x, k, cu)
    source = taps_source(ConvTraits(act, bias is not None, state is not None, cu is not None))
    parts = max(1, min(call.blocks, MOST // call.columns))
    wide = 1 << k.bit_length()  # rows for the taps and the bias
    sums = x.new_empty((parts, wide, x.shape[2]), dtype=torch.float32)
    dz = g if act == "none" else x.new_empty(x.shape, dtype=torch.float32)
    given = {"p_w": _dense(w), "p_bias": _dense(bias), "p_state": _dense(state), "p_dz": dz, "p_sums": sums}
    values = {**call.values, **rows_of("x", x), **rows_of("g", g), **given, "parts": parts, "BK": wide}
    _go(run, source, "taps", parts * call.columns, values)
    added = sums.sum(0)
    return added[:k].t().contiguous(), added[k] if bias is not None else added[0], dz


def transposed(
    g: Tensor, w: Tensor, final: Maybe, cu: Maybe, run: Run, *, state: bool = True, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x[b t c] and, where it is asked for, the state's [n c k-1], from cotangents of results and of last inputs."""
    call = Conv(g, w.shape[1], cu)
    source = spread_source(ConvTraits("none", False, False, cu is not None, final is not None))
    dx, dstate = g.new_empty(g.shape, dtype=dtype or g.dtype), g.new_empty(call.state_shape if state else 0)
    given = {"p_w": w.contiguous(), "p_dfinal": _dense(final), "p_dx": dx, "p_dstate": dstate}
    values = {**call.values, **rows_of("g", g), **given}
    _go(run, source, "spread", call.blocks * call.columns, values)
    _go(run, source, "past", call.count * call.columns * (call.taps > 1) * state, values)
    return dx, dstate
