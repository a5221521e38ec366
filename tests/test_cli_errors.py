"""The command line given what is wrong: words, usage, files, hostile text, and places it cannot write to."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plait.ir import parse

from tests.command import bad, good, run, wrong

GATE = """def gate(x: f32[b, s, 64], g: f32[b, s, 64], *, w: f32[64] = constant(1.0)):
    n = rms_norm(x, w, eps=1e-06)
    a = silu(g)
    y = mul(n, a)
    return y
"""
NESTED = f"def f(x: f32[{'(' * 10**5}1{')' * 10**5}]):\n    y = silu(x)\n    return y\n"


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own to stand in: reproducers are written there."""
    monkeypatch.chdir(tmp_path_factory.mktemp("home"))


@pytest.fixture
def gate(tmp_path: Path) -> str:
    path = tmp_path / "gate.ir"
    path.write_text(GATE, encoding="utf-8")
    return str(path)


# -- words, usage, files --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["compile", "demmo"], "did you mean 'demo'?"),
        (["compile", "no/such.toml"], "does not exist"),
        (["compile", "no/such.ir"], "there is no such file"),
        (["opt", "no/such.ir", "-p", "fuse"], "there is no such file"),
        (["compile", "demo", "-p", "fusee"], "did you mean fuse?"),
        (["compile", "demo", "--emit=ir", "-p", "fusee"], "^"),
        (["compile", "demo", "-p", "fuse{onli=glu}"], "no option onli"),
        (["compile", "demo", "-p", "fuse{only=glu"], "closing brace"),
        (["compile", "demo", "-p", "fuse", "--require", "norm-gates"], "norm-gates"),
        (["compile", "demo", "--emit=fx", "--target=tpu"], "no target called 'tpu'"),
        (["op", "rmsnorm"], "did you mean rms_norm?"),
        (["op", "x\x00y"], "no op called"),
    ],
)
def test_a_wrong_word_is_named(args: list[str], said: str) -> None:
    assert said in bad(*args)


@pytest.mark.parametrize(
    "args",
    [
        ["compile", "demo", "--emit=llvm"],
        ["compile", "demo", "--dtype=fp8"],
        ["compile", "demo", "--task=chat"],
        ["compile", "demo", "--verify-each=often"],
        ["compile", "demo", "--seq=0"],
        ["compile", "demo", "--seq=many"],
        ["compile"],
        ["compile", "demo", "demo"],
        ["compil", "demo"],
        ["opt", "x.ir", "--print-changed=some"],
        ["opt", "x.ir", "--unknown"],
        ["op"],
    ],
)
def test_wrong_usage_ends_with_2(args: list[str]) -> None:
    assert wrong(*args)


def test_a_pattern_that_is_none_is_wrong_usage(gate: str) -> None:
    assert "regular expression" in wrong("opt", gate, "-p", "fuse", "--remarks=[")


FILES: dict[str, bytes] = {
    "empty.ir": b"", "blank.ir": b" \n\n", "binary.ir": bytes(range(256)), "nul.ir": b"def f(x: f32[1]):\n    return x\x00\n",
    "comment.ir": b"# nothing here\n", "prose.ir": b"hello there, world", "deep.ir": NESTED.encode(),
    "empty.toml": b"", "binary.toml": b"\xff\xfe\x00", "half.toml": b"name = ", "list.json": b"[1, 2]", "empty.json": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert name in bad("compile", str(path))
    if name.endswith(".ir"):
        assert name in bad("opt", str(path), "-p", "fuse")


@pytest.mark.parametrize("name", ["folder.ir", "folder.toml"])
def test_a_directory_is_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert "directory" in bad("compile", str(tmp_path / name)).lower()


@pytest.mark.parametrize("stdin", [b"", b"\xff\xff", b"def f(", b"{", b"vocab = ", b"[1]"])
def test_stdin_that_is_nothing_is_refused(stdin: bytes) -> None:
    assert "stdin" in bad("compile", "-", stdin=stdin)


def test_ir_cut_anywhere_is_refused_or_whole(tmp_path: Path) -> None:
    text, path = good("compile", "mamba-2-2.7b-tiny").stdout, tmp_path / "cut.ir"
    refused = 0
    for i in range(1, 40):
        path.write_text(text[: i * len(text) // 40], encoding="utf-8")
        result = run("opt", str(path), "-p", "fuse")
        assert result.exit_code in (0, 1) and "Traceback" not in result.output
        if result.exit_code:
            assert "cut.ir, line " in bad("opt", str(path), "-p", "fuse")
            refused += 1
    assert refused == 39


def test_a_stray_pattern_letter_is_pointed_at(tmp_path: Path) -> None:
    path = tmp_path / "stray.toml"
    path.write_text('vocab = 9\nhidden = 8\npattern = "MxM"\n', encoding="utf-8")
    lines = bad("compile", str(path)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip() == "^")
    assert lines[at - 1][lines[at].index("^")] == "x"


def test_ir_takes_no_spec_options(gate: str) -> None:
    for option in ("--task=loss", "--dtype=f32", "--packed"):
        assert option.partition("=")[0] in bad("compile", gate, option)
    assert "no spec" in bad("compile", gate, "--emit=spec")


HOSTILE = "__import__('os').system('touch {}')"


def test_text_from_a_file_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = HOSTILE.format(canary)
    texts = {
        "a.ir": f"def f(x: f32[{code}]):\n    return x\n",
        "b.ir": f"def f(x: f32[4]):\n    y = scale(x, by={code})\n    return y\n",
        "c.ir": f"{code}\ndef f(x: f32[4]):\n    return x\n",
        "d.ir": f"# pipeline: fuse{{only={code}}}\ndef f(x: f32[4]):\n    y = silu(x)\n    return y\n",
        "e.toml": f'name = "{code}"\nvocab = 9\nhidden = 8\npattern = "-"\n[mlp]\nwidth = 4\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        bad("compile" if name.endswith("toml") else "opt", str(tmp_path / name))
    assert not canary.exists()


# -- output ---------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, gate: str) -> None:
    path, link = tmp_path / "out" / "x.ir", tmp_path / "link.ir"
    assert good("opt", gate, "-p", "fuse", "-o", str(path)).stdout == ""
    link.symlink_to(path)
    good("opt", gate, "-p", "", "-o", str(link))
    assert link.is_symlink() and path.read_text() == str(parse(GATE))
    bad("opt", gate, "-p", "fusee", "-o", str(path))
    assert path.read_text() == str(parse(GATE)) and [p.name for p in path.parent.iterdir()] == ["x.ir"]


def test_an_output_that_cannot_be_is_refused(tmp_path: Path, gate: str) -> None:
    for output in (str(tmp_path), f"{gate}/under.ir", f"{tmp_path}/{'x' * 300}"):
        assert "cannot be written" in bad("opt", gate, "-p", "fuse", "-o", output)
    assert [p.name for p in tmp_path.iterdir()] == ["gate.ir"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path, gate: str) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    good("opt", gate, "-p", "", "-o", str(pipe))
    assert reader.communicate(timeout=20)[0] == str(parse(GATE)) and pipe.is_fifo()


def test_ctrl_c_ends_with_130_and_leaves_nothing(tmp_path: Path, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("plait.ir.files._sync", interrupted)
    result = run("opt", gate, "-p", "fuse", "-o", str(tmp_path / "out.ir"))
    assert (result.exit_code, result.stdout) == (130, "") and "Traceback" not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["gate.ir"]


def test_a_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-m", "plait", "ops", "--json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout and running.stderr
    running.stdout.close()  # nobody reads
    said = running.stderr.read()
    assert (running.wait(timeout=60), said) == (141, "")


def test_no_color_and_odd_encodings_leave_plain_text() -> None:
    env = {**os.environ, "NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "plait", "presets"], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0 and "\x1b" not in done.stdout and done.stdout.startswith("preset")
