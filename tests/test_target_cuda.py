"""Targets "cuda" and "interpreter": whole models against the references, decode steps that wait for no host, and recording."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.frontends import ModelSpec, load_spec, shrink
from plait.ir import OPS, DataError, parameters, parse
from plait.lowering import lower
from plait.lowering.forms import device
from plait.lowering.gpu.jobs import jobs, uses
from plait.lowering.program import fingerprint
from plait.lowering.rows import row_kernel
from plait.lowering.triton_ops import KernelOp, kernel_op
from plait.passes import DEFAULT, Pipeline
from plait.runtime import CompiledModel, Variant
from plait.runtime.capture import WORTH, Decoder, recorder
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

TINY = ("qwen3-next-80b-a3b-tiny", "nemotron-h-8b-tiny", "llama-3-8b-tiny")
names = pytest.mark.parametrize("name", TINY)


def short(name: str) -> ModelSpec:
    return shrink(load_spec(name))


def moved(model: CompiledModel) -> CompiledModel:
    """Weights away from their symmetric first values, so that each of them matters."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def pair(name: str, target: str, **options: Any) -> tuple[CompiledModel, CompiledModel]:
    """A model on a target, without a compiler around it, and its references; their weights are the same."""
    wanted = moved(plait.compile(short(name), dtype="f32", target="reference", jit=False, **options))
    return plait.compile(short(name), dtype="f32", target=target, jit=False, **options).load_from(wanted), wanted


# -- whole models -------------------------------------------------------------------------


@names
@pytest.mark.parametrize("target", ["cuda", "interpreter"])
def test_a_model_trains_as_its_references(name: str, target: str) -> None:
    model, wanted = pair(name, target)
    tokens = torch.randint(0, model.vocab, (2, 7))
    ours, right = model.loss(tokens), wanted.loss(tokens)
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(loss, list(m.parameters())) for loss, m in ((ours, model), (right, wanted)))
    for (label, _), a, b in zip(model.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()), msg=lambda m, at=label: f"{at}: {m}")


@pytest.mark.parametrize(("name", "target"), [(TINY[0], "cuda"), (TINY[1], "interpreter")])
def test_a_model_generates_as_its_references(name: str, target: str) -> None:
    model, wanted = pair(name, target, mode="infer")
    tokens = torch.randint(0, model.vocab, (2, 5))
    assert torch.equal(model.generate(tokens, 4), wanted.generate(tokens, 4))
    torch.testing.assert_close(model(tokens), wanted(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY[:2])
def test_packed_segments_are_separate_runs(name: str) -> None:
    model, wanted = pair(name, "cuda", mode="infer")
    tokens, cu = torch.randint(0, model.vocab, (1, 12)), torch.tensor([0, 1, 1, 8, 12])
    torch.testing.assert_close(model(tokens, cu), wanted(tokens, cu), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "target"), [("qwen3-next-80b-a3b-tiny", "cuda"), ("llama-3-8b-tiny", "interpreter")])
def test_autocast_and_half_weights_stay_near(name: str, target: str) -> None:
    model, _ = pair(name, target)
    tokens = torch.randint(0, model.vocab, (2, 9))
    wanted = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(tokens)
        model.loss(tokens).backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
    for other in (cast, model.to(torch.bfloat16)(tokens)):
        assert other.dtype == torch.bfloat16
        assert float((other - wanted).detach().norm() / wanted.detach().norm()) < 0.05


def test_one_compilation_for_every_length() -> None:
    model, wanted = pair("llama-3-8b-tiny", "cuda")
    model.runner(Variant("loss", training=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    for batch, length in ((2, 5), (3, 7), (4, 9)):
        tokens = torch.randint(0, model.vocab, (batch, length))
        torch._dynamo.maybe_mark_dynamic(tokens, (0, 1))
        ours, right = compiled(tokens), wanted.loss(tokens)
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)
        grads = (torch.autograd.grad(loss, list(m.parameters())) for loss, m in ((ours, model), (right, wanted)))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("target", ["cuda", "interpreter"])
def test_an_exported_model_runs_from_its_file(target: str, tmp_path: Path) -> None:
    model, wanted = pair("llama-3-8b-tiny", target, mode="infer")
    tokens = torch.randint(0, model.vocab, (2, 5))
    sizes = {"tokens": {1: torch.export.Dim("s", min=2, max=64)}}
    torch.export.save(torch.export.export(model, (tokens,), dynamic_shapes=sizes, strict=False), tmp_path / "model.pt2")
    back = torch.export.load(tmp_path / "model.pt2").module()
    for length in (5, 9):
        tokens = torch.randint(0, model.vocab, (2, length))
        torch.testing.assert_close(back(tokens), wanted(tokens), rtol=1e-4, atol=1e-4)


def test_inputs_go_where_the_weights_are() -> None:
    model, _ = pair("llama-3-8b-tiny", "cuda")
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    assert model.device.type == device_type
    assert model(torch.ones(1, 3, dtype=torch.int64)).device.type == device_type


# -- files --------------------------------------------------------------------------------


KERNEL = parse(
    """
@kernel
def residual_norm(x: f32[b, s, 65], delta: f32[b, s, 65], w: f32[65]):
    y = add(x, delta)
    n = rms_norm(y, w, zero_centered=True)
    return y, n
""".strip()
)


class Block(torch.nn.Module):
    """One kernel between two maps."""

    def __init__(self, op: KernelOp) -> None:
        super().__init__()
        self.op, self.w = op, torch.nn.Parameter(torch.randn(65))

    def forward(self, x: Tensor) -> Tensor:
        y, n = self.op.call(x * 2, x, self.w)
        return y + n


@pytest.mark.parametrize("interpreted", [False, True])
def test_exported_and_loaded(interpreted: bool, tmp_path: Path) -> None:
    block, x = Block(kernel_op(KERNEL, interpreted=interpreted)), torch.randn(2, 5, 65)
    sizes = {"x": {0: torch.export.Dim("b", min=1, max=64), 1: torch.export.Dim("s", min=2, max=64)}}
    exported = torch.export.export(block, (x,), dynamic_shapes=sizes)
    torch.export.save(exported, tmp_path / "block.pt2")
    back = torch.export.load(tmp_path / "block.pt2").module()
    for n in (5, 9):
        x = torch.randn(3, n, 65)
        torch.testing.assert_close(back(x), block(x))


def test_packaged_ahead_of_time(tmp_path: Path) -> None:
    block, x = Block(kernel_op(KERNEL)).requires_grad_(False), torch.randn(2, 5, 65)
    path = torch._inductor.aoti_compile_and_package(torch.export.export(block, (x,)), package_path=str(tmp_path / "block.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), block(x))


# -- choices ------------------------------------------------------------------------------

VIEWS = ("linear", "split", "reshape")  # a library's, or nothing at all


def test_a_decode_step_of_a_recurrent_mixer_is_three_launches() -> None:
    """Between its two projections: the preamble with its gates, the rule, its norm and gate; each is one function."""
    graph = Pipeline.parse(DEFAULT).run(plait.program(load_spec("qwen3-next-80b-a3b-tiny"), task="cached"))
    layer = next(g for g in graph.layers if g.name == "gdn")
    names = [n.op.name for n in layer.nodes if not n.is_op(*VIEWS)]
    assert sorted(names) == ["gated_delta_rule", "norm_gate", "preamble", "residual_norm"]
    for use in uses(graph):
        if "gdn" in use.calls:
            assert len(jobs(row_kernel(use.graph), use.operands, "sm_90")) == 1, use.name


def lowered(name: str, target: str, **options: Any) -> plait.lowering.Program:
    return lower(Pipeline.parse(DEFAULT).run(plait.program(short(name), dtype="f32", **options)), target=target)


def test_the_report_names_every_row_kernel() -> None:
    program = lowered("qwen3-next-80b-a3b-tiny", "cuda")
    found = {c.op: (c.runs, c.why) for c in program.choices if c.runs == "row kernel"}
    assert {"norm_gate", "residual_norm", "glu", "qkv_prep", "preamble"} <= found.keys()
    assert set(found.values()) == {("row kernel", "one pass forward, one backward")}
    assert "torch.ops.plait.residual_norm_" in program.source
    interpreted = lowered("qwen3-next-80b-a3b-tiny", "interpreter").source
    assert "_interpreted" in interpreted and "_interpreted" not in program.source


def test_a_declined_kernel_runs_op_by_op_and_says_why() -> None:
    packed = lowered("qwen3-next-80b-a3b-tiny", "cuda", packed=True).choices
    preamble = next(c for c in packed if c.op == "preamble")
    assert preamble.runs == "op by op" and preamble.why.startswith("no row kernel: ")
    assert any(c.op == "causal_conv1d" and c.runs == "attending.causal_conv1d" for c in packed)
    wide = lower(Pipeline.parse(DEFAULT).run(plait.program(short("llama-3-8b-tiny"), dtype="f64")), target="cuda").choices
    assert any("float64" in c.why for c in wide) and not any(c.runs == "row kernel" for c in wide)


def test_compiled_code_of_another_generator_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = fingerprint(), Path.read_bytes
    fingerprint.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda p: read(p) + (b"#" if p.match("lowering/rows/write.py") else b""))
        assert fingerprint() != before
    fingerprint.cache_clear()
    assert fingerprint() == before


# -- forms --------------------------------------------------------------------------------

q, k, v = torch.randn(2, 5, 6, 8), torch.randn(2, 9, 3, 8), torch.randn(2, 9, 3, 8)
ATTENTION: dict[str, tuple[tuple[Tensor | None, ...], dict[str, Any]]] = {
    "causal": ((q, k[:, :5], v[:, :5]), {}),
    "at": ((q, k, v, None, None, torch.tensor(3)), {}),
    "one": ((q[:, :1], k, v, None, None, torch.tensor(4)), {"window": 3}),
    "window": ((q, k[:, :5], v[:, :5]), {"window": 2, "scale": 0.3}),
    "open": ((q, k, v), {"causal": False}),
    "packed": ((q[:1], k[:1, :5], v[:1, :5], None, torch.tensor([0, 2, 2, 5])), {}),
    "sinks": ((q, k, v, torch.randn(6), None, torch.tensor(3)), {"softcap": 2.0, "window": 4}),
    "wide": ((q, k[:, :5], torch.randn(2, 5, 3, 11)), {}),
}


def same_as_the_op(op: str, form: Callable[..., Any], operands: tuple[Tensor | None, ...], options: dict[str, Any]) -> None:
    """Values and gradients of a form and of its op's reference."""
    both = list[list[Tensor]]()
    for run in (form, OPS[op].reference):
        xs = [x.double().requires_grad_() if x is not None and x.is_floating_point() else x for x in operands]
        made = run(*xs, **options)
        ys = made if isinstance(made, tuple) else (made,)
        weights = [torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos() for y in ys]
        total = sum((y * w).sum() for y, w in zip(ys, weights, strict=True))
        leaves = [x for x in xs if x is not None and x.requires_grad]
        both.append([*ys, *torch.autograd.grad(total, leaves)])  # type: ignore[arg-type] # a sum of tensors
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_on_the_device(case: str) -> None:
    same_as_the_op("attention", device.attention, *ATTENTION[case])


@pytest.mark.parametrize("length", [1, 2, 3, 65])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_convolutions_on_the_device(length: int, taps: int) -> None:
    x, w, state = torch.randn(2, length, 7), torch.randn(7, taps), torch.randn(2, 7, taps - 1)
    same_as_the_op("causal_conv1d", device.causal_conv1d, (x, w, torch.randn(7), state), {"act": "silu"})
    same_as_the_op("causal_conv1d", device.causal_conv1d, (x, w), {})
    same_as_the_op("anticausal_conv1d", device.anticausal_conv1d, (x, w, state), {})
    same_as_the_op("anticausal_conv1d", device.anticausal_conv1d, (x, w), {})
    same_as_the_op("conv1d_taps", device.conv1d_taps, (x, torch.randn(2, length, 7), state), {"k": taps})
    cu = torch.tensor([0, 0, length])
    same_as_the_op("causal_conv1d", device.causal_conv1d, (x[:1], w, None, None, cu), {})


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 7], [20, 20, 23]])
def test_grouped_linear_on_the_device(counts: list[int]) -> None:
    x, w = torch.randn(sum(counts), 5), torch.randn(3, 4, 5)
    same_as_the_op("grouped_linear", device.grouped_linear, (x, w, torch.tensor(counts)), {})
    fewer = device.grouped_linear(torch.randn(9, 5), w, torch.tensor([2, 1, 4]))
    assert not fewer[7:].any()


# -- decoding without the host ------------------------------------------------------------


OPAQUE = {
    torch.ops.plait.linear_recurrence.default: sys.modules["plait.lowering.forms.recurrence"]._forward,
    torch.ops.plait.attention.default: sys.modules["plait.lowering.forms.attention"]._forward,
}


class Opened(TorchDispatchMode):
    """Looks into opaque ops, so that fake tensors meet what their kernels ask of numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = OPAQUE.get(func)
        if kernel is None:
            return func(*args, **(kwargs or {}))
        with self:
            return kernel(*args)


def decode_step(name: str, target: str) -> int:
    """Run one cached step on fake tensors, which have no numbers to read; how many ops of ours it met."""
    spec = short(name)
    graph = Pipeline.parse(f"with-cache,{DEFAULT}").run(plait.program(spec, dtype="f32"))
    program = lower(graph, target=target)
    sizes = {"b": 2, "s": 1, "m": 19}
    with FakeTensorMode(), torch.no_grad(), Opened():
        made = list[Tensor]()
        for value in graph.inputs:
            shape = [sizes.get(str(d.size), d.size) for d in value.type.dims]
            made.append(torch.empty(shape) if value.type.is_float else torch.zeros(shape, dtype=torch.int64))
        made += [torch.empty([int(d.size) for d in type_.dims]) for type_, _ in parameters(graph).values()]
        out = program.entry(*made)
    assert out[0].shape == (2, 1, spec.vocab)
    return len(out)


@names
def test_a_decode_step_reads_no_number_on_the_host(name: str) -> None:
    assert decode_step(name, "cuda") > 1


def test_a_host_read_would_be_seen() -> None:
    with pytest.raises(DataDependentOutputException):
        decode_step("llama-3-8b-tiny", "cpu")


# -- recording ----------------------------------------------------------------------------


class Tape:
    """Stands in for a CUDA graph: records by remembering what to call, and runs nothing while it records."""

    def __init__(self, waits: bool = False) -> None:
        self.waits, self.replays = waits, 0

    def __call__(self, try_step: Callable[[], Any], body: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor] | None:
        logits, *_ = try_step()
        if self.waits:
            return None
        out = torch.empty_like(logits[:, -1])

        def replay() -> None:
            self.replays += 1
            out.copy_(body())

        return replay, out


@names
@pytest.mark.parametrize("waits", [False, True])
def test_a_recorded_step_decodes_as_the_plain_one(name: str, waits: bool) -> None:
    model, _ = pair(name, "cuda", mode="infer")
    tokens, tape = torch.randint(0, model.vocab, (2, 5)), Tape(waits)
    step = partial(model._run, Variant("cached"))
    plain, taped = (Decoder(step, model.fresh_states(2, 16), record) for record in (None, tape))
    for _ in range(6):
        a, b = plain(tokens), taped(tokens)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        tokens = a.argmax(-1)[:, None]
    assert tape.replays == (0 if waits else 4)  # the prompt and the first step run as they are


@pytest.mark.parametrize(("carried", "tried"), [(None, 0), ((True,), 0), ((False,), 1)])
def test_trying_a_step_leaves_what_it_carries(carried: tuple[bool, ...] | None, tried: int) -> None:
    """A step that counts in place counts the steps that are taken; slots, which it writes again, are not copied."""

    def step(tokens: Tensor, at: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return tokens[..., None] + state.add_(1.0), state

    decode = Decoder(step, [torch.zeros(1)], Tape(), carried)
    made = [float(decode(torch.zeros(1, 1, dtype=torch.int64))) for _ in range(4)]
    assert made == [1, 2 + tried, 3 + tried, 4 + tried]


def test_nothing_is_recorded_without_a_device() -> None:
    assert recorder(torch.device("cpu"), 1000) is None
    assert recorder(torch.device("cuda"), WORTH - 1) is None and recorder(torch.device("cuda"), WORTH) is not None
    model, _ = pair("llama-3-8b-tiny", "cuda", mode="infer")
    with pytest.raises(DataError, match="max_new_tokens is -1"):
        model.generate(torch.ones(1, 2, dtype=torch.int64), -1)
