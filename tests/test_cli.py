"""The command line: what goes to stdout and to stderr, exit codes, and every wrong thing a user may give."""

import json
from pathlib import Path
from typing import Any

import pytest
from plait.cli_output import Table, count, size
from plait.cli_report import arithmetic, report, traffic, work
from plait.frontends import PRESETS, build, dump_spec, load_spec, parameter_count
from plait.ir import OPS, Graph, PassError, parse
from plait.lowering import lower
from plait.passes import DEFAULT, PASSES, Pipeline, register

from tests.command import bad, good

GATE = """def gate(x: f32[b, s, 64], g: f32[b, s, 64], *, w: f32[64] = constant(1.0), w2: f32[3, 64] = normal(0.02)):
    n = rms_norm(x, w, eps=1e-06)
    a = silu(g)
    y = mul(n, a)
    z = linear(y, w2)
    return z
"""
FUSED = """def gate(x: f32[b, s, 64], g: f32[b, s, 64], *, w: f32[64] = constant(1.0), w2: f32[3, 64] = normal(0.02)):
    y = norm_gate(x, w, g)
    z = linear(y, w2)
    return z

@kernel
def norm_gate(x: f32[b, s, 64], w: f32[64], g: f32[b, s, 64]):
    n = rms_norm(x, w, eps=1e-06)
    a = silu(g)
    y = mul(n, a)
    return y
"""


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own to stand in: reproducers are written there."""
    monkeypatch.chdir(tmp_path_factory.mktemp("home"))


@pytest.fixture
def gate(tmp_path: Path) -> str:
    path = tmp_path / "gate.ir"
    path.write_text(GATE, encoding="utf-8")
    return str(path)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that fails on every graph."""
    for name in ("break_user", "break_inside"):
        monkeypatch.delitem(PASSES, name.replace("_", "-"), raising=False)

    def break_user(graph: Graph) -> Graph:
        """Refuses."""
        raise PassError("refused")

    def break_inside(graph: Graph) -> Graph:
        """Has a mistake."""
        raise KeyError("lost")

    for fn in (break_user, break_inside):
        made = register(numerics="exact")(fn)
        monkeypatch.setitem(PASSES, fn.__name__.replace("_", "-"), PASSES.pop(made.__name__.replace("_", "-")))


# -- compile --------------------------------------------------------------------------


def test_each_stage_goes_to_stdout_alone() -> None:
    spec = load_spec("mamba-2-2.7b-tiny")
    outputs = {emit: good("compile", "mamba-2-2.7b-tiny", f"--emit={emit}") for emit in ("spec", "ir", "fused", "fx", "report")}
    assert all(r.stderr == "" for r in outputs.values())
    assert outputs["spec"].stdout == dump_spec(spec)
    assert parse(outputs["ir"].stdout) == build(spec)
    fused = parse(outputs["fused"].stdout)
    assert fused != build(spec) and any(g.role == "kernel" for layer in fused.layers for g in layer.callees)
    assert outputs["fx"].stdout == lower(Pipeline.parse(DEFAULT).run(build(spec))).source
    assert "parameters" in outputs["report"].stdout


@pytest.mark.parametrize("task", ["logits", "loss", "cached"])
def test_a_task_and_a_dtype_shape_the_program(task: str) -> None:
    graph = parse(good("compile", "demo", "--emit=ir", f"--task={task}", "--dtype=f32").stdout)
    names = [v.name for v in graph.inputs]
    assert names[:2] == {"logits": ["tokens"], "loss": ["tokens", "labels"], "cached": ["tokens", "at"]}[task]
    assert graph.params[0].type.dtype == "f32"


def test_packed_adds_borders() -> None:
    assert "cu" in [v.name for v in parse(good("compile", "demo", "--emit=ir", "--packed").stdout).inputs]


def test_a_spec_file_ir_and_stdin_compile_alike(tmp_path: Path, gate: str) -> None:
    spec = good("compile", "llama-3-8b-tiny", "--emit=spec").stdout
    path = tmp_path / "spec.toml"
    path.write_text(spec, encoding="utf-8")
    want = good("compile", "llama-3-8b-tiny").stdout
    assert good("compile", str(path)).stdout == want
    assert good("compile", "-", stdin=spec).stdout == want
    assert parse(good("compile", "-", stdin=good("compile", "llama-3-8b-tiny", "--emit=ir").stdout).stdout) == parse(want)
    assert good("compile", gate, "-p", "").stdout == str(parse(GATE))


def test_json_carries_text_passes_and_report() -> None:
    made = json.loads(good("compile", "demo", "--emit=fused", "--json", "-p", "fuse").stdout)
    assert made["emit"] == "fused" and made["text"] == good("compile", "demo", "-p", "fuse").stdout
    assert [p["pass"] for p in made["passes"]] == ["fuse"] and made["passes"][0]["ops_after"] < made["passes"][0]["ops_before"]


def test_remarks_and_timing_go_to_stderr() -> None:
    made = good("compile", "demo", "-p", "fuse", "--remarks", "--timing")
    assert made.stdout == good("compile", "demo", "-p", "fuse").stdout
    assert "remark: fuse: passed norm-gate" in made.stderr and "timing:" in made.stderr and " ms" in made.stderr


def test_numbers_of_a_large_spec_are_verified_on_the_shrunken_one() -> None:
    made = good("compile", "mamba-2-2.7b", "-p", "fuse", "--verify-each=numeric")
    assert "shrunken" in made.stderr and parse(made.stdout).name == "mamba_2_2_7b"


def test_a_required_fusion_that_does_not_fire_fails() -> None:
    good("compile", "mamba-2-2.7b-tiny", "-p", "fuse", "--require", "norm-gate")
    assert "glu" in bad("compile", "mamba-2-2.7b-tiny", "-p", "fuse", "--require", "norm-gate,glu")


# -- the report -----------------------------------------------------------------------


def test_traffic_and_arithmetic_are_what_crosses_the_borders() -> None:
    before, after, tokens = parse(GATE), parse(FUSED), 65
    row, weights = 64 * 4 * tokens, 64 * 4
    norm, silu, mul, linear = before.nodes
    assert [traffic(n, tokens) for n in (norm, silu, mul)] == [2 * row + weights, 2 * row, 3 * row]
    assert traffic(linear, tokens) == row + 3 * 64 * 4 + 3 * 4 * tokens
    assert traffic(after.nodes[0], tokens) == 3 * row + weights
    assert [arithmetic(n, tokens) for n in (norm, silu, mul)] == [4 * 64 * tokens, 4 * 64 * tokens, 64 * tokens]
    assert arithmetic(after.nodes[0], tokens) == 9 * 64 * tokens
    assert work(after, tokens).ops == 2 and work(before, tokens).flops == work(after, tokens).flops


def test_a_view_moves_nothing_and_an_embedding_reads_its_rows() -> None:
    graph = parse(
        "def f(tokens: i64[b, s], *, w: f32[1000, 6] = normal(0.02)):\n"
        "    x = embedding(w, tokens)\n    y, z = split(x, sizes=(2, 4))\n    return y, z\n"
    )
    assert [traffic(n, 63) for n in graph.nodes] == [8 * 63 + 2 * 6 * 4 * 63, 0]


def _total(made: dict[str, Any], field: str) -> float:
    return sum(p[field] * len(p["prefixes"]) for p in made["parts"])


def test_the_report_counts_the_model() -> None:
    spec = load_spec("demo")
    made = json.loads(good("compile", "demo", "--emit=report", "--json", "--seq=100").stdout)
    layers = made["parts"][1:]
    assert made["parameters"] == parameter_count(spec) and made["tokens"] == 100
    assert _total(made, "parameters") == made["parameters"]
    assert sum(len(p["prefixes"]) for p in layers) == len(spec.blocks) + 1
    assert any(p["kernels"] for p in layers)
    assert all(_total(made, f"{x}_after") < _total(made, f"{x}_before") for x in ("bytes", "ops"))
    weights = [v.type.count({}) for layer in build(spec).layers for v in layer.params if v.name in ("w_in", "w_out")]
    projections = 2 * sum(weights)
    assert projections > 0 and _total(made, "flops") > projections
    assert {c["op"] for c in made["choices"]} >= {"linear", "gated_delta_rule", "ssd", "attention"}


def test_an_unchanged_program_saves_nothing() -> None:
    graph = build(load_spec("demo"))
    made = report(graph, lower(graph), 130)
    assert all(p.before == p.after and not p.kernels for p in made.parts)
    chosen = [n for g in (graph, *graph.layers) for n in g.nodes if n.callee is None and not n.is_op("reshape")]
    assert sum(made.choices.values()) == len(chosen)


# -- opt ------------------------------------------------------------------------------


def test_opt_runs_a_pipeline_on_a_file_and_on_stdin(gate: str) -> None:
    made = good("opt", gate, "-p", "fuse")
    assert made.stderr == "" and [g.name for g in parse(made.stdout).callees] == ["norm_gate"]
    assert good("opt", "-", "-p", "fuse", stdin=GATE).stdout == made.stdout


def test_opt_prints_ir_around_passes_on_stderr(gate: str) -> None:
    made = good("opt", gate, "-p", "fuse,inline-kernels", "--print-ir-before", "--print-ir-after=fuse")
    markers = [line for line in made.stderr.splitlines() if "-----//" in line]
    titles = ["Before fuse", "After fuse", "Before inline-kernels"]
    assert markers == [f"# -----// IR Dump {t} //----- #" for t in titles]
    assert "-----//" not in made.stdout and parse(made.stdout) == parse(GATE)


def test_opt_prints_changes(gate: str) -> None:
    passes = ("opt", gate, "-p", "inline-kernels,fuse")
    full, diff, quiet = (good(*passes, f"--print-changed{how}").stderr for how in ("", "=diff", "=quiet"))
    assert "IR Unchanged After inline-kernels" in full and "IR Dump After fuse" in full
    assert "IR Diff After fuse" in diff and "\n-" in diff and "+++ after fuse" in diff
    assert "Unchanged" not in quiet and "IR Dump After fuse" in quiet


def test_opt_fills_a_folder(gate: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dump"
    good("opt", gate, "-p", "fuse,inline-kernels", "--dump-dir", str(folder))
    names = {f"{stem}.{when}.ir" for stem in ("000-fuse", "001-inline-kernels") for when in ("before", "after")}
    assert {p.name for p in folder.iterdir()} == names | {"index.md", "timeline.jsonl"}
    assert parse((folder / "000-fuse.after.ir").read_text()) == parse((folder / "001-inline-kernels.before.ir").read_text())
    events = [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]
    assert [(e["index"], e["pass"], e["changed"]) for e in events] == [(0, "fuse", True), (1, "inline-kernels", True)]
    assert "[after](000-fuse.after.ir)" in (folder / "index.md").read_text()


def test_opt_tells_remarks_that_match(gate: str) -> None:
    told = good("opt", gate, "-p", "fuse", "--remarks").stderr
    assert "remark: fuse: passed norm-gate" in told
    assert good("opt", gate, "-p", "fuse", "--remarks=nothing like it").stderr == ""
    assert "missed" not in good("opt", gate, "-p", "fuse", "--remarks=passed").stderr


def test_opt_leaves_passes_out_and_says_what_ran(gate: str) -> None:
    made = json.loads(good("opt", gate, "-p", "fuse,inline-kernels", "--disable-pass", "inline-kernels", "--json").stdout)
    assert made["pipeline"] == "fuse" and [p["pass"] for p in made["passes"]] == ["fuse"]
    assert "did you mean fuse?" in bad("opt", gate, "-p", "fuse", "--disable-pass", "fus")


def test_a_failing_pass_leaves_a_reproducer(gate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: None) -> None:
    monkeypatch.chdir(tmp_path)
    said = bad("opt", gate, "-p", "fuse,break-user")
    assert "pass break-user: refused" in said and "plait-reproducer.ir" in said and "mistake in plait" not in said
    text = (tmp_path / "plait-reproducer.ir").read_text()
    assert text.startswith("# pipeline: break-user\n") and "norm_gate" in text
    assert "pass break-user: refused" in bad("opt", "plait-reproducer.ir")
    monkeypatch.delitem(PASSES, "break-user")
    assert "no pass called break-user" in bad("opt", "plait-reproducer.ir")


def test_a_mistake_of_ours_is_said_to_be_one(gate: str, tmp_path: Path, broken: None) -> None:
    folder = tmp_path / "dump"
    said = bad("opt", gate, "-p", "fuse,break-inside", "--dump-dir", str(folder))
    assert "KeyError" in said and "mistake in plait" in said
    assert (folder / "plait-reproducer.ir").is_file() and (folder / "000-fuse.after.ir").is_file()
    assert "| 0 | `fuse` |" in (folder / "index.md").read_text()


def test_opt_without_passes_reads_and_prints(gate: str) -> None:
    made = good("opt", gate)
    assert made.stdout == str(parse(GATE)) and "no pipeline" in made.stderr


# -- what there is --------------------------------------------------------------------


def test_everything_there_is_is_listed() -> None:
    for command, names in (("ops", OPS), ("passes", PASSES), ("presets", [p.name for p in PRESETS])):
        made = good(command)
        assert [line.split()[0] for line in made.stdout.splitlines()[1 : len(names) + 1]] == list(names)
        assert [x["name"] for x in json.loads(good(command, "--json").stdout)[command]] == list(names)


def test_presets_tell_their_size() -> None:
    made = {p["name"]: p for p in json.loads(good("presets", "--json").stdout)["presets"]}
    assert made["llama-3-8b"]["parameters"] == parameter_count(load_spec("llama-3-8b")) == made["llama-3-8b"]["active"]
    assert "8.03B" in next(line for line in good("presets").stdout.splitlines() if line.startswith("llama-3-8b "))


@pytest.mark.parametrize("name", OPS)
def test_every_op_explains_itself(name: str) -> None:
    text, made = good("op", name).stdout, json.loads(good("op", name, "--json").stdout)
    assert made["signature"] in text and made["meaning"] and all(a["name"] in text for a in made["attributes"])
    file, _, line = made["defined"].removeprefix("plait/").rpartition(":")
    lines = (Path(__file__).parent.parent / file).read_text().splitlines()
    assert any(f"def {name.removesuffix('_backward')}(" in x for x in lines[int(line) - 1 : int(line) + 5])
    assert made["lowerings"].keys() >= {"cpu"} and all(x["why"] for x in made["lowerings"].values())


def test_version_and_help() -> None:
    assert good("--version").stdout.startswith("plait 0.")
    for command in ("compile", "opt", "train", "generate", "bench", "ops", "op", "passes", "presets"):
        assert command in good("--help").stdout and "Usage:" in good(command, "--help").stdout


def test_tables_align_and_know_when_they_do_not_fit() -> None:
    table = Table(("op", "n", "saved", "why"), [("add", "7", "-3%", "x" * 40), ("rms_norm", "120", "-", "y")], "title")
    lines = str(table).splitlines()
    assert lines[0] == "title" and lines[2] == "add         7    -3%  " + "x" * 40 and lines[3] == "rms_norm  120      -  y"
    assert table.fits(40) and not table.fits(30)


@pytest.mark.parametrize(
    ("number", "counted", "sized"),
    [
        (0, "0", "0 B"),
        (1023, "1.02k", "1023 B"),
        (999.6e3, "1M", "976.2 KiB"),
        (8.03e9, "8.03B", "7.5 GiB"),
        (5e15, "5000T", "4547.5 TiB"),
    ],
)
def test_numbers_are_short(number: float, counted: str, sized: str) -> None:
    assert (count(number), size(number)) == (counted, sized)
