"""The cases of the CPU table: shapes, inputs, the variants that take turns and the figure to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ours
import peers
import torch
import torch.nn.functional as F
from measure import Thunk
from torch import Tensor, nn

Inputs = Callable[[], tuple[Tensor, ...]]
Targets = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Bench:
    """The variants of one row, ready to be timed, and what was learned while building them."""

    variants: dict[str, Thunk]
    notes: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table; `target` is the ratio for torch forms and for generated C++."""

    case: str
    title: str
    shape: str
    mode: str
    target: tuple[float, float]
    build: Callable[[], Bench]
    over: str = "compile"
    quick: bool = False


def rows() -> list[Row]:
    """Every timed row, in the order of the table."""
    return [*_rules(), *_conv(), *_pointwise(), *_models(), *_decodes()]


# One operation ----------------------------------------------------------------------------------------------------------


def _operation(case: str, name: str, shape: str, inputs: Inputs, targets: Targets, **rest: Any) -> list[Row]:
    """The forward row and the forward-and-backward row of one operation."""
    modes = zip(("fwd", "fwd+bwd"), targets, strict=True)
    compiled = rest.get("over") != "eager"
    return [
        Row(case, name, shape, mode, target, lambda m=mode: _bench(name, inputs, m, compiled), **rest) for mode, target in modes
    ]


def _bench(name: str, inputs: Inputs, mode: str, compiled: bool) -> Bench:
    values, peer, form = inputs(), getattr(peers, name), ours.operation(name)
    calls: dict[str, Callable[..., Any]] = {"eager": peer}
    if compiled:
        calls["compile"] = torch.compile(peer, dynamic=False)
    notes: dict[str, Any] = {}
    if isinstance(form, ours.Missing):
        notes["ours"] = form.reason
    else:
        calls["ours"] = form
        notes["error"] = _difference(form, peer, values)
    return Bench({label: _thunk(call, values, mode) for label, call in calls.items()}, notes)


def _thunk(call: Callable[..., Any], values: tuple[Tensor, ...], mode: str) -> Thunk:
    if mode == "fwd":
        return lambda: _without_gradient(call, values)
    inputs = tuple(value.detach().requires_grad_(value.is_floating_point()) for value in values)
    leaves = [value for value in inputs if value.requires_grad]
    heads = [torch.randn_like(each) for each in _several(call(*inputs))]
    return lambda: torch.autograd.grad(_several(call(*inputs)), leaves, heads)


def _several(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _without_gradient(call: Callable[..., Any], values: tuple[Tensor, ...]) -> object:
    with torch.no_grad():
        return call(*values)


def _difference(form: Callable[..., Any], peer: Callable[..., Any], values: tuple[Tensor, ...]) -> float:
    """Largest difference from the peer run in float32, over the largest value: bf16 is never judged by bf16."""
    with torch.no_grad():
        wanted = _several(peer(*(value.float() if value.is_floating_point() else value for value in values)))
        pairs = zip(_several(form(*values)), wanted, strict=True)
        return max(((got.float() - want).abs().max() / want.abs().max()).item() for got, want in pairs)


@dataclass(frozen=True)
class Heads:
    """A recurrence's heads and their sizes."""

    keys: int = 4
    values: int = 8
    width: int = 128
    out: int = 128

    def __str__(self) -> str:
        count = f"{self.keys}k/{self.values}v" if self.keys != self.values else f"{self.keys}"
        return f"{count} x {self.width}" + (f", values x {self.out}" if self.out != self.width else "")


def _delta_inputs(t: int, dtype: str, heads: Heads, *, channels: bool = False, state: bool = False) -> Inputs:
    def make() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        kind, (g, h, n, m) = peers.DTYPES[dtype], (heads.keys, heads.values, heads.width, heads.out)
        q, k = (F.normalize(torch.randn(1, t, g, n), dim=-1).to(kind) for _ in "qk")
        decay = -torch.rand(1, t, h, *([n] if channels else [])) * 0.5
        begun = (torch.randn(1, h, n, m) * 0.1,) if state else ()
        return q, k, torch.randn(1, t, h, m).to(kind), decay, torch.rand(1, t, h).to(kind), *begun

    return make


def _ssd_inputs(t: int, dtype: torch.dtype) -> Inputs:
    def make() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        b, c = (torch.randn(1, t, 1, 128).mul(0.3).to(dtype) for _ in "bc")
        return torch.randn(1, t, 16, 64).to(dtype), torch.rand(1, t, 16) * 0.1, -torch.linspace(1, 16, 16), b, c

    return make


WIDE: Targets = ((1.5, 6.0), (1.5, 5.0))


def _rules() -> list[Row]:
    return [*_delta_rules(), *_kimi_rules(), *_ssd_rules(), *_channel_scans()]


def _delta_rules() -> list[Row]:
    made, name, heads = list[Row](), "gated_delta_rule", Heads()
    for dtype, t in (("f32", 1024), ("bf16", 1024), ("f32", 2048), ("bf16", 2048), ("f32", 4096), ("f32", 1000)):
        made += _operation("C1", name, f"{dtype} {t}, {heads}", _delta_inputs(t, dtype, heads), WIDE, quick=t == 1024)
    for uneven in (Heads(out=64), Heads(width=64)):
        made += _operation("C1", name, f"f32 1024, {uneven}", _delta_inputs(1024, "f32", uneven), WIDE)
    begun, inputs = _delta_inputs(1024, "f32", heads, state=True), _delta_inputs(peers.PACKED[-1], "f32", heads)
    made += _operation("C1", name, f"f32 1024, {heads}, begun state", begun, WIDE)
    packed = f"f32 {peers.PACKED[-1]}, {heads}, {len(peers.PACKED) - 1} segments"
    return [*made, *_operation("C1", f"packed_{name}", packed, lambda: (*inputs(), torch.tensor(peers.PACKED)), WIDE)]


def _kimi_rules() -> list[Row]:
    made, heads = list[Row](), Heads(values=4)
    for dtype, t in (("f32", 1024), ("bf16", 1024), ("f32", 2048), ("f32", 4096), ("f32", 1000)):
        inputs = _delta_inputs(t, dtype, heads, channels=True)
        quick = (dtype, t) == ("f32", 1024)
        made += _operation("C1", "kimi_delta_attention", f"{dtype} {t}, {heads}", inputs, WIDE, quick=quick)
    return made


def _ssd_rules() -> list[Row]:
    made = list[Row]()
    for dtype, t in (("f32", 2048), ("bf16", 2048), ("f32", 4096)):
        inputs, quick = _ssd_inputs(t, peers.DTYPES[dtype]), (dtype, t) == ("f32", 2048)
        made += _operation("C1", "ssd", f"{dtype} {t}, 16 x 64, state 128", inputs, WIDE, quick=quick)
    return made


def _scan_inputs(t: int, channels: int, state: int) -> Inputs:
    def make() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        k, q = (torch.randn(1, t, state) for _ in "kq")
        return torch.randn(1, t, channels), torch.rand(1, t, channels) * 0.1, -torch.rand(channels, state) * 8, k, q

    return make


def _unit_inputs(t: int, channels: int) -> Inputs:
    def make() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return torch.randn(1, t, channels), -torch.rand(1, t, channels) * 0.5, torch.arange(t)[None]

    return make


def _channel_scans() -> list[Row]:
    """Their peers walk token by token: eager, or (a selective scan) compiled to an associative scan."""
    scans = _operation("C1", "selective_scan", "f32 1024 x 1024, state 16", _scan_inputs(1024, 1024, 16), WIDE)
    return [*scans, *_operation("C1", "rg_lru", "f32 1024 x 2560", _unit_inputs(1024, 2560), WIDE, over="eager")]


def _random(*shapes: tuple[int, ...]) -> Inputs:
    def make() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return tuple(torch.randn(shape) for shape in shapes)

    return make


def _conv() -> list[Row]:
    inputs = _random((1, 8192, 2048), (2048, 4))
    return _operation("C2", "conv_silu", "f32 8192 x 2048, width 4", inputs, ((1.0, 4.0), (1.0, 4.0)), quick=True)


def _pointwise() -> list[Row]:
    rotated = _random((1, 4096, 8, 256), (1, 4096, 2, 256), (256,), (256,))
    shapes: dict[str, tuple[str, Inputs]] = {
        "gated_norm": ("f32 8192 x 16 x 128", _random((8192, 16, 128), (8192, 16, 128), (128,))),
        "add_norm": ("f32 8192 x 2048", _random((8192, 2048), (8192, 2048), (2048,))),
        "qk_norm_rope": ("f32 4096, 8 q / 2 kv x 256", lambda: (*rotated(), torch.arange(4096)[None])),
        "swiglu": ("f32 4096 x 5632", _random((4096, 5632), (4096, 5632))),
    }
    goals = ((1.0, 1.2), (1.0, 1.5))
    return [row for name, (shape, inputs) in shapes.items() for row in _operation("C3", name, shape, inputs, goals)]


# Whole models -----------------------------------------------------------------------------------------------------------


def _models() -> list[Row]:
    made = list[Row]()
    for t in (1024, 2048, 4096):
        made += _model("C4", "q3n", "f32", t, ((1.6, 2.2), (1.6, 2.2)), quick=t == 1024)
    made += _model("C4", "q3n-moe", "f32", 1024, ((1.6, 2.2), (1.6, 2.2)))
    for t in (1024, 2048):
        made += _model("C4b", "q3n", "bf16", t, ((1.2, 1.6), (1.4, 1.9)))
    for dtype in ("f32", "bf16"):
        made += _model("C5", "mamba2", dtype, 2048, ((1.3, 2.0), (1.3, 2.0)))
    for dtype, goal in (("f32", 1.5), ("bf16", 1.1)):
        made += _model("C6", "llama", dtype, 2048, ((1.0, goal), (1.0, goal)), over="peer")
    return made


def _model(case: str, name: str, dtype: str, t: int, targets: Targets, **rest: Any) -> list[Row]:
    modes = zip(("fwd", "fwd+bwd"), targets, strict=True)
    return [
        Row(case, name, f"{dtype} {t} tokens", mode, target, lambda m=mode: _model_bench(name, dtype, t, m), **rest)
        for mode, target in modes
    ]


def _model_bench(name: str, dtype: str, t: int, mode: str) -> Bench:
    tokens = torch.randint(0, peers.VOCAB, (1, t), generator=torch.Generator().manual_seed(0))
    peer = peers.build(name, dtype)
    free = peers.mask_free(peer)
    mine: Any = ours.model(name, dtype, "infer" if mode == "fwd" else "train")
    modules: dict[str, Any] = {"eager": peer, "compile": torch.compile(peer, dynamic=False)}
    if free is not None:
        modules["compile, no mask"] = torch.compile(free, dynamic=False)
    step = forward if mode == "fwd" else train
    variants = {label: lambda m=module: step(m, m, tokens) for label, module in modules.items()}
    if not isinstance(mine, ours.Missing):
        variants["ours"] = lambda: step(mine, mine if mode == "fwd" else next_tokens(mine), tokens)
    return Bench(variants, {"parameters": peers.parameter_count(peer)} | _ours_notes(mine))


def _ours_notes(mine: Any) -> dict[str, Any]:
    if isinstance(mine, ours.Missing):
        return {"ours": mine.reason}
    return {"our parameters": peers.parameter_count(mine)}


def next_tokens(mine: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Our loss in the peer's call shape: given no labels, it shifts the tokens itself."""
    return lambda tokens, _labels: mine.loss(tokens)


def forward(_module: nn.Module, call: Callable[..., Tensor], tokens: Tensor) -> object:
    """Logits of all tokens, without gradients."""
    with torch.no_grad():
        return call(tokens)


def train(module: nn.Module, call: Callable[..., Tensor], tokens: Tensor) -> object:
    """One loss and its gradients; gradients are dropped, so that no step pays for adding to the last one's."""
    loss = call(tokens, tokens)
    loss.backward()
    module.zero_grad(set_to_none=True)
    return loss


# Decoding ---------------------------------------------------------------------------------------------------------------

PROMPT, SAID = 16, 64


def _decodes() -> list[Row]:
    return [
        Row("C7", "q3n", f"{dtype}, {SAID} tokens after {PROMPT}, per token", "decode", (2.0, 4.0),
            lambda d=dtype: _decode_bench(d), over="eager", quick=dtype == "f32")
        for dtype in ("f32", "bf16")
    ]  # fmt: skip


def _decode_bench(dtype: str) -> Bench:
    prompt = torch.randint(0, peers.VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    peer = peers.build("q3n", dtype).eval()
    mine: Any = ours.model("q3n", dtype, "infer")
    variants: dict[str, Thunk] = {"eager": lambda: _quietly(lambda: peers.decode(peer, prompt, SAID))}
    if not isinstance(mine, ours.Missing):
        variants["ours"] = lambda: _quietly(lambda: mine.generate(prompt, max_new_tokens=SAID))
    return Bench(variants, {"parameters": peers.parameter_count(peer), "calls": SAID} | _ours_notes(mine))


def _quietly(call: Thunk) -> object:
    with torch.no_grad():
        return call()
