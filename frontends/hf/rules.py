"""Where parameters come from, as data: each is rows of a file's tensors, and the way back is read off the same line.

    w_in = self_attn.q_proj.weight[query_width hidden] self_attn.k_proj.weight[kv_width hidden] ...

A line names a parameter and the tensors whose rows stand behind one another in it, with their shapes in sizes of the spec.
`.T` behind a shape is a matrix stored transposed, `.V` a vector of rows for each expert; `{heads: head_dim head_dim}` are rows
that come head by head, two sections in each, and stand section by section in the parameter. A name with `{e}` is there once
for every expert. Where a parameter has several lines, files differ: the line counts whose tensors a file has, and the first
where weights are written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate

import torch

from ...ir.errors import CheckpointError

Tensor = torch.Tensor
_SOURCE = re.compile(
    r"(?P<name>[\w.{}]+?)\[(?P<shape>[^\]]*)\](?P<turn>\.[TV])?(?:\{(?P<groups>[^:}]+):(?P<widths>[^}]+)\})?\s*"
)


@dataclass(frozen=True)
class Part:
    """One tensor of a file: its name and shape there, and how its rows are stored."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    vectors: bool = False
    groups: int = 1
    widths: tuple[int, ...] = ()

    def rows(self, stored: Tensor) -> Tensor:
        """As it stands in the parameter."""
        x = stored.mT if self.transposed else stored
        if not self.widths:
            return x
        x = x.unsqueeze(-1) if self.vectors else x
        made = self._by_section(x)
        return made.squeeze(-1) if self.vectors else made

    def _by_section(self, x: Tensor) -> Tensor:
        """Rows that came group by group."""
        sections = x.unflatten(_row_dim(x), (self.groups, -1)).split(self.widths, _row_dim(x) + 1)
        return torch.cat([s.flatten(_row_dim(x), _row_dim(x) + 1) for s in sections], _row_dim(x))

    def stored(self, rows: Tensor) -> Tensor:
        """What `rows` undoes."""
        if self.widths:
            rows = rows.unsqueeze(-1) if self.vectors else rows
            at = _row_dim(rows)
            sections = rows.split([self.groups * w for w in self.widths], at)
            rows = torch.cat([s.unflatten(at, (self.groups, -1)) for s in sections], at + 1).flatten(at, at + 1)
        return (rows.mT if self.transposed else rows).reshape(self.shape)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape


@dataclass(frozen=True)
class Rule:
    """A parameter: its name and shape, and the parts whose rows it holds, in order."""

    target: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    made: tuple[float, ...] = ()  # its numbers, where no tensor has them

    @property
    def dim(self) -> int:
        """Along which parts stand behind one another: the rows of each expert where parts are stacked."""
        return 1 if len(self.shape) == 3 and len(self.parts[0].shape) == 3 else 0

    def assemble(self, take: Callable[[str], Tensor], done: Callable[[str], None] = lambda name: None) -> Tensor:
        """The parameter, out of the file's tensors; `done` hears of each that is copied, which then need not be held."""
        if self.made:
            return torch.tensor(self.made, dtype=torch.float64)
        if len(self.parts) == 1:
            made = self.parts[0].rows(take(self.parts[0].name)).reshape(self.shape)
            done(self.parts[0].name)
            return made
        whole = torch.empty(0)
        for part, place in zip(self.parts, self._places(), strict=True):
            rows = part.rows(take(part.name))
            whole = whole if whole.numel() else torch.empty(self._whole, dtype=rows.dtype)
            whole = whole.to(torch.promote_types(whole.dtype, rows.dtype))
            whole.narrow(self.dim, *place).copy_(rows)
            done(part.name)
        return whole.reshape(self.shape)

    def _places(self) -> Iterator[tuple[int, int]]:
        """Where each part begins in all of them, and how long it is."""
        lengths = [part.row_shape[self.dim] for part in self.parts]
        return zip(accumulate(lengths, initial=0), lengths, strict=False)

    @property
    def _whole(self) -> tuple[int, ...]:
        """The shape of all parts behind one another."""
        shapes = [part.row_shape for part in self.parts]
        return (*shapes[0][: self.dim], sum(s[self.dim] for s in shapes), *shapes[0][self.dim + 1 :])

    def take_apart(self, parameter: Tensor) -> dict[str, Tensor]:
        """The file's tensors, out of the parameter."""
        if not self.parts:
            return {}
        pieces = [parameter.reshape(self._whole).narrow(self.dim, *place) for place in self._places()]
        return {part.name: part.stored(piece) for part, piece in zip(self.parts, pieces, strict=True)}


def made_rule(target: str, numbers: tuple[float, ...]) -> Rule:
    """A vector that follows from the config."""
    return Rule(target, (len(numbers),), (), numbers)


def _row_dim(x: Tensor) -> int:
    return max(0, x.dim() - 2)


@dataclass(frozen=True)
class Known:
    """What lines are read against: the parameters' shapes, and the names that a file has, if there is one."""

    shapes: Mapping[str, tuple[int, ...]]
    names: Set[str] = frozenset()


def read_rules(table: str, sizes: Mapping[str, int], known: Known, target: str = "", source: str = "") -> Iterator[Rule]:
    """The lines of a table whose parameter the model has; `target` and `source` are the prefixes of both sides."""
    found: dict[str, list[Rule]] = {}
    for line in filter(None, (text.strip() for text in table.splitlines())):
        name, _, text = line.partition(" = ")
        if shape := known.shapes.get(target + name):
            rule = _checked(Rule(target + name, shape, tuple(_parts(text, sizes, source))))
            found.setdefault(name, []).append(rule)
    for rules in found.values():
        yield next((r for r in rules if all(p.name in known.names for p in r.parts)), rules[0])


def _parts(text: str, sizes: Mapping[str, int], prefix: str) -> Iterator[Part]:
    found = [match.groupdict() for match in _SOURCE.finditer(text)]
    if "".join(m.group(0) for m in _SOURCE.finditer(text)) != text:
        raise ValueError(f"no rule: {text}")
    each = range(sizes["experts"]) if any("{e}" in m["name"] for m in found) else range(1)
    for e in each:
        for m in found:
            shape = tuple(size(word, sizes) for word in m["shape"].split())
            widths = tuple(size(word, sizes) for word in (m["widths"] or "").split())
            groups = size(m["groups"], sizes) if m["groups"] else 1
            name = prefix + m["name"].replace("{e}", str(e))
            yield Part(name, shape, m["turn"] == ".T", m["turn"] == ".V", groups, widths)


def size(text: str, sizes: Mapping[str, int]) -> int:
    """A sum of products of names and numbers: `2*key_width+value_heads`; `a/b` divides."""

    def product(term: str) -> int:
        over, *under = term.split("/")
        return math.prod(number(w) for w in over.split("*")) // math.prod(number(w) for w in under)

    def number(word: str) -> int:
        return int(word) if word.isdigit() else sizes[word]

    return sum(product(term) for term in text.strip().split("+"))


def _checked(rule: Rule) -> Rule:
    """A table that is itself wrong is our mistake, found when any model of the family is read."""
    have, want = sum(math.prod(p.shape) for p in rule.parts), math.prod(rule.shape)
    for part in rule.parts:
        rows = part.row_shape[-1 if part.vectors else max(0, len(part.shape) - 2)]
        if part.widths and part.groups * sum(part.widths) != rows:
            raise CheckpointError(f"{part.name} has {rows} rows, which {part.groups} groups of {part.widths} do not make up")
    if have != want:
        raise CheckpointError(f"{rule.target} is {list(rule.shape)}, its tensors have {have} numbers; must have {want}")
    return rule


def check_bijection(rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every parameter has one rule, and every tensor is in one."""
    targets, sources = [r.target for r in rules], [p.name for r in rules for p in r.parts]
    twice = (
        sorted({n for names in (targets, sources) for n in names if names.count(n) > 1}) if _repeats(targets, sources) else []
    )
    lost = [name for name in shapes if name not in set(targets)]
    if twice or lost:
        raise CheckpointError(f"the map of names is no bijection: without a rule {lost}, with two {twice}")


def _repeats(*lists: Sequence[str]) -> bool:
    return any(len(set(names)) < len(names) for names in lists)
