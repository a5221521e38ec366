"""`plait explain` and `plait calibrate`: every price or reason, the choice, the machine that is measured, and mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plait.cli_calibrate import Sample, fit
from plait.frontends import build, load_spec
from plait.ir import parse_mesh
from plait.passes import Pipeline
from plait.passes.machine import load_machine
from plait.passes.plan import plan

from tests.command import bad, said

QWEN = "qwen3-next-80b-a3b"
LONG = (QWEN, "--mesh", "cp=8", "--seq", "131072", "--machine", "h200")


def test_every_remedy_has_a_price_and_one_is_chosen() -> None:
    text = said("explain", *LONG)
    assert "gdn, 36 calls" in text and "self_attention, 12 calls" in text
    rows = [line.split() for line in text.splitlines()]
    kinds = ["heads", "states", "scan", "chain", "gather", "heads", "kv", "ring", "gather"]
    table = [r for r in rows if r[:1] and r[0] in kinds and r[1] in ("natural", "zigzag")]
    assert [r[0] for r in table] == [k for k in kinds for _ in range(2)]
    assert [r[:2] for r in table if r[-1] == "chosen"] == [["scan", "zigzag"], ["kv", "zigzag"]]
    assert sum(r[-1] == "runner-up" for r in table) == 2
    assert "place{mesh='cp=8' order=zigzag ways='gdn=scan self_attention=kv'}" in text
    assert "16384 of 131072" in text and "Megatron-core" in text and "471.60 MB in 7 exchanges" in text


def test_json_says_what_the_plan_says() -> None:
    found = json.loads(said("explain", *LONG, "--json"))
    made = plan(build(load_spec(QWEN)), parse_mesh("cp=8"), load_machine("h200"), seq=131072)
    assert found["sent"] == made.sent and found["reference_sent"] == made.reference and found["place"] == made.place
    assert found["seconds"] == {"forward": made.forward, "training": made.training}
    gdn = found["layers"][0]
    assert gdn["chosen"] == {"remedy": "scan", "order": "zigzag"} and gdn["runner_up"]["remedy"] == "chain"
    assert [o["price"]["sent"] for o in gdn["offers"]] == [o.price.sent for o in made.choices[0].offers if o.price]
    assert found["orders_by_layer"]["reorders"] == 0 and found["link"]["name"] == "node"
    sums = {(x["layer"], x["axis"]): x["bytes"] for x in found["counted"]}
    assert sums["gdn", "cp"] + sums["self_attention", "cp"] == found["sent"] and found["cannot_be_counted"] == ""


def test_what_cannot_be_has_its_reason() -> None:
    text = said("explain", "mamba-2-2.7b", "--mesh", "cp=64", "--seq", "1048576")
    assert "cannot be: o of ssd has 80 heads; they must be a multiple of cp=64" in text and "it would refuse" in text
    odd = said("explain", "demo", "--mesh", "cp=2", "--seq", "4098")
    assert "cannot be: a sequence has 4098 tokens; zigzag needs a multiple of 2 x cp = 4" in odd and "order=natural" in odd


def test_packed_segments_have_their_own_balance() -> None:
    packed = json.loads(said("explain", "demo", "--mesh", "cp=2", "--seq", "4096", "--lengths", "512,3072,512", "--json"))
    assert "order=zigzag-packed" in packed["place"] or packed["order"] == "natural"
    attention = next(x for x in packed["layers"] if x["layer"] == "self_attention")
    found = {(o["remedy"], o["order"]): o["price"]["balance"] for o in attention["offers"]}
    own = [512 * 513 + 1536 * 1537, 3072 * 3073 - 1536 * 1537 + 512 * 513]
    assert found["kv", "natural"] == pytest.approx(2 * max(own) / sum(own)) and found["kv", "zigzag"] == 1.0


def test_a_program_that_cannot_be_placed_is_priced_all_the_same() -> None:
    text = said("explain", "demo", "--mesh", "cp=2,zz=3", "--seq", "64")
    assert "the placed program cannot be made: pass place: mesh axis zz" in text and "chosen" in text


def test_forced_ways_and_ir_and_stdin() -> None:
    text = said("explain", "demo", "--mesh", "cp=2,tp=1", "--ways", "gdn=chain, self_attention=ring")
    assert "ways='gdn=chain mamba2=" in text and "self_attention=ring'" in text
    ir = said("compile", "demo", "--emit=ir")
    assert said("explain", "-", "--mesh", "cp=2", stdin=ir) == said("explain", "demo", "--mesh", "cp=2")


def test_the_pass_that_is_printed_places_the_program() -> None:
    spec = load_spec("demo")
    made = plan(build(spec), parse_mesh("cp=2"), load_machine("h200"), seq=4096)
    placed = Pipeline.parse(made.place).run(build(spec))
    assert "@cp" in str(placed.inputs[0].type)


@pytest.mark.parametrize(("options", "why"), [
    (("--mesh", "cp=0"), "mesh is 'cp=0'"), (("--mesh", "tp=2"), "has no axis cp to split tokens over; its axes are tp"),
    (("--machine", "h20"), "did you mean h200?"), (("--machine", "none.toml"), "does not exist"),
    (("--ways", "gdn"), "--ways is 'gdn'; 'gdn' stands where there must be a layer, =, and a remedy"),
    (("--ways", "gdn=ring"), "gdn: no remedy called ring; there are"), (("--ways", "gdm=chain"), "did you mean gdn?"),
    (("--lengths", "10,x"), "'x' must be a number of tokens"), (("--lengths", "10,20"), "add up to 30"),
    (("--mesh", "cp=3"), "every remedy cannot be: a sequence has 4096 tokens; natural needs a multiple of cp=3"),
])  # fmt: skip
def test_mistakes(options: tuple[str, ...], why: str) -> None:
    assert why in bad("explain", "demo", *options)


# -- calibrate ----------------------------------------------------------------------------------


def test_this_host_is_measured_and_then_explained(tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    found = json.loads(said("calibrate", "--machine-out", str(out), "--seconds", "0.001", "--json"))["measured"]
    made, base = load_machine(out), load_machine("laptop")
    assert made.name == "mine" and [*tmp_path.iterdir()] == [out]
    assert all(made.numbers[k] == v > 0 for k, v in found.items()) and found["flops.f32"] > 1e8
    kept = {k: v for k, v in base.numbers.items() if k.startswith("links.")}
    assert kept.items() <= made.numbers.items() and "links as of laptop" in made.about
    assert "node of mine" in said("explain", "demo", "--machine", str(out))


def test_a_fit_finds_latency_and_bandwidth() -> None:
    exact = [Sample(m, size, m * 3e-5 + size / 2e9) for m, size in ((1, 100), (3, 3000), (1, 10**6), (7, 7 * 10**6))]
    assert fit(exact) == pytest.approx((3e-5, 2e9))
    assert all(x > 0 for x in fit([Sample(1, 10, 1e-9), Sample(1, 10**6, 1e-9)]))


def test_links_are_measured_between_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "pair.toml"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "plait"]
    command = [*launch, "calibrate", "--machine-out", str(out), "--seconds", "0.001", "--name", "pair"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    made = load_machine(out)
    assert made.name == "pair" and made.devices == 2 and "links of 2 ranks measured" in made.about
    assert 1e-7 < made.numbers["links.node.latency"] < 1 and 1e6 < made.numbers["links.node.bandwidth"] < 1e13


def test_calibrate_mistakes(tmp_path: Path) -> None:
    assert "must be a .toml file" in bad("calibrate", "--machine-out", str(tmp_path / "x.json"))
    assert "no machine's name" in bad("calibrate", "--machine-out", str(tmp_path / "x.toml"), "--machine", "abacus")
    assert "--name is" in bad("calibrate", "--machine-out", str(tmp_path / "x.toml"), "--name", "a\nb")
    assert [*tmp_path.iterdir()] == []
