"""What is measured of a family's folder: how far each way of running it is from what it means."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import plait
import torch
from plait.frontends import build
from plait.frontends.hf import hf_tensors, load_hf
from plait.ir import evaluate
from plait.runtime import CompiledModel
from safetensors.torch import load_file

from tests.hf_cases import CASES, config, product, tokens, weight, write

Tensor = torch.Tensor
GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("hf_golden.json").read_text())
PROMPTS, NEW = (9, 4), 12  # tokens of the prompts, which differ in length, and how many are generated
LENGTHS = (19, 11, 5)  # of the rows that are padded, and packed


@dataclass(frozen=True)
class Subject:
    """A case as a folder, and what it means: transformers' figures, and the references of our ops in float64."""

    name: str
    folder: Path

    @cached_property
    def golden(self) -> Mapping[str, Any]:
        return GOLDEN[self.name]

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        return {n: w.double().requires_grad_() for n, w in load_hf(self.folder)[1].items()}

    @cached_property
    def model(self) -> CompiledModel:
        """In float32, its layers run eagerly: the programs that `plait.compile` makes, without waiting for Inductor."""
        return plait.compile(self.folder, dtype="f32", jit=False, mode="train")

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """By the names of modules, in float64."""
        loss = evaluate(self._graph("loss"), tokens(), wanted(), params=self.parameters)
        own = {n: g for n, g in zip(self.parameters, torch.autograd.grad(loss, [*self.parameters.values()], allow_unused=True),
                                    strict=True) if g is not None}  # fmt: skip
        return dict(hf_tensors(config(self.name), own, self.golden["gradients"]))

    @cached_property
    def rows(self) -> list[Tensor]:
        return [torch.cat([*tokens()])[7 * i : 7 * i + n] for i, n in enumerate(LENGTHS)]

    @cached_property
    def alone(self) -> list[Tensor]:
        """Logits of each row by itself."""
        return [self.means(row[None])[0] for row in self.rows]

    @torch.no_grad()
    def means(self, ids: Tensor) -> Tensor:
        return evaluate(self._graph("logits"), ids, params=self.parameters)

    def _graph(self, task: str) -> Any:
        return build(load_hf(self.folder)[0], task=task, dtype="f64")


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
    return apart(of.model.eval()(tokens()), of.means(tokens()))


def gradients(of: Subject) -> float:
    """Every gradient's product with a wave against transformers, both in float64."""
    meant: Mapping[str, float] = of.golden["gradients"]
    most = max(map(abs, meant.values()))
    return max(abs(float(product(of.gradients[n])) - g) / most for n, g in meant.items())


def run_gradients(of: Subject) -> float:
    """The gradient of the compiled program in float32, every tensor of it against float64."""
    model = of.model.train()
    model.zero_grad()
    model.loss(tokens(), wanted()).backward()
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found, meant = dict(hf_tensors(config(of.name), own, of.golden["gradients"])), of.gradients
    least = 1e-3 * max(float(g.norm()) for g in meant.values())
    return max(float((found[n].double() - g).norm()) / max(float(g.norm()), least) for n, g in meant.items())


def generation(of: Subject) -> float:
    """Greedy tokens, from the cached program in float32 at once for prompts of unequal length, that float64 would not say."""
    prompts = [row[:n] for row, n in zip(tokens(), PROMPTS, strict=True)]
    made = of.model.eval().generate(prompts, NEW)
    meant = [of.means(row[None, :-1])[0, n - 1 :].argmax(-1) for row, n in zip(made, PROMPTS, strict=True)]
    return float(sum(int((row[n:] != m).sum()) for row, n, m in zip(made, PROMPTS, meant, strict=True)))


def padded(of: Subject) -> float:
    """Rows padded on the left, and on the right, in float32 against each row alone."""
    return max(_padded(of, left) for left in (True, False))


@torch.no_grad()
def _padded(of: Subject, left: bool) -> float:
    batch, mask = (torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64) for _ in range(2))
    places = [slice(max(LENGTHS) - n, None) if left else slice(0, n) for n in LENGTHS]
    for i, (row, place) in enumerate(zip(of.rows, places, strict=True)):
        batch[i, place], mask[i, place] = row, 1
    found = of.model.eval()(batch, mask=mask)
    return max(apart(f[p], m) for f, p, m in zip(found, places, of.alone, strict=True))


@torch.no_grad()
def packed(of: Subject) -> float:
    """Rows behind one another in one row, in float32 against each row alone."""
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)
    found = of.model.eval()(torch.cat(of.rows)[None], borders)[0].split(list(LENGTHS))
    return max(map(apart, found, of.alone))


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
    return Subject(name, write(place / name, config(name), tensors))


def outcomes(name: str, only: tuple[str, ...] = tuple(CHECKS)) -> dict[str, float]:
    """Every check of a case, by name."""
    with tempfile.TemporaryDirectory() as place:
        of = subject(name, Path(place))
        return {check: CHECKS[check].measure(of) for check in only}


def family(name: str) -> str:
    """The model_type of a case."""
    return str(CASES[name]["model_type"])
