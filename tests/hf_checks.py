"""What is measured of a family's folder: how far each way of running it is from what it means."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import plait
import torch
from plait.frontends import ModelSpec, build
from plait.frontends.hf import hf_tensors, load_hf
from plait.ir import evaluate
from safetensors.torch import load_file

from tests.hf_cases import CASES, config, product, tokens, weight, write
from tests.hf_cases_third import CASES as ENCODED
from tests.hf_cases_third import source

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]  # what is found, and what is meant
GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("hf_golden.json").read_text())
PROMPTS, NEW = (9, 4), 12  # tokens of the prompts, which differ in length, and how many are generated
LENGTHS = (19, 11, 5)  # of the rows that are padded, and packed
READ = (13, 6)  # tokens of the rows that an encoder reads


@dataclass(frozen=True)
class Subject:
    """A case as a folder, and what it means: transformers' figures, and the references of our ops in float64."""

    name: str
    folder: Path

    @cached_property
    def golden(self) -> Mapping[str, Any]:
        return GOLDEN[self.name]

    @cached_property
    def spec(self) -> ModelSpec:
        return load_hf(self.folder)[0]

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        return {n: w.double().requires_grad_() for n, w in load_hf(self.folder)[1].items()}

    @cached_property
    def model(self) -> Any:
        """In float32, its layers run eagerly: the programs that `plait.compile` makes, without waiting for Inductor."""
        return plait.compile(self.folder, dtype="f32", jit=False, mode="train")

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """By the names of modules, in float64."""
        loss = evaluate(build(self.spec, task="loss", dtype="f64"), *self.inputs(tokens(), wanted()), params=self.parameters)
        found = torch.autograd.grad(loss, [*self.parameters.values()], allow_unused=True)
        own = {n: g for n, g in zip(self.parameters, found, strict=True) if g is not None}
        return dict(hf_tensors(config(self.name), own, self.golden["gradients"]))

    @torch.no_grad()
    def means(self, *ids: Tensor) -> Tensor:
        """Logits of tokens, in float64."""
        return evaluate(build(self.spec, dtype="f64"), *self.inputs(*ids), params=self.parameters)

    # -- what a family without an encoder is asked --------------------------------------------

    def inputs(self, *ids: Tensor) -> tuple[Tensor, ...]:
        """Of the program that takes these."""
        return ids

    def run(self) -> Tensor:
        return self.model(tokens())

    def loss(self) -> Tensor:
        return self.model.loss(tokens(), wanted())

    def generated(self) -> Iterator[Pair]:
        """Tokens that are said after prompts of unequal length in one batch, and what float64 would say in their place."""
        prompts = [row[:n] for row, n in zip(tokens(), PROMPTS, strict=True)]
        for row, n in zip(self.model.generate(prompts, NEW), PROMPTS, strict=True):
            yield row[n:], self.means(row[None, :-1])[0, n - 1 :].argmax(-1)

    @cached_property
    def rows(self) -> list[Tensor]:
        return [tokens().flatten()[7 * i : 7 * i + n] for i, n in enumerate(LENGTHS)]

    @cached_property
    def alone(self) -> list[Tensor]:
        """Logits of each row by itself."""
        return [self.means(row[None])[0] for row in self.rows]

    def padded(self, left: bool) -> Iterator[Pair]:
        batch, mask, places = padded_batch(self.rows, left)
        found = self.model(batch, mask=mask)
        return ((f[p], m) for f, p, m in zip(found, places, self.alone, strict=True))

    def packed(self) -> Iterator[Pair]:
        borders = torch.tensor([0, *LENGTHS]).cumsum(0)
        found = self.model(torch.cat(self.rows)[None], borders)[0]
        return zip(found.split([*LENGTHS]), self.alone, strict=True)


class Encoded(Subject):
    """A case with an encoder: it is what the encoder reads that is padded and of unequal length."""

    def inputs(self, *ids: Tensor) -> tuple[Tensor, ...]:
        return *ids, source()[: len(ids[0])], torch.full((len(ids[0]),), source().shape[1])

    @cached_property
    def rows(self) -> list[Tensor]:
        return [row[:n] for row, n in zip(source(), READ, strict=True)]

    @torch.no_grad()
    def _reply(self, ids: Tensor, read: Tensor) -> Tensor:
        """Logits of a row of tokens after one that the encoder reads alone."""
        given = (ids[None], read[None], torch.tensor([len(read)]))
        return evaluate(build(self.spec, dtype="f64"), *given, params=self.parameters)[0]

    @cached_property
    def alone(self) -> list[Tensor]:
        return [self._reply(ids, read) for ids, read in zip(tokens(), self.rows, strict=True)]

    def run(self) -> Tensor:
        return self.model(source(), decoder_input_ids=tokens())

    def loss(self) -> Tensor:
        return self.model.loss(source(), wanted(), decoder_input_ids=tokens())

    def generated(self) -> Iterator[Pair]:
        for row, read in zip(self.model.generate(self.rows, NEW), self.rows, strict=True):
            yield row[1:], self._reply(row[:-1], read).argmax(-1)

    def padded(self, left: bool) -> Iterator[Pair]:
        batch, mask, _ = padded_batch(self.rows, left)
        return zip(self.model(batch, decoder_input_ids=tokens(), mask=mask), self.alone, strict=True)

    def packed(self) -> Iterator[Pair]:
        return iter(())


def padded_batch(rows: Sequence[Tensor], left: bool) -> tuple[Tensor, Tensor, list[slice]]:
    """Rows in one batch, its mask, and where each row stands."""
    longest = max(map(len, rows))
    batch, mask = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(2))
    places = [slice(longest - len(r), None) if left else slice(0, len(r)) for r in rows]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        batch[i, place], mask[i, place] = row, 1
    return batch, mask, places


def wanted() -> Tensor:
    """Each token's next one."""
    return torch.cat([tokens()[:, 1:], torch.full((2, 1), -100)], 1)


def apart(found: Tensor, meant: Tensor) -> float:
    """How far numbers are from what they should be, over what they should be."""
    return float((found.double() - meant.double()).norm() / meant.double().norm())


def logits(of: Subject) -> float:
    """The references of our ops against transformers, both in float64."""
    meant = torch.tensor(of.golden["logits"], dtype=torch.float64)
    return apart(of.means(tokens())[:, ::6, ::13].flatten(), meant)


@torch.no_grad()
def run_logits(of: Subject) -> float:
    """The compiled program in float32 against float64."""
    of.model.eval()
    return apart(of.run(), of.means(tokens()))


def gradients(of: Subject) -> float:
    """Every gradient's product with a wave against transformers, both in float64."""
    meant: Mapping[str, float] = of.golden["gradients"]
    most = max(map(abs, meant.values()))
    return max(abs(float(product(of.gradients[n])) - g) / most for n, g in meant.items())


def run_gradients(of: Subject) -> float:
    """The gradient of the compiled program in float32, every tensor of it against float64."""
    model = of.model.train()
    model.zero_grad()
    of.loss().backward()
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found, meant = dict(hf_tensors(config(of.name), own, of.golden["gradients"])), of.gradients
    least = 1e-3 * max(float(g.norm()) for g in meant.values())
    return max(float((found[n].double() - g).norm()) / max(float(g.norm()), least) for n, g in meant.items())


def generation(of: Subject) -> float:
    """Greedy tokens of the cached program in float32 that float64 would not say."""
    of.model.eval()
    return float(sum(int((said != meant).sum()) for said, meant in of.generated()))


@torch.no_grad()
def padded(of: Subject) -> float:
    """Rows padded on the left, and on the right, in float32 against each row alone."""
    of.model.eval()
    return max(apart(found, meant) for left in (True, False) for found, meant in of.padded(left))


@torch.no_grad()
def packed(of: Subject) -> float:
    """Rows behind one another in one row, in float32 against each row alone; not a number where a family has no such rows."""
    of.model.eval()
    return max((apart(found, meant) for found, meant in of.packed()), default=math.nan)


def save_back(of: Subject) -> float:
    """Tensors of the folder that `save_hf` writes which differ in any bit, are missing or left over."""
    with tempfile.TemporaryDirectory() as place:
        plait.save_hf(of.model, Path(place, "back"))
        before, after = (load_file(f / "model.safetensors") for f in (of.folder, Path(place, "back")))
    names = before.keys() | after.keys()
    return float(sum(n not in before or n not in after or not torch.equal(before[n], after[n]) for n in names))


@dataclass(frozen=True)
class Check:
    """One column: what it measures, the most that is right, and whether it counts what differs."""

    title: str
    measure: Callable[[Subject], float]
    most: float
    counts: bool = False


CHECKS: dict[str, Check] = {
    "logits": Check("logits", logits, 1e-9),
    "run_logits": Check("in float32", run_logits, 2e-5),
    "gradients": Check("gradients", gradients, 1e-9),
    "run_gradients": Check("in float32", run_gradients, 1e-4),
    "generation": Check("generation", generation, 0.0, counts=True),
    "padded": Check("padded", padded, 2e-5),
    "packed": Check("packed", packed, 2e-5),
    "save_back": Check("save back", save_back, 0.0, counts=True),
}


def subject(name: str, place: Path) -> Subject:
    """A case written as a folder in `place`."""
    tensors = {n: weight(n, tuple(s)) for n, s in GOLDEN[name]["shapes"].items()}
    kind = Encoded if name in ENCODED else Subject
    return kind(name, write(place / name, config(name), tensors))


def outcomes(name: str, only: tuple[str, ...] = tuple(CHECKS)) -> dict[str, float]:
    """Every check of a case, by name."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what a family's folder holds that is not read
        of = subject(name, Path(place))
        return {check: CHECKS[check].measure(of) for check in only}


def reached(check: str, value: float) -> bool:
    """Whether this is right; what a family does not have is no failure."""
    return math.isnan(value) or value <= CHECKS[check].most


def cases_of(family: str) -> list[str]:
    """The cases of a model_type."""
    return [name for name, case in CASES.items() if case["model_type"] == family]
