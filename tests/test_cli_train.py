"""`plait train`, `generate`, `bench`, and the demo: outputs, exit codes and every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from plait import cli_generate, cli_train
from plait.cli_progress import clock, line
from plait.frontends import dump_spec, load_spec
from plait.runtime.rundir import checkpoint_file
from plait.runtime.train import Progress
from typer.testing import CliRunner, Result

SPEC: dict[str, Any] = {
    "name": "small", "vocab": 256, "hidden": 16, "pattern": "M*-", "tied": True,
    "mamba2": {"heads": 2, "head_dim": 8, "state": 8}, "attention": {"heads": 2, "head_dim": 8}, "mlp": {"width": 16},
}  # fmt: skip
FAST = ["--batch", "2", "--length", "17", "--eager"]


def run(*args: object) -> Result:
    app = typer.Typer()
    cli_train.mount(app)
    cli_generate.mount(app)
    return CliRunner().invoke(app, [str(a) for a in args])


def write_spec(path: Path, **changes: Any) -> Path:
    path.write_text(dump_spec(load_spec(SPEC | changes)))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a spec and some text, in which commands run."""
    monkeypatch.chdir(tmp_path)
    write_spec(tmp_path / "small.toml")
    (tmp_path / "text.txt").write_text("def f(x): return g(x) + 1\n" * 400)
    return tmp_path


def test_train_resume_generate(here: Path) -> None:
    first = run("train", "small.toml", "--text", "text.txt", "--steps", 3, *FAST, "--json")
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    assert told["steps"] == 3 and told["spec"] == "small" and 4 < told["validation"] < 6
    assert told["bigram"] < told["unigram"] < 4
    assert told["run"] == "small-run" and Path(told["checkpoint"]).is_file() and not told["interrupted"]
    assert "parameters;" in first.stderr and "step 3  loss" in first.stderr
    # The batch and length of the run are remembered; --eager is no option of the run.
    again = run("train", "small.toml", "--text", "text.txt", "--steps", 5, "--resume", "--eager")
    assert again.exit_code == 0 and again.stdout == "" and "5 steps" in again.stderr and "step 4" not in again.stdout
    ask = ["generate", "small-run", "--prompt", "def é", "--tokens", 9, "--temperature", 2.0]
    texts = [run(*ask, "--seed", seed) for seed in (1, 1, 2)]
    assert all(t.exit_code == 0 and t.stdout.startswith("def é") and t.stderr == "" for t in texts)
    assert texts[0].stdout == texts[1].stdout != texts[2].stdout
    file = run("generate", checkpoint_file("small-run"), "--prompt", "def ", "--tokens", 9, "--json")
    assert json.loads(file.stdout)["prompt"] == "def " and json.loads(file.stdout)["text"]


def test_interrupted_training_says_how_to_go_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import plait.runtime.train as module

    whole = module.train

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        from dataclasses import replace

        return replace(whole(*args, **kwargs), interrupted=True)

    monkeypatch.setattr(module, "train", interrupted)
    result = run("train", "small.toml", "--text", "text.txt", "--steps", 2, *FAST)
    assert result.exit_code == 130 and "interrupted at step 2; continue with --resume --run small-run" in result.stderr


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["train", "smal", "--text", "text.txt"], "neither a preset nor"),
        (["train", "small.toml", "--text", "absent"], "absent: there is no such file"),
        (["train", "small.toml", "--text", "text.txt", "--length", 5000], "bytes, must be at least 5001"),
        (["train", "small.toml", "--text", "text.txt", "--lr", 0], "lr is 0"),
        (["train", "small.toml", "--text", "text.txt", "--resume"], "small-run: holds no checkpoint"),
        (["train", "llama-3-8b", "--text", "text.txt"], "vocab is 128256, must be 256, for bytes; try llama-3-8b-tiny"),
        (["train", "huge.toml", "--text", "text.txt"], "of memory, this machine has"),
        (["train", "small.toml", "--text", "text.txt", "--run", "text.txt"], "text.txt: is no folder"),
        (["generate", "absent", "--prompt", "x"], "absent: there is no such file"),
        (["generate", ".", "--prompt", "x"], "has neither a config.json nor"),
        (["generate", "text.txt", "--prompt", "x"], "text.txt"),
        (["generate", "text.txt", "--prompt", ""], "the prompt is empty"),
        (["bench", "absent"], "neither a preset nor"),
        (["bench", "qwen3-next-80b-a3b"], "of memory, this machine has"),
    ],
)
def test_a_mistake_is_one_message(here: Path, args: list[object], what: str) -> None:
    write_spec(here / "huge.toml", hidden=2**20, mlp={"width": 2**22})
    result = run(*args, *(["--steps", 1, "--eager"] if args[0] == "train" else []))
    assert result.exit_code == 1 and result.stdout == "", result.output
    assert "plait: error: " in result.stderr and what in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("args", ["train demo", "train demo --text x --steps 0", "bench demo --dtype f8"])
def test_wrong_usage_is_two(here: Path, args: str) -> None:
    assert run(*args.split()).exit_code == 2


def test_bench_compares(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import plait.api as api

    whole = api.compile
    monkeypatch.setattr(api, "compile", lambda *a, **k: whole(*a, **k | {"jit": False}))
    monkeypatch.setattr(cli_train, "DECODED", 3)
    result = run("bench", "small.toml", "--tokens", 9, "--batch", 2, "--rounds", 2, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    for what in ("forward", "forward + backward", "decode a token"):
        assert told[what]["speedup"] == pytest.approx(told[what]["reference"] / told[what]["compiled"])
    table = run("bench", "small.toml", "--tokens", 9, "--rounds", 1)
    assert [row.split()[0] for row in table.stdout.splitlines()[1:]] == ["reference", "forward", "forward", "decode"]


def test_text_cannot_drive_a_terminal() -> None:
    assert cli_generate.visible("a\x1b[31m\té\n\x07") == "a·[31m\té\n·"


def test_the_bar_speaks_plainly() -> None:
    want = "step 120  loss 1.934  validation 2.011  5.12k bytes/s  3:05 left"
    assert line(Progress(120, 0.5, 1.9336, 2.0108, 5123.0, 185.2)) == want
    assert line(Progress(1, 0.0, 5.5, 5.6, 0.0, 0.0)) == "step 1  loss 5.500  validation 5.600"
    assert (clock(59.6), clock(3725), clock(-1)) == ("1:00", "1:02:05", "0:00")


def test_the_demo_in_small(here: Path) -> None:
    demo = Path(__file__).parent.parent / "examples" / "demo.py"
    args = [sys.executable, str(demo), "--steps", "2", "--eager", "--preset", "small.toml", "--bytes", "5"]
    done = subprocess.run(args, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr
    found = {p.name for p in (here / "demo-run").iterdir()}
    assert found == {"loss.png", "loss.svg", "latest", "history.jsonl", "step-00000002"}
    assert "@kernel" in done.stdout and "counting pairs" in done.stdout and "logits within 0.0e+00" in done.stdout
