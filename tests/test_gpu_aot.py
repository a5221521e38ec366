"""Kernels compiled ahead of time: as a launch would, for every target, and what the code uses."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from plait.ir import PlaitError
from plait.lowering.gpu import (
    MACHINES,
    TARGETS,
    Compiled,
    CompileError,
    Job,
    aot,
    compile_all,
    compile_kernel,
    gpu_target,
    predicted_seconds,
    resources,
    run,
)
from triton.backends.driver import DriverBase

X = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta")


@triton.jit
def scale(p_x, p_y, n, factor, s_x, B: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, B)
    m = o < n
    x = tl.load(p_x + o_row * s_x + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_y + o_row * s_x + o, (x * factor / tl.sum(x, 0)).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def matmul(p_a, p_b, p_c, K, s, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(0, K, BK):
        a = tl.load(p_a + o_m[:, None] * s + (i + o_k)[None, :])
        b = tl.load(p_b + (i + o_k)[:, None] * s + o_n[None, :])
        acc += tl.dot(a, b)
    tl.store(p_c + o_m[:, None] * s + o_n[None, :], acc.to(p_c.dtype.element_ty))


def outcome(job: Job) -> Compiled:
    made = compile_all([job])[0]
    assert isinstance(made, Compiled), made
    return made


def test_one_kernel_for_every_target_in_the_order_of_the_jobs() -> None:
    jobs = [Job(scale, (X, X, 4096, 0.5, 4096), {"B": 4096}, target, num_warps=8) for target in TARGETS]
    made = compile_all([*jobs, *jobs[::-1]])
    assert [m.target for m in made if isinstance(m, Compiled)] == [*TARGETS, *[*TARGETS][::-1]]
    for compiled in made[:4]:
        assert isinstance(compiled, Compiled)
        final = {"ptx", "cubin"} if compiled.target.startswith("sm") else {"amdgcn", "hsaco"}
        assert {"ttir", "ttgir", "llir"} | final <= compiled.asm.keys() and compiled.aligned == ("p_x", "p_y", "n", "s_x")
        used = resources(compiled)
        each = 4096 // (8 * TARGETS[compiled.target].warp * 8)  # eight elements of bf16 are 128 bits
        assert used.loads == used.wide_loads == used.stores == used.wide_stores == each
        assert 16 <= used.registers <= 80 and used.spills == used.stack == 0 and not used.tensor_core
        assert 0 < used.shared <= 1024 and resources(compiled) == used


def test_spills_and_wide_loads_are_read_from_amd_assembly() -> None:
    compiled = compile_kernel(scale, (X, X, 63, 0.5, 63), {"B": 64}, "gfx942")
    text = str(compiled.asm["amdgcn"]).replace(".vgpr_spill_count: 0", ".vgpr_spill_count: 7")
    used = resources(replace(compiled, asm={"amdgcn": text}))
    assert used.spills == 7 and used.loads >= 1 and used.wide_loads == used.wide_stores == 0
    with pytest.raises(PlaitError, match=r"the assembly names no \.vgpr_count"):
        resources(replace(compiled, asm={"amdgcn": "nothing"}))
    with pytest.raises(PlaitError, match="cuobjdump, which Triton brings, fails on this kernel"):
        resources(replace(compiled, asm={"cubin": b"nothing", "ptx": ""}))


def test_unaligned_operands_have_narrow_loads() -> None:
    odd = torch.empty(4097, dtype=torch.bfloat16)[1:]
    compiled = compile_kernel(scale, (odd, odd, 4096, 0.5, 4096), {"B": 4096}, "sm_90", num_warps=8)
    assert compiled.aligned == ("n", "s_x") and resources(compiled).wide_loads == 0 < resources(compiled).loads


@pytest.mark.parametrize(("target", "name"), [
    ("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma"),
])  # fmt: skip
def test_tensor_cores_are_seen(target: str, name: str) -> None:
    used = resources(outcome(Job(matmul, (X, X, X, 4096, 4096), {"BM": 64, "BN": 64, "BK": 32}, target, num_stages=2)))
    assert list(used.tensor_core) == [name] and used.tensor_core[name] > 0 and used.spills == 0
    assert used.wide_loads >= 2 and used.shared >= 4096


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_spills_are_seen(target: str) -> None:
    """A row of 8,192 in one warp cannot stay in registers."""
    used = resources(compile_kernel(scale, (X, X, 8192, 0.5, 8192), {"B": 8192}, target, num_warps=1))
    assert used.spills > 0 and used.stack > 0 and used.registers >= 250


class FakeDriver(DriverBase):
    """A GPU that is not there, to see what a launch specialises on."""

    def __init__(self, target: str) -> None:
        self.target = gpu_target(target)
        self.get_current_device, self.get_current_stream = (lambda: 0), (lambda device=0: 0)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        return None

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What a launch on a target compiles."""

    def launch(kernel: Any, target: str, *args: Any, **named: Any) -> Any:
        monkeypatch.setattr(triton.runtime.driver, "_active", FakeDriver(target))
        kernel.device_caches.clear()
        return kernel.warmup(*args, grid=(1,), **named)

    yield launch
    scale.device_caches.clear()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(("n", "factor", "stride"), [(4096, 0.5, 4096), (63, 1, 1), (100, 16, 2**31), (1, True, 2**33 + 1)])
def test_what_is_compiled_is_what_a_launch_compiles(launched: Any, target: str, n: int, factor: Any, stride: int) -> None:
    wanted = launched(scale, target, X, X, n, factor, stride, B=128, num_warps=2)
    made = compile_kernel(
        scale, (X, X, n, factor, stride), {"B": 128}, target, num_warps=2, num_stages=wanted.metadata.num_stages
    )
    assert made.signature == wanted.src.signature and made.asm["ttir"] == wanted.asm["ttir"]
    code = "cubin" if target == "sm_90" else "hsaco"
    assert made.asm[code] == wanted.asm[code]
    assert (made.signature["s_x"] == "i64") == (stride >= 2**31) and (made.signature["n"] == "constexpr") == (n == 1)


@triton.jit
def wrong_types(p_x):
    x = tl.load(p_x)
    tl.store(p_x, x + tl.arange(0, 3))


@triton.jit
def double(x):
    return tl.exp(x) + missing  # noqa: F821  # pyright: ignore


@triton.jit
def wrong_inside(p_x):
    tl.store(p_x, double(tl.load(p_x)))


@triton.jit
def writes_for_some(p_x, B: tl.constexpr):
    x = tl.load(p_x)
    if B > 0:
        tl.store(p_x, x + x)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_of_which_no_store_is_left_is_refused(target: str) -> None:
    assert compile_kernel(writes_for_some, (X,), {"B": 1}, target)
    with pytest.raises(CompileError, match=f"writes_for_some writes nothing: for {target} the compiler takes"):
        compile_kernel(writes_for_some, (X,), {"B": 0}, target)


def test_a_kernel_that_cannot_be_compiled_says_where() -> None:
    good = Job(scale, (X, X, 63, 0.5, 63), {"B": 64}, "sm_80")
    bad = [Job(wrong_types, (X,), {}, "sm_90"), Job(wrong_inside, (X.float(),), {}, "gfx942"), Job(scale, (X,), {}, "sm_80")]
    made = compile_all([bad[0], good, *bad[1:]])
    assert isinstance(made[1], Compiled)
    texts = [str(e) for e in (made[0], *made[2:]) if isinstance(e, CompileError)]
    assert texts[0].startswith("wrong_types cannot be compiled for sm_90:\n") and "tl.arange(0, 3)" in texts[0]
    assert "power of 2" in texts[0]
    assert texts[1].startswith("wrong_inside cannot be compiled for gfx942:\n") and "missing is not defined" in texts[1]
    assert texts[2].startswith("scale cannot be compiled for sm_80:\n") and "missing" in texts[2]
    assert all(len(t.splitlines()) <= 13 and "Traceback" not in t for t in texts)


def test_too_much_shared_memory_and_unknown_targets_are_refused() -> None:
    with pytest.raises(CompileError, match=r"matmul needs \d+ bytes of shared memory; a block of sm_90 has 232448"):
        compile_kernel(matmul, (X, X, X, 4096, 4096), {"BM": 128, "BN": 128, "BK": 128}, "sm_90", num_warps=8, num_stages=5)
    with pytest.raises(PlaitError, match="target 'sm_70' is not known; it must be one of sm_80, sm_90, sm_100, gfx942"):
        compile_kernel(scale, (), {}, "sm_70")
    with pytest.raises(CompileError, match=r"the kernel is a function; it must be a @triton\.jit function"):
        compile_kernel(scale.fn, (), {}, "sm_80")


def test_one_process_interprets_compiles_and_interprets() -> None:
    x = torch.rand(3, 65)
    for n in (31, 32, 33):
        y = torch.full((3, 65), float("nan"))
        run(scale, 3, x, y, n, 0.5, 65, B=64)
        wanted = x[:, :n].double() * 0.5 / x[:, :n].double().sum(1, keepdim=True)
        torch.testing.assert_close(y[:, :n].double(), wanted, atol=1e-6, rtol=1e-5)
        made = compile_kernel(scale, (x, y, n, 0.5, 65), {"B": 64}, "sm_90", num_stages=n % 3 + 1)
        assert "tt.reduce" in str(made.asm["ttir"])


def test_machines() -> None:
    assert all(m.target in TARGETS and m.shared == TARGETS[m.target].shared for m in MACHINES.values())
    h200 = MACHINES["H200"]
    assert (h200.bandwidth, h200.measured, h200.sustained) == (4.8e12, 4.3e12, 4.3e12)
    assert predicted_seconds(4.3e9, 0, h200) == pytest.approx(1e-3)
    assert predicted_seconds(1, 989e9, h200, dtype="bf16") == pytest.approx(1e-3)
    assert predicted_seconds(1, 67e9, h200) == pytest.approx(1e-3)


def test_vendors_are_never_compiled_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM's options are the process's: code for one vendor comes out otherwise while another's is made."""
    now, met = list[str](), set[frozenset[str]]()

    def watched(job: Job) -> CompileError:
        now.append("hip" if job.target == "gfx942" else "cuda")
        time.sleep(0.02)
        met.add(frozenset(now))
        now.pop()
        return CompileError(job.target)

    monkeypatch.setattr(aot, "_outcome", watched)
    jobs = [Job(scale, (), {}, target) for target in ("sm_80", "gfx942", "sm_90", "gfx942", "sm_100", "sm_80")]
    assert [str(e) for e in compile_all(jobs)] == [j.target for j in jobs]
    assert met == {frozenset({"cuda"}), frozenset({"hip"})}
