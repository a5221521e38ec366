"""Specs as files: read from TOML, JSON, a preset or a mapping, and written as TOML."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..ir.errors import SpecError
from .hf import is_folder, read_spec
from .presets import PRESETS, preset_path
from .problems import shown, suggest
from .spec import ModelSpec, named_kinds, spec_of

MAX_BYTES = 2**20
PER_LINE = 8
# tomllib takes time quadratic in the parts of one dotted key.
MAX_DOTS = 300


def load_spec(source: str | Path | Mapping[str, Any]) -> ModelSpec:
    """The spec in a .toml or .json file, of a Hugging Face folder, a preset's name, or a mapping with a spec file's fields."""
    if isinstance(source, Mapping):
        return spec_of(source)
    if not isinstance(source, (str, Path)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpecError(f"spec: is {shown(source)}; must be a path, a preset's name or a mapping")
    if source not in [preset.name for preset in PRESETS] and is_folder(source):
        return read_spec(source)
    path = _find(source)
    return spec_of(_parse(path, _read(path)), subject=path.name)


def dump_spec(spec: ModelSpec) -> str:
    """A spec as TOML text that reads back to an equal spec."""
    names = {block: name for name, block in named_kinds(spec).items()}
    fields = [f"{name} = {_toml(value)}" for name, value in _plain(spec).items() if name not in ("blocks", "stages")]
    sequence = [json.dumps(names[block]) for block in spec.blocks]
    lines = [", ".join(sequence[i : i + PER_LINE]) for i in range(0, len(sequence), PER_LINE)]
    fields += ["blocks = [", *(f"  {line}," for line in lines), "]"]
    fields += [f"stages = {_toml(list(spec.stages))}"] if spec.stages else []
    return "\n".join(["\n".join(fields), *(_table(name, block) for block, name in names.items())]) + "\n"


def _find(source: str | Path) -> Path:
    """A preset's file, or the path itself."""
    names = [preset.name for preset in PRESETS]
    if isinstance(source, str) and source in names:
        return preset_path(source)
    path = Path(source)
    if "\0" not in str(source) and path.is_dir() and not path.suffix:
        raise SpecError(f"spec: {shown(str(source))} is a folder without a config.json; must be a Hugging Face folder")
    if path.suffix.lower() not in (".toml", ".json"):
        text = f"{shown(str(source))} is neither a preset nor a .toml or .json file"
        raise SpecError(f"spec: {text}; presets: {suggest(source, names)}")
    return path


def _read(path: Path) -> str:
    """A file's text, if it can be a spec at all."""
    name = shown(str(path))
    try:
        if path.exists() and not path.is_file():
            raise SpecError(f"spec: {name} is a directory or a device; must be a file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig") if len(data) <= MAX_BYTES else None
    except UnicodeDecodeError as error:
        raise SpecError(f"spec: {name} is not UTF-8 text (byte {error.start}); must be TOML or JSON") from None
    except FileNotFoundError:
        raise SpecError(f"spec: {name} does not exist; give a path that does, or a preset's name") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"spec: {name} cannot be read: {error}") from None
    if text is None:
        raise SpecError(f"spec: {name} is larger than {MAX_BYTES} bytes; a spec is a page of text")
    if not text.strip():
        raise SpecError(f"spec: {name} is empty; must give vocab, hidden and blocks, pattern or ratio")
    return text


def _parse(path: Path, text: str) -> dict[Any, Any]:
    try:
        parsed = _json(text) if path.suffix.lower() == ".json" else _table_of(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path.name}: does not parse: {str(error)[:200]}") from None
    if not isinstance(parsed, dict):
        raise SpecError(f"{path.name}: is {shown(parsed)}; must be an object with the fields of a spec")
    return parsed  # pyright: ignore[reportUnknownVariableType]


def _table_of(text: str) -> dict[str, Any]:
    """TOML without its trap: no line that is one endless dotted key."""
    if any(line.count(".") > MAX_DOTS for line in text.split("\n")):
        raise ValueError(f"a line has more than {MAX_DOTS} dots; must be broken up")
    return tomllib.loads(text)


def _json(text: str) -> Any:
    """JSON without its traps: no NaN, no key given twice."""

    def refuse_constant(word: str) -> Any:
        raise ValueError(f"{word} is no number here; must be finite")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise ValueError(f"{shown(name)} is given twice; must be given once")
            table[name] = value
        return table

    return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=once)


def _plain(record: BaseModel) -> dict[str, Any]:
    """The fields of a record that have a value; an absent one has the default, none."""
    values = {name: getattr(record, name) for name in type(record).model_fields}
    return {name: value for name, value in values.items() if value is not None}


def _table(name: str, block: BaseModel) -> str:
    """A kind as a table, under its own name where that says its kind."""
    fields = _plain(block)
    header = f"[{name}]" if name == fields["kind"] else f"[kinds.{name}]"
    if name == fields["kind"]:
        del fields["kind"]
    return "\n".join(["", header, *(f"{key} = {_toml(value)}" for key, value in fields.items())])


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value)
        case BaseModel():
            return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in _plain(value).items()) + "}"
        case _:
            return "[" + ", ".join(_toml(item) for item in value) + "]"
