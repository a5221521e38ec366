"""Recurrence kernels beside their main road: final states alone, borders of segments, samples of the whole grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plait.ir import DataError, TypeMismatch, ops
from plait.lowering import lower
from plait.lowering.gpu.jobs import op_uses
from plait.lowering.gpu.op_jobs import op_kernels
from plait.lowering.recurrent import Step, faces, final_state, forward, interpreted, launches
from torch import Tensor

from tests import recurrent_grid as grid
from tests.test_forms_relay import operands as relay_operands
from tests.test_recurrent_kernels import FORMS, call_of, error, operands, results
from tests.ways import gradients, leaves

FINALS = {
    "gated": ("gated_delta_final", "head"),
    "plain": ("gated_delta_final", "none"),
    "kimi": ("kimi_delta_final", "channel"),
}
FINAL = pytest.mark.parametrize("name", FINALS)


def operands_of(name: str, cu: list[int] | None, dtype: torch.dtype) -> list[Tensor | None]:
    """k, v, decay, beta, state, cu; keys and values in `dtype`."""
    xs = relay_operands(FINALS[name][1], 70, cu, b=1, k=20, v=24)
    return [x if x is None or not x.is_floating_point() else x.to(dtype if i < 2 else torch.float32) for i, x in enumerate(xs)]


# -- final states -------------------------------------------------------------------------


@FINAL
@pytest.mark.parametrize(("cu", "dtype"), [(None, torch.float32), ([0, 0, 1, 64, 70, 70], torch.bfloat16)], ids=str)
def test_final_states_and_their_gradients(name: str, cu: list[int] | None, dtype: torch.dtype) -> None:
    op = FINALS[name][0]
    xs, limit = operands_of(name, cu, dtype), 3e-6 if dtype == torch.float32 else 1e-2
    a, b = leaves(xs), leaves([x if x is None or not x.is_floating_point() else x.double() for x in xs])
    kept, want = faces(interpreted=True)[op](*a), getattr(ops, op).reference(*b)
    assert error(kept.detach(), want.detach()) < limit
    for got, exact in zip(gradients([kept], a), gradients([want], b), strict=True):
        assert error(got, exact) < limit
    with torch.no_grad():
        assert torch.equal(faces(interpreted=True)[op](*xs), kept)


def test_a_final_state_reads_no_queries_and_makes_no_outputs() -> None:
    x, made = call_of("gated_delta_rule", operands("gated_delta_rule", 70)), list[Step]()
    final_state(x, made.append)
    names = {n for step in made for n in step.arguments}
    assert [s.function.split("_")[0] for s in made] == ["prepare", "scan"]
    assert not names & {"p_q", "p_o", "p_scores", "p_u", "p_states"} and "$" not in made[0].source.text


def test_torch_sees_the_state_op() -> None:
    k, v, decay, beta, state, _ = operands_of("gated", None, torch.float32)
    torch.library.opcheck(torch.ops.plait.recurrence_state, (k, v, decay, beta, state, None, "delta", True))


class Rule(torch.nn.Module):
    """A recurrence between two maps."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        o, final = FORMS["gated_delta_rule"](q * 2, k, v, decay, beta, state)
        return o + 1, final


def test_exported_and_packaged_ahead_of_time(tmp_path: Path) -> None:
    xs = tuple(operands("gated_delta_rule", 20))
    with torch.no_grad():
        exported, want = torch.export.export(Rule(), xs), Rule()(*xs)
        torch.export.save(exported, tmp_path / "rule.pt2")
        back = torch.export.load(tmp_path / "rule.pt2").module()
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "packaged.pt2"))
        for made in (back(*xs), torch._inductor.aoti_load_package(path)(*xs)):
            torch.testing.assert_close(list(made), list(want))


@pytest.mark.parametrize("dense", [True, False])
def test_a_step_updates_a_state_however_it_lies(dense: bool) -> None:
    q, k, v, decay, beta, state = operands("gated_delta_rule", 1, b=2, k=20, v=24)
    want = ops.gated_delta_rule.reference(*(x.double() for x in (q, k, v, decay, beta, state)))
    state = state if dense else state.transpose(2, 3).contiguous().transpose(2, 3)
    o = torch.ops.plait.recurrence_step(q, k, v, decay, beta, state, None, 1.0, "delta", True)
    assert error(o, want[0]) < 1e-6 and error(state, want[1]) < 1e-6
    with pytest.raises(TypeMismatch, match="a step takes one row of tokens"):
        torch.ops.plait.recurrence_step(q, k, v, decay, beta, state, torch.tensor([0, 1]), 1.0, "delta", True)


# -- borders ------------------------------------------------------------------------------


@pytest.mark.parametrize("cu", [[0, 30, 10, 20], [0, 5, 10, 21], [1, 5, 10, 20], [0, 5, 10, 19]], ids=str)
def test_borders_that_are_none_are_refused(cu: list[int]) -> None:
    xs = operands("ssd", 20, n=3)
    with pytest.raises(DataError, match="must rise from 0 to the number of tokens, 20"):
        FORMS["ssd"](*xs, cu=torch.tensor(cu))
    with pytest.raises(DataError, match="must rise"):
        k, v, decay, beta, state = xs[1:]
        FORMS["gated_delta_final"](k, v, decay, beta, state, torch.tensor(cu))


def test_borders_that_nobody_looked_at_touch_nothing_outside() -> None:
    """On a device no host waits for them: they are clamped into the row."""
    x = replace(call_of("ssd", operands("ssd", 20, n=3)), cu=torch.tensor([-3, 30, 10, 25]))
    o, final, _ = forward(x, interpreted)
    assert o.isfinite().all() and final.isfinite().all()


# -- digits of half types -----------------------------------------------------------------


@pytest.mark.parametrize(("name", "result", "limit"), [("gated_delta_rule", 6, 4.2e-3), ("kimi_delta_attention", 5, 4.5e-3)])
def test_small_differences_keep_their_digits(name: str, result: int, limit: float) -> None:
    """What is solved is not rounded before, and pairs within a chunk leave nothing in a decay's gradient: beta's, decay's."""
    xs = operands(name, 63, r=1, k=32, v=32, dtype=torch.bfloat16)
    got = results(FORMS[name], xs)[result]
    want = results(getattr(ops, name).reference, [x.double() for x in xs])[result]
    assert error(got, want) < limit


# -- the grid -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", grid.sample(grid.NUMBERS, 173), ids=str)
def test_a_sample_of_the_numbers(case: grid.Numbers) -> None:
    assert case.worst() < 1


@pytest.mark.parametrize("case", grid.sample(grid.COMPILED, 125), ids=str)
def test_a_sample_of_the_targets(case: grid.Compiled) -> None:
    assert not case.faults()


def test_launches_of_a_node_are_listed_and_of_what_torch_runs_not() -> None:
    case = grid.COMPILED[0]
    node = grid.parse(case.text).nodes[0]
    assert [x.half for x in launches(node)] == ["forward"] * 2 + ["backward"] * 3 + ["step"]
    assert [x.half for x in launches(node, halves=("step",))] == ["step"]
    assert launches(grid.parse(replace(case, dtype="f64").text).nodes[0]) == ()
    assert launches(grid.parse("def f(x: f32[b, 8]): y = silu(x); return y").nodes[0]) == ()


def test_a_final_state_is_among_a_programs_kernels() -> None:
    given = "k: bf16[b, s, 2, 64], v: bf16[b, s, 4, 64], g: f32[b, s, 4], w: f32[b, s, 4]"
    (use,) = op_uses(grid.parse(f"def f({given}): final = gated_delta_final(k, v, g, w); return final"))
    assert use.node is not None and use.half == "forward"
    made = op_kernels(use.node, use.half, "sm_90", use.operands)
    assert [x.name.split("_")[0] for x in made.launches] == ["prepare", "scan"] and "def scan_" in made.text


CARRIED = """
@layer
def mixer(q: f32[b, s, 2, 16], k: f32[b, s, 2, 16], v: f32[b, s, 4, 16], g: f32[b, s, 4], w: f32[b, s, 4],
          state: f32[b, 4, 16, 16]):
    o, final = gated_delta_rule(q, k, v, g, w, state)
    y = scale(o, by=2.0)
    return y, final
"""


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_state_that_a_program_carries_is_written_where_it_stands(tokens: int) -> None:
    """By a step of few tokens without a gradient; compiled, too, and nobody copies it."""
    program = lower(grid.parse(CARRIED), target="interpreter")
    assert "a step writes the state where it stands" in program.choices[0].why
    xs = [torch.randn(2, tokens, *rest) for rest in ((2, 16), (2, 16), (4, 16), (4,), (4,))]
    xs = [*xs[:3], -xs[3].abs(), xs[4].sigmoid()]
    compiled = torch.compile(program.entry.forward, backend="aot_eager", fullgraph=True)
    for run in (program.entry, compiled)[: 2 if tokens == 1 else 1]:
        state = torch.randn(2, 4, 16, 16)
        want = ops.gated_delta_rule.reference(*(x.double() for x in (*xs, state)))
        _, kept = program.entry(*(x.clone().requires_grad_() for x in xs), before := state.clone())
        assert torch.equal(before, state) and kept.data_ptr() != before.data_ptr()  # a backward reads what was there
        with torch.no_grad():
            y, final = run(*xs, state)
        assert error(y, 2 * want[0]) < 3e-6 and error(final, want[1]) < 3e-6
        assert (final.data_ptr() == state.data_ptr()) == (tokens < 5)


def test_a_state_that_is_read_elsewhere_is_not_given_up() -> None:
    for text in (
        CARRIED.replace("return y, final", "return y"),
        CARRIED.replace("return y, final", "return y, final, state"),
        CARRIED.replace("y = scale(o, by=2.0)", "y = scale(state, by=2.0)"),
    ):
        assert "carried" not in lower(grid.parse(text), target="cuda").source
    assert "carried" not in lower(grid.parse(CARRIED), target="cpu").source
