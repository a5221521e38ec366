"""What the command line reads and prints: files in, IR on stdout, everything else on stderr, errors one screen long."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import typer

P = ParamSpec("P")
MAX_BYTES = 2**26  # the parser reads 2**24 characters, of at most four bytes
LOOSE = 14  # the least width in which a column of text is still read with ease
MAX_LINES = 40  # of an error: what is first is what helps


def fail_cleanly(command: Callable[P, None]) -> Callable[P, None]:
    """A user's error as one message and exit code 1, a closed pipe as silence, Ctrl-C as 130; a bug keeps its traceback."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            _silence()
            raise typer.Exit(141) from None  # what a shell sees of `cat` there
        except KeyboardInterrupt:
            note("plait: interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            from plait.ir.errors import PlaitError  # torch comes with it, and most commands end well

            if not isinstance(error, PlaitError):
                raise
            note(error_text(error))
            raise typer.Exit(1) from None

    return guarded


def error_text(error: Exception) -> str:
    """`plait: error: ...`, cut to a screen."""
    lines = (str(error) or type(error).__name__).splitlines()
    more = [f"  ... and {len(lines) - MAX_LINES} lines more"] if len(lines) > MAX_LINES else []
    return "\n".join(["plait: error: " + "\n".join(lines[:MAX_LINES]), *more])


def _silence() -> None:
    """Nobody reads stdout any more: let the flush at exit go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str) -> None:
    """A line for a person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def problem(text: str) -> Exception:
    """A user's error, to be raised."""
    from plait.ir.errors import PlaitError

    return PlaitError(text)


def read_text(file: str) -> str:
    """The text of a file, or of stdin for `-`. Raises PlaitError for what is absent, a directory, too large, or no text."""
    name = "stdin" if file == "-" else file
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if file == "-" else _head(file)
        if len(data) > MAX_BYTES:
            raise problem(f"{name}: is larger than {MAX_BYTES} bytes; give a file of text")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise problem(f"{name}: is not UTF-8 text (byte {error.start}); give a file of text") from None
    except FileNotFoundError:
        raise problem(f"{name}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise problem(f"{name!r}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise problem(f"{name}: is empty")
    return text


def _head(file: str) -> bytes:
    with Path(file).open("rb") as opened:
        return opened.read(MAX_BYTES + 1)


def write_out(text: str, output: str = "-") -> None:
    """Text to stdout for `-`, else to a file that is replaced whole or not at all."""
    if output == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    from plait.ir.files import write_text

    path = os.path.realpath(output)  # a link stays a link
    if not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path):
        return write_text(path, text)
    try:  # a device or a pipe is written to, never replaced
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise problem(f"{output}: cannot be written: {error.strerror or error}") from None


def write_json(value: Any, output: str = "-") -> None:
    """One JSON object; numbers JSON does not have become text."""
    write_out(json.dumps(plain(value), indent=2, allow_nan=False) + "\n", output)


def plain(value: Any) -> Any:
    """Mappings, lists, text and finite numbers alone."""
    match value:
        case Mapping():
            return {str(k): plain(v) for k, v in value.items()}
        case str() | bool() | int() | None:
            return value
        case float():
            return value if abs(value) < float("inf") else str(value)
        case Iterable():
            return [plain(v) for v in value]
        case _:
            return str(value)


@dataclass(frozen=True)
class Table:
    """Rows under column names; a column of numbers stands right."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def is_number(self, index: int) -> bool:
        cells = [row[index] for row in self.rows if row[index] not in ("", "-")]
        return bool(cells) and all(cell.lstrip("-")[:1].isdigit() for cell in cells)

    def fits(self, width: int) -> bool:
        """Whether columns that must not wrap, names and numbers, leave the others room."""
        stiff = [w for i, w in enumerate(self.widths) if i == 0 or self.is_number(i)]
        return sum(stiff) + len(stiff) + (len(self.columns) - len(stiff)) * LOOSE <= width

    @property
    def widths(self) -> list[int]:
        return [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]

    def __str__(self) -> str:
        widths = self.widths
        right = [self.is_number(i) for i in range(len(self.columns))]
        lines = [
            "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
            for row in (self.columns, *self.rows)
        ]
        return "\n".join([self.title] * bool(self.title) + lines) + "\n"


def show(tables: Sequence[Table], output: str = "-") -> None:
    """Tables drawn on a terminal, aligned text anywhere else."""
    if output == "-" and sys.stdout.isatty():
        return _draw(tables)
    write_out("\n".join(map(str, tables)), output)


def _draw(tables: Sequence[Table]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()  # it honours NO_COLOR
    for table in tables:
        if not table.fits(console.width):
            write_out(f"{table}\n")
            continue
        title = Text(table.title, style="bold") if table.title else None
        drawn = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for i, name in enumerate(table.columns):
            number = table.is_number(i)
            drawn.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number or i == 0)
        for row in table.rows:
            drawn.add_row(*(Text(cell) for cell in row))
        console.print(drawn)


def count(number: float) -> str:
    """`8.03B`, `4.9M`, `512`: three digits and a letter."""
    for letter, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g}{letter}" if number < 999.5 * unit else f"{number / unit:.0f}{letter}"
    return f"{number:.4g}"


def size(number: float) -> str:
    """`15.0 GiB`, `9.8 MiB`, `512 B`."""
    for name, unit in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:.0f} B"


def suggestion(word: str, known: Iterable[str]) -> str:
    """A did-you-mean, or everything there is."""
    from difflib import get_close_matches

    names = list(known)
    close = get_close_matches(word, names, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
