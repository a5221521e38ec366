"""Every known mistake is caught, and by what the table says; programs without a mistake pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from plait.ir import crossing, dump
from plait.ir.crossing import Exchange, Gather, Hop, Moving, ScatterSum, Shift, Sum, Swap, answered
from plait.passes import check_types, validate
from plait.passes.placing import Pack

from tests.mutant_plants import Edit, Left, Lost, OtherWay, Patch
from tests.mutant_programs import PROGRAMS
from tests.mutants import KINDS, MUTANTS, Mutant, judged, main, verdict

Tensor = torch.Tensor


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_without_a_mistake_passes(name: str) -> None:
    program = PROGRAMS[name]
    after = program.after()
    check_types(after)
    report = validate(program.before, after, "reassociates", gradients=program.back)
    assert report.ok and report.rows, report
    assert judged(program, lambda: after)[0] == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mistake_is_caught(mutant: Mutant) -> None:
    before = dump(PROGRAMS[mutant.program].after())
    kind, said = verdict(mutant)
    assert kind == mutant.caught, said
    assert dump(PROGRAMS[mutant.program].after()) == before  # nothing of it stays


def test_the_table() -> None:
    names = [m.name for m in MUTANTS]
    assert len(names) == len({*names}) >= 50
    counts = Counter(m.caught for m in MUTANTS)
    assert counts.keys() == {*KINDS} and min(counts[k] for k in ("types", "lockstep", "values", "gradients")) >= 3
    assert {m.program for m in MUTANTS} == PROGRAMS.keys()


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.mutants.MUTANTS", MUTANTS[:2])
    assert main() == 0
    first, _, last = capsys.readouterr().out.splitlines()
    assert first.split("  ")[0] == MUTANTS[0].name and " types " in first and "must be split" in first
    assert last == "2 mistakes, 0 not caught as they should be"


def test_a_mistake_that_is_none_is_not_called_caught() -> None:
    kind, said = verdict(Mutant("nothing changes", "delta heads", Patch(Pack, "packed", lambda real: real), "values"))
    assert kind == "" and "5 tensors agree" in said


@pytest.mark.parametrize("plant", [Edit("no such text", ""), Edit("q0", "q0"), Left("all_gather")])
def test_an_edit_that_changes_nothing_is_lost(plant: Edit | Left) -> None:
    with pytest.raises(Lost):
        verdict(Mutant("lost", "heads", plant, "types"))


def test_a_patch_of_what_is_not_there_is_lost() -> None:
    with pytest.raises(AttributeError):
        verdict(Mutant("lost", "heads", Patch(PROGRAMS, "no_such_name", lambda real: real), "types"))
    with pytest.raises(KeyError):
        op = next(m.plant.op for m in MUTANTS if isinstance(m.plant, OtherWay))
        verdict(Mutant("lost", "heads", OtherWay(op, "no such way", lambda run: run), "types"))


# -- what a backward asks for, which processes alone would show -------------------------------

RANKS = 3
ASKED: dict[str, Callable[[int, Tensor], Moving]] = {
    "shift": lambda rank, x: Shift(x[0], 1),
    "shift back by two": lambda rank, x: Shift(x[0], -2),
    "shift along the line": lambda rank, x: Shift(x[0], 1, ring=False),
    "gather": lambda rank, x: Gather(x[0]),
    "scatter-sum": lambda rank, x: ScatterSum(x),
    "sum": lambda rank, x: Sum(x[0]),
    "hop": lambda rank, x: Hop(x[0], 2, 0),
    "swap": lambda rank, x: Swap(x),
    "exchange": lambda rank, x: Exchange(x[: sum(SENT[rank])], SENT[rank], tuple(row[rank] for row in SENT)),
}
SENT = ((0, 1, 2), (1, 1, 0), (2, 0, 1))


def lopsided(asked: Callable[[int, Tensor], Moving]) -> float:
    """How far <what ranks hear, d> is from <what they said, what the transposed requests hear>."""
    requests = [asked(rank, torch.randn(RANKS, 5, dtype=torch.float64)) for rank in range(RANKS)]
    heard = answered(requests)
    ds = [torch.randn_like(y) for y in heard]
    back = answered([crossing.transposed(r, d) for r, d in zip(requests, ds, strict=True)])
    return abs(_inner(heard, ds) - _inner([r.x for r in requests], back))


def _inner(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("name", ASKED)
def test_a_backward_asks_for_the_transpose(name: str) -> None:
    assert lopsided(ASKED[name]) < 1e-12


@pytest.mark.parametrize("name", ["shift", "shift back by two", "shift along the line", "hop"])
def test_a_backward_that_asks_for_the_same_again_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossing, "transposed", lambda request, d: replace(request, x=d))
    assert lopsided(ASKED[name]) > 1e-3
