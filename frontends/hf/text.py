"""A folder's own words: its tokenizer, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.errors import SpecError
from ..problems import shown
from .folder import inside, read_config, read_json

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
# What tools read beside the weights; a saved folder has those that the first one had.
BESIDE = (
    TOKENIZER, GENERATION, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
MAX_TOKENIZER, MAX_GENERATION = 2**27, 2**20
BROKEN = "\ufffd"  # stands where a character is not whole yet


@dataclass(frozen=True)
class Words:
    """Text to tokens and back, as a folder's tokenizer.json says."""

    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode([*tokens])

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens one by one, each piece once its characters are whole."""
        # A token is read behind the ones of the piece before it, which say whether a space stands between.
        held, start = list[int](), 0
        for token in tokens:
            held.append(token)
            before, now = self.decode(held[:start]), self.decode(held)
            if len(now) > len(before) and not now.endswith(BROKEN):
                yield now[len(before) :]
                held, start = held[start:], len(held) - start
        if rest := self.decode(held)[len(self.decode(held[:start])) :]:
            yield rest


def read_words(folder: str | Path) -> Words | None:
    """The tokenizer of a folder, None where it has none. Raises SpecError where it cannot be read."""
    path = Path(folder)
    if not (path / TOKENIZER).exists() and not (path / TOKENIZER).is_symlink():
        return None
    file = inside(path, TOKENIZER)
    try:
        from tokenizers import Tokenizer  # pyright: ignore # an extra, which need not be installed
    except ImportError:
        raise SpecError(
            f"{file.name}: is read by the package tokenizers, which is not installed; pip install 'plait[text]'"
        ) from None
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_TOKENIZER + 1)
        if len(data) > MAX_TOKENIZER:
            raise ValueError(f"it is larger than {MAX_TOKENIZER} bytes")
        return Words(Tokenizer.from_str(data.decode("utf-8")))
    except Exception as error:  # the package raises Exception itself for a file that it cannot read
        raise SpecError(f"{TOKENIZER}: cannot be read: {str(error)[:200]}") from None


def end_tokens(folder: str | Path) -> tuple[int, ...]:
    """The tokens that end a text, as generation_config.json says, or else config.json."""
    path = Path(folder)
    said: Any = read_json(inside(path, GENERATION), MAX_GENERATION) if (path / GENERATION).exists() else {}
    if not isinstance(said, dict):
        raise SpecError(f"{GENERATION}: is {shown(said)}; must be an object")
    found: Any = said["eos_token_id"] if "eos_token_id" in said else read_config(path).get("eos_token_id")  # pyright: ignore[reportUnknownVariableType]
    tokens: list[Any] = [] if found is None else list(found) if isinstance(found, list) else [found]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if bad := [t for t in tokens if not isinstance(t, int) or isinstance(t, bool)]:
        raise SpecError(f"eos_token_id: holds {shown(bad[0])}; must be a token's number or a list of them")
    return tuple(tokens)
