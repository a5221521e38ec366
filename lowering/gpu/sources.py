"""Generated source as a module: kept in a file that a user can open, run from the text in hand."""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import linecache
import os
import sys
import threading
import warnings
from pathlib import Path
from types import CodeType, ModuleType

from ...ir import PlaitError, check_name
from ...ir.files import write_text

LOCK = threading.RLock()
_UNUSABLE = set[Path | None]()  # directories that a warning has named


def cache_dir() -> Path:
    """Where generated sources are kept: `PLAIT_CACHE`, else `plait` under the user's cache directory."""
    given, above = os.environ.get("PLAIT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = os.path.expanduser(given or os.path.join(above or os.path.join("~", ".cache"), "plait"))
    if folder.startswith("~"):
        raise PlaitError(f"{folder}: there is no such home directory; set PLAIT_CACHE to a directory")
    return Path(os.path.abspath(folder))


def load(source: str, name: str) -> ModuleType:
    """The module of this text; the same text gives the same module, in `<name>_<hash>.py`."""
    check_name(name, "load: the module name")
    full = f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    key = f"_plait_generated_{full}"
    with LOCK:
        return sys.modules.get(key) or _run(source, key, _place(source, full))


def _place(source: str, full: str) -> str:
    """The path of a file that holds the text, or a name for text that is in memory alone."""
    folder = None
    try:
        folder = cache_dir()
        path = folder / f"{full}.py"
        if not _holds(path, source):
            write_text(path, source)
        return str(path)
    except (PlaitError, OSError) as error:
        _warn(folder, error)
        return f"<plait:{full}>"


def _holds(path: Path, source: str) -> bool:
    """Whether the file is there and is neither cut short nor edited."""
    try:
        return path.read_bytes() == source.encode()
    except FileNotFoundError:
        return False


def _warn(folder: Path | None, error: Exception) -> None:
    if folder in _UNUSABLE:
        return
    _UNUSABLE.add(folder)
    reason = f"generated kernels are kept in memory alone: {error}; set PLAIT_CACHE to a directory that can be written"
    warnings.warn(reason, RuntimeWarning, stacklevel=4)


class _Text(importlib.abc.InspectLoader):
    """Loads a module from text in hand, so that no file chooses what runs, whoever may have changed it meanwhile."""

    def __init__(self, source: str, place: str) -> None:
        self.source, self.place = source, place

    def get_source(self, fullname: str) -> str:
        return self.source

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.source, self.place)


def _run(source: str, key: str, place: str) -> ModuleType:
    # no time of change: what runs is what tracebacks and Triton read, also when the file changes
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    loader = _Text(source, place)
    spec = importlib.util.spec_from_loader(key, loader, origin=place)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = place
    sys.modules[key] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module
