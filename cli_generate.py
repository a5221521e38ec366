"""`plait generate`: a model's own text, as it comes."""

from __future__ import annotations

import codecs
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from plait.cli_output import fail_cleanly, note, problem, write_json, write_out

if TYPE_CHECKING:
    from plait.runtime import CompiledModel


def mount(app: typer.Typer) -> None:
    """Add `generate`."""
    app.command("generate")(generate_command)


@dataclass(frozen=True)
class Voice:
    """How text becomes a model's tokens and tokens become text, and which tokens end it."""

    encode: Callable[[str], list[int]]
    pieces: Callable[[Iterable[int]], Iterator[str]]
    ends: frozenset[int] = frozenset()


@fail_cleanly
def generate_command(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a run's folder, or a saved file.")],
    prompt: Annotated[str | None, typer.Option(help="What the text begins with.")] = None,
    ids: Annotated[str | None, typer.Option(help="The prompt as token numbers, 1,2,3; the text is numbers then.")] = None,
    tokens: Annotated[int, typer.Option(min=0, help="How many tokens to add; bytes, where a run was trained on them.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token every time.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many of the likeliest only; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that make this chance together.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw from those of at least this part of the likeliest's chance.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens that were there less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text, or this token number; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    jit: Annotated[bool, typer.Option("--jit", help="Compile first: pays off for many thousand tokens.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Continue a text with a model, a token at a time, until it ends or --tokens are there."""
    from plait.runtime.sampling import Sampling

    Sampling(repetition_penalty, temperature, top_k, top_p, min_p)  # refused before weights are read
    begin = begun(prompt, ids)
    voice = voice_of(path, numbers=ids is not None, stop=stop or [])
    start = voice.encode(begin)
    model = opened(path, jit=jit, numbers=ids is not None)
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    drawn = fresh(model, start, tokens, voice.ends, how | {"repetition_penalty": repetition_penalty})
    pieces = until(voice.pieces(drawn), stop or [] if ids is None else [])
    if as_json:
        return write_json({"prompt": begin, "text": "".join(pieces)})
    show(begin, pieces)


def begun(prompt: str | None, ids: str | None) -> str:
    """The prompt, as text or as numbers, and never both."""
    if (prompt is None) == (ids is None):
        raise problem("give what the text begins with, either --prompt or --ids")
    begin = prompt if prompt is not None else ids or ""
    if not begin:
        raise problem(f"the prompt is empty; give at least one {'character' if ids is None else 'token number'} to continue")
    return begin


def show(begin: str, pieces: Iterable[str]) -> None:
    """Text as it comes; an interrupted line is ended."""
    write_out(begin)
    try:
        for piece in pieces:
            write_out(visible(piece) if sys.stdout.isatty() else piece)
    finally:
        write_out("\n")


# -- tokens and text ------------------------------------------------------------------------


def voice_of(path: Path, *, numbers: bool, stop: Sequence[str]) -> Voice:
    """Numbers where they were asked for, else a folder's own tokenizer, else bytes."""
    from plait.frontends.hf import end_tokens, is_folder, read_words

    ends = end_tokens(path) if is_folder(path) else ()
    if numbers:
        return Voice(numbered, _numbers, frozenset([*ends, *(n for text in stop for n in numbered(text))]))
    if not is_folder(path):
        return Voice(lambda text: list(text.encode()), _characters)
    words = read_words(path)
    if words is None:
        raise problem(f"{path}: holds no tokenizer.json, so text has no tokens; give their numbers: --ids 1,2,3")
    return Voice(words.encode, words.pieces, frozenset(ends))


def numbered(text: str) -> list[int]:
    """1,2,3"""
    parts = text.split(",")
    bad = [p for p in parts if not (p.strip().isascii() and p.strip().isdigit() and len(p.strip()) < 10)]
    if bad:
        raise problem(f"{bad[0][:40]!r} is no token number; give numbers with commas between, such as 1,2,3")
    return [int(p) for p in parts]


def _numbers(tokens: Iterable[int]) -> Iterator[str]:
    return (f",{token}" for token in tokens)


def _characters(tokens: Iterable[int]) -> Iterator[str]:
    """Bytes as text, as soon as each character is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(bytes([token]))
    yield decoder.decode(b"", final=True)


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Text up to the first of some words; what may still become one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        if found := [i for i in map(held.find, filter(None, stops)) if i >= 0]:
            yield held[: min(found)]
            return
        keep = max((n for word in stops for n in range(1, len(word)) if held.endswith(word[:n])), default=0)
        out, held = held[: len(held) - keep], held[len(held) - keep :]
        if out:
            yield out
    if held:
        yield held


def visible(text: str) -> str:
    """Text that cannot drive a terminal: other control characters than line ends and tabs are shown as dots."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


# -- models ---------------------------------------------------------------------------------


def opened(path: Path, *, jit: bool, numbers: bool) -> CompiledModel:
    """The model in a folder of either kind, or in a file."""
    from plait.api import compile, load
    from plait.frontends.hf import is_folder
    from plait.runtime.rundir import checkpoint_file

    if is_folder(path):
        return compile(path, mode="infer", jit=jit)
    if path.is_dir() and not (path / "latest").exists():
        what = "must be a Hugging Face folder, a run's folder or a saved file"
        raise problem(f"{path}: has neither a config.json nor a run's `latest`; {what}")
    if not path.exists():
        raise problem(f"{path}: there is no such file or folder")
    model = load(checkpoint_file(path), dtype="f32", mode="infer", jit=jit)
    if model.vocab != 256 and not numbers:
        raise problem(
            f"{path}: vocab is {model.vocab}, must be 256: the text is written as bytes; or give token numbers: --ids"
        )
    return model


def fresh(model: CompiledModel, start: list[int], count: int, ends: frozenset[int], how: dict[str, Any]) -> Iterator[int]:
    """The tokens after the prompt, up to one that ends it; what is wrong with the prompt is said at once."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stream = model.stream([torch.tensor(start, dtype=torch.int64)], count, stop=[*ends] or None, **how)
    for warning in said:
        note(f"plait: {warning.message}")
    return takewhile(lambda token: token not in ends, map(int, stream))


def written(model: CompiledModel, prompt: str, count: int, **how: Any) -> Iterator[str]:
    """The continuation of a byte model as text."""
    return _characters(fresh(model, list(prompt.encode()), count, frozenset(), how))
