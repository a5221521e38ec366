"""The encoder of a model that has one: blocks that see a whole sequence, which the decoder's cross attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from .kinds import Attention, Count, Frozen, Mlp
from .kinds_cross import Cross, Relative
from .sequence import MAX_BLOCKS, Block, Kind


class Encoder(Frozen):
    """Blocks over another sequence of tokens, with the model's embedding and norms, and a final norm of their own."""

    blocks: tuple[Block, ...] = Field(strict=False, description="the resolved sequence; attention that is not causal, and mlp")
    start: Count = Field(default=0, description="token that decoding starts with")
    pad: Count = Field(default=0, description="token that the decoder reads where a label is none")

    def rules(self) -> list[str]:
        if not 1 <= len(self.blocks) <= MAX_BLOCKS:
            return [f"blocks: has {len(self.blocks)}; must have 1 to {MAX_BLOCKS}"]
        lines = list[str]()
        for i, block in enumerate(self.blocks):
            if not isinstance(block, Attention | Mlp):
                lines.append(f"blocks.{i}: is of kind {block.kind}; must be attention or mlp in an encoder")
            elif isinstance(block, Attention) and (block.causal or block.window or block.sinks or block.softcap):
                lines.append(f"blocks.{i}: must have causal = false, and no window, sinks or softcap, in an encoder")
        return lines


def relative_of(blocks: Sequence[Kind]) -> tuple[Relative, int] | None:
    """The bias that a stack's attention shares, and the heads it has; none where there is none."""
    found = ((b.relative, b.heads) for b in blocks if isinstance(b, Attention) and b.relative)
    return next(found, None)  # type: ignore[arg-type] # not none, as has been seen


def stacks_agree(blocks: Sequence[Kind], encoder: Any) -> list[str]:
    """What is wrong between a decoder, its encoder, and the tables that each of them shares."""
    lines = list[str]()
    for where, stack in (("blocks", blocks), ("encoder.blocks", encoder.blocks if encoder else ())):
        tables = {(b.relative, b.heads) for b in stack if isinstance(b, Attention) and b.relative}
        if len(tables) > 1:
            lines.append(f"{where}: have {len(tables)} different tables of relative bias; all attention of a stack shares one")
    crossing = [i for i, b in enumerate(blocks) if isinstance(b, Cross)]
    if crossing and not encoder:
        lines.append(f"blocks.{crossing[0]}: is cross attention; must stand in a model with an encoder")
    if encoder and not crossing:
        lines.append("encoder: is read by no block; the decoder must have one of kind cross")
    return lines
