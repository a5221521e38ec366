"""The GPU benchmark where there is no GPU: predictions, checks, and how it goes on when a kernel or a process fails."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
ROWS = ["norm_gate:fwd", "swiglu:fwd", "swiglu:bwd", "gates:fwd", "gates:bwd"]
WORKER = """
import json, os, sys, time
print(json.dumps({"device": "fake", "copy": 1e12, "versions": {"torch": "1", "triton": "2"}}), flush=True)
for key in sys.argv[sys.argv.index("--case") + 1].split(","):
    if key == "swiglu:fwd": os._exit(9)
    if key == "swiglu:bwd": time.sleep(60)
    row = {"key": key, "case": "G0", "shape": "1", "mode": "fwd", "bytes": 10, "failures": {}, "variants": {}}
    print(json.dumps(row), flush=True)
    if key == "gates:fwd": os._exit(3)
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


@pytest.fixture
def measure(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = importlib.import_module("gpu_measure")

    def plain(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
        return function

    monkeypatch.setattr(torch, "compile", plain)
    return made


def host(measure: Any) -> Callable[..., Any]:
    """A clock for calls on the CPU."""

    def clock(setup: Callable[[], Callable[[], object]]) -> Any:
        setup()()
        return measure.Sample(1e-3, True)

    return clock


def test_a_plain_checkout_predicts_and_checks(tmp_path: Path) -> None:
    """Without site's own imports, so that no installed plait is found."""
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "CUDA_VISIBLE_DEVICES": "", "PLAIT_CACHE": str(tmp_path)}
    command = [sys.executable, "-S", str(FOLDER / "gpu.py"), "--check", "--case", "gates,norm_gate", "--tokens", "4096"]
    ran = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "no GPU was found" in ran.stderr
    predicted, checked = ran.stdout.split("\n\n")
    (line,) = (x for x in predicted.splitlines() if "norm_gate" in x and "fwd" in x)
    moved = 3 * 4096 * 4096 * 2 + 256
    assert line.split()[-6:-1] == [f"{moved / 1e6:.1f}", *(f"{moved / s * 1e6:.1f}" for s in (3.35e12, 4.3e12, 8e12, 5.3e12))]
    assert len(checked.splitlines()) == 5 and "wrong" not in checked


def test_an_unknown_case_is_named() -> None:
    ran = subprocess.run([sys.executable, str(FOLDER / "gpu.py"), "--case", "G33"], capture_output=True, text=True)
    assert ran.returncode == 1 and "nothing is called 'G33'; there are G3, norm_gate," in ran.stderr


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_every_row_has_the_figures_that_the_table_needs(gpu: Any, measure: Any, mode: str) -> None:
    cases = importlib.import_module("gpu_cases")
    key = f"add_norm_2048:{mode}"
    record: dict[str, Any] = {"key": key, **measure.measure(cases.rows()[key], 7, 3, host(measure), "cpu")}
    assert set(record["variants"]) == {"ours", "compile"} and record["errors"]["ours"]["norm"] < 3e-3
    facts = {"device": "fake", "copy": 1e12, "versions": {"torch": "1", "triton": "2"}}
    text = gpu.measured_text({"device": facts, "rows": [json.loads(json.dumps(record))]})
    assert "1000.0" in text and "1.00" in text and ("88%" if mode == "fwd" else "80%") in text


@pytest.mark.parametrize("mode", ["fwd", "bwd", "step"])
def test_a_recurrence_is_a_row_too(gpu: Any, measure: Any, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    rules = importlib.import_module("gpu_rules")
    whole = rules.small(next(r for r in rules.RULES if r.mode == mode))
    rule = dataclasses.replace(whole, tokens=min(whole.tokens, 9), key=16, value=16)
    monkeypatch.setattr(rules, "small", lambda given: rule)
    record = measure.measure((rule, mode), 9, 2, host(measure), "cpu")
    assert set(record["variants"]) == {"ours", "compile"} and record["errors"]["ours"]["norm"] < 1e-2
    assert [*record["failures"]] == ["fla"] or "fla" in record["variants"]
    assert record["bytes"] == rules.rule_bytes(rule, rule.tokens) <= 3 * max(1, rules.launched_bytes(rule, rule.tokens))
    cells = gpu.measured_cells({"key": f"{rule.name}:{mode}", **record}, 1e12)
    assert cells[8] == {"fwd": "1.70x", "bwd": "1.50x", "step": "-"}[mode]
    ours = gpu.checked_rule(rule)["ours"]

    def zeros(*xs: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        return 0 * xs[2], torch.zeros(1)

    assert ours[0] < 1e-2
    monkeypatch.setattr(rules, "_ours", lambda rule, device: zeros)
    assert "ours" in measure.measure((rule, mode), 9, 2, host(measure), "cpu")["failures"]


def test_what_is_wrong_is_not_timed(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = importlib.import_module("gpu_cases").rows()
    interpret = measure.run

    def skewed(function: Any, grid: Any, **arguments: Any) -> None:
        interpret(function, grid, **arguments)
        arguments["p_y1"][..., -1, :5] += 1.0

    def idle(*_: object, **__: object) -> None: ...

    for broken, why in ((skewed, "wrong: error"), (idle, "wrong: error nan")):
        monkeypatch.setattr(measure, "run", broken)
        record = measure.measure(rows["gates:fwd"], 9, 3, host(measure), "cpu")
        assert record["failures"]["ours"].startswith(why) and set(record["variants"]) == {"compile"}


def test_a_variant_that_fails_says_why(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch, "compile", refuse)
    record = measure.measure(importlib.import_module("gpu_cases").rows()["gates:bwd"], 9, 3, host(measure), "cpu")
    assert record["failures"] == {"compile": "RuntimeError: no such thing"} and set(record["variants"]) == {"ours"}


def test_the_pause_grows_until_the_host_is_ahead(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = list[int]()

    class Event:
        def __init__(self, **_: object) -> None: ...

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return len(pauses) < 3

        def elapsed_time(self, end: object) -> float:
            return 2.0

    for name, fake in (("Event", Event), ("synchronize", lambda: None), ("_sleep", pauses.append)):
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = object.__new__(measure.Stopwatch)
    clock.flush, clock.pause = torch.zeros(8), measure.FEWEST
    times = measure.interleave({"a": lambda: tuple[torch.Tensor, ...], "b": lambda: tuple[torch.Tensor, ...]}, 5, clock)
    assert pauses[:4] == [measure.FEWEST * n for n in (1, 2, 4, 4)]
    assert times["a"].median == 2e-3 and times["a"].samples == 5 and times["b"].ahead


def collected(gpu: Any, given: Sequence[str], tmp_path: Path, worker: str = WORKER) -> dict[str, Any]:
    (tmp_path / "worker.py").write_text(worker)
    args = gpu.parse_arguments([*given, "--json", str(tmp_path / "out.json")])
    found: dict[str, Any] = {"device": {}, "rows": []}
    for record in gpu.records(ROWS, args, [sys.executable, str(tmp_path / "worker.py")]):
        gpu.keep(record, found, args.json)
    return found


def test_rows_go_on_behind_a_process_that_died_or_is_silent(gpu: Any, tmp_path: Path) -> None:
    found = collected(gpu, ["--patience", "3"], tmp_path)
    assert [row["key"] for row in found["rows"]] == ROWS
    whys = [row["failures"].get("row", "") for row in found["rows"]]
    assert "ended with 9" in whys[1] and "ended with -9" in whys[2] and not any((whys[0], *whys[3:]))
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert "swiglu:bwd: row: its process ended" in gpu.measured_text(found)


def test_a_spent_budget_and_a_worker_that_cannot_begin(gpu: Any, tmp_path: Path) -> None:
    for given, worker, why in (([], "raise SystemExit(5)", "no worker could begin"), (["--budget", "0"], WORKER, "left out")):
        found = collected(gpu, given, tmp_path, worker)
        assert [row["failures"]["row"][: len(why)] for row in found["rows"]] == [why] * 5


def test_an_interrupt_keeps_what_is_done(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*_: object):
        yield {"device": "fake", "copy": 1e12, "versions": {"torch": "1", "triton": "2"}}
        yield {**gpu.blank("gates:fwd"), "bytes": 10}
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "records", told)
    assert gpu.measured_table(ROWS, gpu.parse_arguments(["--json", str(tmp_path / "out.json")])) == 130
    assert "gates" in capsys.readouterr().out and json.loads((tmp_path / "out.json").read_text())["rows"]
