"""Generated C++ is built once and kept: cut short, shared, read-only, without a compiler."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plait.ir import parse
from plait.lowering import cpp, lower
from plait.lowering.cpp import build
from plait.lowering.cpp import conv as conv_text
from plait.lowering.cpp import recurrence as recurrence_text
from plait.lowering.early import libraries
from plait.runtime.runner import Runner

TEXT = 'extern "C" __attribute__((visibility("default"))) int answer() {{ return {number}; }}\n'

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and nothing loaded before."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_LOADED", {})
    monkeypatch.setattr(build, "_WARNED", set())
    return tmp_path


def answer(number: int) -> int:
    return cpp.load(TEXT.format(number=number), "answer").answer()


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*operands: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(build, "_compile", refuse)


def kept(place: Path, suffix: str) -> Path:
    (found,) = place.glob(f"answer_*.{suffix}")
    return found


def test_built_once_and_found_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(41) == 41 and answer(42) == 42
    assert len(list(place.glob("answer_*.so"))) == len(list(place.glob("answer_*.sha256"))) == 2
    monkeypatch.setattr(build, "_LOADED", {})
    no_compiler(monkeypatch)
    assert answer(42) == 42
    assert not [p for p in place.iterdir() if p.suffix not in (".so", ".cpp", ".sha256")]


@pytest.mark.parametrize("harm", ["cut", "empty", "other", "no digest", "half a digest", "writable by all"])
def test_a_harmed_file_is_built_again(harm: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(7)
    library, digest = kept(place, "so"), kept(place, "sha256")
    whole = library.read_bytes()
    fresh = library.with_name("fresh")  # a new file: this process has the old one open
    fresh.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "other": b"\x7fELF" + whole[5:]}.get(harm, whole))
    fresh.chmod(0o666 if harm == "writable by all" else 0o644)
    fresh.replace(library)
    if harm == "no digest":
        digest.unlink()
    if harm == "half a digest":
        digest.write_text(digest.read_text()[:10])
    monkeypatch.setattr(build, "_LOADED", {})
    assert answer(7) == 7 and build._sound(library)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.skipif(os.name != "posix", reason="a directory is a file here")
def test_a_directory_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="built anew in every process: .*set PLAIT_CACHE to a directory") as found:
        assert answer(1) == 1 and answer(2) == 2
    assert len(found) == 1


def test_a_full_disk_costs_a_warning_only(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, write: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(build, "write_atomic", full)
    with pytest.warns(RuntimeWarning, match="No space left on device.*set PLAIT_CACHE to a directory"):
        assert answer(3) == 3
    assert not list(place.glob("*.so"))


def test_no_room_anywhere_runs_torch_code(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", full)
    with pytest.warns(RuntimeWarning) as found:
        assert build.library(TEXT.format(number=8), "nothing") is None
    assert "No space left on device; make room in" in str(found[-1].message)


def test_many_processes_at_once(place: Path) -> None:
    code = f"from plait.lowering import cpp; print(cpp.load({TEXT.format(number=5)!r}, 'answer').answer())"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [p.communicate(timeout=120)[0].strip() for p in running] == ["5"] * 3
    assert build._sound(kept(place, "so"))  # pyright: ignore[reportPrivateUsage]


def test_a_text_that_does_not_compile_says_why_once() -> None:
    with pytest.raises(cpp.Unbuilt, match=r"does not compile wrong_\w+\.cpp"):
        cpp.load("int f( { }", "wrong")
    with pytest.warns(RuntimeWarning, match="wrong runs as torch code") as found:
        assert build.library("int f( { }", "wrong") is None and build.library("int f( { }", "wrong") is None
    assert len(found) == 1


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert cpp.compiler() is None and build.library("", "nothing") is None
    with pytest.raises(cpp.Unbuilt, match="install one or set CXX"):
        cpp.load("", "nothing")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(cpp.Unbuilt, match="CXX names no program: '/no/such/compiler'"):
        cpp.load("", "nothing")


def test_texts_differ_where_traits_do_and_nowhere_else() -> None:
    made = [
        recurrence_text.source(recurrence_text.Traits(delta, decay, 16, out))
        for delta in (False, True) for decay in ("head", "channel") for out in (16, 32)
    ]  # fmt: skip
    assert len(set(made)) == len(made)
    again = recurrence_text.source(recurrence_text.Traits(False, "head", 16, 16))
    assert again == made[0] and conv_text.source(4, "silu") != conv_text.source(4, "none")


def test_who_needs_what_is_being_built_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, built, compiled = threading.Event(), list[str](), build._compile  # pyright: ignore[reportPrivateUsage] # slowed down

    def slowly(source: str, *rest: Any) -> Path:
        begun.set()
        time.sleep(0.2)
        built.append(source)
        return compiled(source, *rest)

    monkeypatch.setattr(build, "_compile", slowly)
    monkeypatch.setattr(build, "_cores", lambda: 2)
    cpp.begin(lambda: [("answer", TEXT.format(number=9))])
    assert begun.wait(10) and answer(9) == 9
    assert built == [TEXT.format(number=9)]


FUSED = """
def model(x: f32[b, s, 5]):
    y = mix(x, params='layers.0')
    return y

@layer
def mix(x: f32[b, s, 5], *, w: f32[5, 5] = normal(0.2), g: f32[5] = constant(1)):
    n = prenorm(x, g)
    y = linear(n, w)
    return y

@kernel
def prenorm(x: f32[b, s, 5], g: f32[5]):
    a = add(x, x)
    n = rms_norm(a, g)
    return n
"""


def test_eager_calls_build_nothing_but_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[str, str]]()

    def refuse(source: str, name: str) -> None:
        asked.append((name, source))
        raise cpp.Unbuilt("not here")

    monkeypatch.setattr(build, "load", refuse)
    graph = parse(FUSED)
    run = Runner(lower(graph, eager=True), None)
    x, w, g = torch.randn(2, 7, 5), torch.randn(5, 5), torch.ones(5)
    (plain,) = run([x], [w, g])
    torch.testing.assert_close(plain, F.rms_norm(2 * x, (5,), g, 1e-6) @ w.mT)
    assert not asked
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without libraries it is torch code
        (made,) = run([x.requires_grad_()], [w, g.requires_grad_()])
        made.sum().backward()
    torch.testing.assert_close(made, plain)
    assert asked == list(libraries(graph, gradients=True)) and len(asked) == 2
