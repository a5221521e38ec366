"""Writing files so that a reader sees the old one or the new one, never a half."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import PlaitError


def write_atomic(path: Path | str, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then rename it there; nothing stays behind when either fails."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise PlaitError(f"{path}: cannot be written: {error.strerror or error}") from None
    beside = Path(name)
    try:
        write(beside)
        _sync(beside)
        beside.chmod(0o644)
        beside.replace(path)
    except OSError as error:
        raise PlaitError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path | str, text: str) -> None:
    """A text file, whole or not at all."""

    def write(beside: Path) -> None:
        beside.write_text(text, encoding="utf-8")

    write_atomic(path, write)
