"""A folder to a spec and its weights, and weights back to a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from ...ir.errors import CheckpointError
from ..spec import ModelSpec
from .families import read_plan
from .folder import open_folder, read_config
from .plan import Plan, map_of
from .tensors import FLOATS, Entry, Mapped

Tensor = torch.Tensor
SHOWN = 40
HEAD = "lm_head.weight"


def read_spec(folder: str | Path) -> ModelSpec:
    """The spec of a folder's config; its weights are not looked at."""
    return read_plan(read_config(folder)).spec


def load_hf(folder: str | Path) -> tuple[ModelSpec, Mapping[str, Tensor]]:
    """The spec of a Hugging Face folder, and its weights by our names.

    Weights are read when they are asked for: one that stands in the file as it is needed is a view of the file's pages, any
    other is put together from them. Raises SpecError for a family or an attribute that is not honoured, CheckpointError for
    files that cannot be, and for tensors that are missing, left over or of another shape, all of them at once.
    """
    found = open_folder(folder)
    plan = read_plan(found.config)
    return plan.spec, Weights(plan, named(found.entries, plan), str(folder))


def named(entries: Mapping[str, Entry], plan: Plan) -> dict[str, Entry]:
    """Tensors by their full names: files of a bare model leave the prefix out. Tables the model makes itself are left out."""
    full = {full_name(n, plan, entries): e for n, e in entries.items()}
    return {n: e for n, e in full.items() if not any(re.fullmatch(p, n) for p in plan.derived)}


def full_name(name: str, plan: Plan, names: Iterable[str]) -> str:
    """The canonical name of a tensor in a file with these names."""
    for other, own in plan.renamed:
        if name.startswith(other):
            return own + name.removeprefix(other)
    if name.startswith("lm_head.") or any(n.startswith(plan.prefix) for n in names):
        return name
    return plan.prefix + name.removeprefix(plan.other_prefix)


class Weights(Mapping[str, Tensor]):
    """A folder's weights by our names, read when they are asked for."""

    def __init__(self, plan: Plan, entries: Mapping[str, Entry], where: str) -> None:
        self.rules = {rule.target: rule for rule in map_of(plan, entries)}
        self.where, self.mapped, self.entries = where, Mapped(), dict(entries)
        doubled = {n: self.entries.pop(n) for n in (*([HEAD] if plan.spec.tied else []), *plan.copies) if n in entries}
        self.zeros = [n for n in plan.zeros if n not in entries]
        self._check()
        embed = self.rules["embed"].parts[0].name
        whole = self.entries[embed]
        for name, copy in doubled.items():
            if not (copy.shape == whole.shape and torch.equal(*map(self.mapped.tensor, (copy, whole)))):
                what = "the head is tied to the embedding" if name == HEAD else "the embedding is there twice"
                raise CheckpointError(f"{where}: {what}, but {name} differs from {embed}")

    def _check(self) -> None:
        wanted = {p.name: p for r in self.rules.values() for p in r.parts if p.name not in self.zeros}
        problems = [f"{n}: missing; must be {list(p.shape)}" for n, p in wanted.items() if n not in self.entries]
        problems += [f"{n}: is in the file, but no parameter" for n in self.entries if n not in wanted]
        both = [(n, self.entries[n], wanted[n]) for n in wanted if n in self.entries]
        problems += [f"{n}: is {list(e.shape)}, must be {list(p.shape)}" for n, e, p in both if e.shape != p.shape]
        problems += [f"{n}: is {e.dtype}, must be one of {', '.join(FLOATS)}" for n, e, _ in both if e.dtype not in FLOATS]
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            text = "\n  ".join([*problems[:SHOWN], *more])
            raise CheckpointError(f"{self.where}: the tensors do not fit the config\n  {text}")

    def __getitem__(self, name: str) -> Tensor:
        rule, copied = self.rules[name], len(self.rules[name].parts) > 1
        shapes = {part.name: part.shape for part in rule.parts}

        def done(part: str) -> None:
            if copied:  # before the next one is read, so that files and copies are never whole side by side
                self._release(part)

        made = rule.assemble(lambda part: self._read(part, shapes[part]), done)
        if not copied and not self.mapped.holds(made):
            self.release(name)
        return made

    def release(self, name: str) -> None:
        """Let go of the file's pages of a parameter that has been copied; what was changed in a view of them is lost."""
        for part in self.rules[name].parts:
            self._release(part.name)

    def _release(self, part: str) -> None:
        if part in self.entries:
            self.mapped.release(self.entries[part])

    def _read(self, part: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the files, or zeros where the family leaves it out; refused where a number is none."""
        if part in self.zeros:
            return torch.zeros(shape, dtype=FLOATS[self.entries[self.rules["embed"].parts[0].name].dtype])
        entry = self.entries[part]
        stored = self.mapped.tensor(entry)
        if holds_nan(stored):
            wrong = [n for n, e in self.entries.items() if holds_nan(self.mapped.tensor(e))]
            names = ", ".join(wrong[:SHOWN]) + (f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")
            raise CheckpointError(f"{self.where}: {names} holds NaN; a model with it computes nothing, save the folder anew")
        return stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)


def holds_nan(tensor: Tensor) -> bool:
    """Whether a number is none. The extremes of numbers are not a number where one of them is not."""
    return bool(tensor.isnan().any() if tensor.numel() < 2 else torch.stack(tensor.aminmax()).isnan().any())
