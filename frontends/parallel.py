"""Mixers side by side: a block that adds up what several of them make of the same input."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .kinds import Attention, Gdn, Kda, Mamba2, Mla, Mlp, Sublayer

Part = Attention | Mla | Gdn | Kda | Mamba2 | Mlp


class Parallel(Sublayer):
    """A weighted sum of mixers over one norm, or each over a norm of its own."""

    kind: Literal["parallel"] = "parallel"
    parts: tuple[Annotated[Part, Field(discriminator="kind")], ...] = Field(strict=False, description="the mixers")
    scales: tuple[float, ...] = Field(default=(), strict=False, description="what each mixer's result is multiplied by")
    own_norms: bool = Field(default=False, description="every mixer has a norm of its own")

    def rules(self) -> list[str]:
        lines = [] if 1 <= len(self.parts) <= 9 else [f"parts: has {len(self.parts)}; must have 1 to 9"]
        if self.scales and len(self.scales) != len(self.parts):
            lines.append(f"scales: has {len(self.scales)}; must have one for each of {len(self.parts)} parts")
        for i, part in enumerate(self.parts):
            if part.norm_place or part.skip_scale != 1 or part.add_scale != 1:
                lines.append(f"parts.{i}: has a norm_place or a scale of its own; the block has them, not its parts")
        return lines

    @property
    def rope(self) -> bool:
        """Whether a part reads positions."""
        return any(isinstance(part, Attention | Mla) and part.rope for part in self.parts)

    @property
    def mixes(self) -> bool:
        """Whether a part sees other tokens."""
        return any(not isinstance(part, Mlp) for part in self.parts)


def prefix(i: int) -> str:
    """What the parameters of a part are called after."""
    return f"part{i}_"
