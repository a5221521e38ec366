"""Megatron's hybrid layer pattern: one letter a block, such as `GEGEGE*E`."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import SpecError

LETTERS = {"M": "mamba2", "G": "gdn", "*": "attention", "-": "mlp", "E": "moe"}
NOT_BUILT = {"+": "multi-head latent attention", "D": "DeepSeek sparse attention"}
SEPARATORS = {"|": "pipeline stage border", "/": "multi-token prediction"}
MAX_LENGTH = 10_000


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: the decoder's letters, split by pipeline stage, and one string per prediction depth."""

    letters: str
    stages: tuple[str, ...]
    mtp: tuple[str, ...]

    def __str__(self) -> str:
        return "/".join(["|".join(self.stages), *self.mtp])


def parse_pattern(text: str) -> Pattern:
    """Read a pattern, or say under which letter it goes wrong."""
    if not text or len(text) > MAX_LENGTH:
        raise SpecError(f"pattern has {len(text)} letters; must have 1 to {MAX_LENGTH}, such as 'GEGEGE*E'")
    for at, letter in enumerate(text):
        if letter not in LETTERS and letter not in NOT_BUILT and letter not in SEPARATORS:
            raise _at(text, at, f"{letter!r} is no layer; {_alphabet(letter)}")
    _refuse_mixed(text)
    main, *mtp = text.split("/")
    _refuse_empty_stage(text, main)
    _refuse_uneven_depths(text, main, mtp)
    return Pattern(main.replace("|", ""), tuple(main.split("|")), tuple(mtp))


def pattern_names(text: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The kind behind each letter and the blocks per pipeline stage; what is not built yet is refused by name."""
    pattern = parse_pattern(text)
    if pattern.mtp:
        raise _at(text, text.index("/"), "multi-token prediction is not built yet; leave out '/' and what follows")
    for at, letter in enumerate(text):
        if letter in NOT_BUILT:
            raise _at(text, at, f"{NOT_BUILT[letter]} is not built yet; use '*' for softmax attention")
    stages = tuple(len(stage) for stage in pattern.stages) if len(pattern.stages) > 1 else ()
    return tuple(LETTERS[letter] for letter in pattern.letters), stages


def _at(text: str, at: int, problem: str) -> SpecError:
    """An error with a caret under the offending letter, in a window of a long pattern."""
    start = max(0, at - 60)
    window = text[start : at + 20]
    # An odd character would move the caret from under it.
    line = "".join(c if c.isascii() and c.isprintable() else "?" for c in window)
    return SpecError(f"pattern, letter {at + 1}: {problem}\n  {line}\n  {' ' * (at - start)}^")


def _alphabet(letter: str) -> str:
    upper = letter.upper()
    hint = f"did you mean {upper!r}? " if upper in LETTERS else ""
    return hint + "known: " + ", ".join(f"{k} {v}" for k, v in {**LETTERS, **NOT_BUILT, **SEPARATORS}.items())


def _refuse_mixed(text: str) -> None:
    latent = next((at for at, letter in enumerate(text) if letter in NOT_BUILT), None)
    if latent is not None and "*" in text:
        name = NOT_BUILT[text[latent]]
        raise _at(text, max(latent, text.index("*")), f"'*' attention and {text[latent]!r} {name} cannot be in one pattern")


def _refuse_empty_stage(text: str, main: str) -> None:
    if not main:
        raise _at(text, 0, "no layer stands before '/'; the decoder needs at least one")
    at = 0
    for stage in main.split("|"):
        if not stage:
            raise _at(text, min(at, len(text) - 1), "a pipeline stage has no layer; put one beside this border")
        at += len(stage) + 1


def _refuse_uneven_depths(text: str, main: str, mtp: list[str]) -> None:
    at = len(main) + 1
    for depth in mtp:
        if "|" in depth:
            raise _at(text, at + depth.index("|"), "a pipeline stage border cannot stand in a prediction depth")
        if not depth or depth != mtp[0]:
            problem = f"a prediction depth is {depth!r}; all must be equal and not empty (the first is {mtp[0]!r})"
            raise _at(text, min(at, len(text) - 1), problem)
        at += len(depth) + 1
