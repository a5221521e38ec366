"""CompiledModel: an ordinary `nn.Module` that runs, trains and generates."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..ir import DTYPES, DataError, Graph, fill, parameters
from ..ir.sizes import value as bound_size
from ..lowering.program import Program
from .capture import Decoder, recorder
from .checkpoint import read_tensors, save_tensors
from .layout import Layout, own_part
from .runner import CompiledLayer, Runner

Tensor = torch.Tensor


@dataclass(frozen=True)
class Variant:
    """Which program of a model is wanted."""

    task: str = "logits"  # logits, loss, or cached: logits with state in and out
    packed: bool = False
    training: bool = False


class CompiledModel(torch.nn.Module):
    """A model compiled from a graph; its parameters carry the graph's own names, `layers.3.w_in`."""

    def __init__(
        self, graph: Graph, make: Callable[[Variant], Program], *, description: str = "", compiled: bool = True, seed: int = 0,
        device: str = "cpu", layout: Layout | None = None, weights: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.origin: Mapping[str, Any] = {}  # the config of the folder that it came from
        self.graph, self.description = graph, description
        self.layout = layout
        self._layers: dict[Graph, CompiledLayer] | None = {} if compiled else None
        self._make, self._runners = make, dict[Variant, Runner]()
        self.vocab = int(graph.params[0].type.dims[0].size)  # rows of the embedding, the first parameter
        self.shapes = dict[str, tuple[int, ...]]()  # of the parameters, as one process has them
        for name, tensor in initial(graph, seed).items() if weights is None else given(graph, weights):
            self.shapes[name] = tuple(tensor.shape)
            _place(self, name, torch.nn.Parameter(own_part(layout, name, tensor).to(device)))

    # -- programs -------------------------------------------------------------------------

    def runner(self, variant: Variant) -> Runner:
        """The program for this variant, lowered when it is first asked for."""
        if variant not in self._runners:
            self._runners[variant] = Runner(self._make(variant), self._layers)
        return self._runners[variant]

    def _run(self, variant: Variant, *inputs: Tensor) -> tuple[Tensor, ...]:
        runner = self.runner(variant)
        return runner(inputs, self._arguments(runner))

    def _arguments(self, runner: Runner) -> list[Tensor]:
        """The parameters in the order a program takes them."""
        return [self.get_parameter(name) for name in runner.program.parameters]

    # -- use ------------------------------------------------------------------------------

    def forward(
        self, tokens: Tensor, cu: Tensor | None = None, seed: Tensor | None = None, *, labels: Tensor | None = None,
        local: bool = False,
    ) -> Tensor:  # fmt: skip
        """Logits [b, s, vocab] of tokens i64[b, s]; `cu` i64[n+1] are the borders of segments packed in one row.

        With labels it is the loss: wrappers such as DistributedDataParallel see calls of the module alone. `local` says that
        tokens and labels are one rank's part, which in one process is all of them.
        """
        if labels is not None:
            return self.loss(tokens, labels, cu, seed)
        tokens = self._tokens(tokens)
        return self._run(*self._call("logits", tokens, None, cu, seed))[0]

    def whole_logits(self, tokens: Tensor, cu: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        """Logits of every token, also where ranks of a mesh have parts of them."""
        return self(tokens, cu, seed)

    def loss(
        self, tokens: Tensor, labels: Tensor | None = None, cu: Tensor | None = None, seed: Tensor | None = None, *,
        local: bool = False,
    ) -> Tensor:  # fmt: skip
        """Mean cross entropy, plus the spec's balance losses.

        labels[b, t] is the token wanted after position t, -100 where none is; without labels the tokens themselves,
        shifted by one, are (the last position of each segment then has none).
        """
        tokens = self._tokens(tokens)
        return self._run(*self._call("loss", tokens, shifted(tokens, cu) if labels is None else labels, cu, seed))[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are; inputs are brought there."""
        return self.get_parameter(self.graph.params[0].name).device

    def _call(
        self, task: str, tokens: Tensor, labels: Tensor | None, cu: Tensor | None, seed: Tensor | None
    ) -> tuple[Any, ...]:
        """The variant that these arguments ask for, and its inputs in order."""
        given = [tokens, *([labels.to(tokens.device)] if labels is not None else [])]
        if cu is not None:
            given.append(self._borders(tokens.shape[0], tokens.shape[1], cu))
        variant = Variant(task, cu is not None, self.training)
        if any(v.name == "seed" for v in self.runner(variant).program.graph.inputs):
            drawn = torch.tensor(int(torch.randint(2**31, ()))) if seed is None else seed
            given.append(drawn.to(tokens.device))
        return variant, *given

    def _tokens(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise DataError(f"tokens is {tokens.dtype}{list(tokens.shape)}, must be int64 [batch, length]")
        if 0 in tokens.shape:
            raise DataError(f"tokens is {list(tokens.shape)}; there must be at least one row and one token")
        if not torch.compiler.is_compiling():
            low, high = (int(x) for x in tokens.aminmax())
            if low < 0 or high >= self.vocab:
                raise DataError(f"tokens holds the token {low if low < 0 else high}; tokens are from 0 to {self.vocab - 1}")
        return tokens.to(self.device, torch.int64)

    def _borders(self, rows: int, length: int, cu: Tensor) -> Tensor:
        cu = cu.long()
        rises = cu.dim() == 1 and cu.numel() > 1 and bool((cu.diff() >= 0).all())
        if rows != 1 or not rises or int(cu[0]) != 0 or int(cu[-1]) != length:
            must = "it must rise from 0 to the length, with a batch of one"
            raise DataError(f"cu is {cu.tolist()} for tokens {[rows, length]}; {must}")
        return cu.to(self.device)

    # -- generation -----------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """tokens [b, s] continued by up to `max_new_tokens`; greedy at temperature 0. Stops early once every row met `stop`."""
        tokens = self._tokens(tokens)
        out = [tokens]
        for new in self.stream(tokens, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed, stop=stop):
            out.append(new[:, None])
        return torch.cat(out, 1)

    @torch.no_grad()
    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
        stop: int | None = None,
    ) -> Iterator[Tensor]:
        """The new tokens [b], one position at a time. Prompt and steps run one cached program.

        On a CUDA device the step of one token is recorded as a CUDA graph, unless it waits for the host.
        """
        tokens, rng = self._tokens(tokens), torch.Generator().manual_seed(seed)
        if max_new_tokens < 0:
            raise DataError(f"max_new_tokens is {max_new_tokens}, must be 0 or more")
        states = self.fresh_states(tokens.shape[0], tokens.shape[1] + max_new_tokens)
        done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        decode = Decoder(partial(self._run, Variant("cached")), states, recorder(tokens.device, max_new_tokens))
        for _ in range(max_new_tokens):
            new = pick(decode(tokens), temperature, top_k, rng)
            new = new if stop is None else torch.where(done, stop, new)
            yield new
            if stop is not None:
                done |= new == stop
                if bool(done.all()):
                    return
            tokens = new[:, None]

    def fresh_states(self, batch: int, length: int) -> list[Tensor]:
        """Empty caches and states for `batch` rows of up to `length` tokens."""
        first = next(self.parameters())
        env = {"b": batch, "m": length}
        wide = first.dtype if first.dtype == torch.float64 else torch.float32
        inputs = self.runner(Variant("cached")).program.graph.inputs[2:]
        made = list[Tensor]()
        for v in inputs:
            dtype = first.dtype if v.type.dtype == self.graph.params[0].type.dtype else wide
            made.append(torch.zeros([bound_size(d.size, env) for d in v.type.dims], dtype=dtype, device=first.device))
        return made

    # -- weights --------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write the weights, with the text of the spec and their dtype, as one safetensors file."""
        dtype = next(name for name, d in DTYPES.items() if d == next(self.parameters()).dtype)
        save_tensors(path, dict(self.named_parameters()), {"format": "plait", "spec": self.description, "dtype": dtype})

    def save_sharded(self, folder: Path | str) -> None:
        """Write the weights as a new folder, each rank of a mesh its own part."""
        from .sharded import save_sharded  # torch's checkpoints are slow to import

        save_sharded(self, folder)

    def load_sharded(self, folder: Path | str) -> CompiledModel:
        """Read weights that `save_sharded` wrote, on whatever mesh."""
        from .sharded import load_sharded

        return load_sharded(self, folder)

    def load_from(self, other: torch.nn.Module) -> CompiledModel:
        """Take another model's weights; both must have the same parameters."""
        self.load_state_dict(other.state_dict())
        return self

    def load(self, path: Path | str) -> CompiledModel:
        """Read weights written by `save`. Raises CheckpointError naming every tensor that is missing, extra or misshapen."""
        own = dict(self.named_parameters())
        found = read_tensors(path, own)
        with torch.no_grad():
            for name, tensor in found.tensors.items():
                own[name].copy_(tensor)
        return self


def initial(graph: Graph, seed: int) -> dict[str, Tensor]:
    """First numbers of every parameter by its recipe; each depends on the seed and its own name alone."""
    made = dict[str, Tensor]()
    for name, (type_, init) in parameters(graph).items():
        rng = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1 & 0xFFFFFFFF))
        made[name] = fill(init, tuple(bound_size(d.size, {}) for d in type_.dims), rng).to(DTYPES[type_.dtype])
    return made


def given(graph: Graph, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's numbers out of `weights`, in its own type; one at a time, so that a file is not held twice."""
    for name, (type_, _) in parameters(graph).items():
        yield name, weights[name].to(DTYPES[type_.dtype])


def _place(root: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Register a parameter under its dotted name."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, torch.nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, parameter)


def shifted(tokens: Tensor, cu: Tensor | None) -> Tensor:
    """Each position's next token; the last of a row or segment has none."""
    labels = torch.cat([tokens[:, 1:], tokens.new_full((tokens.shape[0], 1), -100)], 1)
    if cu is not None:
        ends = cu[1:][cu.diff() > 0] - 1
        labels[:, ends.to(labels.device)] = -100
    return labels


def pick(logits: Tensor, temperature: float, top_k: int, rng: torch.Generator) -> Tensor:
    """The next token [b]: the likeliest at temperature 0, else drawn from the `top_k` likeliest (all when 0)."""
    if temperature <= 0:
        return logits.argmax(-1)
    scaled = logits.float() / temperature
    if top_k:
        floor = scaled.topk(min(top_k, scaled.shape[-1]), -1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    return torch.multinomial(torch.softmax(scaled, -1).cpu(), 1, generator=rng)[:, 0].to(logits.device)
