"""The block sequence of a spec: written out, as a pattern, or as a ratio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, ValidationError

from ..ir.errors import SpecError
from .kinds import Attention, Frozen, Gdn, Kda, Mamba2, Mla, Mlp, Moe
from .kinds_cross import Cross
from .kinds_lightning import Lightning
from .kinds_scan import GatedConv, Lru, Mamba1
from .parallel import Parallel
from .pattern import pattern_names
from .problems import MAX_PROBLEMS, PLAIN, explain, join, kind_problem, shown, suggest
from .shared import Shared

Kind = Attention | Gdn | Kda | Mamba2 | Mlp | Moe | Mla | Parallel | Mamba1 | GatedConv | Lru | Lightning | Shared | Cross
Block = Annotated[Kind, Field(discriminator="kind")]

KINDS: dict[str, type[Kind]] = {
    "attention": Attention,
    "gdn": Gdn,
    "kda": Kda,
    "mamba2": Mamba2,
    "mlp": Mlp,
    "moe": Moe,
    "mla": Mla,
    "parallel": Parallel,
    "mamba1": Mamba1,
    "gated_conv": GatedConv,
    "lru": Lru,
    "lightning": Lightning,
    "shared": Shared,
    "cross": Cross,
}
MAX_BLOCKS = 10_000
WAYS = ("blocks", "pattern", "ratio")
KEYS = (*WAYS, "kinds", *KINDS)


class Ratio(Frozen):
    """Mixers in turn, each followed by the feed-forward layer, `depth` times."""

    mixers: tuple[str, ...] = Field(strict=False, description="kind names, taken in turn")
    ffn: str = Field(default="", description="kind name of the feed-forward layer; none when absent")
    depth: int = Field(ge=1, le=MAX_BLOCKS // 2, description="number of mixers")

    def rules(self) -> list[str]:
        return [] if self.mixers else ["mixers: is empty; must name at least one kind"]

    def names(self) -> tuple[str, ...]:
        """The sequence this ratio stands for."""
        ffn = (self.ffn,) if self.ffn else ()
        return tuple(name for i in range(self.depth) for name in (self.mixers[i % len(self.mixers)], *ffn))


@dataclass
class Reading:
    """What has been understood of a spec so far, and what is wrong with it."""

    tables: dict[str, Kind | None] = field(default_factory=dict[str, Kind | None])
    problems: list[str] = field(default_factory=list[str])
    blocks: tuple[Kind, ...] = ()
    stages: tuple[int, ...] = ()


def read_sequence(fields: Mapping[str, Any]) -> Reading:
    """The blocks a spec asks for, with every problem found on the way."""
    reading = Reading()
    _read_tables(fields, reading)
    ways = [way for way in WAYS if way in fields]
    if len(ways) != 1:
        given = " and ".join(ways) or "none"
        reading.problems.append(f"blocks: {given} given; must be exactly one of blocks, pattern and ratio")
        return reading
    value = fields[ways[0]]
    match ways[0]:
        case "blocks":
            _read_blocks(value, reading)
        case "pattern":
            _read_pattern(value, reading)
        case _:
            _read_ratio(value, reading)
    return reading


def _read_tables(fields: Mapping[str, Any], reading: Reading) -> None:
    """[attention], [gdn], ... are named after their kind; [kinds.local] says its own."""
    for name in KINDS:
        if name in fields:
            _read_table(name, name, fields[name], name, reading)
    named = fields.get("kinds", {})
    if not isinstance(named, dict):
        reading.problems.append(f"kinds: is {shown(named)}; must be a table of named kinds, such as [kinds.local]")
        return
    entries: dict[Any, Any] = named
    for name, table in entries.items():
        path = join("kinds", name)
        if not isinstance(name, str) or not PLAIN.fullmatch(name):
            reading.problems.append(f"{path}: is no name; must be letters, digits, '_', '-' or '.', at most 60")
        elif name in reading.tables:
            reading.problems.append(f"{path}: is also the table [{name}]; must have a name of its own")
        else:
            _read_table(path, name, table, "", reading)
        if len(reading.problems) > MAX_PROBLEMS:
            return


def _read_table(path: str, name: str, table: object, kind: str, reading: Reading) -> None:
    block = _read_kind(path, table, kind, reading.problems)
    # A wrong table keeps its name, so that blocks naming it are not wrong as well.
    reading.tables[name] = block


def _read_kind(path: str, table: object, kind: str, problems: list[str]) -> Kind | None:
    """One table as a kind; `kind` is what its name already says."""
    if isinstance(table, Kind):
        return table
    if not isinstance(table, dict):
        problems.append(f"{path}: is {shown(table)}; must be a table")
        return None
    given: dict[Any, Any] = {"kind": kind, **table} if kind else table  # pyright: ignore[reportUnknownVariableType]
    said = given.get("kind")
    if kind and said != kind:
        problems.append(f"{path}.kind: is {shown(said)}; must be {kind!r} here; give another kind a name: [kinds.<name>]")
        return None
    if not isinstance(said, str) or said not in KINDS:
        problems.append(f"{path}.kind: {kind_problem(given, KINDS)}")
        return None
    try:
        return KINDS[said].model_validate(given)
    except ValidationError as error:
        problems.extend(explain(error, KINDS[said], path))
        return None


def _read_blocks(value: object, reading: Reading) -> None:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not 1 <= len(value) <= MAX_BLOCKS:  # pyright: ignore[reportUnknownArgumentType]
        text = f"is {shown(value)}; must be a list of 1 to {MAX_BLOCKS} names or tables with a kind"  # pyright: ignore[reportUnknownArgumentType]
        reading.problems.append(f"blocks: {text}")
        return
    items: Sequence[object] = value  # pyright: ignore[reportUnknownVariableType]
    unknown: set[str] = set()
    found: list[Kind | None] = []
    for i, item in enumerate(items):
        at = f"blocks.{i}"
        found.append(_named(at, item, unknown, reading) if isinstance(item, str) else _inline(at, item, reading))
        if len(reading.problems) > MAX_PROBLEMS:
            return
    _keep(found, reading)


def _inline(path: str, table: object, reading: Reading) -> Kind | None:
    return _read_kind(path, table, "", reading.problems)


def _read_pattern(value: object, reading: Reading) -> None:
    if not isinstance(value, str):
        reading.problems.append(f"pattern: is {shown(value)}; must be letters such as 'GEGEGE*E'")
        return
    try:
        names, reading.stages = pattern_names(value)
    except SpecError as error:
        reading.problems.append(str(error))
        return
    _keep(_lookup("pattern", names, reading), reading)


def _read_ratio(value: object, reading: Reading) -> None:
    if not isinstance(value, dict):
        reading.problems.append(f"ratio: is {shown(value)}; must be a table with mixers, ffn and depth")
        return
    try:
        ratio = Ratio.model_validate(value)
    except ValidationError as error:
        reading.problems.extend(explain(error, Ratio, "ratio"))
        return
    _keep(_lookup("ratio", ratio.names(), reading), reading)


def _lookup(path: str, names: Iterable[str], reading: Reading) -> list[Kind | None]:
    unknown: set[str] = set()
    return [_named(path, name, unknown, reading) for name in names]


def _named(path: str, name: str, unknown: set[str], reading: Reading) -> Kind | None:
    """The kind a name stands for; a name without a table is reported once."""
    if name not in reading.tables and name not in unknown:
        unknown.add(name)
        if name in KINDS:
            sizes = ", ".join(f for f, info in KINDS[name].model_fields.items() if info.is_required())
            text = f"{name!r} has no table; add [{name}] with {sizes}"
        else:
            text = f"{shown(name)} names no table; {suggest(name, reading.tables)}"
        reading.problems.append(f"{path}: {text}")
    return reading.tables.get(name)


def _keep(found: Sequence[Kind | None], reading: Reading) -> None:
    """Take the blocks if all of them are known."""
    blocks = tuple(block for block in found if block is not None)
    reading.blocks = blocks if len(blocks) == len(found) else ()
