"""Launch configurations: a table in a file, a small space, gates before clocks, a budget, and no key with a length in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from plait import tune as kernels
from plait.__main__ import app
from plait.ir import PlaitError, parse
from plait.lowering.gpu import Job
from plait.lowering.gpu import tuned as tables
from plait.lowering.gpu.jobs import jobs, uses
from plait.lowering.gpu.tuned import FORMAT, asked, forced, keep, table, tuned
from plait.lowering.gpu.tuning import Work, space, tune
from plait.lowering.rows import row_kernel
from typer.testing import CliRunner

GLU = """@kernel
def glu(x: bf16[b, s, 1024]):
    g, u = split(x, sizes=(512, 512))
    a = silu(g)
    y = mul(a, u)
    return y
"""


@dataclass(frozen=True)
class Tile:
    value: int
    warps: int


@triton.jit
def copy(p_x, p_y, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_y + o, tl.load(p_x + o))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    monkeypatch.delenv("PLAIT_TUNED", raising=False)
    monkeypatch.delenv("PLAIT_TUNE", raising=False)
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    tables._read.cache_clear()  # pyright: ignore[reportPrivateUsage] # a table is read once per process
    yield tmp_path / "tuned.json"
    tables._read.cache_clear()  # pyright: ignore[reportPrivateUsage]


def work(seconds: Callable[[Tile], float], seen: list[Tile], asks: str = "copy") -> tuple[Work, Callable[[Any], float]]:
    """A kernel whose time is a function of its configuration; and the clock that knows it."""

    def now() -> Tile:
        return tuned("sm_90", asks, Tile(64, 4))

    def made(target: str) -> list[Job]:
        x = torch.empty(1024, device="meta")
        return [Job(copy, (), {"p_x": x, "p_y": x, "B": now().value}, target, num_warps=now().warps)]

    def call() -> Callable[[], float]:
        tile = now()
        seen.append(tile)
        return lambda: seconds(tile)

    return Work("copy", made, call), lambda run: run()


def test_the_space_is_small_and_stands_around_the_default() -> None:
    assert space(Tile(64, 4)) == [Tile(64, 4), Tile(32, 4), Tile(128, 4), Tile(64, 2), Tile(64, 8)]
    assert space(Tile(16, 16)) == [Tile(16, 16), Tile(32, 16), Tile(16, 8)]


def test_the_fastest_is_chosen_and_kept(place: Path) -> None:
    seen = list[Tile]()
    copied, clock = work(lambda t: 1.0 if t.warps == 4 else 0.5 / t.warps, seen)
    (chosen,) = tune([copied], "sm_90", budget=60, clock=clock, say=print, known=table())
    assert chosen.best == Tile(64, 8) and seen == space(Tile(64, 4)) and not chosen.refused
    assert chosen.told == "sm_90 copy: value=64 warps=8 in 62500.0 us of 5 timed; 16.00x of the default's speed"
    assert tuned("sm_90", "copy", Tile(64, 4)) == Tile(64, 4)
    keep({chosen.name: chosen.best})
    assert tuned("sm_90", "copy", Tile(64, 4)) == Tile(64, 8) and tuned("sm_80", "copy", Tile(64, 4)) == Tile(64, 4)
    said = {"format": FORMAT, "configurations": {"sm_90": {"copy": {"value": 64, "warps": 8}}}}
    assert json.loads(place.read_text()) == said
    assert not [*tune([copied], "sm_90", budget=60, clock=clock, say=print, known=table())]


def test_less_than_noise_is_no_gain() -> None:
    copied, clock = work(lambda t: 1.0 if t == Tile(64, 4) else 0.985, [])
    (chosen,) = tune([copied], "sm_90", budget=60, clock=clock, say=print, known={})
    assert chosen.best == chosen.default == Tile(64, 4) and chosen.told.endswith("the default stays")


def test_what_a_gate_refuses_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Tile]()
    copied, clock = work(lambda t: 1.0 / t.warps, seen)
    broken = Work("copy", lambda t: [Job(None, (), {}, t)] if _now().warps == 8 else copied.jobs(t), copied.call)

    def _now() -> Tile:
        return tuned("sm_90", "copy", Tile(64, 4))

    (chosen,) = tune([broken], "sm_90", budget=60, clock=clock, say=print, known={})
    assert chosen.best == Tile(64, 4) and Tile(64, 8) not in seen
    assert [*chosen.refused] == ["value=64 warps=8"] and "must be a @triton.jit function" in chosen.refused["value=64 warps=8"]


def test_a_budget_ends_and_without_a_clock_nothing_runs() -> None:
    said, seen = list[str](), list[Tile]()
    copied, clock = work(lambda t: 1.0, seen)
    assert not [*tune([copied], "sm_90", budget=0, clock=clock, say=said.append, known={})]
    assert said == ["the budget of 0 seconds is spent; copy and what follows keep their defaults"] and not seen
    (chosen,) = tune([copied], "sm_90", budget=60, clock=None, say=said.append, known={})
    assert not seen and chosen.best == chosen.default and "none timed" in chosen.told


def test_tuning_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_TUNE", "off")
    with pytest.raises(PlaitError, match="PLAIT_TUNE forbids tuning here"):
        next(kernels.tuned_kernels([parse(GLU)], "sm_90", budget=60, measured=False, say=print))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no table of configurations"),
        ("[]", "is no table of configurations"),
        ('{"format": "2", "configurations": {}}', "format is '2'; must be"),
        (json.dumps({"format": FORMAT, "configurations": {"sm_90": {"copy": {"warps": 0}}}}), "no whole number from 1 to"),
        (json.dumps({"format": FORMAT, "configurations": {"sm_90": {"copy": {"warps": True}}}}), "no whole number from 1 to"),
        (json.dumps({"format": FORMAT, "configurations": {"sm_90": {"copy": {"wraps": 4}}}}), "wraps is no field of it"),
    ],
)
def test_a_bad_table_is_named(text: str, told: str, place: Path) -> None:
    place.write_text(text)
    with pytest.raises(PlaitError, match=f"tuned.json: .*{told}"):
        tuned("sm_90", "copy", Tile(64, 4))


def test_a_table_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLAIT_TUNED", str(tmp_path / "none.json"))
    with pytest.raises(PlaitError, match="PLAIT_TUNED: there is no file"):
        table()


def test_a_row_kernel_asks_and_is_launched_so() -> None:
    (use,) = uses(parse(GLU))
    kernel = row_kernel(use.graph)
    with asked() as seen:
        (first,) = jobs(kernel, use.operands, "sm_90")
    ((name, default),) = seen.items()
    assert name[0] == "sm_90" and re.fullmatch(r"plait_glu [0-9a-f]{8}", name[1]) and default.warps == first.num_warps
    with forced({name: {"warps": 2}}):
        (second,) = jobs(kernel, use.operands, "sm_90")
        (amd,) = jobs(kernel, use.operands, "gfx942")
    assert second.num_warps == 2 and amd.num_warps == first.num_warps // 2


def test_no_key_holds_a_length() -> None:
    (use,) = uses(parse(GLU))
    found = list[set[tuple[str, str]]]()
    for rows in (7, 4096):
        with asked() as seen:
            jobs(row_kernel(use.graph), [torch.empty(rows, 13, 1024, dtype=torch.bfloat16, device="meta")], "sm_90")
        found.append(set(seen))
    assert found[0] == found[1] and len(found[0]) == 1


def test_the_command_tells_the_gates_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "glu.ir"
    path.write_text(GLU)
    told = CliRunner().invoke(app, ["tune", str(path), "--gates", "--json"])
    assert told.exit_code == 0, told.stderr
    made = json.loads(told.stdout)
    assert [k["kernel"].rstrip("1") for k in made["keys"]] == ["glu", "glu_backward"] and not made["measured"]
    if not torch.cuda.is_available():
        refused = CliRunner().invoke(app, ["tune", str(path)])
        assert refused.exit_code == 1 and "there is none here; --gates tells" in refused.stderr
