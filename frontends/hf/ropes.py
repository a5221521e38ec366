"""Rotary positions as configs say them: their base, and how they are stretched for longer contexts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...ir.errors import SpecError
from ..kinds import Rope, RopeFar, RopeRamp, RopeScaling
from ..problems import shown
from .config import Config

# Every frequency is a slow one where wavelengths count as long from a billionth of a token on.
ALL = {"low": 1e9, "high": 2e9, "original": 1}


# Families that turn a share of a head; others pass over what a config says of it.
PARTIAL = frozenset({
    "bamba", "glm4", "gpt_neox", "phi3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma",
})  # fmt: skip


def read_rope(c: Config, theta: float = 10000.0, fraction: float = 1.0, *, width: int = 0, idle: tuple[str, ...] = ()) -> Rope:
    """Rotary positions, as new configs (rope_parameters) or old ones (rope_theta, rope_scaling) say them.

    `width` are the columns of a head that may be rotated, which some ways of stretching count; `idle` are fields that mean
    nothing to the family.
    """
    outer: Any = c.get("rope_parameters", {})
    older: Any = c.get("rope_scaling", {})
    if not isinstance(outer, dict) or not isinstance(older, dict):
        raise SpecError("config.json: rope_parameters and rope_scaling: must be tables")
    inner = Config({**older, **outer})
    theta, fraction = c.number("rope_theta", theta), c.number("partial_rotary_factor", fraction)
    theta, fraction = inner.number("rope_theta", theta), inner.number("partial_rotary_factor", fraction)
    family = c.fields.get("model_type")
    if fraction != 1 and family not in PARTIAL:
        c.problems.append(f"partial_rotary_factor: is {fraction:g}; {family} turns whole heads, so 1 is what is supported")
        fraction = 1.0
    inner.idle("type", "rope_type", *idle)
    kind = inner.get("rope_type", inner.get("type", "default"))
    plain = Rope(theta=theta, fraction=fraction, rounded=True)
    if kind not in STRETCHED:
        known = ", ".join(STRETCHED)
        c.problems.append(f"rope_parameters: rope_type is {shown(kind)}; what is supported is one of {known}")
        return plain
    made = STRETCHED[kind](c, inner, plain, int(width * fraction))
    left = [n for n, v in inner.fields.items() if n not in inner.used and v is not None]
    c.problems += [f"rope_parameters: {n} is {shown(inner.fields[n])}, which is not honoured" for n in left]
    return made


def _original(c: Config, inner: Config) -> int:
    """The context length that the model was first trained with; the config's own word counts before the table's."""
    inside = inner.size("original_max_position_embeddings", c.size("max_position_embeddings", 4096))
    return c.size("original_max_position_embeddings", inside)


def _llama3(c: Config, inner: Config, rope: Rope, width: int) -> Rope:
    low, high = inner.number("low_freq_factor", 1.0), inner.number("high_freq_factor", 4.0)
    factor = inner.number("factor", 1.0)
    return _with(rope, scaling=RopeScaling(factor=factor, low=low, high=high, original=_original(c, inner)))


def _linear(c: Config, inner: Config, rope: Rope, width: int) -> Rope:
    return _with(rope, scaling=RopeScaling(factor=inner.number("factor", 1.0), **ALL))  # type: ignore[arg-type] # of these types


def _dynamic(c: Config, inner: Config, rope: Rope, width: int) -> Rope:
    """The base grows with texts longer than the model's positions."""
    inner.idle("original_max_position_embeddings")
    return _with(rope, far=RopeFar(length=c.size("max_position_embeddings", 4096), factor=inner.number("factor", 1.0)))


def _longrope(c: Config, inner: Config, rope: Rope, width: int) -> Rope:
    """Divisors for texts up to the original context, others for longer ones; what is rotated grows with the ratio."""
    original = _original(c, inner)
    factor = inner.number("factor", c.size("max_position_embeddings", 4096) / original)
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    near, far = (_numbers(inner, name) for name in ("short_factor", "long_factor"))
    beyond = RopeFar(length=original, divisors=far)
    return _with(rope, divisors=near, far=beyond, amplitude=inner.number("attention_factor", inferred))


def _numbers(inner: Config, name: str) -> tuple[float, ...]:
    value: Any = inner.get(name)
    if not isinstance(value, list) or not value or not all(type(x) in (int, float) for x in value):
        raise SpecError(f"config.json: rope_parameters: {name}: is {shown(value)}; must be a list of a number for each pair")
    return tuple(float(x) for x in value)


def mscale(factor: float, by: float = 1.0) -> float:
    """YaRN's growth of scores with the context."""
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


def _yarn(c: Config, inner: Config, rope: Rope, width: int) -> Rope:
    """The ramp between pairs that turn often within the original context, and pairs that do not turn once."""
    original = _original(c, inner)
    factor = inner.number("factor", c.size("max_position_embeddings", 4096) / original)
    up, down = inner.number("mscale", 0.0), inner.number("mscale_all_dim", 0.0)
    inferred = mscale(factor, up) / mscale(factor, down) if up and down else mscale(factor)
    fast, slow = inner.number("beta_fast", 32.0) or 32.0, inner.number("beta_slow", 1.0) or 1.0
    low, high = (width * math.log(original / (n * 2 * math.pi)) / (2 * math.log(rope.theta)) for n in (fast, slow))
    if inner.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = float(max(low, 0)), float(min(high, width - 1))
    ramp = RopeRamp(factor=factor, low=low, high=high + 0.001 if low == high else high)
    return _with(rope, ramp=ramp, amplitude=inner.number("attention_factor", inferred))


def _default(c: Config, inner: Config, rope: Rope, width: int) -> Rope:
    # Some files of models that are not stretched say how they would be.
    return rope


def _with(rope: Rope, **fields: Any) -> Rope:
    """The same with other fields, all of them checked."""
    return Rope(**{name: getattr(rope, name) for name in type(rope).model_fields} | fields)


STRETCHED: dict[str, Callable[[Config, Config, Rope, int], Rope]] = {
    "default": _default, "llama3": _llama3, "linear": _linear, "dynamic": _dynamic, "yarn": _yarn,
    "longrope": _longrope, "su": _longrope,
}  # fmt: skip
