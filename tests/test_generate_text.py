"""`plait generate` on folders: tokenizers, stop words, token numbers, what ends a text, and what is wrong with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import plait
import pytest
import torch
import typer
from plait import cli_generate
from plait.cli_generate import until
from plait.frontends.hf import Words, end_tokens, write_folder
from typer.testing import CliRunner

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "torch_dtype": "float32", "rope_theta": 10000.0,
}  # fmt: skip
WORDS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ."


class Letters:
    """Stands for the package's tokenizer: a token a letter, and of a few letters two bytes apart."""

    def __init__(self, text: str) -> None:
        assert json.loads(text)["letters"] == WORDS

    @classmethod
    def from_str(cls, text: str) -> Letters:
        return cls(text)

    def encode(self, text: str) -> Any:
        made = ModuleType("encoding")
        made.ids = [WORDS.index(c) for c in text]  # type: ignore[attr-defined] # the package's own name
        return made

    def decode(self, tokens: list[int]) -> str:
        return "".join(WORDS[t] for t in tokens)


def app() -> typer.Typer:
    made = typer.Typer()
    made.callback()(lambda: None)
    cli_generate.mount(made)
    return made


def run(*args: object) -> Any:
    return CliRunner().invoke(app(), ["generate", *map(str, args)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, a tokenizer and what ends its texts."""
    from plait.frontends.hf import read_plan

    folder = tmp_path_factory.mktemp("models") / "letters"
    model = plait.compile(read_plan(CONFIG).spec, dtype="f32", mode="infer", jit=False, seed=3)
    write_folder(folder, CONFIG, dict(model.named_parameters()))
    (folder / "tokenizer.json").write_text(json.dumps({"letters": WORDS}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [63]}))
    return folder


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("tokenizers")
    stand_in.Tokenizer = Letters  # type: ignore[attr-defined] # as the package has it
    monkeypatch.setitem(sys.modules, "tokenizers", stand_in)


DRAWN = ("--temperature", 1.5, "--top-p", 0.98, "--repetition-penalty", 1.1, "--seed", 4)


def test_text_comes_from_the_folders_own_words(made: Path) -> None:
    told = run(made, "--prompt", "abc", "--tokens", 12, *DRAWN)
    assert told.exit_code == 0 and told.stdout.startswith("abc") and told.stdout.endswith("\n"), told.output
    model = plait.compile(made, mode="infer", jit=False)
    start = torch.tensor([[0, 1, 2]])
    ids = model.generate(start, 12, temperature=1.5, top_p=0.98, repetition_penalty=1.1, seed=4, stop=63)[0].tolist()
    want = "".join(WORDS[t] for t in ids if t != 63)
    assert told.stdout == want + "\n"
    as_json = json.loads(run(made, "--prompt", "abc", "--tokens", 12, *DRAWN, "--json").stdout)
    assert as_json == {"prompt": "abc", "text": want[3:]}
    numbers = run(made, "--ids", "0,1,2", "--tokens", 12, *DRAWN)
    assert numbers.stdout == ",".join(str(t) for t in ids if t != 63) + "\n"


def test_a_word_or_a_number_ends_a_text(made: Path) -> None:
    whole = json.loads(run(made, "--prompt", "abc", "--tokens", 12, *DRAWN, "--json").stdout)["text"]
    assert len(whole) > 6
    for word in (whole[4], whole[3:6]):
        cut = json.loads(run(made, "--prompt", "abc", "--tokens", 12, *DRAWN, "--json", "--stop", word, "--stop", "~").stdout)
        assert cut["text"] == whole[: whole.index(word)]
    number = WORDS.index(whole[4])
    cut = run(made, "--ids", "0,1,2", "--tokens", 12, *DRAWN, "--stop", number)
    assert cut.stdout == "0,1,2" + "".join(f",{WORDS.index(c)}" for c in whole[: whole.index(whole[4])]) + "\n"


def test_what_generation_config_says_ends_a_text(made: Path, tmp_path: Path) -> None:
    assert end_tokens(made) == (63,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert end_tokens(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text("{}")
    assert end_tokens(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert end_tokens(tmp_path) == ()
    for wrong, what in (('{"eos_token_id": "x"}', "holds 'x'"), ("[1]", "must be an object"), ("{", "does not parse")):
        (tmp_path / "generation_config.json").write_text(wrong)
        with pytest.raises(plait.PlaitError, match=what):
            end_tokens(tmp_path)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--prompt", ""], "the prompt is empty"),
        ([], "either --prompt or --ids"),
        (["--prompt", "a", "--ids", "1"], "either --prompt or --ids"),
        (["--ids", "1,x"], "'x' is no token number"),
        (["--ids", "1,,2"], "'' is no token number"),
        (["--ids", "1,99999999999999999999"], "'99999999999999999999' is no token number"),
        (["--ids", "1,64"], "tokens holds the token 64; tokens are from 0 to 63"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0, must be above 0"),
        (["--ids", "1", "--stop", "z"], "'z' is no token number"),
    ],
)
def test_a_mistake_is_one_message(made: Path, args: list[str], what: str) -> None:
    told = run(made, *args)
    assert told.exit_code == 1 and what in told.stderr and "Traceback" not in told.output, told.output


def test_a_folder_without_words_takes_numbers(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    told = run(made, "--prompt", "abc")
    assert told.exit_code == 1 and "is not installed; pip install 'plait[text]'" in told.stderr
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in made.iterdir():
        if file.name != "tokenizer.json":
            (bare / file.name).write_bytes(file.read_bytes())
    told = run(bare, "--prompt", "abc")
    assert (
        told.exit_code == 1 and "holds no tokenizer.json, so text has no tokens; give their numbers: --ids 1,2,3" in told.stderr
    )
    assert run(bare, "--ids", "1,2", "--tokens", 2).exit_code == 0
    (bare / "tokenizer.json").symlink_to("/etc/hostname")
    assert "is a link out of the folder" in run(bare, "--prompt", "abc").stderr


def test_a_tokenizer_that_cannot_be_read_is_said(made: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    told = run(tmp_path, "--prompt", "abc")
    assert told.exit_code == 1 and "tokenizer.json: cannot be read" in told.stderr


def test_an_interrupted_text_ends_its_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two(*_: Any) -> Iterator[int]:
        yield 7
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_generate, "fresh", two)
    told = run(made, "--prompt", "abc")
    assert told.exit_code == 130 and told.stdout == "abch\n" and told.stderr == "plait: interrupted\n"


def test_a_saved_folder_keeps_its_words(made: Path, tmp_path: Path) -> None:
    model = plait.compile(made, mode="infer", jit=False)
    plait.save_hf(model, tmp_path / "again")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes()
    plait.save_hf(model, tmp_path / "third", like=tmp_path / "again")
    assert (tmp_path / "third" / "tokenizer.json").exists()


class Bytes:
    """Stands for a tokenizer whose tokens are bytes: a character may take several."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["plain", "größe", "漢字 👍", "👍👍"])
def test_a_piece_is_whole_characters(text: str) -> None:
    pieces = [*Words(Bytes()).pieces(text.encode())]
    assert "".join(pieces) == text and len(pieces) == len(text)
    assert "".join(Words(Bytes()).pieces(text.encode()[:-1])).startswith(text[:-1])


@pytest.mark.parametrize(
    ("pieces", "stops", "want"),
    [
        ("a b c", ["b"], "a "), ("abcabd", ["abd"], "abc"), ("aab", ["ab"], "a"), ("abab", ["abc"], "abab"), ("abc", [], "abc"),
        ("xyz", ["z", "y"], "x"), ("x", [""], "x"), ("aXbY", ["Y", "bY"], "aX"),
    ],
)  # fmt: skip
def test_text_ends_before_a_stop_word(pieces: str, stops: list[str], want: str) -> None:
    assert "".join(until(pieces, stops)) == want == "".join(until([pieces], stops))
