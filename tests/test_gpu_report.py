"""What kernels move and use: bytes against what interpreted launches touch, operands as calls have them, faults by name."""

import dataclasses
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from plait.api import program
from plait.ir import Graph, parse
from plait.ir.gradient import backward
from plait.lowering.gpu import MACHINES, CompileError, Job, Resources, resources
from plait.lowering.gpu.jobs import BATCH, LENGTH, Use, job_key, jobs, op_uses, uses
from plait.lowering.gpu.op_jobs import OpKernels
from plait.lowering.gpu.report import Row, flops, generated, kernel_bytes, kernels, moved, outcomes, rows, together, wide_rows
from plait.lowering.rows import Declined, RowKernel, row_kernel
from plait.passes import DEFAULT, Pipeline, differentiate

from tests.row_cases import CASES, gradient_of, graph_of, interpreted, operands

SIZES = {"b": 1, "s": 13}


def kernel(body: str, head: str = "x: f32[b, s, 64]", results: str = "y") -> Graph:
    lines = "\n".join(f"    {line.strip()}" for line in body.strip().splitlines())
    return parse(f"@kernel\ndef k({head}):\n{lines}\n    return {results}\n")


def no_bar(done: int, total: int) -> None: ...


def touched(graph: Graph, xs: list[torch.Tensor]) -> int:
    """Bytes of an interpreted launch: every element that a program loads or stores, once for each program."""
    ran = interpreted(graph, xs)
    counts = {name: ran.traffic[name] for name in ran.traffic}
    assert not any(c.stored_twice for c in counts.values())
    width = {f"p_x{i}": x.element_size() for i, x in enumerate(xs)}
    return sum((c.distinct_loads + c.distinct_stores) * width.get(name, 4) for name, c in counts.items())


# -- bytes and FLOPs ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["norms", "norm_gate", "grouped", "activations", "glu", "gates"])
@pytest.mark.parametrize("width", [48, 64])
def test_bytes_are_those_that_a_launch_touches(name: str, width: int) -> None:
    """13 rows are one program, so that nothing is read twice by two."""
    graph = graph_of(CASES[name][0], width)
    assert touched(graph, operands(graph, SIZES)) == kernel_bytes(graph, SIZES)


def test_bytes_of_a_gradient_hold_its_partial_sums() -> None:
    graph = graph_of(CASES["norm_gate"][0], 64)
    back, xs = gradient_of(graph, operands(graph, SIZES), SIZES)
    assert touched(back, xs) == kernel_bytes(back, SIZES)
    made = row_kernel(back)
    assert made.sums == 16
    many = kernel_bytes(back, {"b": 4, "s": 8192})
    assert many == 4 * (4 * 8192 * 64 * 5 + 2 * 16) + 2 * 4 * 16 * 256  # o z d_y, d_o d_z; w d_w; 256 programs share


def test_only_the_parts_of_an_operand_that_are_read_count() -> None:
    row = 4 * 13
    cut = kernel("a, c, d = split(x, sizes=(16, 32, 16))\ny = mul(a, d)")
    assert kernel_bytes(cut, SIZES) == row * (16 + 16 + 16)
    assert kernel_bytes(kernel("y = mul(x, x)"), SIZES) == row * 128
    returned = kernel("a, c = split(x, sizes=(16, 48))\ny = silu(a)", results="y, c")
    assert kernel_bytes(returned, SIZES) == row * (16 + 16)  # c is a view, and stays one
    itself = kernel("y = silu(z)", "x: f32[b, s, 64], z: f32[b, s, 64]", "y, x")
    assert kernel_bytes(itself, SIZES) == row * 128
    shape = kernel("y = spread_rows(w, x)", "w: f32[b, s], x: f32[b, s, 64]")
    assert kernel_bytes(shape, SIZES) == row * 65


def test_ops_on_their_own_read_operands_and_write_results_and_views_are_free() -> None:
    graph = parse("""
def f(x: bf16[b, s, 64], t: i64[b, s], *, e: bf16[256, 64] = normal(0.02), w: bf16[3, 64] = normal(0.02)):
    a, c = split(x, sizes=(32, 32))
    d = mul(a, a)
    g = embedding(e, t)
    h = linear(g, w)
    return c, d, h
""")
    row = 2 * 13
    assert [moved(n, SIZES) for n in graph.nodes] == [0, 64 * row, 8 * 13 + 128 * row, 64 * row + 3 * 64 * 2 + 3 * row]
    assert [flops(n, SIZES) for n in graph.nodes] == [0, 32 * 13, 0, 2 * 13 * 64 * 3]


def test_a_kernel_call_moves_what_its_kernel_does() -> None:
    fused = Pipeline.parse("fuse").run(parse(GATE))
    call, (only,) = fused.nodes[0], uses(fused)
    assert moved(call, SIZES) == kernel_bytes(only.graph, SIZES) == 4 * (3 * 13 * 64 + 64)
    assert flops(call, SIZES) == 13 * 64 * 9


GATE = """def gate(x: f32[b, s, 64], g: f32[b, s, 64], *, w: f32[64] = constant(1.0)):
    n = rms_norm(x, w)
    a = silu(g)
    y = mul(n, a)
    return y
"""


# -- what a program calls -----------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[Use, ...]:
    return uses(Pipeline.parse(f"{DEFAULT},differentiate").run(program("demo")))


def test_uses_are_the_distinct_kernels_with_all_their_calls(trained: tuple[Use, ...]) -> None:
    named = {u.name: u for u in trained}
    assert len(named) == len(trained) == len({u.graph for u in trained})
    assert named["residual_norm"].calls == {"moe": 5, "mamba2": 2, "gdn": 1, "self_attention": 1}
    assert named["preamble"].calls == {"first_gdn": 1, "gdn": 1} and named["preamble1"].calls == {"mamba2": 2}
    assert [named[n].direction for n in ("glu", "glu_backward", "glu_backward1")] == ["forward", "backward", "backward"]
    assert sum(u.direction == "backward" for u in trained) == sum(u.direction == "forward" for u in trained)


def test_operands_are_strided_as_the_call_has_them(trained: tuple[Use, ...]) -> None:
    """The gates of demo read 4 of 584 columns, 1160 bytes behind the start of a row."""
    found = {u.name: u.operands for u in trained}
    _, _, a, bias, _, b = found["preamble"]
    assert (a.shape, a.stride(), a.data_ptr()) == ((BATCH, LENGTH, 4), (LENGTH * 584, 584, 1), 2 * 580)
    assert b.data_ptr() == 2 * 576 and bias.stride() == (1,)
    made = row_kernel(next(u.graph for u in trained if u.name == "preamble"))
    assert [j.meta["s_x2_1"] for j in jobs(made, found["preamble"], "sm_90")] == [584]
    assert found["norm_gate1"][0].stride() == (LENGTH * 448, 448, 56, 1)  # of a kernel's result: memory of its own
    assert {"p_x3", "p_x4"} <= jobs(made, found["preamble"], "sm_90")[0].meta.keys()


def test_a_kernel_is_a_program_too() -> None:
    graph = graph_of(CASES["glu"][0], 64)
    (only,) = uses(graph)
    assert only.graph == graph and only.name == "glu" and only.calls == {"glu": 1}
    assert uses(parse(GATE)) == ()


def test_long_aligned_rows_are_due_wide_loads() -> None:
    def due(head: str, *strides: int) -> bool:
        graph = kernel("y = silu(x)", head)
        shape = [BATCH, LENGTH, 1024]
        x = torch.empty_strided(shape, strides or (LENGTH * 1024, 1024, 1), dtype=torch.bfloat16, device="meta")
        return wide_rows(Use("k", graph, (x[..., : graph.inputs[0].type.dims[-1].size],), {}), row_kernel(graph))

    assert due("x: bf16[b, s, 1024]") and due("x: bf16[b, s, 256]")
    assert not due("x: bf16[b, s, 255]") and not due("x: bf16[b, s, 1024]", LENGTH * 1032, 1032, 1)
    (stencil,) = uses(graph_of(CASES["conv"][0], 1000))
    assert not wide_rows(stencil, row_kernel(stencil.graph))


# -- ops that are kernels of their own ----------------------------------------------------

RULE = """def layer(q: {0}[b, s, 2, 16], v: {0}[b, s, 4, 16], g: f32[b, s, 4], n: f32[b, s, 4]):
    o, final = gated_delta_rule(q, q, v, g, n)
    p, last = gated_delta_rule(q, q, o, g, n)
    return p
"""


def test_an_op_that_is_kernels_of_its_own_is_listed_by_halves() -> None:
    graph = parse(RULE.format("bf16"))
    found = {u.name: u for u in (*op_uses(graph), *op_uses(differentiate(graph)[0]))}
    assert {n: u.direction for n, u in found.items()} == {
        "gated_delta_rule": "forward", "gated_delta_rule_step": "step", "gated_delta_rule_backward": "backward",
    }  # fmt: skip
    assert found["gated_delta_rule"].calls == {"layer": 2}
    whole, step, back = rows([*found.values()], [], {"b": 1, "s": 100}, no_bar)
    assert (whole.launches, step.launches, back.launches) == (2, 1, 3)
    # q, which is k too, v and o in bf16, two gates and the last state in float32
    assert whole.bytes == 100 * (32 + 2 * 64) * 2 + 100 * 2 * 4 * 4 + 4 * 16 * 16 * 4
    assert step.bytes == 64 * ((32 + 2 * 64) * 2 + 2 * 4 * 4 + 2 * 4 * 16 * 16 * 4)
    assert whole.seconds(MACHINES["H100"]) == pytest.approx(whole.bytes / 3.35e12)
    assert {f for r in (whole, step, back) for f in ("scan", "decode", "gradients") if f in source_of(r)} == {
        "scan", "decode", "gradients",
    }  # fmt: skip


def source_of(row: Row) -> str:
    made = kernels(row.use, "sm_90")
    return made.text if isinstance(made, OpKernels) else ""


def test_an_op_that_a_library_runs_is_said_to_be() -> None:
    (whole, step) = rows(op_uses(parse(RULE.format("f64"))), ["sm_90"], {"b": 1, "s": 100}, no_bar)
    assert "a library, or torch code, runs it" in whole.declined and step.launches == 0 and not whole.used


def test_products_by_the_slower_instruction_are_a_fault() -> None:
    slow = Resources(90, 0, 0, 512, {"HGMMA": 4, "HMMA": 1}, 2, 2, 2, 2)
    wide = RULE.format("bf16").replace("16]", "64]")
    for text, told in ((wide, 1), (RULE.format("bf16"), 0), (wide.replace("bf16", "f32"), 0)):
        row, _ = rows(op_uses(parse(text)), [], {"b": 1, "s": 100}, no_bar)
        bad = dataclasses.replace(row, used={"sm_80": slow, "sm_90": slow})
        assert bad.faults == ("gated_delta_rule for sm_90: has products by HMMA, which reach half of what HGMMA does",) * told


# -- compiling ----------------------------------------------------------------------------


@triton.jit
def copy(p_x, p_y, n, B: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def broken(p_x, p_y, n, B: tl.constexpr):
    tl.store(p_y + tl.arange(0, B), nothing)  # noqa: F821 # the mistake is the point


def job(fn: Any, n: int, target: str = "sm_90", offset: int = 0) -> Job:
    x = torch.empty(8192, dtype=torch.bfloat16, device="meta")[offset:]
    return Job(fn, (), {"p_x": x, "p_y": x, "n": n, "B": 1024}, target)


def test_equal_code_is_compiled_once_and_a_mistake_stays_in_its_place() -> None:
    given = [job(copy, 4096), job(copy, 2048), job(copy, 4095), job(copy, 4096, offset=1), job(copy, 1), job(broken, 4096)]
    assert len({job_key(j) for j in given}) == 5 and job_key(given[0]) == job_key(given[1])
    told = list[tuple[int, int]]()
    found = outcomes(given, resources, lambda done, total: told.append((done, total)))
    assert told[0] == (0, 5) and told[-1] == (5, 5)
    first, _, odd, shifted, _, bad = (found[job_key(j)] for j in given)
    assert isinstance(first, Resources) and first.wide_loads == first.loads == 1
    assert isinstance(odd, Resources) and isinstance(shifted, Resources) and odd.wide_loads == shifted.wide_loads == 0
    assert isinstance(bad, CompileError) and "broken cannot be compiled for sm_90" in str(bad)


def test_launches_add_up_and_faults_have_names() -> None:
    a = Resources(40, 0, 0, 1024, {"HMMA": 2}, 4, 4, 2, 1)
    b = Resources(90, 3, 8, 512, {"HMMA": 1, "HGMMA": 5}, 2, 0, 2, 2)
    both = together([a, b])
    assert both == Resources(90, 3, 8, 1024, {"HGMMA": 5, "HMMA": 3}, 6, 4, 4, 3)
    error = CompileError("no")
    assert together([a, error]) is error
    (row,) = rows(uses(graph_of(CASES["glu"][0], 64)), [], SIZES, no_bar)
    assert row.faults == () and row.bytes == 4 * 13 * 192 and row.flops == 13 * 64 * 5
    narrow = dataclasses.replace(a, wide_loads=0)
    bad = dataclasses.replace(row, wide=True, used={"sm_80": a, "sm_90": both, "sm_100": error, "gfx942": narrow})
    assert bad.faults == (
        "glu for sm_90: spills registers: 3 times, 8 bytes a thread",
        "glu for sm_100: does not compile: no",
        "glu for gfx942: has no 128-bit load, though its rows are long and aligned",
    )
    assert dataclasses.replace(bad, wide=False).faults == bad.faults[:2]
    assert row.seconds(MACHINES["H100"]) == row.bytes / 3.35e12 and row.intensity == row.flops / row.bytes


def test_a_kernel_that_is_declined_says_why() -> None:
    graph = graph_of(CASES["glu"][0], 64, "f64")
    reason = generated(graph)
    assert isinstance(reason, Declined) and isinstance(generated(backward(graph_of(CASES["glu"][0], 64)).graph), RowKernel)
    (row,) = rows(uses(graph), ["sm_90"], SIZES, no_bar)
    assert "float64" in row.declined and not row.used and not row.faults and row.bytes == 8 * 13 * 192
