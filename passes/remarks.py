"""Remarks: what a pass did, what it did not, and why."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = ("passed", "missed", "note")


@dataclass(frozen=True)
class Remark:
    """`fuse: missed norm-gate at layers.3.out_norm: the result of rms_norm is used elsewhere`."""

    kind: str  # passed, missed or note
    what: str  # the name of a fusion or rule; `require` asks for it
    where: str = ""  # the spec path
    why: str = ""
    by: str = ""  # the pass; the manager writes it

    def __str__(self) -> str:
        head = f"{self.by}: " if self.by else ""
        place = f" at {self.where}" if self.where else ""
        return f"{head}{self.kind} {self.what}{place}" + (f": {self.why}" if self.why else "")


def suggestion(name: str, known: Iterable[str]) -> str:
    """`did you mean fuse?`, or what there is."""
    listed = sorted(known)
    near = difflib.get_close_matches(name, listed, 1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(listed) or 'none'}"
