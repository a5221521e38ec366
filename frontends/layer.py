"""A layer graph under construction: its parameters, and what many mixers say alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from ..ir import ONES, ZEROS, Builder, Init, TensorType, Value, ops, tensor_type
from .spec import ModelSpec

Mixer = Callable[["Layer", Any, Any], "Value | tuple[Value, ...]"]


@dataclass(frozen=True)
class Layer:
    """A layer graph being built: its builder, its model, and the values that every layer may read."""

    b: Builder
    spec: ModelSpec
    dtype: str
    shared: Mapping[str, Value]  # p: positions, cu: segment borders, seed: of the dropout, ...
    prefix: str = ""  # of its parameters' names

    def param(self, name: str, type_: TensorType, init: Init) -> Value:
        return self.b.param(self.prefix + name, type_, init)

    def weight(self, name: str, *shape: int, out: bool = False) -> Value:
        """A matrix; one that writes into the residual stream starts smaller by sqrt(number of blocks)."""
        std = self.spec.init_std / (math.sqrt(len(self.spec.blocks)) if out else 1)
        return self.param(name, tensor_type(self.dtype, *shape), Init("normal", (float(f"{std:.6g}"),)))

    def vector(self, name: str, size: int, init: Init) -> Value:
        return self.param(name, tensor_type(self.dtype, size), init)

    def wide_vector(self, name: str, size: int, init: Init) -> Value:
        """A small parameter that is kept in at least float32: decay rates, step biases, routing biases."""
        return self.param(name, tensor_type("f64" if self.dtype == "f64" else "f32", size), init)

    def norm(self, x: Value, name: str, size: int) -> Value:
        """The model's norm, as in front of every block."""
        return model_norm(self.spec, x, lambda n, init: self.vector(f"{name}{n}", size, init))

    def linear(self, x: Value, name: str, out: int, *, residual: bool = False, bias: bool = False) -> Value:
        size = x.type.dims[-1].size
        w = self.weight(name, out, int(size), out=residual)
        y = ops.linear(x, w, self.vector(f"{name}_bias", out, ZEROS)) if bias else ops.linear(x, w)
        return ops.add(y, self._adapted(x, self.prefix + name)) if f"{self.prefix}{name}_down" in self.shared else y

    def _adapted(self, x: Value, name: str) -> Value:
        """What an adapter that is given from outside makes: for each section of the columns, two narrow matrices."""
        ups = [v for n, v in self.shared.items() if n.startswith(f"{name}_up")]
        narrow = ops.linear(x, self.shared[f"{name}_down"])
        rank = int(narrow.type.dims[-1].size) // len(ups)
        parts = ops.split(narrow, sizes=(rank,) * len(ups)) if len(ups) > 1 else [narrow]
        return reduce(ops.concat, map(ops.linear, parts, ups))


def model_norm(spec: ModelSpec, x: Value, vector: Callable[[str, Init], Value]) -> Value:
    """RMS or layer norm as the spec says, its parameters made by `vector(suffix, init)`."""
    norm = ops.rms_norm if spec.norm == "rms" else ops.layer_norm
    if not spec.norm_weight:
        return norm(x, eps=spec.norm_eps)
    named = {"w": vector("", ZEROS if spec.zero_centered else ONES)}
    if spec.norm == "layer" and spec.norm_bias:
        named["bias"] = vector("_bias", ZEROS)
    return norm(x, **named, eps=spec.norm_eps, zero_centered=spec.zero_centered)


def heads(x: Value, h: int) -> Value:
    """Part the last dim into h heads."""
    return ops.reshape(x, pattern=f"... (h={h} d) -> ... h d")


def merge(x: Value) -> Value:
    """Heads side by side in one last dim."""
    return ops.reshape(x, pattern="b t h d -> b t (h d)")


def borders(at: Layer) -> dict[str, Value]:
    """The borders of packed segments, for an op that sees other tokens."""
    return {"cu": at.shared["cu"]} if "cu" in at.shared else {}


def short_conv(at: Layer, x: Value, width: int, taps: int, *, bias: bool = False, act: str = "silu") -> Value:
    """Each channel over its last tokens."""
    bound = taps**-0.5
    w = at.param("conv", tensor_type(at.dtype, width, taps), Init("uniform", (-bound, bound)))
    named = {"bias": at.vector("conv_bias", width, ZEROS)} if bias else {}
    y, _ = ops.causal_conv1d(x, w, **named, **borders(at), act=act)
    return y
