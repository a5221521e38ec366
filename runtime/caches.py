"""What a model remembers of the rows it has read: keys and values, windows, convolution and recurrent states."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..ir import DataError, Graph, TensorType
from ..ir.sizes import value as bound_size
from .pages import Held, Pool
from .variant import Variant

Tensor = torch.Tensor
CHUNK = 512  # tokens of a row in one call, where layers look through a window: what its ring has room for beside it


@dataclass(frozen=True)
class Reader:
    """A model as a cache sees it."""

    run: Callable[..., tuple[Tensor, ...]]  # variant, inputs -> logits, states
    graph: Callable[[Variant], Graph]
    dtype: Callable[[TensorType], torch.dtype]
    device: torch.device
    limit: int  # positions there are, 0 where any number can be
    check: Callable[[Tensor], None]  # refuses what is no token of the vocabulary
    meant: int = 0  # positions that the model is meant for, 0 where it says nothing
    windows: tuple[int, ...] = ()  # of layers whose keys can wait in a ring


@dataclass(frozen=True)
class Trial:
    """What a cache was before tokens were tried."""

    lengths: tuple[int, ...]
    kept: Mapping[int, Tensor]  # the states that are not made of slots
    tokens: Tensor


class Cache:
    """The states of a batch of rows, each row with a length of its own; `model.cache(rows)` makes one.

    Keys and values of full attention wait contiguously, or in pages of a pool that forks share; those of a window in a ring.
    Tokens that are `waiting` belong to their row and are read with the next ones.
    """

    def __init__(self, reader: Reader, rows: int, room: int = 0, *, page: int = 0, chunk: int = 0) -> None:
        for name, number, least in (("rows", rows, 1), ("room", room, 0), ("page", page, 0), ("chunk", chunk, 0)):
            if number < least:
                raise DataError(f"a cache's {name} is {number}, must be {least} or more")
        self.reader, self.task = reader, "paged" if page else "rows"
        graph = reader.graph(Variant(self.task, last=True))
        self.names = [v.name for v in graph.inputs]
        self.types = [v.type for v in graph.inputs[self.names.index("at") + 1 :]]
        self.where = [_where(t) for t in self.types]
        self.windows = sorted({int(w[1:]) for w in self.where if w.startswith("w")})
        self.room, self.page, self.chunk = max(room, 2), page, chunk or CHUNK
        self.lengths, self.waiting = [0] * rows, [torch.empty(0, dtype=torch.int64, device=reader.device)] * rows
        self.trial: Trial | None = None
        self._fill()

    @torch.inference_mode()  # as every call, so that one compiled program serves them all
    def _fill(self) -> None:
        """Empty states, where programs find them."""
        device, sizes = self.reader.device, self._sizes()
        self.states = [
            torch.zeros([bound_size(d.size, sizes) for d in t.dims], dtype=self.reader.dtype(t), device=device)
            for t in self.types
        ]
        self.at = torch.zeros(len(self.lengths), dtype=torch.int64, device=device)
        pooled = [s for s, w in zip(self.states, self.where, strict=True) if w == "pages"]
        width = -(-self.room // self.page) if pooled else 0
        self._hold(Held(Pool(self.page, pooled), len(self.lengths), width) if pooled else None)

    def _hold(self, held: Held | None) -> None:
        self.held = held
        if held is not None:
            weakref.finalize(self, held.close)  # pages go back to the pool with the cache

    def _sizes(self) -> dict[str, int]:
        rows = len(self.lengths)
        pages = max(2, rows * -(-self.room // self.page)) if self.page else 0
        rings = {f"w{w}": min(w - 1 + self.chunk, self.room) for w in self.windows}
        return {"b": rows, "n": rows, "m": self.room, "pages": pages, "page": self.page, **rings}

    # -- use ------------------------------------------------------------------------------

    def belongs(self, reader: Reader) -> None:
        """Refuse a model that this cache was not made by."""
        if self.reader.run != reader.run:
            raise DataError("the cache was made by another model, whose states it holds; make one by this model's own cache()")

    @property
    def length(self) -> Tensor:
        """Tokens of each row, those that are waiting included."""
        return torch.tensor([n + len(w) for n, w in zip(self.lengths, self.waiting, strict=True)])

    @torch.inference_mode()
    def fork(self) -> Cache:
        """A cache that goes on from here by itself; pages are shared until one of the two writes into them."""
        made = copy.copy(self)
        made.lengths, made.waiting, made.at = list(self.lengths), list(self.waiting), self.at.clone()
        made.states = [s if w == "pages" else s.clone() for s, w in zip(self.states, self.where, strict=True)]
        made._hold(self.held.fork() if self.held is not None else None)
        return made

    def add(self, rows: Sequence[Tensor]) -> None:
        """Let tokens wait behind what the rows have."""
        if len(rows) != len(self.lengths):
            raise DataError(f"there are {len(rows)} rows of tokens; the cache has {len(self.lengths)}, give one for each")
        for i, row in enumerate(rows):
            if row.dim() != 1 or row.is_floating_point():
                raise DataError(f"row {i} of the tokens is {row.dtype}{list(row.shape)}, must be int64 [length]")
            if len(row):
                self.reader.check(row)
        self.wait(rows)

    def wait(self, rows: Sequence[Tensor]) -> None:
        """As `add`, for tokens that the model itself has chosen."""
        given = [row.to(self.reader.device, torch.int64) for row in rows]
        self.waiting = [torch.cat([old, new]) if len(old) else new for old, new in zip(self.waiting, given, strict=True)]

    def read(self, chunk: int = 0) -> Tensor:
        """Read what is waiting, so many tokens of a row at a time: the logits [b, vocab] behind each row's last token.

        Of a row that has nothing waiting they are zeros.
        """
        rows, longest = self.waiting, max(map(len, self.waiting))
        self._check(list(map(len, rows)))
        step = min(chunk or longest, self.chunk if self.windows else longest)
        found: Tensor | None = None
        for i in range(0, longest, max(step, 1)):
            logits = self._ends([r[i : i + step] for r in rows])
            over = torch.tensor([i < len(r) for r in rows], device=logits.device)
            found = logits if bool(over.all()) else torch.where(over[:, None], logits, 0 if found is None else found)
        self.waiting, self.trial = [r[:0] for r in rows], None
        if found is None:
            raise DataError("no token is waiting to be read; give at least one")
        return found

    def verify(self, tokens: Tensor) -> Tensor:
        """Try tokens [b, n] behind what the rows have: the logits [b, n, vocab] behind each; `rollback` keeps some of them."""
        if any(map(len, self.waiting)):
            self.read()
        if self.windows and tokens.shape[1] > self.chunk:
            raise DataError(
                f"{tokens.shape[1]} tokens are tried at once; a cache with windows has chunk {self.chunk}, make it larger"
            )
        self._check([tokens.shape[1]] * len(self.lengths))
        with torch.inference_mode():
            kept = {i: s.clone() for i, (s, w) in enumerate(zip(self.states, self.where, strict=True)) if not w}
        trial = Trial(tuple(self.lengths), kept, tokens)
        logits = self._call(tokens, None, last=False)
        self.trial = trial
        return logits

    def rollback(self, accepted: int | Sequence[int] | Tensor) -> None:
        """Keep the first `accepted` tokens that were tried, of all rows or of each: the rest has never been."""
        if self.trial is None:
            raise DataError("nothing was tried since the last tokens were read; call verify first")
        trial, n, rows = self.trial, self.trial.tokens.shape[1], len(self.lengths)
        given = accepted.tolist() if isinstance(accepted, Tensor) else accepted
        counts = [given] * rows if isinstance(given, int) else list(given)
        if len(counts) != rows or not all(0 <= c <= n for c in counts):
            raise DataError(f"accepted is {counts}; it must be from 0 to {n} for each of {rows} rows")
        self.trial = None
        if min(counts) == n:
            return
        self._stand(trial.lengths if trial.kept else [a + c for a, c in zip(trial.lengths, counts, strict=True)])
        for i, state in trial.kept.items():
            self.states[i] = state.clone()  # a fork may go back to it too
        if trial.kept and any(counts):
            self._ends([row[:c] for row, c in zip(trial.tokens, counts, strict=True)])

    # -- programs -------------------------------------------------------------------------

    def _ends(self, rows: Sequence[Tensor]) -> Tensor:
        """Read rows, packed where they differ in length: the logits [b, vocab] behind the last token of each."""
        counts = [len(r) for r in rows]
        if min(counts) == max(counts):
            return self._call(torch.stack([*rows]), None)[:, 0]
        return self._call(torch.cat([*rows])[None], counts)[0]

    @torch.inference_mode()
    def _call(self, tokens: Tensor, counts: Sequence[int] | None, *, last: bool = True) -> Tensor:
        """Logits of tokens [b, t], or of rows of so many tokens packed into one; of each row's last token, or of all."""
        each = [tokens.shape[1]] * len(self.lengths) if counts is None else list(counts)
        lengths = [a + c for a, c in zip(self.lengths, each, strict=True)]
        self._make_room(max(lengths))
        told = self._told(tokens, each, packed=counts is not None)
        logits, *states = self.reader.run(Variant(self.task, counts is not None, last=last), *told, *self.states)
        self.states = states
        if self.held is not None:
            self.held.pool.tensors = [s for s, w in zip(states, self.where, strict=True) if w == "pages"]
        self.at.add_(each[0] if counts is None else torch.tensor(each, device=self.at.device))
        self.lengths = lengths
        return logits

    def _told(self, tokens: Tensor, each: list[int], *, packed: bool) -> list[Tensor]:
        """The inputs in front of the states: tokens, where they stand, and where they are kept."""
        device = self.reader.device
        told = [tokens.to(device)]
        if packed:
            told.append(torch.tensor([0, *accumulate(each)], device=device))
        if self.held is not None:
            self.held.reserve(self.lengths, each)
            slots = self.held.slots(self.lengths, each).view(tokens.shape)
            told += [slots.to(device), self.held.table.to(device)]
            pooled = iter(self.held.pool.tensors)
            self.states = [next(pooled) if w == "pages" else s for s, w in zip(self.states, self.where, strict=True)]
        return [*told, self.at]

    def _make_room(self, length: int) -> None:
        """Slots for rows of this length; room at least doubles."""
        if length <= self.room or not any(w == "m" or w.startswith("w") for w in self.where):
            return
        self.room = max(length, 2 * self.room)
        sizes = self._sizes()
        for i, (state, where) in enumerate(zip(self.states, self.where, strict=True)):
            # A ring that is not full length yet has not turned, so that its tokens stay where they are.
            if (more := sizes.get(where, 0) - state.shape[1]) > 0 and where != "pages":
                self.states[i] = torch.cat([state, state.new_zeros(len(state), more, *state.shape[2:])], 1)

    def _stand(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        with torch.inference_mode():
            self.at.copy_(torch.tensor(self.lengths))

    def _check(self, counts: Sequence[int]) -> None:
        for row, (start, count) in enumerate(zip(self.lengths, counts, strict=True)):
            check_length(start + count, self.reader.limit, f"row {row}")


def check_length(length: int, limit: int, what: str) -> None:
    """Refuse more tokens than the model has positions for."""
    if limit and length > limit:
        raise DataError(f"{what} would have {length} tokens; the model has a table of {limit} positions, and none behind them")


def _where(state: TensorType) -> str:
    """Where a state's tokens wait: `m` slots of a row, a ring `w<window>`, `pages`; nothing where it has no tokens."""
    sizes = [str(d.size) for d in state.dims[:2] if isinstance(d.size, str)]
    return "pages" if sizes[0] == "pages" else sizes[1] if len(sizes) > 1 else ""


def carried(graph: Graph) -> list[bool]:
    """Which states of a program are carried on whole, and not made of slots."""
    names = [v.name for v in graph.inputs]
    return [not _where(v.type) for v in graph.inputs[names.index("at") + 1 :]]


def position_limit(graph: Graph) -> int:
    """How many positions a program has a table of; 0 where it has none."""
    for node in graph.nodes:
        maker = graph.makers.get(node.operands[-1]) if node.is_op("embedding") else None
        start = maker.attrs["by"] if maker is not None and maker.is_op("shift_positions") else 0
        maker = graph.makers.get(maker.operands[0]) if maker is not None and start else maker
        if maker is not None and maker.is_op("positions"):
            return int(node.operands[0].type.dims[0].size) - start
    return 0


def meant_length(graph: Graph, length: int) -> int:
    """Up to how many tokens a program that turns positions is meant for; 0 where it turns none."""
    return length if any(node.is_op("rope") for part in (graph, *graph.layers) for node in part.nodes) else 0


def windows_of(graph: Graph) -> tuple[int, ...]:
    """The windows of a program whose keys may wait in rings; none where its rows cannot have lengths of their own."""
    nodes = [node for part in (graph, *graph.layers) for node in part.nodes]
    if any(node.is_op("biased_attention") for node in nodes):
        return ()
    return tuple(sorted({int(n.attrs["window"]) for n in nodes if n.is_op("attention") and n.attrs["window"]}))
