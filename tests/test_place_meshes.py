"""Meshes of several axes: each axis splits what its name says, and the program stays what it is."""

from __future__ import annotations

import pytest
from plait.frontends import load_spec, ways_of
from plait.frontends.build import build
from plait.ir import Graph, PlacementError, dump, parse
from plait.passes import Pipeline, check_types, place, placement, validate

from tests.matrix_worker import SPEC


def mixed(packed: bool = False) -> Graph:
    return build(load_spec(SPEC), task="loss", dtype="f64", packed=packed)


def agree(before: Graph, after: Graph) -> None:
    check_types(after)
    assert parse(dump(after)) == after
    report = validate(before, after, "reassociates")
    assert report.ok and len(report.rows) > 40, report
    assert max(r.error for r in report.rows) <= 1e-10, report.worst


MESHES = [
    ("dp=2,cp=2", {"attention": "ring", "recurrence": "chain", "order": "zigzag"}, "i64[b@dp, s@cp:zigzag(2)]"),
    ("cp=2,tp=2", {"attention": "kv", "recurrence": "states"}, "i64[b, s@cp]"),
    ("dp=2,ep=2,cp=2,tp=2", {}, "i64[b@ep@dp, s@cp]"),
    ("ring=2,cp=2", {"order": "zigzag"}, "i64[b, s@ring@cp:zigzag(2)]"),
    ("ring=2", {"attention": "kv", "recurrence": "scan"}, "i64[b, s@ring]"),
]


@pytest.mark.parametrize(("mesh", "options", "tokens"), MESHES, ids=[m for m, _, _ in MESHES])
def test_every_axis_splits_what_its_name_says(mesh: str, options: dict[str, str], tokens: str) -> None:
    before = mixed()
    after, _ = place(before, mesh=mesh, **options)
    assert str(after.inputs[0].type) == tokens
    agree(before, after)


def test_heads_and_a_ring_meet_in_one_attention() -> None:
    """Over the inner axis heads are exchanged, over the outer one keys pass from rank to rank."""
    after, _ = place(mixed(packed=True), mesh="ring=2,cp=2")
    layer = next(g for g in after.layers if g.name == "self_attention")
    node = next(n for n in layer.nodes if n.is_op("attention"))
    assert node.attrs["over"] == "ring" and node.attrs["by"] == "ring"
    assert [str(v.type) for v in node.operands[:2]] == ["f64[b, s@ring, 8@cp, 6]", "f64[b, s@ring, 4@cp, 6]"]


def test_the_whole_pipeline_over_a_mesh() -> None:
    before = mixed()
    text = placement("cp=2,tp=2", "recurrence=chain ways=gdn=heads", "self_attention=ring")
    assert text.startswith("place{mesh='cp=2 tp=2' recurrence=chain ways='self_attention=ring gdn=heads'},hoist-exchanges")
    agree(before, Pipeline.parse(text).run(before))


def test_a_spec_says_the_ways_of_its_layers() -> None:
    known = load_spec({**SPEC, "attention": {**SPEC["attention"], "cp": "ring"}, "kda": {**SPEC["kda"], "cp": "chain"}})  # type: ignore[dict-item]
    assert ways_of(known) == "self_attention=ring kda=chain"


def test_a_plan_is_taken() -> None:
    before = mixed()
    after, said = place(before, attention="auto", seq=65536, ways="gdn=chain")
    told = next(r.why for r in said if r.what == "auto")
    assert "gdn=chain" in told and "planned for 1 x 65536 tokens on h200" in told
    agree(before, after)


def test_an_axis_of_another_name_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"mesh axis pp: its name says what it splits; there are tp \(features\), ep"):
        place(mixed(), mesh="cp=2,pp=2")
