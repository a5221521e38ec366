"""Blocks whose weights several places of a model share, each place with a mixer and adapters of its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .kinds import Attention, Count, Gdn, Kda, Mamba2, Mlp, Sublayer
from .kinds_scan import Lru, Mamba1

Behind = Mamba2 | Mamba1 | Gdn | Kda | Lru | Mlp


class Shared(Sublayer):
    """mixer(norm(x + w s)), where s = mlp(norm(attention(norm([x | embeddings])))) has weights that other blocks use too."""

    kind: Literal["shared"] = "shared"
    weights: Count = Field(default=0, description="which of the model's sets of shared weights; each has its own number")
    attention: Attention = Field(description="attention of the shared weights, over twice the model's columns")
    mlp: Mlp = Field(description="feed-forward layer of the shared weights")
    mixer: Annotated[Behind, Field(discriminator="kind")] = Field(description="this block's own mixer")
    attention_rank: Count = Field(default=0, description="columns of adapters of queries, keys and values; 0 for none")
    mlp_rank: Count = Field(default=0, description="columns of the adapter of the feed-forward layer; 0 for none")

    def rules(self) -> list[str]:
        parts = {"attention": self.attention, "mlp": self.mlp, "mixer": self.mixer}
        bad = [n for n, part in parts.items() if part.norm_place or part.skip_scale != 1 or part.add_scale != 1]
        lines = [f"{n}: has a norm_place or a scale of its own; the block has them, not its parts" for n in bad]
        if self.attention_rank and self.attention.gate:
            lines.append(f"attention_rank: is {self.attention_rank}; must be 0 where attention has a gate")
        return lines

    @property
    def parts(self) -> tuple[Behind, ...]:
        """The mixers whose parameters are this block's own."""
        return (self.mixer,)

    @property
    def adapters(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """By the shared weight that it is added to: an adapter's rank, and the columns of its sections."""
        own = self.attention
        sections = (own.query_width, own.kv_width, own.kv_width)
        found = {
            "attention_w_in": (self.attention_rank, sections),
            "mlp_w_in": (self.mlp_rank, (self.mlp.width * (2 if self.mlp.glu else 1),)),
        }
        return {name: adapter for name, adapter in found.items() if adapter[0]}


def one_shape(blocks: tuple[object, ...]) -> list[str]:
    """The rule that blocks with the same weights mean the same by them."""
    first: dict[int, tuple[int, Shared]] = {}
    lines = list[str]()
    for i, block in enumerate(blocks):
        if isinstance(block, Shared):
            j, other = first.setdefault(block.weights, (i, block))
            if (block.attention, block.mlp) != (other.attention, other.mlp):
                lines.append(
                    f"blocks.{i}: shares weights {block.weights} with blocks.{j}; must have the same attention and mlp"
                )
    return lines
