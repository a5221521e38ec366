"""Attention and convolution kernels compiled ahead of time for every target: no spills, tensor cores, wide loads."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from plait.ir import Node, parse
from plait.lowering.attending.jobs import Launch, launches
from plait.lowering.gpu import TARGETS, Compiled, Resources, compile_all, resources

CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
FULL = "attention(q, k, v, sinks, cu, window=128, softcap=30.0)"
PLAIN = "attention(q, k, v, at=at)"


def attention(text: str, d: int, e: int, *, b: str = "b", heads: int = 8, dtype: str = "bf16") -> Node:
    """A node with every operand that an attention may have at hand."""
    q, k, v = (f"{dtype}[{b}, s, {n}, {width}]" for n, width in ((heads, d), (2, d), (2, e)))
    inputs = f"q: {q}, k: {k}, v: {v}, sinks: {dtype}[{heads}], "
    return parse(f"def f({inputs}cu: i64[n+1], at: i64[()]):\n    o = {text}\n    return o").nodes[0]


def convolution(act: str, dtype: str = "bf16") -> Node:
    inputs = f"x: {dtype}[1, s, 8192], w: {dtype}[8192, 4], bias: {dtype}[8192], state: {dtype}[n, 8192, 3], cu: i64[n+1]"
    return parse(f"def f({inputs}):\n    y, last = causal_conv1d(x, w, bias, state, cu, act='{act}')\n    return y").nodes[0]


def compiled(found: tuple[Launch, ...]) -> dict[str, tuple[Resources, int]]:
    """Resources of each function, and its shared memory."""
    made = compile_all([x.job for x in found])
    assert all(isinstance(c, Compiled) for c in made), [c for c in made if not isinstance(c, Compiled)]
    return {c.name.split("_")[0]: (resources(c), c.shared) for c in made if isinstance(c, Compiled)}


def gates(node: Node, target: str, *, halves: tuple[str, ...] = ("forward", "backward", "step")) -> dict[str, Resources]:
    """No spills, within shared memory, the machine's matrix instructions and no others, loads of 128 bits."""
    found = compiled(launches(node, target, halves=halves))
    for function, (used, shared) in found.items():
        assert used.spills == used.stack == 0 and shared <= TARGETS[target].shared, f"{function}: {used}"
        assert list(used.tensor_core) == ([] if function == "join" else [CORES[target]]), f"{function}: {used.tensor_core}"
        # What is not wide is one number for each row: places, denominators.
        assert used.wide_loads >= used.loads // 4, f"{function}: {used}"
    return {name: used for name, (used, _) in found.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_the_gates_of_every_kernel(target: str) -> None:
    assert set(gates(attention(FULL, 128, 128), target)) == {"attend", "queries", "keys", "values"}


@pytest.mark.parametrize(("text", "d", "e"), [(PLAIN, 64, 64), (PLAIN, 192, 256)])
def test_the_gates_of_other_heads(text: str, d: int, e: int) -> None:
    assert len(gates(attention(text, d, e), "sm_90")) == 6


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_float32_spills_nothing(target: str) -> None:
    found = compiled(launches(attention(FULL, 64, 64, dtype="f32"), target))
    assert set(found) == {"attend", "queries", "keys", "values"}
    for function, (used, shared) in found.items():
        assert used.spills == used.stack == 0 and shared <= TARGETS[target].shared, f"{function}: {used}"
        assert [*used.tensor_core] == [CORES[target]], f"{function}: {used.tensor_core}"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_convolutions_spill_nothing_and_load_rows_whole(target: str) -> None:
    found = compiled(launches(convolution("silu"), target))
    assert set(found) == {"conv", "final", "taps", "spread", "past"}
    for function, (used, _) in found.items():
        assert used.spills == used.stack == 0 and not used.tensor_core, f"{function}: {used}"
    # A thread's 16 elements are two rows of 8: each tap's inputs come in with two loads, a result leaves with two stores.
    assert found["conv"][0].wide_loads >= 8 and found["conv"][0].wide_stores == found["conv"][0].stores == 2


def test_nothing_that_is_compiled_varies_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.lowering.attending import jobs

    @cache
    def fixed(length: int) -> list[object]:
        monkeypatch.setattr(jobs, "LENGTH", length)
        found = [*launches(attention(FULL, 64, 64)), *launches(attention(PLAIN, 64, 64)), *launches(convolution("silu"))]
        loose = {"t", "s", "n", "rows", "splits", "parts"}
        made = list[object]()
        for step in (x.step for x in found):
            numbers = {k: v for k, v in step.arguments.items() if not isinstance(v, torch.Tensor) and k[-2:] != "_b"}
            made.append((step.source, step.warps, step.stages, [(k, v) for k, v in numbers.items() if k not in loose]))
        return made

    assert fixed(2048) == fixed(77)


def test_a_step_of_many_heads_has_more_rows() -> None:
    wide = launches(attention(PLAIN, 64, 64, heads=64), halves=("step",))[0]
    assert (
        wide.step.arguments["BM"] == 32 and launches(attention(PLAIN, 64, 64), halves=("step",))[0].step.arguments["BM"] == 16
    )
