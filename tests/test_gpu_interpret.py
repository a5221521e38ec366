"""Interpreted kernels: numbers against float64, every dtype and trap, and checks of every access."""

import threading
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from plait.ir import PlaitError
from plait.lowering.gpu import AccessError, KernelError, run, watch
from torch import Tensor
from triton.language import load as plain_load
from triton.language.extra import libdevice
from triton.language.extra.libdevice import expm1 as plain_expm1
from triton.tools.tensor_descriptor import TensorDescriptor

SCALE = tl.constexpr(0.5)


@triton.jit
def square(x):
    return x * x


@triton.jit
def rms_norm(p_x, p_w, p_y, n, eps, s_x, B: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, B)
    m = o < n
    x = tl.load(p_x + o_row * s_x + o, mask=m, other=0.0).to(tl.float32)
    w = tl.load(p_w + o, mask=m, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(square(x), 0) / n + eps)
    tl.store(p_y + o_row * n + o, (x * r * w).to(p_y.dtype.element_ty), mask=m)


def normed(x: Tensor, w: Tensor) -> Tensor:
    y = torch.full(x.shape, float("nan"), dtype=x.dtype)
    run(rms_norm, (x.shape[0],), x, w, y, x.shape[1], 1e-6, x.stride(0), B=triton.next_power_of_2(x.shape[1]), num_warps=4)
    return y


def norm(x: Tensor, w: Tensor) -> Tensor:
    x, w = x.double(), w.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n", [1, 63, 65, 100, 130])
def test_a_row_kernel_computes_its_formula(n: int, dtype: torch.dtype) -> None:
    x, w = torch.randn(5, n + 3).to(dtype)[:, :n], torch.randn(n).to(dtype)
    wanted = norm(x, w)
    close = 1e-5 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
    torch.testing.assert_close(normed(x, w).double(), wanted, atol=close, rtol=close)


# -- dtypes -----------------------------------------------------------------------------------


@triton.jit
def arithmetic(p_a, p_b, p_out, n, B: tl.constexpr):
    o = tl.arange(0, B)
    m = o < n
    a = tl.load(p_a + o, mask=m, other=0.0)
    b = tl.load(p_b + o, mask=m, other=1.0)
    tl.store(p_out + o, a + b, mask=m)
    tl.store(p_out + n + o, a * b, mask=m)
    tl.store(p_out + 2 * n + o, a - b, mask=m)
    tl.store(p_out + 3 * n + o, tl.where(a < b, a, b), mask=m)
    tl.store(p_out + 4 * n + o, tl.maximum(a, b), mask=m)
    tl.store(p_out + 5 * n + o, (a.to(tl.float32) * 1.0009765625).to(p_out.dtype.element_ty), mask=m)
    tl.store(p_out + 6 * n + o, -a, mask=m)
    tl.store(p_out + 7 * n + o, tl.abs(a) + 2.0, mask=m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_rounds_as_torch_does(dtype: torch.dtype) -> None:
    n = 100
    a, b = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    out = torch.empty(8, n, dtype=dtype)
    run(arithmetic, 1, a, b, out, n, B=128)
    scaled = (a.float() * 1.0009765625).to(dtype)
    wanted = [a + b, a * b, a - b, torch.minimum(a, b), torch.maximum(a, b), scaled, -a, a.abs() + 2]
    assert torch.equal(out, torch.stack(wanted))


@triton.jit
def reductions(p_x, p_out, B: tl.constexpr, C: tl.constexpr):
    o = tl.arange(0, B)[:, None] * C + tl.arange(0, C)[None, :]
    x = tl.load(p_x + o)
    c = tl.arange(0, C)
    tl.store(p_out + c, tl.sum(x, 0).to(tl.float32))
    tl.store(p_out + C + c, tl.max(x, 0).to(tl.float32))
    tl.store(p_out + 2 * C + c, tl.min(x, 0).to(tl.float32))
    tl.store(p_out + 3 * C + c, tl.argmax(x, 0).to(tl.float32))
    tl.store(p_out + 4 * C + c, tl.reduce(x.to(tl.float32), 0, larger))
    tl.store(p_out + 5 * C + o, tl.cumsum(x.to(tl.float32), 0))
    tl.store(p_out + 5 * C + B * C + o, tl.associative_scan(x.to(tl.float32), 0, larger))
    tl.store(p_out + 5 * C + 2 * B * C, tl.sum(x.to(tl.float32)))
    tl.store(p_out + 5 * C + 2 * B * C + 1, tl.reduce(x.to(tl.float32), None, larger))


@triton.jit
def larger(a, b):
    return tl.where(a > b, a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reductions_and_scans(dtype: torch.dtype) -> None:
    x, b, c = torch.randn(16, 8).to(dtype), 16, 8
    out = torch.empty(5 * c + 2 * b * c + 2)
    run(reductions, 1, x, out, B=b, C=c)
    wide = x.double()
    rows = [wide.sum(0).to(dtype), wide.amax(0), wide.amin(0), wide.argmax(0), wide.amax(0)]
    torch.testing.assert_close(out[: 5 * c].view(5, c).double(), torch.stack([r.double() for r in rows]), atol=1e-5, rtol=1e-5)
    scans = out[5 * c : -2].view(2, b, c).double()
    torch.testing.assert_close(scans, torch.stack([wide.cumsum(0), wide.cummax(0).values]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[-2:].double(), torch.stack([wide.sum(), wide.max()]), atol=1e-5, rtol=1e-5)


@triton.jit
def special(p_x, p_out, n, B: tl.constexpr):
    o = tl.arange(0, B)
    m = o < n
    x = plain_load(p_x + o, mask=m, other=1.0)
    tl.store(p_out + o, libdevice.tanh(x), mask=m)
    tl.store(p_out + n + o, plain_expm1(x), mask=m)
    tl.store(p_out + 2 * n + o, libdevice.log1p(x), mask=m)
    tl.store(p_out + 3 * n + o, libdevice.pow(x, 3.0), mask=m)
    tl.store(p_out + 4 * n + o, libdevice.rsqrt(x), mask=m)
    tl.store(p_out + 5 * n + o, tl.erf(x), mask=m)
    tl.store(p_out + 6 * n + o, tl.sin(x) * tl.cos(x), mask=m)
    tl.store(p_out + 7 * n + o, tl.exp2(tl.log2(x)) + tl.sqrt(x), mask=m)
    tl.store(p_out + 8 * n + o, tl.sigmoid(x) * SCALE, mask=m)
    tl.store(p_out + 9 * n + o, tl.fma(x, x, x), mask=m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_functions(dtype: torch.dtype) -> None:
    n = 65
    x = (torch.rand(n) * 3 + 0.01).to(dtype)
    out = torch.empty(10, n, dtype=dtype)
    run(special, 1, x, out, n, B=128)
    d = x.double()
    wanted = [
        d.tanh(),
        d.expm1(),
        d.log1p(),
        d**3,
        d.rsqrt(),
        d.erf(),
        d.sin() * d.cos(),
        d + d.sqrt(),
        d.sigmoid() / 2,
        d * d + d,
    ]
    close = 2e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(out.double(), torch.stack(wanted), atol=close, rtol=close)


@triton.jit
def tanh_of(p_x, p_y):
    tl.store(p_y, libdevice.tanh(tl.load(p_x)))


@triton.jit
def byte_perm_of(p_x, p_y):
    tl.store(p_y, libdevice.byte_perm(tl.load(p_x), 1, 2))


def test_libdevice_refuses_what_a_gpu_refuses() -> None:
    x = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(PlaitError, match=r"libdevice.tanh takes float32 or float64, its operand is bf16; cast it"):
        run(tanh_of, 1, x, x)
    with pytest.raises(PlaitError, match=r"libdevice.byte_perm has no meaning on a CPU"):
        run(byte_perm_of, 1, x, x)


# -- scalars and loops ------------------------------------------------------------------------


@triton.jit
def loops(p_out, n, step, scale, flag, wide, B: tl.constexpr):
    o = tl.arange(0, B)
    acc = tl.zeros((B,), tl.float32)
    for i in range(0, n, step):
        acc += i.to(tl.float32) * scale.to(tl.float32)
    for i in tl.range(2, num_stages=2):
        acc += i * 0.5
    for i in tl.static_range(3):
        acc += i
    if flag:
        acc += 100
    acc += (wide // 4294967296).to(tl.float32)
    tl.store(p_out + o, acc)


def test_scalars_are_tensors_and_bounds_are_runtime() -> None:
    out = torch.empty(4)
    run(loops, 1, out, 10, 3, 0.25, True, 4294967296 * 8, B=4)
    assert torch.equal(out, torch.full((4,), 18 * 0.25 + 0.5 + 3 + 100 + 8))
    run(loops, lambda meta: (meta["B"] // 4,), out, 0, 1, 0.25, False, 2**31 * 2, B=4)
    assert torch.equal(out, torch.full((4,), 3.5 + 1))


@triton.jit
def corners(p_pair, p_none, p_out, a, b, D: tl.constexpr, KIND: tl.constexpr):
    if tl.program_id(2) == 1:
        return
    p_x, p_y = p_pair
    row: tl.constexpr = D // 2
    o = tl.arange(0, row)
    even, odd = tl.split(tl.join(tl.load(p_x + o), tl.load(p_y + o)))
    if p_none is not None:
        odd += 1000
    out = even - odd if KIND == "minus" else even + odd
    while a < 0:
        a += b
        out += 1
    tl.store(p_out + o, out + a // b + (a - 9) % b)
    tl.store(p_out + row + o, (-a) // b + (9 - a) % b + tl.num_programs(1))


def test_corners_of_the_language() -> None:
    """Division as in C, early return, None, tuples of pointers, text, conditions at run time, three axes of programs."""
    x, y, out = torch.arange(4.0), torch.ones(4), torch.empty(8)
    run(corners, (1, 3, 2), (x, y), None, out, -7, 4, D=8, KIND="minus")  # a ends as 1
    assert torch.equal(out[:4], x - 1 + 2 + 0 + 0) and torch.equal(out[4:], torch.full((4,), 0.0 + 0 + 3))
    run(corners, (1, 1, 1), (x, y), out, out, 7, 4, D=8, KIND="plus")
    assert torch.equal(out[:4], x + 1001 + 1 - 2) and torch.equal(out[4:], torch.full((4,), -1.0 + 2 + 1))


@triton.jit
def products(p_a, p_b, d_a, p_out, K, B: tl.constexpr, D: tl.constexpr):
    o, k = tl.arange(0, B), tl.arange(0, D)
    acc = tl.zeros((B, B), tl.float32)
    for i in range(0, K, D):
        b = tl.make_block_ptr(p_b, (K, B), (B, 1), (i, 0), (D, B), (1, 0))
        acc = tl.dot(tl.load(p_a + o[:, None] * K + (i + k)[None, :]), tl.load(b, boundary_check=(0,)), acc)
    tl.store(p_out + o[:, None] * B + o[None, :], acc)
    for i in range(0, K, D):
        acc = tl.dot(d_a.load([0, i]), tl.load(p_b + (i + k)[:, None] * B + o[None, :]), acc, input_precision="ieee")
    tl.store(p_out + B * B + o[:, None] * B + o[None, :], acc)


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_by_pointers_block_pointers_and_descriptors(dtype: torch.dtype) -> None:
    a, b, out = torch.randn(16, 64).to(dtype), torch.randn(64, 16).to(dtype), torch.empty(2, 16, 16)
    with watch({"a": a, "b": b, "out": out}) as traffic:
        run(products, 1, a, b, TensorDescriptor.from_tensor(a, [16, 32]), out, 64, B=16, D=32)
    wanted = a.double() @ b.double()
    torch.testing.assert_close(out.double(), torch.stack([wanted, 2 * wanted]), atol=1e-4, rtol=1e-5)
    assert traffic["a"].loads == traffic["b"].loads == 2 * 1024 and traffic["a"].distinct_loads == 1024


@triton.jit
def add_all(p_x, p_out, n, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.atomic_add(p_out + o // 2, tl.load(p_x + tl.program_id(0) * B + o), mask=o < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_atomics_add_every_lane(dtype: torch.dtype) -> None:
    x, out = torch.ones(3, 4, dtype=dtype), torch.zeros(2, dtype=dtype)
    with watch({"x": x, "out": out}) as traffic:
        run(add_all, 3, x, out, 3, B=4)
    assert out.tolist() == [6, 3]
    assert traffic["out"].atomics == 9 and traffic["out"].stores == 0 and not traffic["out"].raced


@triton.jit
def masked_sum(p_x, p_out, n, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_out, tl.sum(tl.load(p_x + o, mask=o < n), 0))


def test_a_masked_lane_without_a_value_is_undefined() -> None:
    x, out = torch.ones(5), torch.zeros(1)
    run(masked_sum, 1, x, out, 5, B=8)
    assert out.isnan().all()


@triton.jit
def nan_rules(p_x, p_out):
    x = tl.load(p_x + tl.arange(0, 2))
    tl.store(p_out + tl.arange(0, 2), tl.maximum(x, 1.0))
    tl.store(p_out + 2 + tl.arange(0, 2), tl.minimum(x, 1.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(p_out + 4 + tl.arange(0, 2), tl.clamp(x, -1.0, 1.0))


def test_maximum_takes_the_number_unless_told() -> None:
    out = torch.empty(6)
    run(nan_rules, 1, torch.tensor([float("nan"), 3.0]), out)
    assert out[[0, 1, 3, 4, 5]].tolist() == [1, 3, 1, -1, 1] and out[2].isnan()


# -- what is refused, and what is left behind -------------------------------------------------


@triton.jit
def copy(p_x, p_y, n, s_x, s_y, B: tl.constexpr):
    o_row = tl.program_id(0)
    o = tl.arange(0, B)
    tl.store(p_y + o_row * s_y + o, tl.load(p_x + o_row * s_x + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def block_condition(p_x):
    if tl.load(p_x + tl.arange(0, 2)) > 0:
        tl.store(p_x, 0.0)


def test_mistakes_are_told() -> None:
    x = torch.zeros(2)
    with pytest.raises(KernelError, match=r"the kernel is a function; it must be a @triton\.jit function"):
        run(square.fn, 1, x)
    with pytest.raises(KernelError, match=r"copy\(p_x, p_y, n, s_x, s_y, B\) cannot be launched so: missing a required"):
        run(copy, 1, x)
    with pytest.raises(KernelError, match="unexpected keyword argument 'num_wraps'"):
        run(copy, 1, x, x, 1, 1, 1, B=2, num_wraps=4)
    with pytest.raises(KernelError, match="the grid is"):
        run(copy, (1, 1, 1, 1), x, x, 1, 1, 1, B=2)
    with pytest.raises(KernelError, match="p_x is on meta"):
        run(copy, 1, x.to("meta"), x, 1, 1, 1, B=2)
    with pytest.raises(KernelError, match=r"line \d+: if tl.load.*a block of shape \(2,\) is no condition"):
        run(block_condition, 1, x)
    run(copy, 0, x, x, 1, 1, 1, B=2)


def state() -> list[Any]:
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    owners = (interpreter, tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, JITFunction, libdevice)
    return [(owner, name, id(value)) for owner in owners for name, value in sorted(vars(owner).items())]


def test_everything_is_put_back_also_after_an_error() -> None:
    x, y = torch.randn(5, 63), torch.empty(5, 63)
    normed(x, y[0])
    before = state()
    normed(x, y[0])
    assert state() == before
    with pytest.raises(AccessError):
        run(copy, 6, x, y, 63, 63, 63, B=64)
    assert state() == before and "interpreter_semantic" not in copy.fn.__globals__


def test_a_kernel_may_stand_in_a_function() -> None:
    factor = tl.constexpr(3.0)

    @triton.jit
    def scaled(p_x):
        tl.store(p_x, square(tl.load(p_x)) * factor)

    x = torch.full((1,), 2.0)
    run(scaled, 1, x)
    assert x.item() == 12


def test_threads_take_turns() -> None:
    wanted, failed = torch.randn(3, 65), list[BaseException]()

    def work() -> None:
        try:
            for _ in range(3):
                torch.testing.assert_close(normed(wanted, torch.ones(65)).double(), norm(wanted, torch.ones(65)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
