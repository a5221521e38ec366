"""CompiledModel: an ordinary `nn.Module` that runs, trains and generates."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..ir import DTYPES, DataError, Graph, TensorType, fill, parameters
from ..ir.sizes import value as bound_size
from ..lowering.program import Program
from .caches import Cache, Reader, check_length, position_limit, windows_of
from .checkpoint import read_tensors, save_tensors
from .generate import Prompts, Stops, Wish, generate, stream
from .layout import Layout, own_part
from .padding import packing
from .runner import CompiledLayer, Runner
from .sampling import Sampling
from .variant import Variant

Tensor = torch.Tensor


class CompiledModel(torch.nn.Module):
    """A model compiled from a graph; its parameters carry the graph's own names, `layers.3.w_in`."""

    def __init__(
        self, graph: Graph, make: Callable[[Variant], Program], *, description: str = "", compiled: bool = True, seed: int = 0,
        device: str = "cpu", layout: Layout | None = None, weights: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.origin: Mapping[str, Any] = {}  # the config of the folder that it came from
        self.home: Path | None = None  # that folder
        self.graph, self.description = graph, description
        self.layout = layout
        self._layers: dict[Graph, CompiledLayer] | None = {} if compiled else None
        self._make, self._runners = make, dict[Variant, Runner]()
        self.vocab = int(graph.params[0].type.dims[0].size)  # rows of the embedding, the first parameter
        self.limit = position_limit(graph)  # of positions there is a table of
        self.meant = 0  # tokens that turned positions are meant for, 0 where any number is
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

    def _step(self, variant: Variant, *inputs: Tensor) -> tuple[Tensor, ...]:
        """As `_run`, for who gives states and takes the new ones: these may be written where the old ones are."""
        runner = self.runner(variant)
        return runner(inputs, self._arguments(runner), in_place=True)

    def _arguments(self, runner: Runner) -> list[Tensor]:
        """The parameters in the order a program takes them."""
        return [_found(self, path) for path in runner.paths]

    # -- use ------------------------------------------------------------------------------

    def forward(
        self, tokens: Tensor, cu: Tensor | None = None, seed: Tensor | None = None, *, labels: Tensor | None = None,
        local: bool = False, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [b, s, vocab] of tokens i64[b, s]; `cu` i64[n+1] are the borders of segments packed in one row.

        `mask` [b, s] is 0 where tokens are padding, in front of a row's own or behind them: these run packed, so that padding
        changes no number; its own logits are zeros.
        With labels it is the loss: wrappers such as DistributedDataParallel see calls of the module alone. `local` says that
        tokens and labels are one rank's part, which in one process is all of them.
        """
        if labels is not None:
            return self.loss(tokens, labels, cu, seed, mask=mask)
        tokens = self._tokens(tokens)
        if mask is not None:
            pack = packing(tokens, self._only(mask, cu))
            return pack.unpack(self(pack.pack(tokens), pack.cu, seed))
        return self._run(*self._call("logits", tokens, None, cu, seed))[0]

    def whole_logits(self, tokens: Tensor, cu: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        """Logits of every token, also where ranks of a mesh have parts of them."""
        return self(tokens, cu, seed)

    def loss(
        self, tokens: Tensor, labels: Tensor | None = None, cu: Tensor | None = None, seed: Tensor | None = None, *,
        local: bool = False, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean cross entropy, plus the spec's balance losses; `mask` as for logits.

        labels[b, t] is the token wanted after position t, -100 where none is; without labels the tokens themselves,
        shifted by one, are (the last position of each segment then has none).
        """
        tokens = self._tokens(tokens)
        if mask is not None:
            pack = packing(tokens, self._only(mask, cu))
            wanted = None if labels is None else pack.pack(labels)
            return self.loss(pack.pack(tokens), wanted, pack.cu, seed)
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
        if self.limit and not torch.compiler.is_compiling():
            check_length(tokens.shape[1] if cu is None else int(cu.diff().max()), self.limit, "a row of tokens")
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
        self.check_tokens(tokens)
        return tokens.to(self.device, torch.int64)

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse what is no token of the vocabulary."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise DataError(f"tokens is {tokens.dtype}{list(tokens.shape)}, must be int64")
        if not torch.compiler.is_compiling():
            low, high = (int(x) for x in tokens.aminmax())
            if low < 0 or high >= self.vocab:
                raise DataError(f"tokens holds the token {low if low < 0 else high}; tokens are from 0 to {self.vocab - 1}")

    def _only(self, mask: Tensor, cu: Tensor | None) -> Tensor:
        if cu is not None:
            raise DataError("mask and cu both say where rows end; give one of them")
        return mask

    def _borders(self, rows: int, length: int, cu: Tensor) -> Tensor:
        cu = cu.long()
        rises = cu.dim() == 1 and cu.numel() > 1 and bool((cu.diff() >= 0).all())
        if rows != 1 or not rises or int(cu[0]) != 0 or int(cu[-1]) != length:
            must = "it must rise from 0 to the length, with a batch of one"
            raise DataError(f"cu is {cu.tolist()} for tokens {[rows, length]}; {must}")
        return cu.to(self.device)

    # -- generation -----------------------------------------------------------------------

    def generate(
        self, tokens: Prompts, max_new_tokens: int, *, mask: Tensor | None = None, cache: Cache | None = None,
        prefill_chunk: int = 0, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        repetition_penalty: float = 1.0, seed: int | Sequence[int] = 0, stop: Stops = None,
    ) -> Any:  # fmt: skip
        """Prompts continued by up to `max_new_tokens`; greedy at temperature 0. Stops early once every row met a `stop` token.

        Prompts are tokens [b, s], with `mask` 0 where they are padding, and the result is [b, s + new], where a row that is
        done repeats its stop token; or a list of rows [s], each with a length of its own, and the result is such a list.
        `stop` is a token, several, or a list for each row. Row i draws by seed + i, or by a seed of its own, so that what it
        says does not depend on the others. With a `cache` the prompts go on from what it has read; it keeps all of them, and
        what is generated. `prefill_chunk` is how many tokens of a row are read at a time.
        """
        how = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
        return generate(self, tokens, Wish(max_new_tokens, how, seed, stop, cache, prefill_chunk), mask)

    def stream(
        self, tokens: Prompts, max_new_tokens: int, *, mask: Tensor | None = None, cache: Cache | None = None,
        prefill_chunk: int = 0, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        repetition_penalty: float = 1.0, seed: int | Sequence[int] = 0, stop: Stops = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """The new tokens [b], one position at a time; arguments are those of `generate`. Prompt and steps run one program."""
        how = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
        return stream(self, tokens, Wish(max_new_tokens, how, seed, stop, cache, prefill_chunk), mask)

    def cache(self, rows: int, room: int = 0, *, page: int = 0, chunk: int = 0) -> Cache:
        """An empty cache for `rows` rows: room for so many tokens at first, in pages of `page` tokens where that is given.

        `chunk` is the most tokens of a row in one call, where layers look through a window. See `Cache` for `fork`, `verify`
        and `rollback`.
        """
        return Cache(self.reader(), rows, room, page=page, chunk=chunk)

    def verify(self, cache: Cache, tokens: Tensor) -> Tensor:
        """Logits [b, n, vocab] behind each of the tokens [b, n] that are tried; `cache.rollback` says how many stay."""
        cache.belongs(self.reader())
        tokens = self._tokens(tokens)
        if len(tokens) != len(cache.lengths):
            raise DataError(f"there are {len(tokens)} rows of tokens; the cache has {len(cache.lengths)}, try tokens for each")
        return cache.verify(tokens)

    def reader(self) -> Reader:
        """This model as a cache sees it."""
        windows = windows_of(self.graph)
        return Reader(
            self._step, lambda v: self.runner(v).program.graph, self._state_dtype, self.device, self.limit, self.check_tokens,
            self.meant, windows,
        )  # fmt: skip

    def fresh_states(self, batch: int, length: int) -> list[Tensor]:
        """Empty caches and states for `batch` rows of up to `length` tokens."""
        given = self.runner(Variant("cached", last=True)).program.graph.inputs
        env, inputs = {"b": batch, "m": length}, given[[v.name for v in given].index("at") + 1 :]
        shapes = [[bound_size(d.size, env) for d in v.type.dims] for v in inputs]
        dtypes = [self._state_dtype(v.type) for v in inputs]
        return [torch.zeros(shape, dtype=d, device=self.device) for shape, d in zip(shapes, dtypes, strict=True)]

    def _state_dtype(self, type_: TensorType) -> torch.dtype:
        """What a state is kept in: that of the weights, or as wide as sums are."""
        own = next(self.parameters()).dtype
        wide = own if own == torch.float64 else torch.float32
        return own if type_.dtype == self.graph.params[0].type.dtype else wide

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
    release: Callable[[str], None] = getattr(weights, "release", lambda name: None)  # of a file's pages, where they are such
    for name, (type_, _) in parameters(graph).items():
        found = weights[name]
        own = found.to(DTYPES[type_.dtype])
        if own is not found:
            release(name)
        del found
        yield name, own


def _found(root: torch.nn.Module, path: Sequence[str]) -> torch.nn.Parameter:
    """`get_parameter` in a tenth of its time: a decode step asks for every parameter anew, since any may have been replaced."""
    for part in path[:-1]:
        root = root._modules[part]  # type: ignore[assignment] # a module, as `_place` made it
    found = root._parameters[path[-1]]  # pyright: ignore[reportPrivateUsage] # of torch.nn, as `get_parameter` reads it
    assert found is not None
    return found


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
