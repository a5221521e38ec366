"""What a config comes to: a spec, and for each of its blocks the table that says where its parameters are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ir import parameters
from ...ir.sizes import value
from ..build import build
from ..parallel import Parallel, prefix
from ..sequence import Kind
from ..shared import Shared
from ..spec import ModelSpec, spec_of
from .config import Config
from .rules import Known, Rule, check_bijection, made_rule, read_rules


@dataclass(frozen=True)
class Placed:
    """One block: what it is, the prefix of its tensors in the file, and its table of rules."""

    kind: Kind
    source: str
    table: str
    parts: tuple[str, ...] = ()  # the tables of mixers side by side
    made: tuple[tuple[str, tuple[float, ...]], ...] = ()  # parameters that follow from the config, and no file has

    @property
    def mixers(self) -> tuple[Kind, ...]:
        return self.kind.parts if isinstance(self.kind, Parallel | Shared) else ()


@dataclass(frozen=True)
class Plan:
    """A spec and the way to its parameters."""

    spec: ModelSpec
    blocks: tuple[Placed, ...]
    outside: str
    prefix: str = "model."  # of every tensor but the head; files of a bare model leave it out
    other_prefix: str = "model."  # which some files have in its place
    derived: tuple[str, ...] = ()  # patterns of tensors that say nothing: tables the model makes itself
    renamed: tuple[tuple[str, str], ...] = ()  # prefixes that some files have, and what stands here for them
    encoder: tuple[Placed, ...] = ()  # its blocks
    copies: tuple[str, ...] = ()  # tensors that some files have beside the embedding, and that are it
    zeros: tuple[str, ...] = ()  # tensors that are zeros in files without them
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what is written, where not what was read


def make_plan(
    c: Config, blocks: Sequence[Placed], outside: str, *, prefix: str = "model.", derived: tuple[str, ...] = (), **fields: Any
) -> Plan:
    """Read what every config says, refuse what nobody has read, and make the spec."""
    said: dict[str, Any] = {
        "name": str(c.fields["model_type"]),
        "vocab": c.size("vocab_size"),
        "tied": c.flag("tie_word_embeddings"),
        "init_std": c.number("initializer_range", 0.02),
        "dtype": c.dtype(),
        "blocks": tuple(b.kind for b in blocks),
        **fields,
    }
    if "max_length" not in said:
        said["max_length"] = c.size("max_position_embeddings", 4096)
    c.finish()
    own = (r".*rotary_emb\.inv_freq", *derived)
    return Plan(spec_of(said, "config.json"), tuple(blocks), outside, prefix, derived=own)


def shapes_of(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by its name."""
    return {n: tuple(value(d.size, {}) for d in t.dims) for n, (t, _) in parameters(build(spec)).items()}


def map_of(plan: Plan, names: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Every parameter's rule, for a file with these names, and a check that they are a bijection."""
    shapes = shapes_of(plan.spec)
    own, known = sizes_of(plan.spec), Known(shapes, frozenset(names))
    rules = list(read_rules(plan.outside, own, known))
    for i, block in enumerate(plan.blocks):
        rules += [made_rule(f"layers.{i}.{name}", numbers) for name, numbers in block.made]
        rules += read_rules(block.table, {**own, **sizes_of(block.kind)}, known, f"layers.{i}.", block.source)
        for j, (part, table) in enumerate(zip(block.mixers, block.parts, strict=True)):
            rules += read_rules(table, {**own, **sizes_of(part)}, known, f"layers.{i}.{prefix(j)}", block.source)
    for i, block in enumerate(plan.encoder):
        rules += read_rules(block.table, {**own, **sizes_of(block.kind)}, known, f"encoder.{i}.", block.source)
    check_bijection(rules, shapes)
    return tuple(rules)


def sizes_of(record: Any) -> Mapping[str, int]:
    """The sizes of a spec or a kind, by name: its fields and what follows from them."""
    named = (n for of in type(record).__mro__ for n, p in vars(of).items() if isinstance(p, property) and n[0] != "_")
    names = [*type(record).model_fields, *named]
    return {n: getattr(record, n) for n in names if type(getattr(record, n)) is int}
