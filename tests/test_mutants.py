"""Every known mistake is caught, and by what the table says; programs without a mistake pass."""

from __future__ import annotations

from collections import Counter

import pytest
from plait.ir import dump
from plait.passes import check_types, validate
from plait.passes.placing import Pack

from tests.mutant_plants import Edit, Left, Lost, OtherWay, Patch
from tests.mutant_programs import PROGRAMS
from tests.mutants import KINDS, MUTANTS, Mutant, judged, main, verdict


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
