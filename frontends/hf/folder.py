"""A Hugging Face folder: its config and where its tensors are. Nothing in it is executed, and nothing outside it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.errors import CheckpointError, SpecError
from ..problems import shown
from .tensors import Entry, read_header

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
MAX_CONFIG, MAX_INDEX = 2**22, 2**28


@dataclass(frozen=True)
class Folder:
    """What a folder says: the fields of its config, and every tensor of its files by name."""

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]


def is_folder(path: object) -> bool:
    """Whether this names a directory with a model's config."""
    return isinstance(path, (str, Path)) and "\0" not in str(path) and (Path(path) / CONFIG).is_file()


def read_config(path: str | Path) -> dict[str, Any]:
    """The fields of a folder's config.json."""
    found = read_json(inside(Path(path), CONFIG), MAX_CONFIG)
    if not isinstance(found, dict):
        raise SpecError(f"{CONFIG}: is {shown(found)}; must be an object")
    return found  # pyright: ignore[reportUnknownVariableType]


def open_folder(path: str | Path) -> Folder:
    """Config and tensor headers. Raises SpecError or CheckpointError for what cannot be a model's folder."""
    folder = Path(path)
    config = read_config(folder)
    if (folder / INDEX).exists() or (folder / INDEX).is_symlink():
        return Folder(folder, config, _sharded(folder))
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return Folder(folder, config, read_header(inside(folder, SINGLE)))
    pickled = sorted(p.name for kind in PICKLES for p in folder.glob(kind))
    why = f"only {pickled[0]}, which may be a pickle; pickles run code and are never read: convert it" if pickled else "none"
    raise CheckpointError(f"{folder}: must hold {SINGLE} or {INDEX}; there is {why}")


def inside(folder: Path, name: str) -> Path:
    """A file of the folder. Raises CheckpointError for a name or a link that leads out of it.

    Links of the hub's cache, `snapshots/<revision>/<name>` to `blobs/<hash>` beside it, lead to what belongs to the folder.
    """
    if not name or name != Path(name).name or name in (".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: {shown(name)} is no plain file name; it must not lead out of the folder")
    try:
        home, found = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError):  # as older Pythons call a link that leads back to itself
        raise CheckpointError(f"{folder / name}: is a link that leads nowhere; put the file itself there") from None
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (found.is_relative_to(home) or found.is_relative_to(cache)):
        raise CheckpointError(f"{folder / name}: is a link out of the folder; put the file itself there")
    if not found.is_file():
        raise CheckpointError(f"{folder / name}: there is no such file")
    return found


def _sharded(folder: Path) -> dict[str, Entry]:
    """The tensors of every shard, exactly those that the index names."""
    index = read_json(inside(folder, INDEX), MAX_INDEX)
    places: Any = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / INDEX}: must have a weight_map from tensor names to file names")
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for file in sorted(set(places.values())):
        header = read_header(inside(folder, file))
        problems += [f"{shown(n)} is in {file} and not there in the index" for n in header if places.get(n) != file]
        entries |= header
    problems += [f"{shown(n)} is in the index, but not in {file}" for n, file in places.items() if n not in entries]
    if problems:
        raise CheckpointError("\n  ".join([f"{folder}: the index and the files differ", *problems[:40]]))
    return entries


def read_json(path: Path, most: int) -> Any:
    """A JSON file; Infinity may be said, by a number's own name or as {"__float__": "Infinity"}."""

    def constant(word: str) -> float:
        if word == "NaN":
            raise ValueError("NaN is no number here")
        return float(word)

    def table(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a field is given twice")
        return constant(found["__float__"]) if found.keys() == {"__float__"} else found

    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise ValueError(f"it is larger than {most} bytes")
        return json.loads(data.decode("utf-8"), parse_constant=constant, object_pairs_hook=table)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SpecError(f"{path.name}: does not parse: {str(error)[:200]}") from None
