"""Eager modules traced: the same numbers and gradients, raised where they can be, at sizes that nobody traced."""

import logging
from collections import Counter
from collections.abc import Callable
from functools import cache

import plait
import pytest
import torch
from plait import Traced, trace_module
from plait.ir import DataError, PlaitError, dump, evaluate, parse, parse_mesh, simulate
from plait.passes import DEFAULT, Pipeline
from plait.passes import raise_rules as rules
from plait.passes.rewrite import Rule
from torch import nn

from tests.fx_models import GPT2, RMS, Conv, DeltaNet, Llama, Mamba1, Mamba2, MoE

logging.getLogger("torch.__trace").disabled = True  # pytest would keep every line of it
Tensor = torch.Tensor
TOKENS = lambda b, t: torch.randint(31, (b, t), generator=torch.Generator().manual_seed(b + t))  # noqa: E731


def rows(width: int) -> Callable[[int, int], Tensor]:
    return lambda b, t: torch.randn(b, t, width, dtype=torch.float64, generator=torch.Generator().manual_seed(b + t))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor], dict[str, int]]] = {
    "llama eager": (Llama, TOKENS, {"rms_norm": 3, "rope": 2, "attention": 1, "silu": 1}),
    "llama torch": (lambda: Llama("torch"), TOKENS, {"rms_norm": 3, "rope": 2, "attention": 1}),
    "llama window": (lambda: Llama("window"), TOKENS, {"rms_norm": 3, "rope": 2, "attention": 1}),
    "gpt2": (GPT2, TOKENS, {"layer_norm": 2, "attention": 1, "gelu": 1, "positions": 1}),
    "gated delta net": (DeltaNet, rows(20), {"gated_delta_rule": 1, "causal_conv1d": 1, "l2_norm": 2, "rms_norm": 1}),
    "mamba2": (Mamba2, rows(20), {"ssd": 1, "causal_conv1d": 1, "rms_norm": 1}),
    "mamba": (Mamba1, rows(20), {"selective_scan": 1, "causal_conv1d": 1, "linear": 4}),
    "experts": (MoE, rows(12), {"route": 1, "dispatch": 1, "grouped_linear": 2, "combine": 1}),
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[[int, int], Tensor], dict[str, int]]:
    torch.manual_seed(3)
    model, draw, wanted = CASES[name]
    return model().to(dtype), lambda b, t: x.to(dtype) if (x := draw(b, t)).is_floating_point() else x, wanted


@cache
def example(name: str) -> tuple[nn.Module, Callable[[int, int], Tensor], Traced]:
    """A case in float64, traced once for all tests."""
    module, draw, _ = made(name)
    return module, draw, trace_module(module, draw(2, 7))


def far(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def ops_of(traced: Traced) -> Counter[str]:
    return Counter(n.op.name for n in traced.graph.nodes)


def same_gradients(module: nn.Module, got: Tensor, want: Tensor, within: float) -> None:
    weights = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    params = list(module.parameters())
    found = [torch.autograd.grad((y * weights).sum(), params, materialize_grads=True) for y in (got, want)]
    largest = max(float(d.abs().max()) for d in found[1])
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < within * largest


@EVERY_CASE
def test_a_module_is_raised_and_stays_itself_at_every_size(name: str) -> None:
    module, draw, traced = example(name)
    assert ops_of(traced) >= Counter(CASES[name][2]) and "aten" not in ops_of(traced), str(traced.report)
    assert traced.report.symbolic and not traced.report.held
    assert parse(dump(traced.graph)) == traced.graph
    model = plait.compile(traced, jit=False)
    for sizes in ((2, 7), (1, 1), (3, 13)):
        x = draw(*sizes)
        got, want = model(x), module(x)
        assert far(got, want) < 1e-9
        same_gradients(module, got, want, 1e-9)


@pytest.mark.parametrize("name", ["gated delta net"])
def test_float32_too(name: str) -> None:
    module, draw, wanted = made(name, torch.float32)
    traced = trace_module(module, draw(2, 7))
    assert ops_of(traced) >= Counter(wanted)
    got, want = plait.compile(traced, jit=False)(x := draw(3, 9)), module(x)
    assert far(got, want) < 1e-5
    same_gradients(module, got, want, 1e-4)


def test_a_traced_module_is_fused_as_one_that_was_described() -> None:
    graph = Pipeline.parse(DEFAULT).run(example("llama eager")[2].graph)
    assert {g.name for g in graph.callees} >= {"qkv_prep", "residual_norm", "glu"}
    graph = Pipeline.parse(DEFAULT).run(example("gated delta net")[2].graph)
    assert {g.name for g in graph.callees} >= {"preamble", "norm_gate"}


@pytest.mark.parametrize(("mesh", "options"), [("cp=2", "attention=heads"), ("cp=2", "attention=kv"), ("tp=2", "")])
def test_a_traced_module_is_placed_as_one_that_was_described(mesh: str, options: str) -> None:
    module, draw, traced = example("llama eager")
    placed = Pipeline.parse(f"place{{mesh='{mesh}' {options}}}").run(traced.graph)
    assert placed != traced.graph
    assert far(simulate(placed, parse_mesh(mesh), draw(2, 8), params=traced.params), module(draw(2, 8))) < 1e-9


def test_compiled_it_runs_and_trains_with_the_modules_own_weights() -> None:
    torch.manual_seed(3)
    module = nn.Sequential(RMS(5), nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 5))
    draw = lambda b, t: rows(5)(b, t).float()  # noqa: E731
    model = plait.compile(trace_module(module, draw(2, 5)))
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in module.named_parameters()}
    assert model.state_dict().keys() == module.state_dict().keys()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), list[float]()
    for _ in range(3):
        loss = (model(draw(2, 5)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert far(model(x := draw(3, 6)), module(x)) < 1e-5


def test_the_report_says_what_was_raised_and_what_stays() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(x.sin(), 1) * torch.sigmoid(x)

    report = trace_module(Odd(), rows(5)(2, 6)).report
    assert [line.what for line in report.aten] == ["aten.cumsum.default", "aten.sin.default"] and not report.raised
    assert "aten.cumsum.default" in str(report) and "sizes symbolic" in str(report)
    told = str(example("llama torch")[2].report)
    assert "attention                   1  layers.*.attention" in told and "gated mlp" in told


# -- what is held back ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["eager", "torch"])
def test_a_mask_that_depends_on_data_is_left_to_torch(form: str) -> None:
    module, mask = made(f"llama {form}")[0], torch.full((7, 7), -9e9, dtype=torch.float64).triu(1)
    traced = trace_module(module, (TOKENS(2, 7), mask), gradients=False)
    assert "attention" not in ops_of(traced) and ops_of(traced)["rms_norm"] == 3
    assert far(plait.compile(traced, jit=False)(TOKENS(2, 7), mask * 0), module(TOKENS(2, 7), mask * 0)) < 1e-9


def test_a_raise_that_is_not_equal_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Rule.of("planted", "y = silu(x)", "y = sigmoid(x)")
    monkeypatch.setattr(rules, "ACTIVATIONS", (*rules.ACTIVATIONS[1:2], wrong))

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * torch.sigmoid(x)
            return y * (x * x).mean(-1, keepdim=True).add(1e-5).rsqrt()

    traced = trace_module(Gate(), rows(5)(2, 7))
    assert len(traced.report.held) == 1 and traced.report.held[0].startswith("planted at Gate: values differ by")
    assert "silu" in ops_of(traced)


def test_a_function_that_is_not_what_its_name_says_is_traced_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def torch_chunk_gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **rest: bool):
        return value * beta[..., None] * g.exp()[..., None], None

    monkeypatch.setattr("tests.fx_models.torch_chunk_gated_delta_rule", torch_chunk_gated_delta_rule)
    module, draw, _ = made("gated delta net")
    traced = trace_module(module, draw(2, 7), gradients=False)
    assert "gated_delta_rule" not in ops_of(traced) and "met as one op: values differ" in traced.report.held[0]
    assert far(plait.compile(traced, jit=False)(draw(2, 7)), module(draw(2, 7))) < 1e-9


def test_a_window_that_no_example_shows_is_seen() -> None:
    module, draw, _ = made("llama window")
    node = next(n for n in trace_module(module, draw(2, 2), gradients=False).graph.nodes if n.is_op("attention"))
    assert node.attrs["window"] == 3


def test_a_conv_that_looks_ahead_stays_torchs() -> None:
    class Ahead(Conv):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.transpose(1, 2))[:, :, 1 : x.shape[1] + 1].transpose(1, 2)

    for model, raised in ((Conv(5, 4, True), True), (Ahead(5, 4, True), False)):
        assert ("causal_conv1d" in ops_of(trace_module(model.double(), rows(5)(2, 9)))) is raised


def test_a_module_that_needs_its_sizes_is_traced_for_them() -> None:
    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x[:, 0]
            for t in range(1, x.shape[1]):
                y = (y + x[:, t]).tanh()
            return y

    traced = trace_module(Loop().double(), rows(3)(2, 4))
    model = plait.compile(traced, jit=False)
    assert far(model(rows(3)(2, 4)), Loop()(rows(3)(2, 4))) < 1e-9
    with pytest.raises(DataError, match=r"x is float64\[2, 5, 3\], must be f64\[.*4, 3\]; trace the module"):
        model(rows(3)(2, 5))


# -- mistakes ---------------------------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x * self.seen


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


@pytest.mark.parametrize(("module", "example", "error", "match"), [
    (Branch(), torch.ones(2, 3), PlaitError, r"Branch cannot be exported.*in Branch.forward, line"),
    (Counts(), torch.ones(2, 3), PlaitError, "changes its buffer .*seen"),
    (Drops(), torch.ones(40, 3), PlaitError, "dropout.default is random.*eval"),
    (nn.Linear(3, 3), 5, PlaitError, "example is a int, must be a tensor"),
    (nn.Linear(3, 3), (), PlaitError, "example holds no tensor"),
    (len, torch.ones(2), PlaitError, "must be an nn.Module"),
    (nn.Linear(3, 3), torch.ones(2, 4), PlaitError, "Linear cannot be exported"),
])  # fmt: skip
def test_a_mistake_is_said(module: nn.Module, example: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        trace_module(module, example)


def test_a_call_that_is_not_as_the_example_is_refused() -> None:
    _, draw, traced = example("llama torch")
    model = plait.compile(traced, jit=False)
    with pytest.raises(DataError, match="must be as in the example"):
        model(draw(2, 5), None, None)
    with pytest.raises(DataError, match=r"tokens is float32\[2, 5\], must be i64"):
        model(torch.ones(2, 5))
    with pytest.raises(PlaitError, match="dtype is 'f32', but a traced module keeps"):
        plait.compile(traced, dtype="f32")  # type: ignore[call-overload]


def test_inputs_that_are_no_tensors_are_part_of_the_trace() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor, *, times: int, also: dict[str, Tensor]) -> dict[str, Tensor | None]:
            return {"y": x * times + also["z"], "none": None}

    x, z = rows(3)(2, 4), rows(3)(2, 5)[:, :4]
    traced = trace_module(Twice(), {"x": x, "times": 3, "also": {"z": z}})
    assert [v.name for v in traced.graph.inputs] == ["x", "also_z"]
    model = plait.compile(traced, jit=False)
    made_ = model(x=x, times=3, also={"z": z})
    assert torch.equal(made_["y"], x * 3 + z) and made_["none"] is None
    with pytest.raises(DataError, match="traced with 3; trace it again"):
        model(x=x, times=4, also={"z": z})


def test_evaluated_with_its_params_it_is_the_module() -> None:
    module, draw, traced = example("mamba2")
    assert far(evaluate(traced.graph, draw(3, 4), params=traced.params), module(draw(3, 4))) < 1e-9
