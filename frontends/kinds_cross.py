"""What encoders and decoders have beside what every model has: a bias by distance, and attention to another sequence."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .record import Frozen, Positive, Size, Sublayer, bounded, default_to, divides


class Relative(Frozen):
    """A learned bias of attention's scores by the distance of key and query, one table for all layers of a stack."""

    buckets: Size = Field(default=32, description="rows of the table: half of them exact distances, the rest logarithmic")
    reach: Size = Field(default=128, description="distance from which all fall into the last bucket")

    def rules(self) -> list[str]:
        if self.buckets < 4 or self.buckets % 2:
            return [f"relative.buckets: is {self.buckets}; must be an even number, at least 4"]
        if self.reach <= self.buckets // 2:
            return [f"relative.reach: is {self.reach}; must be more than half of buckets = {self.buckets}"]
        return []


class Grouped(Sublayer):
    """Attention by heads, several of which may share keys and values."""

    heads: Size = Field(description="query heads")
    kv_heads: Size = Field(default=0, description="key/value heads; as many as heads unless given")
    head_dim: Size = Field(description="columns of a head")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, fields: object) -> object:
        return default_to(cls, fields, "kv_heads", "heads")

    @property
    def query_width(self) -> int:
        """Columns of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim


class Cross(Grouped):
    """Attention of a decoder's tokens to what its encoder made, without positions."""

    kind: Literal["cross"] = "cross"
    bias: bool = Field(default=False, description="bias on the query, key and value projections")
    out_bias: bool = Field(default=False, description="bias on the output projection")
    scale: Positive | None = Field(default=None, description="score multiplier; head_dim**-0.5 unless given")

    def rules(self) -> list[str]:
        lines = divides("kv_heads", self.kv_heads, "heads", self.heads)
        return lines + bounded("heads", "heads * head_dim", self.query_width) + bounded("kv_heads", "keys", 2 * self.kv_width)
