"""What each op that knows no places is in a decode step: one token a row, so that tokens of a value are its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .step_record import Declined, Tape, together

Tensor = torch.Tensor
Maybe = Tensor | None
FORMS: dict[str, Callable[..., Any]] = {}
FLOATS = (torch.float32, torch.bfloat16)
# What the C++ has room for: rows of a product, channels of a head, experts, channels of a recurrence, taps.
ROWS, HEAD, EXPERTS, WIDEST, TAPS = 256, 576, 1024, 512, 8


def form(run: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a form under its op's name; it takes the op's operands, and by name the attributes it knows."""
    FORMS[run.__name__] = run
    return run


def need(holds: bool) -> None:
    """Decline what the C++ is not made for."""
    if not holds:
        raise Declined


def floats(*tensors: Maybe) -> None:
    """Decline dtypes that the C++ does not read."""
    need(all(x is None or x.dtype in FLOATS for x in tensors))


def _unary(name: str, kind: str, *attrs: str) -> None:
    def run(t: Tape, x: Tensor, **given: Any) -> Tensor:
        need(set(given) <= set(attrs))
        floats(x)
        return t.pointwise(kind, [x], x.dtype, [float(given[a]) for a in attrs if a in given])

    FORMS[name] = run


def _binary(name: str, kind: str, spread: Callable[[Tensor, Tensor], Tensor] = lambda w, x: w) -> None:
    def run(t: Tape, x: Tensor, w: Tensor) -> Tensor:
        floats(x, w)
        return t.pointwise(kind, [x, spread(w, x).expand(x.shape)], x.dtype)

    FORMS[name] = run


for _name in ("silu", "sigmoid", "relu", "relu2", "neg_exp", "tanh", "rsqrt", "softplus"):
    _unary(_name, _name.upper())
_unary("fixed", "COPY")
_unary("scale", "SCALE", "by")
_unary("shift", "SHIFT", "by")
_unary("softcap", "SOFTCAP", "cap")
for _name in ("add", "sub", "mul"):
    _binary(_name, _name.upper())
_binary("add_bias", "ADD")
_binary("scale_columns", "MUL")
for _name in ("scale_rows", "scale_heads"):
    _binary(_name, "MUL", lambda w, x: w.unsqueeze(-1))


@form
def clamp(t: Tape, x: Tensor, *, low: float = 0.0, high: float = float("inf")) -> Tensor:
    floats(x)
    return t.pointwise("CLAMP", [x], x.dtype, [low, high])


@form
def gelu(t: Tape, x: Tensor, *, approximate: str = "none") -> Tensor:
    floats(x)
    return t.pointwise("GELU_TANH" if approximate == "tanh" else "GELU", [x], x.dtype)


@form
def widen(t: Tape, x: Tensor) -> Tensor:
    floats(x)
    return x if x.dtype == torch.float32 else t.pointwise("COPY", [x], torch.float32)


@form
def concat(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    floats(a, b)
    y = t.new(*a.shape[:-1], a.shape[-1] + b.shape[-1], dtype=a.dtype)
    for part, x in zip(y.split([a.shape[-1], b.shape[-1]], -1), (a, b), strict=True):
        t.say("COPY", *together([x], [part]))
    return y


@form
def split(t: Tape, x: Tensor, *, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return x.split(list(sizes), -1)


@form
def last_token(t: Tape, x: Tensor) -> Tensor:
    return x[:, -1:]


def _norm(t: Tape, kind: str, x: Tensor, w: Maybe, bias: Maybe, groups: int, eps: float, more: bool) -> Tensor:
    floats(x, w, bias)
    need(x.shape[-1] > 1)
    y = t.new(*x.shape, dtype=x.dtype)

    def shown(z: Maybe) -> Maybe:
        return z if z is None else z.expand(x.shape).unflatten(-1, (groups, -1))

    operands, results, size = together([shown(x), shown(w), shown(bias)], [y.unflatten(-1, (groups, -1))])
    need(size[-1] == x.shape[-1] // groups)
    t.say(kind, operands, results, size, num=[eps, float(more)])
    return y


@form
def rms_norm(t: Tape, x: Tensor, w: Maybe = None, *, eps: float = 1e-6, zero_centered: bool = False, groups: int = 1) -> Tensor:
    return _norm(t, "RMS_NORM", x, w, None, groups, eps, zero_centered)


@form
def layer_norm(
    t: Tape, x: Tensor, w: Maybe = None, bias: Maybe = None, *, eps: float = 1e-5, zero_centered: bool = False
) -> Tensor:
    return _norm(t, "LAYER_NORM", x, w, bias, 1, eps, zero_centered)


@form
def l2_norm(t: Tape, x: Tensor, *, eps: float = 1e-6) -> Tensor:
    return _norm(t, "L2_NORM", x, None, None, 1, eps, False)


@form
def linear(t: Tape, x: Tensor, w: Tensor, bias: Maybe = None) -> Tensor:
    floats(x, w, bias)
    rows = x.numel() // x.shape[-1]
    need(1 in w.stride() and rows <= ROWS)
    y = t.new(*x.shape[:-1], w.shape[0], dtype=x.dtype)
    flat = t.dense(x, torch.float32).view(rows, -1)
    t.say("LINEAR", [flat, w, bias], [y.view(rows, -1)], [rows, w.shape[0], w.shape[1], 1])
    return y


@form
def head_linear(t: Tape, x: Tensor, w: Tensor) -> Tensor:
    floats(x, w)
    h, o, depth = w.shape
    y, rows = t.new(*x.shape[:-1], o, dtype=x.dtype), x.numel() // (h * depth)
    need(1 in w.stride()[1:] and rows <= ROWS)
    flat = t.dense(x, torch.float32).view(rows, h, depth)
    t.say("HEADS", [flat, w], [y.view(rows, h, o)], [rows, h, o, depth])
    return y


@form
def embedding(t: Tape, w: Tensor, tokens: Tensor) -> Tensor:
    floats(w)
    y = t.new(*tokens.shape, w.shape[1], dtype=w.dtype)
    t.say("EMBEDDING", [w, tokens.flatten()], [y.flatten(0, -2)], [tokens.numel(), w.shape[1]], [w.shape[0]])
    return y


@form
def causal_conv1d(
    t: Tape, x: Tensor, w: Tensor, bias: Maybe = None, state: Maybe = None, *, act: str = "none"
) -> tuple[Tensor, Tensor]:
    floats(x, w, bias, state)
    need(w.is_contiguous() and 2 <= w.shape[1] <= TAPS and x.stride(2) == 1)
    need(state is None or (state.is_contiguous() and state.dtype == x.dtype))
    y = t.new(*x.shape, dtype=x.dtype)
    final = t.new(x.shape[0], x.shape[2], w.shape[1] - 1, dtype=x.dtype)

    def row(s: Tensor) -> Tensor:
        return s.flatten(1)[:, None, None]

    operands = [x[:, :, None], w.flatten(), bias, None if state is None else row(state)]
    t.say("CONV", operands, [y[:, :, None], row(final)], [x.shape[0], 1, x.shape[2], 1], [w.shape[1], int(act == "silu")])
    return y, final


def _recurrence(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, decay: Maybe, beta: Maybe, state: Maybe, scale: float, delta: bool
) -> tuple[Tensor, Tensor]:
    floats(q, k, v, decay, beta)
    (b, _, heads, width), keys = v.shape, k.shape[3]
    need(max(width, keys) <= WIDEST and (state is None or (state.is_contiguous() and state.dtype == torch.float32)))
    decay = decay.unsqueeze(-1).expand(b, 1, heads, keys) if decay is not None and decay.dim() == 3 else decay
    beta = None if beta is None else beta.unsqueeze(-1)
    o, final = t.new(*v.shape, dtype=v.dtype), t.new(b, heads, keys, width, dtype=torch.float32)
    whole = [keys, width, q.shape[2], int(delta)]
    t.say("RECURRENCE", [q, k, v, decay, beta, state], [o, final], [b, 1, heads, 1], whole, [scale])
    return o, final


def _member(name: str, decay: str, beta: bool, delta: bool) -> None:
    """One face of the family: its operands in its own order, then the state."""

    def run(t: Tape, q: Tensor, k: Tensor, v: Tensor, *rest: Maybe, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        given = list(rest)
        fade = given.pop(0) if decay else None
        if decay == "constant" and fade is not None:
            fade = fade.expand(*v.shape[:2], -1)
        rate = given.pop(0) if beta else None
        need(len(given) <= 1)
        return _recurrence(t, q, k, v, fade, rate, given[0] if given else None, scale, delta)

    FORMS[name] = run


_member("gated_delta_rule", "given", True, True)
_member("delta_rule", "", True, True)
_member("kimi_delta_attention", "given", True, True)
_member("ssd", "given", True, False)
_member("gated_linear_attention", "given", False, False)
_member("retention", "constant", False, False)


@form
def route(
    t: Tape, logits: Tensor, bias: Maybe = None, *, k: int, score: str = "softmax", renormalize: bool = True,
    scale: float = 1.0, groups: int = 1, group_limit: int = 1, group_best: int = 2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    floats(logits, bias)
    need(logits.shape[-1] <= EXPERTS and logits.is_contiguous())
    weights = t.new(*logits.shape[:-1], k, dtype=torch.float32)
    experts = t.new(*logits.shape[:-1], k, dtype=torch.int64)
    flat = logits.flatten(0, -2)
    whole = [k, int(score == "sigmoid"), int(renormalize), groups, group_limit, group_best]
    t.say("ROUTE", [flat, bias], [weights.flatten(0, -2), experts.flatten(0, -2)], list(flat.shape), whole, [scale])
    return weights, experts


@form
def dispatch(t: Tape, x: Tensor, experts: Tensor, *, e: int) -> tuple[Tensor, Tensor, Tensor]:
    floats(x)
    flat, k = t.view(x, "flatten", 0, -2), experts.shape[-1]
    n = experts.numel()
    need(n <= ROWS)
    rows, order, counts = t.new(n, x.shape[-1], dtype=x.dtype), *(t.new(m, dtype=torch.int64) for m in (n, e))
    t.say("DISPATCH", [flat, experts], [rows, order, counts], list(flat.shape), [k, e])
    return rows, order, counts


@form
def grouped_linear(t: Tape, x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    floats(x, w)
    need(1 in w.stride()[1:] and x.shape[0] <= ROWS)
    y = t.new(x.shape[0], w.shape[1], dtype=x.dtype)
    t.say("GROUPED", [t.dense(x, torch.float32), w, counts], [y], [x.shape[0], w.shape[1], w.shape[2], 1], [w.shape[0]])
    return y


@form
def spread_experts(t: Tape, w: Tensor, counts: Tensor, x: Tensor) -> Tensor:
    floats(w)
    y = t.new(x.shape[0], w.shape[1], dtype=w.dtype)
    t.say("SPREAD", [w, counts], [y], list(y.shape), [w.shape[0]])
    return y


@form
def combine(t: Tape, rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    floats(rows, weights)
    need(rows.shape[0] <= ROWS)
    weights = t.dense(weights, torch.float32)
    y = t.new(*weights.shape[:-1], rows.shape[-1], dtype=rows.dtype)
    flat = y.flatten(0, -2)
    t.say("COMBINE", [rows, order, weights], [flat], list(flat.shape), [weights.shape[-1]])
    return y
