"""Kernels on the command line: source, compiled text, tables, checks, and the pages that are written from them."""

import ast
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plait.lowering.gpu.report as report
import pytest
from plait.cli_docs import TOKENS, cost_table, traffic_page
from plait.cli_kernels import fused, kernels_of, presets, step_launches, tables_of
from plait.ir import dump
from plait.lowering.gpu import TARGETS, Resources

from tests.command import bad, good, run

ROOT = Path(__file__).parent.parent
GLU = """def mlp(x: bf16[b, s, 2048], *, w: bf16[1024, 1024] = normal(0.02)):
    g, u = split(x, sizes=(1024, 1024))
    a = silu(g)
    m = mul(a, u)
    y = linear(m, w)
    return y
"""
CODE = Resources(64, 0, 0, 1024, {}, 8, 8, 2, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources of the test's own, and gradients named after this test's kernels: equal kernels share one."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def glu(tmp_path: Path) -> str:
    path = tmp_path / "glu.ir"
    path.write_text(GLU, encoding="utf-8")
    return str(path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job comes out as the same code, nothing is compiled."""

    def outcomes(wanted: Sequence[Any], keep: Any, told: Any) -> dict[Any, Any]:
        return {report.job_key(j): CODE for j in wanted}

    monkeypatch.setattr(report, "outcomes", outcomes)


# -- text ---------------------------------------------------------------------------------


def test_the_source_of_every_kernel_prints_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    text = good("compile", "demo", "--emit=triton").stdout
    headings = re.findall(r"^# ==== (\w+), (\w+), called by (.*)$", text, re.MULTILINE)
    assert [h[0] for h in headings] == [u.name for u in kernels_of(fused("demo"))]
    assert ("residual_norm1", "forward", "head") in headings and ("glu_backward", "backward", "moe x5") in headings
    functions = {n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
    regions = {f"plait_{u.graph.name}" for u in kernels_of(fused("demo")) if u.node is None}
    members = {f"{f}_delta_head_decay_beta{end}" for f, end in (("scan", "_keep"), ("back", "_keep"), ("decode", "_state"))}
    assert regions | members <= functions


def test_compiled_text_of_every_target_prints(glu: str) -> None:
    text = good("compile", glu, "--emit=ptx", "--target", "sm_90,gfx942", "--target", "sm_80").stdout
    assert re.findall(r"^\.target (\w+)", text, re.MULTILINE) == ["sm_90a", "sm_80"] * 2
    assert text.count(".amdgcn_target") == 2 and text.count("; ==== glu") == 2
    assert "; ==== glu, forward, called by mlp: plait_glu for gfx942, 4 warps, AMD's assembly (amdgcn)" in text
    assert text.count("// ==== glu_backward, backward, called by mlp: plait_glu_backward for sm_") == 2
    ttgir = good("compile", glu, "--emit=ttgir").stdout
    assert ttgir.count('ttg.target = "cuda:90"') == 2 and "8 warps, Triton's GPU IR" in ttgir


def test_targets_that_cannot_be_are_named(glu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (("kernels", glu), ("compile", glu, "--emit=ptx"), ("compile", glu, "--emit=triton")):
        error = bad(*command, "--target", "sm_90,sm_75")
        assert "no GPU target called 'sm_75'; there are sm_80, sm_90, sm_100, gfx942" in error
    assert "no target called 'sm_90'; there are cpu, reference" in bad("compile", glu, "--emit=fx", "--target=sm_90")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton, which is not installed" in bad("kernels", glu) and "not installed" in bad("compile", glu, "--emit=ptx")


def test_what_has_no_kernels_or_no_gradient_says_so() -> None:
    plain = "def f(x: f32[b, s, 8]):\n    y = scale(x, by=2.0)\n    return y\n"
    assert good("compile", "-", "--emit=triton", stdin=plain).stdout == "# f has no kernels\n"
    assert good("compile", "-", "--emit=ptx", stdin=plain).stdout == "// f has no kernels\n"
    whole = "@kernel\ndef f(x: i64[b, s]):\n    y = positions(x)\n    return y\n"
    result = good("compile", "-", "--emit=triton", stdin=whole)
    assert "forward kernels alone: f has no gradient" in result.stderr and "no kernel: positions has" in result.stdout


# -- tables -------------------------------------------------------------------------------


def test_a_table_tells_costs_and_code(glu: str) -> None:
    result = good("kernels", glu, "--target=sm_90", "--tokens=100")
    lines = result.stdout.splitlines()
    assert result.stderr == "" and "2 distinct kernels" in lines[0] and "for 100 tokens" in lines[0]
    assert lines[2].split()[:6] == ["glu", "forward", "mlp", "1", "600.0", "KiB"]
    assert lines[3].split()[:6] == ["glu_backward", "backward", "mlp", "1", "1000.0", "KiB"]
    assert sum(x.endswith("on sm_90; wide is 128 bits") for x in lines) == 1
    registers, spills, _, _, loads, wide, *_ = lines[-2].split()[1:]
    assert int(registers) >= 16 and spills == "0" and loads == wide


def test_json_has_every_number(glu: str) -> None:
    found = json.loads(good("kernels", glu, "--target=sm_90,gfx942", "--json").stdout)
    assert found["tokens"] == 8192 and found["targets"] == ["sm_90", "gfx942"]
    (made,) = found["programs"]
    forward, backward = made["kernels"]
    assert (forward["bytes"], backward["bytes"]) == (2 * 8192 * 3072, 2 * 8192 * 5120)
    assert (
        forward["seconds"]["H200"] == forward["bytes"] / 4.3e12 and forward["intensity"] == forward["flops"] / forward["bytes"]
    )
    assert backward["direction"] == "backward" and backward["calls"] == {"mlp": 1} and backward["declined"] is None
    for used in (k["targets"][t] for k in made["kernels"] for t in found["targets"]):
        assert used["loads"] == used["wide_loads"] > 0 and used["spills"] == used["stack"] == 0 and used["tensor_core"] == {}


@pytest.mark.usefixtures("quick")
def test_kernels_are_chosen_by_name(glu: str) -> None:
    def chosen(only: str) -> list[str]:
        found = json.loads(good("kernels", "demo", glu, "--only", only, "--json").stdout)
        return [k["name"] for program in found["programs"] for k in program["kernels"]]

    assert chosen("glu") == ["glu", "glu1", "glu"] and chosen("glu1,norm_gate_backward1") == ["glu1", "norm_gate_backward1"]
    assert "no kernel called glo; did you mean glu?" in bad("kernels", glu, "--only=glo")


@pytest.mark.usefixtures("quick")
def test_gradients_are_not_differentiated_again(glu: str, tmp_path: Path) -> None:
    text = good("compile", glu, "-p", "outline-rows,differentiate").stdout
    path = tmp_path / "joint.ir"
    path.write_text(text)
    found = json.loads(good("kernels", str(path), "--json").stdout)["programs"][0]["kernels"]
    assert [(k["name"], k["direction"]) for k in found] == [("rows", "forward"), ("rows_backward", "backward")]


# -- checks -------------------------------------------------------------------------------


def test_a_check_passes_where_nothing_spills(glu: str) -> None:
    result = good("kernels", glu, "--check", "--target=sm_90")
    assert result.stdout == f"{glu}: 2 generated, 0 declined, sm_90\n" and result.stderr == ""


@pytest.mark.parametrize(("field", "value", "why"), [
    ("spills", 12, "spills registers: 12 times"), ("stack", 64, "spills registers: 0 times, 64 bytes a thread"),
    ("wide_loads", 0, "has no 128-bit load"),
])  # fmt: skip
def test_a_check_names_what_must_not_be(glu: str, monkeypatch: pytest.MonkeyPatch, field: str, value: int, why: str) -> None:
    made = Resources(**{**vars(CODE), field: value})
    monkeypatch.setattr(report, "outcomes", lambda wanted, keep, told: {report.job_key(j): made for j in wanted})
    result = run("kernels", glu, "--check", "--only=glu", "--target=sm_90")
    assert result.exit_code == 1 and f"1 faults in kernels:\n  {glu}: glu for sm_90: {why}" in result.stderr


@pytest.mark.usefixtures("quick")
def test_declined_kernels_stand_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "wide.ir"
    path.write_text(GLU.replace("bf16", "f64"))
    result = good("kernels", str(path), "--check")
    assert result.stdout.startswith(f"{path}: 0 generated, 2 declined, sm_80")
    assert re.search(r"glu +any +\w+ is float64", good("kernels", str(path)).stdout)


# -- pages --------------------------------------------------------------------------------


def test_the_traffic_page_is_that_of_the_program() -> None:
    assert (ROOT / "docs" / "traffic.md").read_text() == traffic_page()


def test_the_kernel_page_has_the_kernels_of_the_program_and_none_spills() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    found = tables_of({name: fused(name) for name in presets()}, (), TOKENS, "", lambda done, total: None)
    steps = {layer: n for layer, (n, _) in step_launches(next(m for m in found if m.name == "demo").rows).items()}
    assert steps == {"first_gdn": 4, "gdn": 4, "mamba2": 4, "self_attention": 5}  # the norm in front of a mixer is one of them
    for made in found:
        assert f"\n## {made.name}\n\n{cost_table(made)}\n" in page
        assert all(page.count(f"\n| {r.use.name} |") >= 2 for r in made.rows)
    columns = " | ".join(TARGETS)
    assert page.count(f"| kernel | {columns} |") == len(found)
    assert not re.search(r"\d spills|does not compile", page)
    rows = re.findall(r"^\| \w+ \| (\d.*) \|$", page, re.MULTILINE)
    cells = [c for row in rows for c in row.split(" | ")]
    assert len(rows) == sum(not r.declined for m in found for r in m.rows)
    assert all(re.fullmatch(r"\d+, [\d.]+ \w+, \d+ of \d+", c) for c in cells)


def test_equal_programs_have_equal_kernels_whatever_they_are_read_from(tmp_path: Path) -> None:
    path = tmp_path / "demo.ir"
    path.write_text(dump(fused("demo")))
    again = kernels_of(fused(str(path)))
    assert [u.graph for u in again] == [u.graph for u in kernels_of(fused("demo"))]
