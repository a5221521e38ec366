"""Layer kinds whose state is a number, or a few, for every channel: Mamba-1, gated short convolutions, Griffin's unit."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .record import WAY, Act, Positive, RecurrenceWay, Size, Sublayer, at_most, bounded, divides


class Mamba1(Sublayer):
    """Mamba-1: a selective scan of its own for every channel, step, B and C read off the convolved input."""

    kind: Literal["mamba1"] = "mamba1"
    width: Size = Field(description="channels")
    state: Size = Field(description="state columns per channel")
    rank: Size = Field(description="columns that the channels' time steps come from")
    conv: Size = Field(default=4, le=64, description="taps of the short convolution")
    conv_bias: bool = Field(default=True, description="bias on the short convolution")
    bias: bool = Field(default=False, description="bias on the input and output projections")
    norms: bool = Field(default=False, description="RMS norms of what steps come from, of B and of C")
    dt_min: Positive = Field(default=0.001, description="smallest initial time step")
    dt_max: Positive = Field(default=0.1, description="largest initial time step")
    dt_floor: Positive = Field(default=0.0001, description="initial time steps are raised to this")
    cp: RecurrenceWay = Field(default="", description=WAY)

    def rules(self) -> list[str]:
        lines = at_most("dt_min", self.dt_min, "dt_max", self.dt_max)
        lines += bounded("rank", "rank + 2 * state", self.read_width)
        return lines + bounded("width", "2 * width", 2 * self.width)

    @property
    def read_width(self) -> int:
        """Columns that are read off the convolved input: step | B | C."""
        return self.rank + 2 * self.state


class GatedConv(Sublayer):
    """A short convolution between two gates, all three projected from the input."""

    kind: Literal["gated_conv"] = "gated_conv"
    width: Size = Field(description="channels")
    conv: Size = Field(default=3, le=64, description="taps of the short convolution")
    bias: bool = Field(default=False, description="bias on the convolution and on both projections")

    def rules(self) -> list[str]:
        return bounded("width", "3 * width", 3 * self.width)


class Lru(Sublayer):
    """Griffin's recurrent block: a short convolution, the real-gated linear recurrent unit (RG-LRU), and a gate beside them."""

    kind: Literal["lru"] = "lru"
    width: Size = Field(description="channels")
    heads: Size = Field(description="blocks of channels that gates are made within")
    conv: Size = Field(default=4, le=64, description="taps of the short convolution")
    act: Act = Field(default="gelu_tanh", description="activation of the gate beside the recurrence")
    sharpness: Positive = Field(default=8.0, description="the logarithm of a full decay is -sharpness softplus(parameter)")
    cp: RecurrenceWay = Field(default="", description=WAY)

    def rules(self) -> list[str]:
        return divides("heads", self.heads, "width", self.width) + bounded("width", "2 * width", 2 * self.width)

    @property
    def block(self) -> int:
        """Channels of a block."""
        return self.width // self.heads
