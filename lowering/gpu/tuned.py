"""Launch configurations that were measured: a file by target and key; no key holds a length, so new lengths never tune."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ...ir import PlaitError
from ...ir.files import write_text
from .sources import cache_dir

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Name = tuple[str, str]  # target and key
Numbers = Mapping[str, int]  # a configuration's fields, all of them whole numbers
FORMAT = "plait tuned configurations 1"
MOST = 1 << 16  # that a field may be

_FORCED: ContextVar[Mapping[Name, Numbers] | None] = ContextVar("forced", default=None)
_ASKED: ContextVar[dict[Name, Any] | None] = ContextVar("asked", default=None)


def tuned(target: str, key: str, default: T) -> T:
    """The configuration of a key on a target: the one that is tried, else the one that was measured, else the default."""
    if (asked := _ASKED.get()) is not None:
        asked.setdefault((target, key), default)
    found = (_FORCED.get() or {}).get((target, key))
    if found is None:
        found = table().get((target, key))
    return default if found is None else _changed(key, default, found)


def _changed(key: str, default: T, found: Numbers) -> T:
    known = [f.name for f in fields(default)]
    if unknown := [name for name in found if name not in known]:
        raise PlaitError(f"{place()}: {key}: {unknown[0]} is no field of it; there are {', '.join(known)}; delete the entry")
    return replace(default, **found)


@contextmanager
def forced(tried: Mapping[Name, Numbers]) -> Generator[None]:
    """Inside, these configurations are used."""
    token = _FORCED.set({**(_FORCED.get() or {}), **tried})
    try:
        yield
    finally:
        _FORCED.reset(token)


@contextmanager
def asked() -> Generator[dict[Name, Any]]:
    """Inside, every configuration that is asked for is noted with its default."""
    seen = dict[Name, Any]()
    token = _ASKED.set(seen)
    try:
        yield seen
    finally:
        _ASKED.reset(token)


@dataclass(frozen=True)
class Warps:
    """All that is open about a row kernel's launch: its tiles are functions of sizes."""

    warps: int  # of 32 threads


def row_warps(target: str, function: str, source: str, warps: int) -> int:
    """Warps of one function of a row kernel; its text says its sizes, and no length is among them."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return tuned(target, f"{function} {digest}", Warps(warps)).warps


# -- the file -----------------------------------------------------------------------------


def place() -> Path:
    """The file of measured configurations: `PLAIT_TUNED`, else `tuned.json` in the cache directory."""
    given = os.environ.get("PLAIT_TUNED")
    return Path(given).expanduser() if given else cache_dir() / "tuned.json"


def table() -> Mapping[Name, Numbers]:
    """What the file says; nothing where there is none. Raises PlaitError for a file that is not such a table."""
    return _read(str(place()))


@cache
def _read(path: str) -> Mapping[Name, Numbers]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        if os.environ.get("PLAIT_TUNED"):
            raise PlaitError(f"PLAIT_TUNED: there is no file {path}; `plait tune` writes one") from None
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise PlaitError(f"{path}: cannot be read: {error}") from None
    return _parsed(path, text)


def _parsed(path: str, text: str) -> Mapping[Name, Numbers]:
    must = f'must be {{"format": "{FORMAT}", "configurations": {{target: {{key: {{field: number}}}}}}}}; delete it, tune again'
    try:
        said: Any = json.loads(text)
        if said["format"] != FORMAT:
            raise PlaitError(f"{path}: format is {said['format']!r}; {must}")
        found = {(target, key): numbers for target, keys in said["configurations"].items() for key, numbers in keys.items()}
        good = all(type(n) is int and 1 <= n <= MOST for numbers in found.values() for n in numbers.values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise PlaitError(f"{path}: is no table of configurations ({error}); {must}") from None
    if not good:
        raise PlaitError(f"{path}: holds what is no whole number from 1 to {MOST}; {must}")
    return found


def text_of(found: Mapping[Name, Any]) -> str:
    """The file's text: equal tables have equal text."""
    targets = dict[str, dict[str, Numbers]]()
    for (target, key), chosen in sorted(found.items()):
        numbers = chosen if isinstance(chosen, Mapping) else asdict(chosen)
        targets.setdefault(target, {})[key] = dict(cast("Numbers", numbers))
    return json.dumps({"format": FORMAT, "configurations": targets}, indent=1) + "\n"


def keep(found: Mapping[Name, Any], path: Path | None = None) -> Path:
    """Add configurations to a file, whole or not at all, and use them from now on."""
    path = path or place()
    known = dict(_read(str(path))) if path.exists() else {}
    write_text(path, text_of({**known, **found}))
    _read.cache_clear()
    return path


def digest() -> str:
    """Tells tables apart: ranks that have different ones would compute different bits."""
    return hashlib.sha256(text_of(table()).encode()).hexdigest()[:16]
