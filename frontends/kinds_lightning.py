"""Lightning attention, as a spec says it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .record import WAY, Act, Positive, RecurrenceWay, Size, Sublayer, bounded


class Lightning(Sublayer):
    """Linear attention with one constant decay per head, a norm of all heads, and a sigmoid gate."""

    kind: Literal["lightning"] = "lightning"
    heads: Size = Field(description="heads of query, key and value alike")
    head_dim: Size = Field(description="columns of a head")
    act: Act = Field(default="silu", description="activation of queries, keys and values")
    out_eps: Positive = Field(default=1e-6, le=1.0, description="epsilon of the output norm")
    cp: RecurrenceWay = Field(default="", description=WAY)

    def rules(self) -> list[str]:
        return bounded("heads", "the input projection", 4 * self.width)

    @property
    def width(self) -> int:
        """Columns of the query, the key, the value and the gate."""
        return self.heads * self.head_dim
