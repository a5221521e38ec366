"""Memory checks of interpreted kernels: what each launch touches, and what it must not."""

import pytest
import torch
import triton
import triton.language as tl
from plait.ir import PlaitError
from plait.lowering.gpu import AccessError, run, watch


@triton.jit
def weigh(p_x, p_w, p_y, n, s_x, B: tl.constexpr):
    o_row = tl.program_id(0)
    o = tl.arange(0, B)
    m = o < n
    x = tl.load(p_x + o_row * s_x + o, mask=m, other=0.0)
    tl.store(p_y + o_row * n + o, x * tl.load(p_w + o, mask=m), mask=m)


@triton.jit
def copy(p_x, p_y, n, s_x, s_y, B: tl.constexpr):
    o_row = tl.program_id(0)
    o = tl.arange(0, B)
    tl.store(p_y + o_row * s_y + o, tl.load(p_x + o_row * s_x + o, mask=o < n, other=0.0), mask=o < n)


def test_each_input_is_read_once_and_each_output_written_once() -> None:
    x, w = torch.randn(5, 70)[:, :63], torch.randn(63)
    y = torch.empty(5, 63)
    with watch({"x": x, "w": w, "y": y}) as traffic:
        run(weigh, 5, x, w, y, 63, 70, B=64)
    assert (traffic["x"].loads, traffic["x"].distinct_loads, traffic["x"].stores) == (315, 315, 0)
    assert (traffic["w"].loads, traffic["w"].distinct_loads) == (315, 315)  # once per program
    assert (traffic["y"].stores, traffic["y"].distinct_stores, traffic["y"].stored_twice) == (315, 315, False)
    assert not any(traffic[name].raced for name in traffic)
    with pytest.raises(PlaitError, match="no such operand; there are x, w, y"):
        traffic["z"]


def test_an_access_between_rows_names_the_operand_and_the_index() -> None:
    x, y = torch.randn(5, 70)[:, :63], torch.empty(5, 64)
    line = r"copy, program \(0, 0, 0\), line \d+: tl.store\(p_y .*: "
    with watch({"x": x, "y": y}), pytest.raises(AccessError, match=line + r"loads x\[0, 63\], which is no element of it"):
        run(copy, 5, x, y, 64, 70, 64, B=64)
    with pytest.raises(AccessError, match=r"loads copy.p_x\[0, 63\].*shape \[5, 63\] and strides \[70, 1\]; mask the lane off"):
        run(copy, 5, x, y, 64, 70, 64, B=64)


@pytest.mark.parametrize(("rows", "s_x", "s_y", "wanted"), [
    (6, 63, 63, r"program \(5, 0, 0\).*loads x\[5, 0\].*\(63 lanes do\)"),
    (5, 63, 64, r"program \(4, 0, 0\).*stores y\[5, 0\].*\(4 lanes do\)"),
    (2, -63, 63, r"loads x, 252 bytes before its first element"),
    (2, 2**30, 63, r"loads x\["),
])  # fmt: skip
def test_an_access_outside_is_an_error_and_no_crash(rows: int, s_x: int, s_y: int, wanted: str) -> None:
    x, y = torch.randn(5, 63), torch.empty(5, 63)
    with watch({"x": x, "y": y}), pytest.raises(AccessError, match=wanted):
        run(copy, rows, x, y, 63, s_x, s_y, B=64)


def test_an_index_past_one_operand_never_lands_in_another() -> None:
    whole = torch.randn(2, 63)
    x, y = whole[0], torch.empty(2, 63)
    with watch({"x": x, "rest": whole[1], "y": y}), pytest.raises(AccessError, match=r"loads x\[63\]"):
        run(copy, 2, x, y, 63, 63, 63, B=64)


def test_a_view_counts_for_the_named_tensor_and_a_stranger_for_its_parameter() -> None:
    x, y = torch.randn(5, 63), torch.empty(5, 63)
    with watch({"x": x}) as traffic:
        run(copy, 2, x.view(-1)[63:], y, 63, 63, 63, B=64)
    assert traffic["x"].loads == 126 and traffic["copy.p_y"].stores == 126


def test_a_store_by_two_programs_is_seen() -> None:
    x, y = torch.randn(2, 8), torch.empty(2, 8)
    with watch({"x": x, "y": y}) as traffic:
        run(copy, 2, x, y, 8, 8, 0, B=8)
    assert traffic["y"].stored_twice and traffic["y"].raced and traffic["y"].distinct_stores == 8


def test_a_program_that_reads_what_another_writes_is_seen() -> None:
    x = torch.zeros(3, 8)
    for target in (x[1], x[0]):  # read after the write, and write after the read
        source = x[0] if target.data_ptr() != x.data_ptr() else x[1]
        with watch({"x": x}) as traffic:
            run(copy, 2, source, target, 8, 8, 8, B=8)
        assert traffic["x"].raced
    with watch({"x": x}) as traffic:
        run(copy, 2, x, x, 8, 8, 8, B=8)
    assert not traffic["x"].raced and traffic["x"].stores == 16


def test_launches_follow_each_other() -> None:
    x, y, z = torch.randn(2, 8), torch.empty(2, 8), torch.empty(2, 8)
    with watch({"x": x, "y": y, "z": z}) as traffic:
        run(copy, 2, x, y, 8, 8, 8, B=8)
        run(copy, 1, y, z, 16, 16, 16, B=16)
    assert torch.equal(x, z) and not traffic["y"].raced and traffic["y"].loads == traffic["y"].distinct_loads == 16
