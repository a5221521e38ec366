"""Generation: prompts of any lengths read into states, then a token a row at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from ..ir import DataError
from .caches import CHUNK, Cache, Reader, carried, check_length
from .capture import Decoder, recorder
from .padding import rows_of
from .sampling import Chooser, Sampling
from .variant import Variant

Tensor = torch.Tensor
Prompts = Tensor | Sequence[Tensor]
Stops = int | Sequence[int] | Sequence[Sequence[int]] | None


class Model(Protocol):
    """What generation asks of a model."""

    vocab: int

    def reader(self) -> Reader: ...
    def fresh_states(self, batch: int, length: int) -> list[Tensor]: ...
    def check_tokens(self, tokens: Tensor) -> None: ...


@dataclass(frozen=True)
class Wish:
    """How text is to be continued."""

    count: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | Sequence[int] = 0
    stop: Stops = None
    cache: Cache | None = None
    chunk: int = 0


def generate(model: Model, prompts: Prompts, wish: Wish, mask: Tensor | None = None) -> Tensor | list[Tensor]:
    """Prompts continued: a tensor for a tensor, whole rows for a list of them, each up to its own stop token."""
    made = [*stream(model, prompts, wish, mask)]
    if isinstance(prompts, Tensor):
        device = model.reader().device
        return torch.cat([prompts.to(device, torch.int64), *(new[:, None] for new in made)], 1)
    rows = rows_of(prompts, None)
    new = torch.stack(made, 1).cpu() if made else torch.empty(len(rows), 0, dtype=torch.int64)
    return [
        torch.cat([row.cpu(), own[: _end(own, stops)]])
        for row, own, stops in zip(rows, new, _stops(wish, len(rows)), strict=True)
    ]


def _end(tokens: Tensor, stops: frozenset[int]) -> int:
    return next((i + 1 for i, token in enumerate(tokens.tolist()) if token in stops), len(tokens))


def stream(model: Model, prompts: Prompts, wish: Wish, mask: Tensor | None = None) -> Iterator[Tensor]:
    """The new tokens [b], one position at a time; a row that met a stop token repeats it. Ends once all have.

    Rows that are equally long run the program with one length; others are packed, so that padding is never read.
    """
    if wish.count < 0 or wish.chunk < 0:
        name, number = ("max_new_tokens", wish.count) if wish.count < 0 else ("prefill_chunk", wish.chunk)
        raise DataError(f"{name} is {number}, must be 0 or more")
    rows = rows_of(prompts, mask)
    _check_rows(model, rows, wish)
    stops, seeds = _stops(wish, len(rows)), _seeds(wish, len(rows))
    chooser = Chooser(wish.sampling, seeds, rows, model.vocab)
    if wish.cache is not None:
        wish.cache.wait(rows)
        return _kept(wish.cache, chooser, stops, wish)
    even = len({len(r) for r in rows}) == 1
    read, step = (_even if even else _ragged)(model, rows, wish)
    return _choose(read, step, chooser, stops, wish.count)


def _check_rows(model: Model, rows: Sequence[Tensor], wish: Wish) -> None:
    reader, cache = model.reader(), wish.cache
    if cache is not None:
        cache.belongs(reader)
    if cache is not None and len(cache.lengths) != len(rows):
        raise DataError(f"there are {len(rows)} prompts; the cache has {len(cache.lengths)} rows, give one prompt for each")
    before = [0] * len(rows) if cache is None else cache.length.tolist()
    for i, (row, start) in enumerate(zip(rows, before, strict=True)):
        if not len(row) and (cache is None or not len(cache.waiting[i])):
            raise DataError(f"prompt {i} is empty; give at least one token to continue")
        if len(row):
            model.check_tokens(row)
        # The last new token is given out, and not read.
        check_length(start + len(row) + max(wish.count - 1, 0), reader.limit, f"prompt {i} with {wish.count} new tokens")
    longest = max(start + len(row) for row, start in zip(rows, before, strict=True)) + wish.count
    if reader.meant and not reader.limit and longest > reader.meant:
        # The same words and place every time, so that Python says it once.
        said = f"the model is meant for {reader.meant} tokens, and a longer text is asked for: what it says beyond may be poor"
        warnings.warn(said, UserWarning, stacklevel=2)


Read = Callable[[], Tensor]
Step = Callable[[Tensor], Tensor]


def _even(model: Model, rows: Sequence[Tensor], wish: Wish) -> tuple[Read, Step]:
    """Rows of one length. On a CUDA device the step of one token is recorded as a CUDA graph, unless it waits for the host."""
    reader = model.reader()
    tokens = torch.stack([*rows]).to(reader.device)
    room, chunk = tokens.shape[1] + wish.count, wish.chunk or CHUNK
    if any(window - 1 + chunk < room for window in reader.windows):
        variant, run = Variant("rows", last=True), partial(_in_rings, reader)
        states = Cache(reader, len(rows), room, chunk=chunk).states
    else:
        variant = Variant("cached", last=True)
        run, states = partial(reader.run, variant), model.fresh_states(len(rows), room)
        chunk = wish.chunk or tokens.shape[1]
    decode = Decoder(run, states, recorder(reader.device, wish.count), carried(reader.graph(variant)))

    def read() -> Tensor:
        *parts, last = tokens.split(chunk, 1)
        for part in parts:
            decode(part)
        return decode(last)

    return read, lambda new: decode(new[:, None])


def _in_rings(reader: Reader, tokens: Tensor, at: Tensor, *states: Tensor) -> Sequence[Tensor]:
    """A step of rows that are equally long, where keys of a window wait in rings."""
    return reader.run(Variant("rows", last=True), tokens, at.expand(len(tokens)).contiguous(), *states)


def _ragged(model: Model, rows: Sequence[Tensor], wish: Wish) -> tuple[Read, Step]:
    cache = Cache(model.reader(), len(rows), max(map(len, rows)) + wish.count)
    cache.wait(rows)

    def step(new: Tensor) -> Tensor:
        cache.wait([*new[:, None]])
        return cache.read()

    return lambda: cache.read(wish.chunk), step


def _choose(read: Read, step: Step, chooser: Chooser, stops: Sequence[frozenset[int]], count: int) -> Iterator[Tensor]:
    """Tokens of rows whose states nobody keeps: a row that is done goes on unheard."""
    last, done = None, [False] * len(stops)
    for i in range(count):
        with torch.inference_mode():
            new = chooser(read() if i == 0 or last is None else step(last))
        last = _repeated(new, last, done)
        yield last
        done = _done(last, done, stops)
        if all(done):
            return


def _kept(cache: Cache, chooser: Chooser, stops: Sequence[frozenset[int]], wish: Wish) -> Iterator[Tensor]:
    """Tokens of rows that go on another time: what a row gave out waits in the cache, and nothing else does."""
    last, done = None, [False] * len(stops)
    for _ in range(wish.count):
        with torch.inference_mode():
            new = chooser(cache.read(wish.chunk))
        last = _repeated(new, last, done)
        cache.wait([token[:0] if over else token for token, over in zip(last[:, None], done, strict=True)])
        yield last
        done = _done(last, done, stops)
        if all(done):
            return


def _repeated(new: Tensor, last: Tensor | None, done: Sequence[bool]) -> Tensor:
    return new.clone() if last is None or not any(done) else torch.where(torch.tensor(done, device=new.device), last, new)


def _done(last: Tensor, done: Sequence[bool], stops: Sequence[frozenset[int]]) -> list[bool]:
    if not any(stops):
        return [*done]
    return [over or token in own for over, token, own in zip(done, last.tolist(), stops, strict=True)]


def _stops(wish: Wish, rows: int) -> list[frozenset[int]]:
    """The tokens that end each row."""
    stop = wish.stop
    if stop is None or isinstance(stop, int):
        return [frozenset([] if stop is None else [stop])] * rows
    if all(isinstance(token, int) for token in stop):
        return [frozenset(stop)] * rows  # type: ignore[arg-type] # integers, as has been seen
    if len(stop) != rows:
        raise DataError(f"stop has tokens for {len(stop)} rows, there are {rows}; give one list for each, or one for all")
    return [frozenset([own] if isinstance(own, int) else own) for own in stop]


def _seeds(wish: Wish, rows: int) -> list[int]:
    """One seed for each row; from a single one, row i draws by seed + i."""
    given = [wish.seed + i for i in range(rows)] if isinstance(wish.seed, int) else [*wish.seed]
    if len(given) != rows:
        raise DataError(f"there are {len(given)} seeds and {rows} rows; give one for each, or one for all")
    if bad := [seed for seed in given if not 0 <= seed < 2**63]:
        raise DataError(f"a seed is {bad[0]}, must be from 0 to 2**63 - 1")
    return given
