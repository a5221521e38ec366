"""Plait's side of the table: what is measured, by name; a name whose module is absent says so and the rest still runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

HIDDEN = 512
VOCAB = 4096


@dataclass(frozen=True)
class Missing:
    """Something of ours that cannot be measured, and why."""

    reason: str


def model(name: str, dtype: str = "f32", mode: str = "train", layers: int = 4) -> nn.Module | Missing:
    """Our module for a mini: tokens give logits, `.loss(tokens)` the loss of each next token, `.generate` a continuation."""
    try:
        compile_spec = importlib.import_module("plait").compile
    except (ImportError, AttributeError) as error:
        return Missing(f"plait.compile: {error}")
    return compile_spec(SPECS[name](layers), target="cpu", dtype=dtype, mode=mode)


def operation(name: str) -> Callable[..., Any] | Missing:
    """Our form of one operation, with the call shape of the peer's function of that name."""
    if name in GRAPHS:
        return _lowered(GRAPHS[name])
    module, function, wrap = OPERATIONS[name]
    try:
        return wrap(getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        return Missing(f"{module}.{function}: {error}")


def _lowered(text: str) -> Callable[..., Any] | Missing:
    """A graph run as the runtime runs a layer: through the passes, lowered, and compiled with symbolic lengths."""
    try:
        passes = importlib.import_module("plait.passes")
        graph = passes.Pipeline.parse(passes.DEFAULT).run(importlib.import_module("plait").parse(text))
        program = importlib.import_module("plait.lowering").lower(graph, target="cpu")
        call = importlib.import_module("plait.runtime.runner").CompiledLayer(program.entry, graph, program.fingerprint)
    except (ImportError, AttributeError) as error:
        return Missing(f"plait.lowering: {error}")
    return call if len(graph.outputs) > 1 else lambda *values: call(*values)[0]


def _rule(form: Callable[..., Any]) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None = None) -> Tensor:
        return form(q, k, v, decay, beta, state, scale=q.shape[-1] ** -0.5)[0]

    return call


def _packed(form: Callable[..., Any]) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu: Tensor) -> Tensor:
        return form(q, k, v, decay, beta, cu=cu, scale=q.shape[-1] ** -0.5)[0]

    return call


def _first(form: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *values: form(*values)[0]


def _ssd(form: Callable[..., Any]) -> Callable[..., Tensor]:
    def call(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return form(c, b, x, dt * a, dt)[0]

    return call


def _conv_silu(form: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda x, w: form(x, w, act="silu")[0]


RECURRENCE = "plait.lowering.forms.recurrence"
OPERATIONS: dict[str, tuple[str, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    "gated_delta_rule": (RECURRENCE, "gated_delta_rule", _rule),
    "kimi_delta_attention": (RECURRENCE, "kimi_delta_attention", _rule),
    "packed_gated_delta_rule": (RECURRENCE, "gated_delta_rule", _packed),
    "ssd": (RECURRENCE, "ssd", _ssd),
    "selective_scan": ("plait.lowering.forms.selective", "selective_scan", _first),
    "rg_lru": ("plait.lowering.forms.lru", "rg_lru", _first),
    "conv_silu": ("plait.lowering.forms.conv", "causal_conv1d", _conv_silu),
}

GRAPHS = {
    "gated_norm": """
def gated_norm(x: f32[t, h, 128], gate: f32[t, h, 128], w: f32[128]):
    n = rms_norm(x, w, eps=1e-06)
    a = silu(gate)
    y = mul(n, a)
    return y
""",
    "add_norm": """
def add_norm(x: f32[t, 2048], residual: f32[t, 2048], w: f32[2048]):
    total = add(x, residual)
    y = rms_norm(total, w, eps=1e-06, zero_centered=True)
    return y, total
""",
    "qk_norm_rope": """
def qk_norm_rope(q: f32[b, t, 8, 256], k: f32[b, t, 2, 256], w_q: f32[256], w_k: f32[256], p: i64[b, t]):
    n_q = rms_norm(q, w_q, eps=1e-06, zero_centered=True)
    n_k = rms_norm(k, w_k, eps=1e-06, zero_centered=True)
    r_q = rope(n_q, p, theta=10000.0, fraction=0.25)
    r_k = rope(n_k, p, theta=10000.0, fraction=0.25)
    return r_q, r_k
""",
    "swiglu": """
def swiglu(gate: f32[t, 5632], up: f32[t, 5632]):
    a = silu(gate)
    y = mul(a, up)
    return y
""",
}


def _spec(name: str, layers: int, mixers: list[str], ffn: str | None, **kinds: dict[str, Any]) -> dict[str, Any]:
    pairs = [mixers[i % len(mixers)] for i in range(layers)]
    blocks = [block for mixer in pairs for block in ([mixer] if ffn is None else [mixer, ffn])]
    zero_centered = name.startswith("q3n")
    return {
        "name": name, "vocab": VOCAB, "hidden": HIDDEN, "blocks": blocks, "norm": "rms", "norm_eps": 1e-6,
        "zero_centered": zero_centered, "tied": False, "max_length": 8192, **kinds,
    }  # fmt: skip


GDN = {"kind": "gdn", "key_heads": 4, "value_heads": 8, "key_dim": 128, "value_dim": 128, "conv": 4}
MAMBA2 = {"kind": "mamba2", "heads": 16, "head_dim": 64, "state": 128, "groups": 1, "conv": 4}
MLP = {"kind": "mlp", "width": 1408, "act": "silu", "glu": True}
MOE = {"kind": "moe", "experts": 16, "top_k": 4, "width": 352, "act": "silu", "glu": True, "score": "softmax",
       "renormalize": True, "shared_width": 352, "shared_gate": True}  # fmt: skip
GATED = {"kind": "attention", "heads": 4, "kv_heads": 1, "head_dim": 256, "qk_norm": True, "gate": True,
         "rope": {"theta": 10000.0, "fraction": 0.25}}  # fmt: skip
PLAIN = {"kind": "attention", "heads": 8, "kv_heads": 2, "head_dim": 64, "rope": {"theta": 10000.0}}

SPECS: dict[str, Callable[[int], dict[str, Any]]] = {
    "q3n": lambda n: _spec("q3n", n, ["gdn", "gdn", "gdn", "attention"], "mlp", gdn=GDN, attention=GATED, mlp=MLP),
    "q3n-moe": lambda n: _spec("q3n-moe", n, ["gdn", "gdn", "gdn", "attention"], "moe", gdn=GDN, attention=GATED, moe=MOE),
    "llama": lambda n: _spec("llama", n, ["attention"], "mlp", attention=PLAIN, mlp=MLP),
    "mamba2": lambda n: _spec("mamba2", n, ["mamba2"], None, mamba2=MAMBA2),
}
