"""`plait train --mesh` on two processes: the curve of one process, and runs that go on where another mesh has left them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from plait import cli_train
from plait.frontends import dump_spec, load_spec
from typer.testing import CliRunner

from tests.ranks import free_port, run_ranks

SPEC: dict[str, Any] = {
    "name": "small", "vocab": 256, "hidden": 16, "pattern": "M*G", "tied": True, "mlp": {"width": 16},
    "mamba2": {"heads": 2, "head_dim": 8, "state": 8}, "attention": {"heads": 2, "head_dim": 8},
    "gdn": {"key_heads": 2, "value_heads": 2, "key_dim": 8, "value_dim": 8},
}  # fmt: skip


def curve(folder: Path) -> list[float]:
    points = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [x for p in points for x in (p["loss"], p["valid"]) if x is not None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(dump_spec(load_spec(SPEC)))
    (tmp_path / "text.txt").write_text("def f(x): return g(x) + 1\n" * 400)
    return tmp_path


def arguments(here: Path, run: str, *more: str) -> list[str]:
    shape = () if "--resume" in more else ("--batch", "2", "--length", "32")
    files = ("--text", str(here / "text.txt"), "--run", str(here / run))
    return ["train", str(here / "small.toml"), *files, "--eager", *shape, *more]


def alone(*args: str) -> None:
    app = typer.Typer()
    cli_train.mount(app)
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 0, result.output


def test_a_run_moves_between_meshes(here: Path) -> None:
    """Two processes train, two others go on, and one process ends it: the curve is that of one process all along."""
    alone(*arguments(here, "one", "--steps", "3"))
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run_ranks(here, "plait", *arguments(here, "mesh", "--steps", "3", "--mesh", "cp=2", "--place", "attention=kv"), env=port)
    assert curve(here / "mesh") == pytest.approx(curve(here / "one"), rel=1e-4)
    said = [(here / f"rank{r}.log").read_text() for r in (0, 1)]
    assert "parameters;" in said[0] and "step 3  loss" in said[0] and "parameters;" not in said[1] and "step 3" not in said[1]
    shutil.copytree(here / "one", here / "moved")
    for run in ("moved", "one"):
        more = ("--steps", "5", "--resume")
        if run == "one":
            alone(*arguments(here, run, *more))
        else:
            port["MASTER_PORT"] = str(free_port())
            run_ranks(here, "plait", *arguments(here, run, *more, "--mesh", "dp=2"), env=port)
    alone(*arguments(here, "mesh", "--steps", "5", "--resume"))
    for run in ("moved", "mesh"):
        assert curve(here / run) == pytest.approx(curve(here / "one"), rel=1e-4)


def test_processes_without_a_mesh_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    app = typer.Typer()
    cli_train.mount(app)
    result = CliRunner().invoke(app, arguments(here, "none"))
    assert result.exit_code == 1 and "no --mesh says what they share; give one, such as --mesh cp=2" in result.output
