"""C++ text into a loaded library: built once per text, compiler and processor, and kept."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from ...ir import PlaitError
from ...ir.files import write_atomic, write_text
from ..gpu.sources import cache_dir
from ..program import is_plain

Tensor = torch.Tensor
COMPILERS = ("c++", "g++", "clang++")
# No fast-math: sums have the order they are written in, and NaN stays NaN.
_COMMON = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-fvisibility=hidden")
FLAGS = (  # the first that the compiler takes
    (*_COMMON, "-march=native", "-fopenmp"),
    (*_COMMON, "-mcpu=native", "-fopenmp"),
    (*_COMMON, "-march=native"),
    _COMMON,
)
PATIENCE = 300  # seconds a compiler may take
_LOADED = dict[str, ctypes.CDLL]()
_LOCKS = dict[str, threading.RLock]()  # of each library: who needs one waits for that one alone
_WARNED = set[str]()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_LOCKS.clear)  # a child has no thread that would let go of them


class Unbuilt(PlaitError):
    """A text that no compiler here makes a library of."""


def compiler() -> str | None:
    """The C++ compiler: `CXX` if it is set, else the first of the usual names that is found."""
    given = os.environ.get("CXX")
    return next((path for name in ([given] if given else COMPILERS) if (path := shutil.which(name))), None)


def remark() -> str:
    """What runs generated ops here, in a few words."""
    path = compiler()
    return f"C++ by {Path(path).name}" if path else f"torch code: {_none()}"


def _none() -> str:
    given = os.environ.get("CXX")
    return f"CXX names no program: {given!r}" if given else f"no C++ compiler ({', '.join(COMPILERS)}); install one or set CXX"


@cache
def described(path: str) -> str:
    """What a compiler calls itself."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unbuilt(f"{path} --version: {error}; set CXX to a C++ compiler") from None
    return done.stdout.partition("\n")[0].strip()


@cache
def processor() -> str:
    """What `native` stands for here: a digest of the processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    except OSError:
        named = {platform.processor()}
    return hashlib.sha256("\n".join([platform.machine(), *sorted(named)]).encode()).hexdigest()


def addressable(*tensors: Tensor | None) -> bool:
    """Whether C++ may read tensors: numbers in this process's memory, and not what a tracer or a transform made of them."""
    if is_plain():
        return False
    real = (Tensor, torch.nn.Parameter)
    return all(x is None or (type(x) in real and x.device.type == "cpu" and not _wrapped(x)) for x in tensors)


def _wrapped(x: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))  # type: ignore[reportPrivateUsage] # it has no public name


def load(source: str, name: str) -> ctypes.CDLL:
    """The library of a text. Raises Unbuilt, with the reason, where there is none."""
    path = compiler()
    if path is None:
        raise Unbuilt(_none())
    parts = (source, path, described(path), processor(), repr(FLAGS))
    full = f"{name}_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}"
    with _LOCKS.setdefault(full, threading.RLock()):
        if full not in _LOADED:
            _LOADED[full] = _kept(source, full, path)
        return _LOADED[full]


def library(source: str, name: str) -> ctypes.CDLL | None:
    """The library of a text; None, for torch code to run instead, where there is no compiler or one that fails."""
    if compiler() is None:
        return None
    try:
        return load(source, name)
    except Unbuilt as error:
        _warn(name, f"{name} runs as torch code: {error}")
        return None


def begin(texts: Callable[[], Iterable[tuple[str, str]]]) -> None:
    """Builds libraries, by name and text, beside what the process does next; with one core there is no beside."""
    if compiler() is not None and _cores() > 1:
        threading.Thread(target=_beside, args=(texts,), name="plait-build").start()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _beside(texts: Callable[[], Iterable[tuple[str, str]]]) -> None:
    """One library after another while the program runs; who calls one that fails says why."""
    with suppress(PlaitError, OSError):
        for name, source in texts():
            if not threading.main_thread().is_alive():
                return
            load(source, name)


def _kept(source: str, full: str, path: str) -> ctypes.CDLL:
    """The library from its file, which is built anew where it is missing, cut short or somebody else's."""
    try:
        file = cache_dir() / f"{full}.so"
        if not _sound(file):
            _build_into(file, source, path)
        return ctypes.CDLL(str(file))
    except Unbuilt:
        raise
    except (PlaitError, OSError) as error:
        remedy = "set PLAIT_CACHE to a directory that can be written"
        _warn("cache", f"generated C++ is built anew in every process: {error}; {remedy}")
        return _passing(source, full, path)


def _passing(source: str, full: str, path: str) -> ctypes.CDLL:
    """The library from a file that is gone once it is loaded."""
    try:
        with tempfile.TemporaryDirectory(prefix="plait_") as folder:
            return ctypes.CDLL(str(_compile(source, full, path, Path(folder))))
    except OSError as error:
        raise Unbuilt(f"{full}: {error}; make room in {tempfile.gettempdir()}, or set TMPDIR") from None


def _sound(file: Path) -> bool:
    """Whether the file is ours alone to write, and the one whose digest stands beside it."""
    try:
        about = file.stat()
        ours = about.st_uid == os.getuid() and not about.st_mode & 0o022
        return ours and file.with_suffix(".sha256").read_text() == _digest(file)
    except (OSError, UnicodeDecodeError):
        return False


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _build_into(file: Path, source: str, path: str) -> None:
    """Library, text and digest, each whole or not at all; the digest last, so that it vouches for a whole file."""
    with tempfile.TemporaryDirectory(prefix="plait_") as folder:
        made = _compile(source, file.stem, path, Path(folder))
        write_text(file.with_suffix(".cpp"), source)

        def copy(beside: Path) -> None:
            shutil.copyfile(made, beside)

        write_atomic(file, copy)
        write_text(file.with_suffix(".sha256"), _digest(made))


def _compile(source: str, full: str, path: str, folder: Path) -> Path:
    text, library = folder / f"{full}.cpp", folder / f"{full}.so"
    text.write_text(source, encoding="utf-8")
    said = ""
    for flags in FLAGS:
        done = _run([path, *flags, "-o", str(library), str(text)])
        if done.returncode == 0:
            return library
        said = said or done.stderr.replace(f"{folder}{os.sep}", "").strip()
    raise Unbuilt(f"{path} does not compile {full}.cpp: {said[:2000]}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unbuilt(f"{command[0]}: {error}") from None


def _warn(subject: str, message: str) -> None:
    if subject not in _WARNED:
        _WARNED.add(subject)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
