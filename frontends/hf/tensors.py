"""Safetensors files as they lie on disk: headers that are checked before any number is read, and mapped tensors."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import CheckpointError
from ..problems import shown

MAX_HEADER = 100_000_000
AHEAD = 2**19
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands: its file, type, shape, and bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file. Raises CheckpointError where the header is none, lies, or says more than the file has."""
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if total < 8 or size > min(total - 8, MAX_HEADER):
                raise CheckpointError(f"{path}: is {total} bytes with a header of {size}; it is cut short, or no safetensors")
            text = file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    entries = {name: _entry(path, name, said, 8 + size) for name, said in _parsed(path, text).items() if name != "__metadata__"}
    _contiguous(path, entries, 8 + size, total)
    return entries


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(table := dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice")
        return table

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header does not parse: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is {shown(header)}; must be an object")
    return header  # pyright: ignore[reportUnknownVariableType]


def _entry(path: Path, name: str, said: Any, start: int) -> Entry:
    """One line of a header, every number of it checked."""
    fields: dict[str, Any] = said if isinstance(said, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    numbers: list[Any] = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else []
    if (
        not isinstance(dtype, str)
        or dtype not in BYTES
        or len(numbers) < 2
        or len(offsets or ()) != 2
        or not all(type(n) is int and 0 <= n < 2**62 for n in numbers)
    ):
        raise CheckpointError(f"{path}: {shown(name)} is described as {shown(said)}; must have a dtype, shape and data_offsets")
    begin, end = numbers[-2:]
    dims = tuple(numbers[:-2])
    if end - begin != math.prod(dims) * BYTES[dtype]:
        text = f"{dtype}{list(dims)}, which is not the {end - begin} bytes it is given"
        raise CheckpointError(f"{path}: the header lies: {shown(name)} is {text}")
    return Entry(path, dtype, dims, start + begin, start + end)


def _contiguous(path: Path, entries: Mapping[str, Entry], start: int, total: int) -> None:
    """Tensors fill the file: none behind its end, no two on the same bytes, nothing between."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if entry.begin != at:
            raise CheckpointError(f"{path}: the header lies: {shown(name)} begins at byte {entry.begin}, must begin at {at}")
        at = entry.end
    if at != total:
        raise CheckpointError(f"{path}: is {total} bytes, its tensors take {at}; the file is cut short or has more in it")


class Mapped:
    """Files mapped into memory: a tensor is a view of its file's pages, which are private to this process."""

    def __init__(self) -> None:
        self.files = dict[Path, mmap.mmap]()

    def tensor(self, entry: Entry) -> torch.Tensor:
        """The numbers of an entry, not copied."""
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=FLOATS[entry.dtype])
        file, count = self._file(entry.file), math.prod(entry.shape)
        self._ahead(file, entry)
        return torch.frombuffer(file, dtype=FLOATS[entry.dtype], count=count, offset=entry.begin).reshape(entry.shape)

    def _ahead(self, file: mmap.mmap, entry: Entry) -> None:
        """Let the disk begin with all of a tensor, in steps that one call may ask for: a fault waits for what is around it."""
        if hasattr(mmap, "MADV_WILLNEED"):
            for at in range(entry.begin // mmap.PAGESIZE * mmap.PAGESIZE, entry.end, AHEAD):
                file.madvise(mmap.MADV_WILLNEED, at, min(AHEAD, entry.end - at))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a view of a file's pages."""
        begins = [torch.frombuffer(file, dtype=torch.uint8, count=1).data_ptr() for file in self.files.values()]
        return any(b <= tensor.data_ptr() < b + len(f) for b, f in zip(begins, self.files.values(), strict=True))

    def release(self, entry: Entry) -> None:
        """Let go of the pages of a tensor that has been copied; no page that it shares with another is touched."""
        page = mmap.PAGESIZE
        begin, end = -(-entry.begin // page) * page, entry.end // page * page
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._file(entry.file).madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _file(self, path: Path) -> mmap.mmap:
        if path not in self.files:
            with path.open("rb") as file:
                self.files[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self.files[path]
