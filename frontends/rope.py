"""Rotary positions, as a spec says them."""

from __future__ import annotations

from pydantic import Field

from .record import Frozen, NotNegative, Positive, Size


class RopeScaling(Frozen):
    """Llama 3 frequency scaling for contexts longer than the original."""

    factor: Positive = Field(description="how much longer the context becomes")
    low: Positive = Field(default=1.0, description="wavelengths above original / low are stretched in full")
    high: Positive = Field(default=4.0, description="wavelengths below original / high are kept")
    original: Size = Field(description="context length before scaling")

    def rules(self) -> list[str]:
        return [] if self.low < self.high else [f"low: is {self.low}; must be less than high = {self.high}"]


class RopeRamp(Frozen):
    """YaRN's frequency scaling: pairs up to `low` turn as they did, from `high` on slower, those between by a ramp."""

    factor: Positive = Field(description="how much slower the slow pairs turn")
    low: NotNegative = Field(description="pair where the ramp begins")
    high: Positive = Field(description="pair where it ends")

    def rules(self) -> list[str]:
        return [] if self.low < self.high else [f"low: is {self.low}; must be less than high = {self.high}"]


class RopeFar(Frozen):
    """Frequencies of texts longer than the original context: other divisors, or a base that grows with the text."""

    length: Size = Field(description="tokens of the original context")
    divisors: tuple[Positive, ...] = Field(default=(), strict=False, description="what each pair's frequency is divided by")
    factor: Positive | None = Field(default=None, description="how much longer the context becomes, by a larger base")

    def rules(self) -> list[str]:
        if (self.factor is None) == (not self.divisors):
            return ["factor: must be given where divisors are not, and only there"]
        return []


class Rope(Frozen):
    """Rotary position embedding."""

    theta: Positive = Field(default=10000.0, description="base of the frequencies")
    fraction: float = Field(default=1.0, gt=0, le=1, description="share of each head's columns that is rotated")
    interleaved: bool = Field(default=False, description="pairs are neighbours (0,1) instead of halves (0,d/2)")
    scaling: RopeScaling | None = Field(default=None, description="Llama 3 frequency scaling")
    ramp: RopeRamp | None = Field(default=None, description="YaRN frequency scaling")
    divisors: tuple[Positive, ...] = Field(default=(), strict=False, description="what each pair's frequency is divided by")
    far: RopeFar | None = Field(default=None, description="other frequencies for texts beyond a length")
    amplitude: Positive = Field(default=1.0, description="what is rotated is multiplied by this")
    rounded: bool = Field(default=False, description="frequencies are float32 numbers, as in the tables of published models")

    def rules(self) -> list[str]:
        given = [name for name in ("scaling", "ramp", "divisors") if getattr(self, name)]
        return [f"{given[1]}: is given beside {given[0]}; must be one way of scaling"] if len(given) > 1 else []


def divided(rope: Rope | None, rotated: int) -> list[str]:
    """The rule that every pair has its divisor, where there are any."""
    tables = {"divisors": rope.divisors, "far.divisors": rope.far.divisors if rope.far else ()} if rope else {}
    must = f"must have one for each of {rotated // 2} pairs"
    lines = [f"rope.{name}: has {len(t)}; {must}" for name, t in tables.items() if len(t) not in (0, rotated // 2)]
    if rope and rope.far and rope.far.factor and rotated < 4:
        lines.append(f"rope.far.factor: grows the base of {rotated} rotated columns; must be at least 4 of them")
    return lines
