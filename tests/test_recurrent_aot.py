"""Recurrence kernels compiled ahead of time for every target: no spills, shared memory, tensor cores, wide loads."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from plait.ir import PlaitError
from plait.lowering.forms.chunked import Operands
from plait.lowering.gpu import TARGETS, Compiled, Resources, compile_all, resources
from plait.lowering.gpu.tuned import asked, forced
from plait.lowering.recurrent import Step, backward, decode, forward, job

CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
DECAYS = {"gated_delta_rule": 3, "kimi_delta_attention": 4}


def steps(name: str, target: str, *, tokens: int = 2048, dtype: torch.dtype = torch.bfloat16) -> list[Step]:
    """Every launch of a call with heads of 128, forward, backward and decode."""

    def meta(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    b, g, h, k, v = 2, 2, 4, 128, 128
    q, key, value = (meta(b, tokens, n, w, kind=dtype) for n, w in ((g, k), (g, k), (h, v)))
    decay = meta(*(b, tokens, h, k)[: DECAYS[name]])
    x, made = Operands(q, key, value, decay, meta(b, tokens, h), None, None, 0.1, True), list[Step]()
    o, final, saved = forward(x, made.append, keep=True, target=target)
    backward(x, saved, o, final, made.append, target=target)
    decode(x, made.append, target=target)
    return made


@cache
def compiled(name: str, target: str) -> dict[str, tuple[Resources, int]]:
    """Resources of each function, and its shared memory."""
    found = compile_all([job(s, target) for s in steps(name, target)])
    assert all(isinstance(c, Compiled) for c in found), [c for c in found if not isinstance(c, Compiled)]
    return {c.name.split("_")[0]: (resources(c), c.shared) for c in found if isinstance(c, Compiled)}


@pytest.mark.parametrize(("name", "target"), [*(("gated_delta_rule", t) for t in TARGETS), ("kimi_delta_attention", "sm_90")])
def test_the_gates_of_every_kernel(name: str, target: str) -> None:
    """No spills, within shared memory, the machine's matrix instructions and no others, loads of 128 bits."""
    found = compiled(name, target)
    assert {"prepare", "scan", "back", "pulls", "gradients", "decode"} <= found.keys()
    for function, (used, shared) in found.items():
        assert used.spills == used.stack == 0 and shared <= TARGETS[target].shared, f"{function}: {used}"
        matrix = function not in ("decode", "gates")
        assert list(used.tensor_core) == ([CORES[target]] if matrix else []), f"{function}: {used.tensor_core}"
        assert used.wide_loads >= used.loads // 2 or function == "decode", f"{function}: {used}"


@pytest.mark.parametrize(("name", "target"), [("gated_delta_rule", "sm_90"), ("kimi_delta_attention", "sm_100")])
def test_float32_fits(name: str, target: str) -> None:
    """Products of float32 take three of tf32 each, whose operands registers hold: no spills, tensor cores all the same."""
    found = compile_all([job(s, target) for s in steps(name, target, dtype=torch.float32)])
    for c in found:
        assert isinstance(c, Compiled), c
        used = resources(c)
        assert used.spills == used.stack == 0 and c.shared <= TARGETS[target].shared, f"{c.name}: {used}"
        assert bool(used.tensor_core) == (c.name.split("_")[0] not in ("decode", "gates")), f"{c.name}: {used.tensor_core}"


def test_nothing_that_is_compiled_varies_with_the_length() -> None:
    for a, b in zip(steps("gated_delta_rule", "sm_90"), steps("gated_delta_rule", "sm_90", tokens=77), strict=True):
        loose = {"t", "chunks", "n_rows"}
        fixed = [{k: v for k, v in s.arguments.items() if not isinstance(v, torch.Tensor) and k not in loose} for s in (a, b)]
        assert fixed[0] == fixed[1] and a.tile == b.tile and a.source == b.source


def test_every_launch_asks_for_what_was_measured_and_no_key_holds_a_length() -> None:
    found = list[dict[tuple[str, str], object]]()
    for tokens in (2048, 77):
        with asked() as seen:
            made = steps("kimi_delta_attention", "sm_90", tokens=tokens)
        found.append(dict(seen))
    functions = {s.function.split("_")[0] for s in made}
    assert found[0] == found[1] and found[0].keys() == {("sm_90", f"{f} delta channel bfloat16 k128 v128") for f in functions}


def test_a_measured_tile_is_launched_and_a_broken_one_named() -> None:
    names = {f: ("sm_90", f"{f} delta head bfloat16 k128 v128") for f in ("scan", "back", "gradients")}
    with forced({names["scan"]: {"value": 16, "warps": 8}, names["back"]: {"value": 64}, names["gradients"]: {"key": 32}}):
        made = {s.function.split("_")[0]: s for s in steps("gated_delta_rule", "sm_90")}
    scan, back, pulls, gradients = (made[f] for f in ("scan", "back", "pulls", "gradients"))
    assert (scan.tile.key, scan.tile.value, scan.tile.warps, scan.programs) == (128, 16, 8, 2 * 4 * 8)
    assert back.arguments["BV"] == pulls.arguments["BW"] == 64 and back.arguments["p_pulled"].shape[0] == 2
    assert gradients.arguments["p_ddecay"].shape[0] == 4 and gradients.programs == 4 * made["pulls"].programs
    with forced({names["scan"]: {"value": 24}}), pytest.raises(PlaitError, match=r"scan delta .*value is 24; .* power of two"):
        steps("gated_delta_rule", "sm_90")
