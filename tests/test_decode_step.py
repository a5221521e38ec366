"""The decode step as a tape: against the program without a cache, in place, and what it leaves to others."""

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from plait import compile as plait_compile
from plait import parse
from plait.frontends.presets import PRESETS
from plait.ir import DataError, parameters
from plait.lowering import lower
from plait.lowering.cpp import compiler
from plait.lowering.cpp.step_record import Step
from plait.lowering.cpp.step_run import Stepper, step_of
from plait.runtime import CompiledModel, Variant
from plait.runtime.runner import Runner

from tests.hf_cases import tokens
from tests.hf_checks import subject

Tensor = torch.Tensor
TINY = [p.name for p in PRESETS if p.name.endswith("-tiny")]
pytestmark = pytest.mark.skipif(compiler() is None, reason="generated C++ needs a compiler")


def model(name: Any, dtype: str = "f32") -> CompiledModel:
    return plait_compile(name, dtype=dtype, mode="infer", jit=False)


def stepper(made: CompiledModel, task: str = "cached", *, last: bool = False) -> tuple[Runner, Stepper]:
    runner = made.runner(Variant(task, last=last))
    program = runner.program
    assert program.step is not None
    calls = {g: runner.entry.get_submodule(n) for g, n in zip(program.graph.layers, program.layers, strict=True)}
    found = program.step(calls)
    assert isinstance(found, Stepper)
    return runner, found


def weights(made: CompiledModel, runner: Runner) -> list[Tensor]:
    return [made.get_parameter(name) for name in runner.program.parameters]


def decode(made: CompiledModel, tokens: Tensor, prompt: int, *, in_place: bool) -> list[Tensor]:
    """Logits behind every token from the last of the prompt on, and then the states."""
    runner, step = stepper(made)
    params = weights(made, runner)
    states = made.fresh_states(tokens.shape[0], tokens.shape[1] + 3)
    logits, *states = runner((tokens[:, :prompt], torch.tensor(0), *states), params)
    found = [logits[:, -1]]
    for i in range(prompt, tokens.shape[1]):
        results = step((tokens[:, i : i + 1], torch.tensor(i), *states), params, in_place)
        assert results is not None, "no plan for this model"
        logits, *states = results
        found.append(logits[:, -1])
    return [torch.stack(found, 1), *states]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_preset_decodes_as_it_reads(name: str, batch: int) -> None:
    made = model(name)
    tokens = torch.randint(0, made.vocab, (batch, 23), generator=torch.Generator().manual_seed(batch))
    whole = made(tokens)
    for in_place in (False, True):
        logits = decode(made, tokens, 9, in_place=in_place)[0]
        assert (logits - whole[:, 8:]).abs().max() <= 1e-5 * whole.abs().max()
    exact = plait_compile(name, dtype="f64", mode="infer", jit=False).load_from(made.double())(tokens)
    assert (logits - exact[:, 8:]).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_preset_is_one_part(name: str) -> None:
    """Nothing of a preset's step is torch code, and in place no state is copied."""
    made = model(name)
    runner, step = stepper(made)
    states = made.fresh_states(2, 7)
    results = step((torch.ones(2, 1, dtype=torch.int64), torch.tensor(0), *states), weights(made, runner), True)
    assert results is not None
    (found,) = step.known[1].values()
    assert found is not None and len(found.plan.parts) == 1
    assert [x.data_ptr() for x in results[1:]] == [x.data_ptr() for x in states]


FAMILIES = ("deepseek_v3", "gpt2", "gpt_oss", "jamba", "phi3_longrope", "recurrent_gemma")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_is_one_part(name: str, tmp_path: Path) -> None:
    """Latent keys, weights that lie in columns, biases of experts, scans of channels, far rotations: token by token."""
    of = subject(name, tmp_path)
    made, text, exact = of.model, tokens()[:, :12], of.means(tokens())[:, :12]
    runner, step = stepper(made)
    states, found = made.fresh_states(2, 12), list[Tensor]()
    for i in range(12):
        results = step((text[:, i : i + 1], torch.tensor(i), *states), weights(made, runner), True)
        assert results is not None
        found.append(results[0][:, -1])
        states = [*results[1:]]
    assert (torch.stack(found, 1) - exact).abs().max() <= 2e-5 * exact.abs().max()
    (ready,) = step.known[1].values()
    assert ready is not None and len(ready.plan.parts) == 1


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_half_precision(name: str) -> None:
    half, full = model(name, "bf16"), model(name)
    full.load_from(half)
    tokens = torch.randint(0, half.vocab, (2, 21), generator=torch.Generator().manual_seed(0))
    # Beside the ops' references, which round where published models do: C++ row kernels do not, and are nearer.
    plain = plait_compile(name, dtype="bf16", mode="infer", jit=False, target="reference").load_from(half)
    exact, read = full(tokens)[:, 8:], plain(tokens)[:, 8:].float()
    logits = decode(half, tokens, 9, in_place=False)[0].float()
    error, known = ((x - exact).square().mean().sqrt() / exact.square().mean().sqrt() for x in (logits, read))
    assert error <= 1.2 * known + 1e-4


@torch.no_grad()
def test_given_states_stay_unless_they_are_given_up() -> None:
    made = model("qwen3-next-80b-a3b-tiny")
    runner, step = stepper(made)
    params, token = weights(made, runner), torch.ones(1, 1, dtype=torch.int64)
    states = [torch.randn_like(s) * 0.1 for s in made.fresh_states(1, 5)]
    moving = [i for i, v in enumerate(runner.program.graph.inputs[2:]) if "cache" not in v.name]
    before = [s.clone() for s in states]
    first = step((token, torch.tensor(3), *states), params, False)
    assert first is not None and all(torch.equal(states[i], before[i]) for i in moving)
    last = step((token, torch.tensor(3), *states), params, True)
    assert last is not None and all(torch.equal(a, b) for a, b in zip(first, last, strict=True))
    assert all(last[i + 1].data_ptr() == states[i].data_ptr() for i in moving)


@torch.no_grad()
def test_steady_steps_make_nothing() -> None:
    """Python holds no more after two hundred steps than after one hundred, and torch makes the logits alone."""
    made = model("qwen3-next-80b-a3b-tiny")
    runner, step = stepper(made)
    params, states = weights(made, runner), made.fresh_states(1, 300)
    token, at = torch.ones(1, 1, dtype=torch.int64), torch.tensor(0)

    def some(n: int) -> None:
        for _ in range(n):
            assert step((token, at, *states), params, True) is not None
            at.add_(1)

    some(10)
    tracemalloc.start()
    some(100)
    before = tracemalloc.get_traced_memory()[0]
    some(100)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    with torch.profiler.profile(profile_memory=True) as profile:
        some(1)
    made_here = [e for e in profile.events() if e.name == "aten::empty"]  # type: ignore[union-attr] # there are events
    assert grown < 2000 and len(step.known[1]) == 1
    assert len(made_here) == 1


@pytest.mark.parametrize("page", [0, 4])
@torch.no_grad()
def test_rows_with_lengths_of_their_own(page: int) -> None:
    made = model("qwen3-next-80b-a3b-tiny")
    runner, step = stepper(made, "paged" if page else "rows", last=True)
    runner.step, runner.eager = step, False
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, made.vocab, (n,), generator=draw) for n in (9, 5, 13)]
    new = torch.randint(0, made.vocab, (3, 6), generator=draw)
    cache = made.cache(3, page=page)
    cache.add(rows)
    cache.read()
    for i in range(6):
        cache.add([*new[:, i : i + 1]])
        logits = cache.read()
        for b in range(3):
            whole = made(torch.cat([rows[b], new[b, : i + 1]])[None])[0, -1]
            assert (logits[b] - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert all(found is not None for found in step.known[1].values()) and step.known[1]


# -- what it does not take ---------------------------------------------------------------------

MIXED = """
def f(tokens: i64[b, s], at: i64[()], state: f32[b, 8, 3], *, w: f32[9, 8] = normal(0.02), c: f32[8, 4] = normal(0.02)):
    x = embedding(w, tokens)
    y, final = mix(x, state, params='a')
    z = mul(y, x)
    u, last = mix(z, final, params='b')
    return u, last

@layer
def mix(x: f32[b, s, 8], state: f32[b, 8, 3], *, c: f32[8, 4] = normal(0.5)):
    y, final = causal_conv1d(x, c, state=state)
    n = normal_cdf(y)
    return n, final
"""


@torch.no_grad()
def test_a_layer_without_a_form_runs_as_it_does_elsewhere() -> None:
    text = MIXED.replace(", c: f32[8, 4] = normal(0.02)):", "):", 1)
    graph = parse(text)
    program = lower(graph)
    calls = dict(zip(graph.layers, program.layers.values(), strict=True))
    draw = torch.Generator().manual_seed(0)
    params = [torch.randn([int(d.size) for d in t.dims], generator=draw) for t, _ in parameters(graph).values()]
    inputs = [torch.tensor([[1], [8], [3]]), torch.tensor(4), torch.randn(3, 8, 3, generator=draw)]
    step = Stepper(graph, "cpu", calls)
    found, exact = step(inputs, params, True), program.entry(*inputs, *params)
    assert found is not None and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, exact, strict=True))
    (made,) = step.known[1].values()
    assert made is not None and [isinstance(p, Step) for p in made.plan.parts] == [False, True, False, True]


def test_only_cached_programs_for_the_processor_have_a_step() -> None:
    made = model("demo")
    cached = made.runner(Variant("cached")).program
    assert cached.step is not None and made.runner(Variant("logits")).program.step is None
    assert step_of(cached.graph, "cuda") is None and step_of(cached.graph, "reference") is None


def test_calls_that_are_not_its_own_are_left() -> None:
    made = model("llama-3-8b-tiny")
    runner, step = stepper(made)
    params, one = weights(made, runner), torch.ones(1, 1, dtype=torch.int64)
    states = made.fresh_states(1, 9)
    inputs = (one, torch.tensor(0), *states)
    assert step((one.expand(1, 2), *inputs[1:]), params, False) is None  # two tokens
    assert step((one.expand(33, 1), torch.tensor(0), *made.fresh_states(33, 4)), params, False) is None  # many rows
    odd = [s.transpose(0, 2).contiguous().transpose(0, 2) for s in made.fresh_states(2, 9)]
    assert step((one.expand(2, 1), torch.tensor(0), *odd), params, False) is None  # not side by side
    with torch.autocast("cpu"):
        assert step(inputs, params, False) is None
    assert step(inputs, params, False) is not None
    made.requires_grad_(True)
    assert step(inputs, params, False) is None
    with torch.no_grad():
        assert step(inputs, params, False) is not None


@torch.no_grad()
def test_weights_that_change_are_seen() -> None:
    """In place, in another tensor, and in another dtype: the next step is of the weights that are there."""
    made, other = model("llama-3-8b-tiny"), model("llama-3-8b-tiny")
    text = torch.randint(0, made.vocab, (1, 12), generator=torch.Generator().manual_seed(0))
    runner, step = stepper(made)
    token, states = text[:, :1], made.fresh_states(1, 4)

    def logits() -> Tensor:
        results = step((token, torch.tensor(0), *states), weights(made, runner), False)
        assert results is not None
        return results[0][:, -1].float()

    before = logits()
    made.get_parameter("layers.0.w_in").mul_(2)
    other.get_parameter("layers.0.w_in").mul_(2)
    want = other(token)[:, -1]
    assert (logits() - want).abs().max() <= 1e-5 * want.abs().max() < (before - want).abs().max()
    made.get_parameter("layers.0.w_in").data = made.get_parameter("layers.0.w_in").clone() * 3
    other.get_parameter("layers.0.w_in").mul_(3)
    want = other(token)[:, -1]
    assert (logits() - want).abs().max() <= 1e-5 * want.abs().max()
    half = made.get_parameter("layers.0.w_in").bfloat16()
    made.get_parameter("layers.0.w_in").data = half
    other.get_parameter("layers.0.w_in").copy_(half)
    want = other(token)[:, -1]
    assert (logits() - want).abs().max() <= 1e-5 * want.abs().max()
    made.bfloat16()
    states = [s.bfloat16() for s in states]
    assert (logits() - want).abs().max() <= 2e-2 * want.abs().max()


def test_numbers_outside_of_a_table_are_named() -> None:
    made = model("llama-3-8b-tiny")
    runner, step = stepper(made)
    params, states = weights(made, runner), made.fresh_states(1, 4)
    with pytest.raises(DataError, match="outside of the vocabulary"):
        step((torch.full((1, 1), made.vocab), torch.tensor(0), *states), params, False)
    for at in (4, -1):
        with pytest.raises(DataError, match="no room for the next token"):
            step((torch.ones(1, 1, dtype=torch.int64), torch.tensor(at), *states), params, False)
