"""The graphs of shared weights, and the adapters that each place brings along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..ir import ZEROS, Builder, Graph, Init, TensorType, Value, ops, tensor_type
from .layer import Layer
from .layers import MIXERS
from .shared import Shared
from .spec import ModelSpec


def shared_graph(kind: Shared, spec: ModelSpec, dtype: str, reads: Mapping[str, TensorType]) -> Graph:
    """mlp(norm(attention(norm([x | embedded])))): what places with these weights add to what their own norm sees."""
    name = weights_name(kind)
    b = Builder(name, "layer")
    x = b.input("x", tensor_type(dtype, "b", "s", spec.hidden))
    given = {n: b.input(n, t) for n, t in {**reads, **adapter_types(kind, spec, dtype)}.items()}
    at = Layer(b, spec, dtype, given)
    with b.at(name):
        y: Value = ops.concat(x, given["embedded"])
        for part, width in (("attention", 2 * spec.hidden), ("mlp", spec.hidden)):
            own = getattr(kind, part)
            with b.at(part):
                made = MIXERS[own.kind](replace(at, prefix=f"{part}_"), at.norm(y, f"{part}_norm", width), own)
            assert isinstance(made, Value)
            y = made
        return b.finish([y])


def weights_name(kind: Shared) -> str:
    """What the graph of its shared weights is called."""
    return f"shared_weights_{kind.weights}"


def adapter_types(kind: Shared, spec: ModelSpec, dtype: str) -> dict[str, TensorType]:
    """A place's own adapters of the shared weights, by name."""
    found = dict[str, TensorType]()
    for name, (rank, sections) in kind.adapters.items():
        width = spec.hidden * (2 if name.startswith("attention") else 1)
        found[f"{name}_down"] = tensor_type(dtype, rank * len(sections), width)
        found |= {f"{name}_up{i}": tensor_type(dtype, size, rank) for i, size in enumerate(sections)}
    return found


def adapters(b: Builder, kind: Shared, spec: ModelSpec, dtype: str, prefix: str) -> list[Value]:
    """Parameters for them; an adapter adds nothing at first."""
    types = adapter_types(kind, spec, dtype)
    down = Init("normal", (spec.init_std,))
    return [b.param(f"{prefix}_{n}", t, down if n.endswith("_down") else ZEROS) for n, t in types.items()]
