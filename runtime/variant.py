"""Which program of a model is wanted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """Which program of a model is wanted."""

    # logits, loss, or with state in and out: cached (rows equally long), rows (each its own length), paged (and in pages)
    task: str = "logits"
    packed: bool = False
    training: bool = False
    last: bool = False  # of programs with state: logits behind each row's last token alone
