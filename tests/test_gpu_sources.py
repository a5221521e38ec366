"""Generated sources: kept in files, run from the text in hand, whatever becomes of the directory."""

import inspect
import linecache
import multiprocessing
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import plait.ir.files as files
import pytest
import torch
from plait.ir import PlaitError
from plait.lowering.gpu import cache_dir, load, run, sources

KERNEL = '''"""A generated kernel."""

import triton
import triton.language as tl


@triton.jit
def double(p_x, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(p_x + o, tl.load(p_x + o, mask=o < n) * 2, mask=o < n)
'''


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PLAIT_CACHE", str(folder))
    monkeypatch.setattr(sources, "_UNUSABLE", set())
    forget()
    yield folder
    forget()


def forget() -> None:
    """As a new process starts."""
    for name in [n for n in sys.modules if n.startswith("_plait_generated_")]:
        linecache.cache.pop(str(sys.modules[name].__file__), None)
        del sys.modules[name]


def doubled(module: object) -> None:
    x = torch.arange(5.0)
    run(getattr(module, "double"), (2,), x, 5, B=4)  # noqa: B009
    assert x.tolist() == [0, 2, 4, 6, 8]


def test_a_source_is_a_file_that_can_be_opened(cache: Path) -> None:
    module = load(KERNEL, "double")
    (path,) = cache.iterdir()
    assert path.read_text() == KERNEL and path.name.startswith("double_") and module.__file__ == str(path)
    assert load(KERNEL, "double") is module and inspect.getsource(module.double.fn).startswith("@triton.jit\ndef double")
    doubled(module)


def test_other_text_or_another_name_is_another_module(cache: Path) -> None:
    made = {id(load(KERNEL, "double")), id(load(KERNEL + "\n", "double")), id(load(KERNEL, "twice"))}
    assert len(made) == 3 and len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    "damage", [b"", KERNEL.encode()[:100], b"raise SystemExit(3)\n", b"\xff\xfe\x00", KERNEL.encode() + b"#"]
)
def test_a_damaged_file_is_rebuilt_and_never_run(cache: Path, damage: bytes) -> None:
    load(KERNEL, "double")
    (path,) = cache.iterdir()
    path.write_bytes(damage)
    forget()
    doubled(load(KERNEL, "double"))
    assert path.read_text() == KERNEL and list(cache.iterdir()) == [path]


def test_a_file_edited_after_loading_changes_nothing(cache: Path) -> None:
    module = load(KERNEL, "double")
    next(cache.iterdir()).write_text(KERNEL.replace("* 2", "* 3"))
    linecache.checkcache()
    assert "* 2" in inspect.getsource(module.double.fn)
    doubled(module)


def test_a_file_where_the_directory_should_be(cache: Path) -> None:
    cache.write_text("not a directory")
    in_memory_with_one_warning()
    assert cache.read_text() == "not a directory"


@pytest.mark.parametrize("where", ["mkdir", "mkstemp", "write", "fsync", "replace", "read"])
def test_a_directory_that_cannot_be_used(cache: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*args: object, **named: object) -> object:
        raise OSError(28, "No space left on device")

    owner = {"mkstemp": files.tempfile, "fsync": os}.get(where, Path)
    name = {"write": "write_text", "read": "read_bytes"}.get(where, where)
    monkeypatch.setattr(owner, name, full)
    in_memory_with_one_warning()
    monkeypatch.undo()
    assert not cache.exists() or not list(cache.iterdir())


def in_memory_with_one_warning() -> None:
    with pytest.warns(RuntimeWarning, match=r"kept in memory alone: .*set PLAIT_CACHE to a directory") as found:
        module = load(KERNEL, "double")
    assert len(found) == 1 and found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(KERNEL, "twice")
    assert str(module.__file__).startswith("<plait:double_") and "def double" in inspect.getsource(module.double.fn)
    doubled(module)


def test_a_mistake_in_generated_text_shows_its_line(cache: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        load("x = 1\ny = x / 0\n", "broken")
    assert "y = x / 0" in "".join(traceback.format_exception(caught.value))
    assert not [n for n in sys.modules if n.startswith("_plait_generated_")]
    with pytest.raises(PlaitError, match="must be a plain identifier"):
        load(KERNEL, "../double")


def test_the_directory_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLAIT_CACHE", "~/kernels")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "kernels"
    monkeypatch.setenv("PLAIT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "plait"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / ".cache" / "plait"
    monkeypatch.setenv("PLAIT_CACHE", "~nobody-has-this-name/x")
    with pytest.raises(PlaitError, match="there is no such home directory; set PLAIT_CACHE"):
        cache_dir()


def texts() -> list[str]:
    return [f"VALUE = {i}\n" + "# a comment that makes the file longer\n" * 500 for i in range(20)]


def load_all(offset: int) -> list[int]:
    everything = texts()
    order = everything[offset * 5 :] + everything[: offset * 5]
    return sorted(load(text, "value").VALUE for text in order)


def test_processes_that_load_at_once_corrupt_nothing(cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(load_all, range(4), chunksize=1) == [list(range(20))] * 4
    assert sorted(p.read_text() for p in cache.iterdir()) == sorted(texts())


def test_nothing_of_triton_is_imported_before_it_is_needed() -> None:
    code = "import sys, plait.lowering.gpu; assert not [m for m in sys.modules if m.split('.')[0] == 'triton']"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
