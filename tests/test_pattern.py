"""Megatron patterns: what parses, and where the caret stands when one does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plait.frontends.load import load_spec
from plait.frontends.pattern import LETTERS, NOT_BUILT, SEPARATORS, parse_pattern, pattern_names
from plait.ir.errors import SpecError

NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def caret(error: SpecError) -> str:
    """The letter above the caret."""
    *_, line, mark = str(error).split("\n")
    assert mark.strip() == "^"
    return line[mark.index("^")]


def test_published_pattern_counts() -> None:
    pattern = parse_pattern(NANO)
    assert len(pattern.letters) == 52
    assert [pattern.letters.count(letter) for letter in "ME*"] == [23, 23, 6]
    assert pattern.stages == (NANO,) and pattern.mtp == ()


def test_names_follow_the_letters() -> None:
    names, stages = pattern_names("MG*-E")
    assert names == ("mamba2", "gdn", "attention", "mlp", "moe")
    assert stages == ()


def test_stages_split_the_blocks() -> None:
    text = "M-M-M-M*-M-|M-M*-M-M-|M-M*-M-M-|M*-M-M-M-M-"
    names, stages = pattern_names(text)
    assert stages == (11, 9, 9, 11)
    assert len(names) == sum(stages)
    assert parse_pattern(text).letters == text.replace("|", "")


def test_prediction_depths_parse_and_are_refused_by_name() -> None:
    assert parse_pattern("MEM*E/*E/*E").mtp == ("*E", "*E")
    with pytest.raises(SpecError, match="multi-token prediction is not built yet") as error:
        pattern_names("MEM*E/*E/*E")
    assert caret(error.value) == "/"


@pytest.mark.parametrize(("letter", "name"), NOT_BUILT.items())
def test_latent_attention_parses_and_is_refused_by_name(letter: str, name: str) -> None:
    assert parse_pattern(f"G{letter}E").letters == f"G{letter}E"
    with pytest.raises(SpecError, match=f"{name} is not built yet") as error:
        pattern_names(f"G{letter}E")
    assert caret(error.value) == letter


@pytest.mark.parametrize(
    ("text", "at", "says"),
    [
        ("GEXGE", 3, "'X' is no layer"),
        ("gE*E", 1, "did you mean 'G'"),
        ("GE *E", 3, "' ' is no layer"),
        ("G*+E", 3, "cannot be in one pattern"),
        ("DE*E", 3, "cannot be in one pattern"),
        ("GE||E", 4, "has no layer"),
        ("|GE", 1, "has no layer"),
        ("GE|", 3, "has no layer"),
        ("/GE", 1, "no layer stands before '/'"),
        ("GE/*E/*", 7, "must be equal"),
        ("GE/*E/", 6, "must be equal"),
        ("GE/", 3, "must be equal"),
        ("GE/*|E", 5, "cannot stand in a prediction depth"),
        ("G" * 100 + "x" + "G" * 100, 101, "'x' is no layer"),
    ],
)
def test_the_caret_is_under_the_letter(text: str, at: int, says: str) -> None:
    with pytest.raises(SpecError, match=f"pattern, letter {at}: ") as error:
        parse_pattern(text)
    assert says in str(error.value)
    assert caret(error.value) == text[at - 1]
    assert max(len(line) for line in str(error.value).split("\n")[1:]) < 100


@pytest.mark.parametrize("text", ["", "G" * 10_001])
def test_length_is_bounded(text: str) -> None:
    with pytest.raises(SpecError, match=f"has {len(text)} letters"):
        parse_pattern(text)


@given(st.text(alphabet=[*LETTERS, *NOT_BUILT, *SEPARATORS, "x"], max_size=12))
def test_any_text_parses_back_or_is_refused(text: str) -> None:
    try:
        pattern = parse_pattern(text)
    except SpecError:
        return
    assert str(pattern) == text
    assert "".join(pattern.stages) == pattern.letters
    assert all(stage for stage in pattern.stages) and len(set(pattern.mtp)) <= 1


@given(st.text(max_size=30))
def test_odd_text_is_refused_under_one_caret(text: str) -> None:
    try:
        parse_pattern(text)
    except SpecError as error:
        assert str(error).count("\n") in (0, 2)


def test_a_spec_names_the_pattern_and_the_missing_table(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text('vocab = 61\nhidden = 24\npattern = "-G-"\n[mlp]\nwidth = 9\n')
    with pytest.raises(SpecError, match=r"m\.toml: pattern: 'gdn' has no table; add \[gdn\] with key_heads, value_heads"):
        load_spec(file)
    file.write_text('vocab = 61\nhidden = 24\npattern = "-|--|-"\n[mlp]\nwidth = 9\n')
    spec = load_spec(file)
    assert spec.stages == (1, 2, 1) and len(spec.blocks) == 4
