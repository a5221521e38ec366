"""Eager functions that are met as one op: what they compute is known by their names and arguments, and their loops would be
unrolled, or depend on data. What they are taken for is proved on the user's example like every other raise."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from ...ir.errors import PlaitError

Tensor = torch.Tensor
Call = Callable[..., Any]
# These ops are names in an exported program, which `build` translates: only their shapes are ever asked for.
TRACED = "an op of plait_fx stands for a known function while a module is traced and computes nothing; call plait.trace_module"


@torch.library.custom_op("plait_fx::gated_delta_rule", mutates_args=())
def _gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    raise PlaitError(TRACED)


@_gated_delta_rule.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    final = v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    return torch.empty_like(v), final if v.dtype == torch.float64 else final.float()


@torch.library.custom_op("plait_fx::kimi_delta_attention", mutates_args=())
def _kimi_delta_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    raise PlaitError(TRACED)


@_kimi_delta_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    final = v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    return torch.empty_like(v), final if v.dtype == torch.float64 else final.float()


@torch.library.custom_op("plait_fx::rg_lru", mutates_args=())
def _rg_lru(x: Tensor, decay: Tensor, p: Tensor) -> Tensor:
    raise PlaitError(TRACED)


@_rg_lru.register_fake
def _(x: Tensor, decay: Tensor, p: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("plait_fx::ssd", mutates_args=())
def _ssd(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, bias: Tensor | None, softplus: bool, low: float,
    high: float, wide: bool,
) -> Tensor:  # fmt: skip
    raise PlaitError(TRACED)


@_ssd.register_fake
def _(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, bias: Tensor | None, softplus: bool, low: float,
    high: float, wide: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape, dtype=torch.float32 if wide else x.dtype)


@torch.library.custom_op("plait_fx::selective_scan", mutates_args=())
def _selective(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None, bias: Tensor | None,
    softplus: bool,
) -> Tensor:  # fmt: skip
    raise PlaitError(TRACED)


@_selective.register_fake
def _(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None, bias: Tensor | None,
    softplus: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)


@torch.library.custom_op("plait_fx::experts", mutates_args=())
def _experts(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str) -> Tensor:
    raise PlaitError(TRACED)


@_experts.register_fake
def _(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str) -> Tensor:
    return torch.empty_like(x)


@dataclass(frozen=True)
class Known:
    """A function by its names, and what its call is as an op: None where it is called in a way that is not known."""

    what: str
    names: tuple[str, ...]
    call: Callable[[Mapping[str, Any]], Any]


def _delta(given: Mapping[str, Any]) -> Any:
    """(o, final state or None) of the chunked or token-by-token delta rule, [b t h d], with a decay per head or channel."""
    q, k, v = (_one_of(given, *names) for names in (("query", "q"), ("key", "k"), ("value", "v")))
    g, beta = _one_of(given, "g", "decay"), _one_of(given, "beta")
    if any(x is None for x in (q, k, v, g, beta)) or _one_of(given, "cu_seqlens") is not None:
        return None
    scale = _one_of(given, "scale")
    normalize = bool(_one_of(given, "use_qk_l2norm_in_kernel"))
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    rule = _kimi_delta_attention if g.dim() == 4 else _gated_delta_rule
    o, final = rule(q, k, v, g, beta, _one_of(given, "initial_state"), scale, normalize)
    return o, final if _one_of(given, "output_final_state") else None


def _scan(given: Mapping[str, Any]) -> Any:
    """Mamba-2's chunked scan without states in or out."""
    x, dt, a, b, c = (_one_of(given, *n) for n in (("hidden_states", "x"), ("dt",), ("A",), ("B",), ("C",)))
    odd = ("z", "initial_states", "seq_idx", "return_final_states", "cu_seqlens")
    if any(v is None for v in (x, dt, a, b, c)) or any(_one_of(given, n) not in (None, False) for n in odd) or a.dim() != 1:
        return None
    low, high = given.get("dt_limit") or (0.0, float("inf"))
    bias, plus = _one_of(given, "dt_bias"), bool(_one_of(given, "dt_softplus"))
    return _ssd(x, dt, a, b, c, _one_of(given, "D"), bias, plus, float(low), float(high), bool(given["wide"]))


def _selected(given: Mapping[str, Any]) -> Any:
    """Mamba-1's scan of [b c t] without a state in or out; the rates are one for every channel and state."""
    x, dt, a, b, c = (_one_of(given, *n) for n in (("hidden_states", "u", "x"), ("dt", "delta"), ("A",), ("B",), ("C",)))
    odd = ("return_last_state", "return_final_states", "initial_states", "cu_seqlens")
    if any(v is None for v in (x, dt, a, b, c)) or any(_one_of(given, n) not in (None, False) for n in odd):
        return None
    if a.dim() != 2 or b.dim() != 3 or c.dim() != 3:
        return None
    bias, plus = _one_of(given, "delta_bias", "dt_bias"), bool(_one_of(given, "delta_softplus", "dt_softplus"))
    return _selective(x, dt, a, b, c, _one_of(given, "D"), _one_of(given, "z"), bias, plus)


def _one_of(given: Mapping[str, Any], *names: str) -> Any:
    return next((given[n] for n in names if given.get(n) is not None), None)


KNOWN = (
    Known(
        "gated_delta_rule",
        (
            "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "chunk_gated_delta_rule",
            "fused_recurrent_gated_delta_rule", "recurrent_gated_delta_rule",
        ),
        _delta,
    ),
    Known(
        "kimi_delta_attention",
        ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", "chunk_kda", "fused_recurrent_kda", "fused_kda"),
        _delta,
    ),
    Known("ssd", ("mamba2_chunk_scan", "mamba_chunk_scan_combined"), _scan),
    Known("selective_scan", ("mamba_selective_scan", "selective_scan_fn", "selective_scan_ref"), _selected),
)  # fmt: skip
BY_NAME = {name: known for known in KNOWN for name in known.names}


@contextmanager
def boundaries(module: torch.nn.Module, *, wanted: bool = True) -> Generator[list[tuple[str, str]]]:
    """While it lasts, known functions of the modules' files are opaque; yields where each was met."""
    met = list[tuple[str, str]]()
    with ExitStack() as stack:
        for path, part in module.named_modules() if wanted else ():
            for holder in (part, sys.modules.get(type(part).__module__)):
                for name, known in _functions(holder):
                    made = _opaque(getattr(holder, name), known, met, path)
                    stack.enter_context(patch.object(holder, name, made))
            if wanted and (act := _expert_act(part)):
                stack.enter_context(patch.object(part, "forward", _opaque_experts(part, act, met, path)))
            if wanted and _is_rg_lru(part):
                stack.enter_context(patch.object(part, "forward", _opaque_rg_lru(part, met, path)))
        yield met


def _functions(holder: Any) -> list[tuple[str, Known]]:
    """Attributes of a module or a file that are known functions, by their own names."""
    found = (
        [(k, BY_NAME.get(getattr(v, "__name__", ""))) for k, v in vars(holder).items() if inspect.isfunction(v)]
        if holder
        else []
    )
    return [(k, known) for k, known in found if known is not None]


def _opaque(function: Call, known: Known, met: list[tuple[str, str]], path: str) -> Call:
    """The function as one op where it is called as is known, as it is elsewhere."""
    if hasattr(function, "plait_known"):
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        made = known.call({**given, "wide": _widens(function)})
        if made is None:
            return function(*args, **kwargs)
        met.append((function.__name__, known.what))
        return made

    call.plait_known = True  # type: ignore[attr-defined] # so that it is wrapped once
    return call


def _widens(function: Call) -> bool:
    """Whether it computes in float32 whatever it is given, as its text says."""
    try:
        return ".float()" in inspect.getsource(inspect.unwrap(function))
    except OSError:
        return False


# -- experts ----------------------------------------------------------------------------------

ACTS: tuple[tuple[str, Call], ...] = (
    ("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", functools.partial(F.gelu, approximate="tanh")), ("relu", F.relu),
)  # fmt: skip


def _expert_act(part: torch.nn.Module) -> str:
    """The activation of stacked gated experts, [e 2i d] and [e d i], called with tokens, chosen experts and weights."""
    names = list(inspect.signature(part.forward).parameters)
    gate_up, down, act = (getattr(part, n, None) for n in ("gate_up_proj", "down_proj", "act_fn"))
    if names[:3] != ["hidden_states", "top_k_index", "top_k_weights"] or act is None:
        return ""
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.dim() == down.dim() == 3):
        return ""
    fits = gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1]) and not hasattr(part, "gate_up_proj_bias")
    x = torch.linspace(-4, 4, 33)
    return next((n for n, f in ACTS if fits and torch.allclose(act(x), f(x), atol=1e-6)), "")


def _opaque_experts(part: Any, act: str, met: list[tuple[str, str]], path: str) -> Call:
    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        met.append((path, "experts"))
        return _experts(hidden_states, top_k_index, top_k_weights, part.gate_up_proj, part.down_proj, act)

    return forward


# -- the gated unit of Griffin ------------------------------------------------------------------


def _is_rg_lru(part: torch.nn.Module) -> bool:
    """Whether a module is the unit, called with [b t c] and positions, its gates having a matrix for each head."""
    names = [n for n, _ in part.named_parameters(recurse=False)]
    wanted = {"recurrent_param", *(f"{gate}_gate_{x}" for gate in ("input", "recurrent") for x in ("weight", "bias"))}
    return set(names) == wanted and [*inspect.signature(part.forward).parameters] == ["activations", "position_ids"]


def _opaque_rg_lru(part: Any, met: list[tuple[str, str]], path: str) -> Call:
    def gate(x: Tensor, name: str) -> Tensor:
        heads = x.unflatten(-1, part.input_gate_bias.shape)
        weight, bias = (getattr(part, f"{name}_gate_{of}") for of in ("weight", "bias"))
        return torch.sigmoid((torch.einsum("bthi,hio->btho", heads, weight) + bias).flatten(2))

    def forward(activations: Tensor, position_ids: Tensor) -> Tensor:
        met.append((path, "rg_lru"))
        decay = -8.0 * gate(activations, "recurrent") * F.softplus(part.recurrent_param)
        places = position_ids.expand(activations.shape[:2])
        return _rg_lru(activations * gate(activations, "input"), decay, places)

    return forward


__all__: Sequence[str] = ("boundaries",)
