"""A compiled model whose program runs on the ranks of a mesh: each holds its part of the inputs and the parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch

from ..ir import DTYPES, DataError, Graph, PlaitError, TensorType, parameters
from ..lowering.program import Program
from .caches import Reader
from .checkpoint import read_tensors, save_tensors
from .layout import Layout, as_one, entering, leaving, take_parts, whole_tensors
from .mesh import Near, handshake
from .module import CompiledModel, Variant, shifted
from .parts import part_of, whole_of
from .runner import Runner

Tensor = torch.Tensor


class Batch(NamedTuple):
    """Tokens, labels and borders: whole, as the data loader gives them, or one rank's part of them."""

    tokens: Tensor
    labels: Tensor | None = None
    cu: Tensor | None = None  # always of the whole


class PlacedModel(CompiledModel):
    """A model on the ranks of a mesh. Every rank calls it alike: with the whole batch, or with its part of it (`local`).

    Logits come back as their type places them, this rank's part; a loss is that of the whole batch, on every rank. After
    `backward` each rank has the complete gradients of its part of the parameters.
    """

    def __init__(
        self, graph: Graph, make: Callable[[Variant], Program], layout: Layout, *, description: str = "",
        compiled: bool = True, seed: int = 0, device: str = "cpu", weights: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        options: Any = {"description": description, "compiled": compiled, "seed": seed, "device": device, "weights": weights}
        super().__init__(graph, make, layout=layout, **options)
        self._drawn = torch.Generator().manual_seed(seed)  # every rank draws the same seeds of dropout

    @property
    def _layout(self) -> Layout:
        assert self.layout is not None
        return self.layout

    # -- programs -------------------------------------------------------------------------

    def runner(self, variant: Variant) -> Runner:
        fresh = variant not in self._runners
        made = super().runner(variant)
        types = {name: type_ for name, (type_, _) in parameters(made.program.graph).items()}
        if fresh and (moved := [k for k, t in self._layout.types.items() if types.get(k) != t]):
            how = f"{moved[0]} is {types.get(moved[0])} there and {self._layout.types[moved[0]]} in the model"
            raise PlaitError(f"the program for {variant} places parameters otherwise: {how}; choose one way for both")
        return made

    def _arguments(self, runner: Runner) -> list[Tensor]:
        found = entering(self._layout, {name: self.get_parameter(name) for name in runner.program.parameters})
        return [found[name] for name in runner.program.parameters]

    # -- use ------------------------------------------------------------------------------

    def forward(
        self, tokens: Tensor, cu: Tensor | None = None, seed: Tensor | None = None, *, labels: Tensor | None = None,
        local: bool = False, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """This rank's part of the logits, or the loss where labels are given; `local` tokens and labels are its part, too."""
        return self._placed("logits" if labels is None else "loss", Batch(tokens, labels, cu), seed, local, mask)

    def loss(
        self, tokens: Tensor, labels: Tensor | None = None, cu: Tensor | None = None, seed: Tensor | None = None, *,
        local: bool = False, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean cross entropy of the whole batch, plus the spec's balance losses."""
        return self._placed("loss", Batch(tokens, labels, cu), seed, local, mask)

    def _placed(self, task: str, batch: Batch, seed: Tensor | None, local: bool, mask: Tensor | None) -> Tensor:
        """Run once all ranks have said that they run the same program on the same batch."""
        world, place = self._layout.world, self._layout.place
        try:
            if mask is not None:
                raise DataError("a model on a mesh takes no mask; pack the rows into one and say where they end: cu")
            runner, inputs = self._ready(task, batch, seed, local)
        except PlaitError as error:
            handshake(world, {}, str(error))
            raise
        handshake(world, {"program": _stamp(runner)}, near=Near(_facts(batch, local, seed), place.mesh))
        (result,) = runner(inputs, self._arguments(runner))
        return leaving(self._layout, result, runner.program.graph.outputs[0].type)

    def _ready(self, task: str, batch: Batch, seed: Tensor | None, local: bool) -> tuple[Runner, list[Tensor]]:
        """The program, and this rank's inputs in its order."""
        runner = self.runner(Variant(task, batch.cu is not None, self.training))
        types = {v.name: v.type for v in runner.program.graph.inputs}
        tokens = self._tokens(batch.tokens)
        length = tokens.shape[1] * (prod(self._layout.place.mesh[a] for a in types["tokens"].dims[1].axes) if local else 1)
        cu = None if batch.cu is None else self._borders(len(tokens), length, batch.cu)
        if local and task == "loss" and batch.labels is None:
            raise DataError("labels are missing; a part of the tokens has no next tokens, so shard_batch makes its labels")
        labels = batch.labels if batch.labels is not None or task != "loss" else shifted(tokens, cu)
        whole = Batch(tokens, self._labels(tokens, labels), cu)
        parts = whole if local else self._part(whole, types)
        drawn = torch.tensor(int(torch.randint(2**31, (), generator=self._drawn))) if seed is None else seed
        given = {"tokens": parts.tokens, "labels": parts.labels, "cu": cu, "seed": drawn.to(tokens.device)}
        return runner, [given[name] for name in types]  # type: ignore[misc] # a program asks for what its variant has

    def _labels(self, tokens: Tensor, labels: Tensor | None) -> Tensor | None:
        if labels is not None and (labels.shape != tokens.shape or labels.dtype != torch.int64):
            raise DataError(f"labels is {labels.dtype}{[*labels.shape]}, must be int64 as tokens are, {[*tokens.shape]}")
        return None if labels is None else labels.to(tokens.device)

    def _part(self, whole: Batch, types: dict[str, TensorType]) -> Batch:
        tokens, labels = (
            None if x is None else part_of(x, types[name], self._layout.place, name=name, cu=whole.cu)
            for name, x in (("tokens", whole.tokens), ("labels", whole.labels))
        )
        assert tokens is not None
        return Batch(tokens.contiguous(), None if labels is None else labels.contiguous(), whole.cu)

    def shard(self, tokens: Tensor, labels: Tensor | None = None, cu: Tensor | None = None) -> Batch:
        """This rank's part of a batch, for `local` calls; labels are the next tokens where none are given."""
        variant = Variant("loss", cu is not None, self.training)
        types = {v.name: v.type for v in self.runner(variant).program.graph.inputs}
        tokens = self._tokens(tokens)
        borders = None if cu is None else self._borders(tokens.shape[0], tokens.shape[1], cu)
        labels = self._labels(tokens, shifted(tokens, borders) if labels is None else labels)
        return self._part(Batch(tokens, labels, borders), types)

    def whole_logits(self, tokens: Tensor, cu: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        """Logits of the whole batch in their natural order, on every rank; without a gradient."""
        with torch.no_grad():
            made = self(tokens, cu, seed)
            type_ = self.runner(Variant("logits", cu is not None, self.training)).program.graph.outputs[0].type
            return whole_of(made, type_, self._layout.place, cu)

    def reader(self) -> Reader:
        """Refused: what generates, and every cache, asks for it."""
        raise PlaitError("generation runs in one process; save the model, and load the file in a process of its own")

    # -- weights --------------------------------------------------------------------------

    def whole_parameters(self) -> dict[str, Tensor]:
        """Every parameter as one process has it; all ranks call this."""
        named = dict(self.named_parameters())
        return whole_tensors(self._layout, named, {k: k for k in named})

    def save(self, path: Path | str) -> None:
        """Write the file that a model in one process writes; all ranks call this, the first one writes."""
        whole = self.whole_parameters()
        dtype = next(name for name, d in DTYPES.items() if d == next(self.parameters()).dtype)
        with as_one(self._layout):
            if self._layout.world.rank == 0:
                save_tensors(path, whole, {"format": "plait", "spec": self.description, "dtype": dtype})

    def load(self, path: Path | str) -> CompiledModel:
        """Read weights written by `save` on any mesh, or in one process; each rank takes its part."""
        shapes = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        with as_one(self._layout):
            found = read_tensors(path, shapes)
        named = dict(self.named_parameters())
        take_parts(self._layout, named, {k: k for k in named}, found.tensors)
        return self

    def load_from(self, other: torch.nn.Module) -> CompiledModel:
        """Take another model's weights, of one process or of the same mesh; both must have the same parameters."""
        if isinstance(other, PlacedModel):
            return super().load_from(other)  # whose extra state says whether it is placed alike
        named = dict(self.named_parameters())
        take_parts(self._layout, named, {k: k for k in named}, dict(other.named_parameters()))
        return self

    def get_extra_state(self) -> Tensor:
        """What a state dict is of: parts of parameters in orders that depend on the mesh and on how it is used."""
        told = "\n".join(f"{name} {type_}" for name, type_ in self._layout.types.items())
        return torch.frombuffer(bytearray(hashlib.sha256(told.encode()).digest()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a state dict of parameters that are placed otherwise."""
        if not torch.equal(state.cpu(), self.get_extra_state()):
            must = "the same mesh and place options; use save and load, or save_sharded and load_sharded, between others"
            raise PlaitError(f"load_state_dict: the state is of a model that is placed otherwise; it must be of {must}")


def _stamp(runner: Runner) -> str:
    """What is one for one program, and short."""
    return hashlib.sha256(runner.program.graph.key.encode()).hexdigest()[:32]


def _facts(batch: Batch, local: bool, seed: Tensor | None) -> dict[str, str]:
    """What ranks that run one program must have alike: the whole batch, or the shapes of their parts and the borders."""
    found = {name: f"{x.dtype}{[*x.shape]}" for name, x in batch._asdict().items() if x is not None}
    alike = [batch.cu, seed] if local else [*batch, seed]
    return found | {"the batch's checksum": f"{_checksum([x for x in alike if x is not None]):08x}"}


def _checksum(given: list[Tensor]) -> int:
    total = 0
    for x in given:
        total = crc32(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), total)
    return total
