"""`plait trace` on a file of the user's own: what it prints, and every mistake said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plait import cli_trace
from plait.__main__ import app
from plait.ir import PlaitError, parse
from torch import nn
from typer.testing import CliRunner

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x):
        return x + self.down(torch.sigmoid(self.up(x)) * self.up(x))

class Model(nn.Module):
    def __init__(self, deep=2):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, 6), nn.ModuleList([Block(6) for _ in range(deep)])

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x.cumsum(-1)

class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x

ready, number, make = Model(3), 5, lambda: 7

def broken():
    raise ValueError("no weights")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(MODEL)
    (tmp_path / "my_missing.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "my_typo.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["trace", *args])


def test_the_report_tells_what_is_what() -> None:
    made = run("my_models:Model", "--example", "2x7")
    assert made.exit_code == 0, made.stderr
    lines = made.stdout.splitlines()
    assert lines[0].endswith("ops, sizes symbolic")
    assert any(x.split() == ["torch's", "own", "aten.cumsum.default", "1", "Model"] for x in lines)
    assert any(x.split()[:3] == ["layer", "block", "2"] for x in lines)
    assert any(x.startswith("layer  ") and "fused ops" in x for x in lines)  # the compile report, layer by layer


def test_ir_is_ir_and_json_is_json() -> None:
    made = run("my_models:ready", "--emit", "ir", "--example", "2x5:i64")
    graph = parse(made.stdout)
    assert [n.op.name for n in graph.nodes] == ["embedding", "block", "block", "block", "aten"]
    told = json.loads(run("my_models:Model", "--emit", "fused", "--json").stdout)
    assert told["layers"] == [{"what": "block", "count": 2, "where": "blocks.*, 4 ops"}] and "@layer" in told["text"]
    assert {p["name"] for p in json.loads(run("my_models:Model", "--json").stdout)["cost"]["parts"]} >= {"Model", "block"}


@pytest.mark.parametrize(("args", "said"), [
    (["my_models"], "must be MODULE:CALLABLE"),
    (["my_models:../x"], "must be MODULE:CALLABLE"),
    (["my_modells:Model"], "there is no module my_modells; run from the folder"),
    (["my_missing:Model"], "my_missing imports nothing_of_this_name, which is not there"),
    (["my_typo:Model"], "my_typo cannot be imported: SyntaxError"),
    (["my_models:Modle"], "has no Modle; did you mean Model?"),
    (["my_models:Block"], "needs width; name a function without arguments"),
    (["my_models:number"], "is a int, must be an nn.Module"),
    (["my_models:make"], "gives a int, must give an nn.Module"),
    (["my_models:broken"], "broken() fails: ValueError: no weights"),
    (["my_models:Branch", "--example", "2x3"], "(in Branch.forward, line 26)"),
    (["my_models:Model", "--example", "2x"], "must be sizes and a dtype"),
    (["my_models:Model", "--example", "2x3:i65"], "must be sizes and a dtype"),
])  # fmt: skip
def test_a_mistake_is_said(args: list[str], said: str) -> None:
    made = run(*args)
    assert made.exit_code == 1 and said in made.stderr and "Traceback" not in made.stderr


def test_an_example_fits_the_module() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 2)

    tokens, mask = cli_trace.inputs("4x50,4x50x2:f64", Small())
    assert tokens.dtype == torch.int64 and int(tokens.max()) == 2 and mask.shape == (4, 50, 2) and mask.dtype == torch.float64
    assert cli_trace.inputs("2x3", nn.Linear(3, 3).bfloat16())[0].dtype == torch.bfloat16
    with pytest.raises(PlaitError):
        cli_trace.made("my_models:")
