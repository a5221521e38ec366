"""Carrying the residual: layers take and give (x, delta), the first in a variant of its own."""

from __future__ import annotations

from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.frontends.shrink import shrink
from plait.ir import Graph, parse
from plait.passes import carry_residual, check_types, fuse, validate

LAYERS = """
@layer
def mix(x: f64[b, 5], *, w: f64[5, 5] = normal(0.2)):
    n = rms_norm(x)
    l = linear(n, w)
    y = add(x, l)
    return y

@layer
def head(x: f64[b, 5], *, w: f64[7, 5] = normal(0.2)):
    n = rms_norm(x)
    y = linear(n, w)
    return y
"""


def model(body: str, layers: str = LAYERS) -> Graph:
    lines = "\n".join(f"    {line.strip()}" for line in body.strip().splitlines())
    return parse(f"def model(x: f64[b, 5]):\n{lines}\n{layers}")


CALLS = """
a = mix(x, params='layers.0')
c = mix(a, params='layers.1')
d = mix(c, params='layers.2')
y = head(d, params='final')
return y
"""
THREE = model(CALLS)


def test_the_last_add_moves_to_the_next_layer():
    after, remarks = carry_residual(THREE)
    check_types(after)
    assert [g.name for g in after.layers] == ["first_mix", "mix", "head"]
    first, mix, head = after.layers
    assert [n.op.name for n in first.nodes] == ["rms_norm", "linear"]
    assert [n.op.name for n in mix.nodes] == ["add", "rms_norm", "linear"]
    assert [v.name for v in mix.inputs] == ["x", "delta"] and len(mix.outputs) == 2
    assert [n.op.name for n in head.nodes] == ["add", "rms_norm", "linear"]
    assert len([r for r in remarks if r.kind == "passed"]) == 3
    assert max(r.error for r in validate(THREE, after, "exact").rows) == 0.0


def test_then_every_layer_but_the_first_starts_with_a_residual_norm():
    fused, _ = fuse(carry_residual(THREE)[0], only=("residual-norm",))
    assert [g.nodes[0].op.name for g in fused.layers] == ["rms_norm", "residual_norm", "residual_norm"]
    assert len(fused.layers[1].callees[0].outputs) == 2 and len(fused.layers[2].callees[0].outputs) == 1
    assert validate(THREE, fused, "exact").ok


def test_a_result_that_others_read_is_added_where_it_was():
    kept = model("a = mix(x, params='layers.0')\nc = mix(a, params='layers.1')\nz = silu(a)\ny = add(c, z)\nreturn y")
    after, remarks = carry_residual(kept)
    assert after == kept and [r.kind for r in remarks] == ["missed"]


def test_only_the_calls_that_can_are_carried():
    some = model("a = mix(x, params='layers.0')\nc = mix(a, params='layers.1')\nd = mix(c, params='layers.2')\nreturn d, c")
    after, remarks = carry_residual(some)
    check_types(after)
    assert [r.where for r in remarks if r.kind == "passed"] == [""] and len(after.layers) == 3
    assert validate(some, after, "exact").ok


def test_an_add_with_the_residual_second_keeps_its_order():
    swapped = model(CALLS, LAYERS.replace("add(x, l)", "add(l, x)"))
    after, _ = carry_residual(swapped)
    assert max(r.error for r in validate(swapped, after, "exact").rows) == 0.0
    assert after.layers[1].nodes[0].operands[0] is after.layers[1].inputs[1]


def test_a_layer_that_ends_otherwise_holds_back():
    for ending in ("mul(x, l)", "add(l, l)", "add(l, n)"):
        other = model(CALLS, LAYERS.replace("add(x, l)", ending))
        assert carry_residual(other)[0] == other


def test_losses_and_dropout_ride_along():
    spec = shrink(load_spec("demo")).model_copy(update={"dropout": 0.25})
    before = build(spec, task="loss", dtype="f64", training=True)
    after, _ = carry_residual(before)
    check_types(after)
    assert len(after.layers) == len(before.layers) + 1
    assert max(r.error for r in validate(before, after, "exact").rows) < 1e-14
