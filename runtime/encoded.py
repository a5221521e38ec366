"""EncoderDecoder: a model whose decoder reads what its encoder made of another sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ir import DataError
from .caches import Cache, Reader, check_length
from .generate import Prompts, Stops, Wish, generate, stream
from .module import CompiledModel
from .padding import rows_of
from .sampling import Sampling
from .variant import Variant

Tensor = torch.Tensor
IGNORE = -100


@dataclass(frozen=True)
class Memory:
    """What was computed once of the encoder's tokens: how many each row has, keys and values of each cross attention."""

    lengths: Tensor
    parts: tuple[Tensor, ...]


@dataclass(frozen=True)
class Speaker:
    """The decoder behind one memory, as generation sees a model."""

    model: EncoderDecoder
    memory: Memory
    vocab: int

    def reader(self) -> Reader:
        """The cached program, told the memory in every call."""
        own = self.model.reader()

        def run(variant: Variant, tokens: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return own.run(variant, tokens, self.memory.lengths, *self.memory.parts, *rest)

        return replace(own, run=run)

    def fresh_states(self, batch: int, length: int) -> list[Tensor]:
        return self.model.fresh_states(batch, length)

    def check_tokens(self, tokens: Tensor) -> None:
        self.model.check_tokens(tokens)


class EncoderDecoder(CompiledModel):
    """A compiled model with an encoder: `tokens` are the encoder's, `decoder_input_ids` what the decoder continues."""

    def __init__(self, *given: Any, start: int, pad: int, **options: Any) -> None:
        super().__init__(*given, **options)
        self.start, self.pad = start, pad  # the token that decoding starts with, and what is read where a label is none

    # -- use ------------------------------------------------------------------------------

    def forward(
        self, tokens: Tensor, cu: Tensor | None = None, seed: Tensor | None = None, *, labels: Tensor | None = None,
        local: bool = False, mask: Tensor | None = None, decoder_input_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [b, s, vocab] of the decoder's tokens [b, s], behind the encoder's [b, u]; with labels the loss.

        `mask` [b, u] is 0 where the encoder's tokens are padding, in front of a row's own or behind them: it changes no number.
        """
        if labels is not None:
            return self.loss(tokens, labels, cu, seed, mask=mask, decoder_input_ids=decoder_input_ids)
        if decoder_input_ids is None:
            raise DataError(
                "decoder_input_ids is missing; give the decoder's tokens, or labels, from which they follow, or call generate"
            )
        return self._run(*self._seeded("logits", [*self._pair(tokens, decoder_input_ids, cu, mask)], seed))[0]

    def whole_logits(self, tokens: Tensor, cu: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        """Refused: who asks for logits of a text alone, such as `train`, has no pairs."""
        raise DataError("a text alone is for models without an encoder; this one learns from pairs: loss(tokens, labels)")

    def loss(
        self, tokens: Tensor, labels: Tensor | None = None, cu: Tensor | None = None, seed: Tensor | None = None, *,
        local: bool = False, mask: Tensor | None = None, decoder_input_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean cross entropy of labels [b, s], -100 where none is wanted; the decoder reads them one place later.

        Its first token is then the model's start token. With `decoder_input_ids` it reads these.
        """
        if labels is None:
            raise DataError("labels is missing; a model with an encoder has no next token of its input, give what is wanted")
        read = shifted_right(labels, self.start, self.pad) if decoder_input_ids is None else decoder_input_ids
        if labels.shape != read.shape:
            raise DataError(f"labels is {list(labels.shape)}; it must be as the decoder's tokens are, {list(read.shape)}")
        first, *rest = self._pair(tokens, read, cu, mask)
        return self._run(*self._seeded("loss", [first, labels.to(first.device), *rest], seed))[0]

    def _pair(self, tokens: Tensor, decoder: Tensor, cu: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The decoder's tokens, the encoder's, and how many of these each row has."""
        if cu is not None:
            raise DataError("cu packs segments in one row, and a model with an encoder has rows; give it rows and a mask")
        decoder, (source, lengths) = self._tokens(decoder), self._source(tokens, mask)
        if len(decoder) != len(source):
            raise DataError(f"the decoder's tokens have {len(decoder)} rows, the encoder's {len(source)}; they go in pairs")
        check_length(decoder.shape[1], self.limit, "a row of the decoder's tokens")
        return decoder, source, lengths

    def _source(self, tokens: Prompts, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The encoder's tokens from each row's first real one on, and how many each row has."""
        rows = rows_of(self._tokens(tokens) if isinstance(tokens, Tensor) else tokens, mask)
        lengths = [len(row) for row in rows]
        if empty := [i for i, n in enumerate(lengths) if not n]:
            raise DataError(f"row {empty[0]} of the encoder's tokens is empty; every row must have at least one")
        check_length(max(lengths), self.limit, "a row of the encoder's tokens")
        source = torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True, padding_value=self.pad)
        return self._tokens(source), torch.tensor(lengths, device=self.device)

    def _seeded(self, task: str, given: list[Tensor], seed: Tensor | None) -> tuple[Any, ...]:
        """The program for a task, and its inputs, with a seed where it trains with dropout."""
        variant = Variant(task, False, self.training)
        names = [v.name for v in self.runner(variant).program.graph.inputs]
        if "seed" in names:
            drawn = torch.tensor(int(torch.randint(2**31, ()))) if seed is None else seed
            given = [*given[: names.index("seed")], drawn.to(self.device), *given[names.index("seed") :]]
        return variant, *given

    # -- generation -----------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, tokens: Prompts, mask: Tensor | None = None) -> Memory:
        """Run the encoder once: what every step of the decoder reads."""
        source, lengths = self._source(tokens, mask)
        # Read in every step: side by side, as the decode step on a CPU wants what it reads.
        return Memory(lengths, tuple(part.contiguous() for part in self._run(Variant("memory"), source, lengths)))

    def generate(
        self, tokens: Prompts, max_new_tokens: int, *, mask: Tensor | None = None, cache: Cache | None = None,
        prefill_chunk: int = 0, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        repetition_penalty: float = 1.0, seed: int | Sequence[int] = 0, stop: Stops = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """What the decoder says to the encoder's tokens, its start token (or `decoder_input_ids`) in front.

        The encoder runs once. Tokens are [b, u] with a `mask`, or a list of rows; the result is as for other models.
        """
        how = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
        wish = Wish(max_new_tokens, how, seed, stop, cache, prefill_chunk)
        return self._spoken(generate, tokens, mask, decoder_input_ids, wish)

    def stream(
        self, tokens: Prompts, max_new_tokens: int, *, mask: Tensor | None = None, cache: Cache | None = None,
        prefill_chunk: int = 0, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        repetition_penalty: float = 1.0, seed: int | Sequence[int] = 0, stop: Stops = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """The decoder's new tokens [b], one position at a time; arguments are those of `generate`."""
        how = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
        wish = Wish(max_new_tokens, how, seed, stop, cache, prefill_chunk)
        return self._spoken(stream, tokens, mask, decoder_input_ids, wish)

    def _spoken(self, way: Callable[..., Any], tokens: Prompts, mask: Tensor | None, first: Tensor | None, wish: Wish) -> Any:
        """Tokens generated by `way` behind the encoder's memory."""
        if wish.cache is not None:
            raise DataError("a cache is for models without an encoder; give decoder_input_ids what the decoder has said so far")
        memory = self.encode(tokens, mask)
        rows = len(memory.lengths)
        said = torch.full((rows, 1), self.start, device=self.device) if first is None else self._tokens(first)
        if len(said) != rows:
            raise DataError(f"decoder_input_ids has {len(said)} rows, the encoder's tokens {rows}; they go in pairs")
        prompts = said if isinstance(tokens, Tensor) else [*said]
        return way(Speaker(self, memory, self.vocab), prompts, wish)

    def cache(self, rows: int, room: int = 0, *, page: int = 0, chunk: int = 0) -> Cache:
        """Refused: the rows of a cache have no encoder's tokens."""
        raise DataError("a cache is for models without an encoder; generate and stream keep what an encoder made by themselves")

    def verify(self, cache: Cache, tokens: Tensor) -> Tensor:
        """Refused, as `cache` is."""
        raise DataError("verify tries tokens behind a cache, which a model with an encoder has none of")


def shifted_right(labels: Tensor, start: int, pad: int) -> Tensor:
    """What a decoder reads to say the labels: the start token, then every label but the last, `pad` where there is none."""
    read = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], 1)
    return read.masked_fill(read == IGNORE, pad)
