"""Remarks: what a pass did, what it did not, and why."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..ir import PassError

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


def check_required(require: Iterable[str], remarks: Sequence[Remark]) -> None:
    """Refuse a build in which something required did not fire, with the reasons that were given."""
    fired = {r.what for r in remarks if r.kind == "passed"}
    for name in require:
        if name in fired:
            continue
        reasons = "; ".join(f"{r.where or r.by}: {r.why}" for r in remarks if r.what == name and r.why)
        raise PassError(f"{name} is required and did not fire; {reasons or 'no pass looked for it'}")
