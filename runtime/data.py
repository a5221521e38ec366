"""Bytes as training data: text read from disk, batches drawn by step, entropies to hold a loss against."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..ir import DataError

Tensor = torch.Tensor
SUFFIXES = (".py", ".txt", ".md")
# Folders inside a source tree whose files are not its own.
SKIPPED = ("__pycache__", "site-packages", "dist-packages", "node_modules")


@dataclass(frozen=True)
class Text:
    """Bytes to train on, and bytes held back to validate on."""

    train: Tensor  # uint8[n]
    valid: Tensor


@dataclass(frozen=True)
class Entropy:
    """Nats per byte of models that only count, fitted on the training bytes, measured on the held-back ones."""

    unigram: float
    bigram: float


def read_bytes(
    path: str | Path, *, suffixes: Sequence[str] = SUFFIXES, skip: Sequence[str] = SKIPPED, limit: int | None = None
) -> Tensor:
    """The bytes uint8[n] of a file, or of every file below a folder with one of the suffixes, in a fixed order.

    Hidden folders and those named in `skip` are left out; reading stops at `limit` bytes.
    """
    path = Path(path)
    if path.is_dir():
        data = _folder(path, tuple(suffixes), frozenset(skip), limit)
    elif path.is_file():
        data = _file(path)[:limit]
    elif path.exists():
        raise DataError(f"{path}: is a device, must be a file or a folder of text")
    else:
        raise DataError(f"{path}: there is no such file or folder; give the path of some text")
    if not data:
        raise DataError(f"{path}: holds no text; must hold at least a few thousand bytes to learn from")
    return torch.frombuffer(data, dtype=torch.uint8)


def _file(path: Path) -> bytearray:
    try:
        return bytearray(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _folder(root: Path, suffixes: tuple[str, ...], skip: frozenset[str], limit: int | None) -> bytearray:
    data, found = bytearray(), False
    for path in _walk(root, suffixes, skip):
        data += _file(path)
        found = True
        if limit is not None and len(data) >= limit:
            return data[:limit]
    if not found:
        raise DataError(f"{root}: holds no file named *{', *'.join(suffixes)}; give a file, or a folder of text")
    return data


def _walk(root: Path, suffixes: tuple[str, ...], skip: frozenset[str]) -> Iterator[Path]:
    """Files in the same order on every machine; links to folders are not followed."""
    for folder, inner, names in os.walk(root, onerror=_unreadable):
        inner[:] = sorted(n for n in inner if n not in skip and not n.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            if path.suffix.lower() in suffixes and path.is_file():
                yield path


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror or error}") from None


def split(data: Tensor, share: float = 0.05) -> Text:
    """The first part to train on, the last `share` of the bytes to validate on."""
    if not 0 < share < 1:
        raise DataError(f"share is {share}, must lie between 0 and 1: the part of the text that is held back")
    held = max(1, round(len(data) * share))
    return Text(data[:-held], data[-held:])


def check_length(text: Text, length: int) -> None:
    """Refuse text that is shorter than one row."""
    for name, data in (("training", text.train), ("validation", text.valid)):
        if len(data) <= length:
            need = f"must be at least {length + 1} for rows of {length}"
            raise DataError(f"the {name} part is {len(data)} bytes, {need}: give more text or a smaller length")


def batch(data: Tensor, *, rows: int, length: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Tokens and their labels, i64[rows, length] each, drawn from the seed and the step alone."""
    starts = np.random.default_rng([seed, step]).integers(len(data) - length, size=rows)
    return _rows(data, torch.from_numpy(starts), length)


def windows(data: Tensor, *, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of up to `rows` rows at equal distances, none twice: the same at every call."""
    last = len(data) - length - 1
    rows = min(rows, last + 1)
    return _rows(data, torch.arange(rows) * last // max(rows - 1, 1), length)


def _rows(data: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    rows = data[starts[:, None] + torch.arange(length + 1)].long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def bigram_entropy(train: Tensor, valid: Tensor) -> Entropy:
    """What counting bytes and pairs of bytes achieves: a model that reads context must come out below.

    Unseen bytes get an added count of one; pairs are interpolated with single bytes by Witten and Bell's weights.
    """
    if len(train) < 2 or len(valid) < 2:
        raise DataError(f"train and valid are {len(train)} and {len(valid)} bytes, must be at least 2 each to count pairs")
    single, pairs = _counts(train)
    p_next = (single + 1) / (single.sum() + 256)
    followers = (pairs > 0).sum(1, keepdim=True).double()
    seen = pairs.sum(1, keepdim=True)
    p_pair = torch.where(seen > 0, (pairs + followers * p_next) / (seen + followers).clamp_min(1), p_next.expand_as(pairs))
    single, pairs = _counts(valid)
    return Entropy(float(-(single * p_next.log()).sum() / single.sum()), float(-(pairs * p_pair.log()).sum() / pairs.sum()))


def _counts(data: Tensor) -> tuple[Tensor, Tensor]:
    """How often each byte, and each byte after each byte, occurs: f64[256], f64[256, 256]."""
    single = torch.bincount(data.long(), minlength=256).double()
    pairs = torch.bincount(data[:-1].long() * 256 + data[1:].long(), minlength=65536).double()
    return single, pairs.view(256, 256)
