"""The entry of a model up to its first block, and the encoder's part of it: tokens to what cross attention reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ir import Builder, Graph, Init, TensorType, Value, ops, tensor_type
from .encoder import relative_of
from .kinds import Attention
from .kinds_cross import Cross
from .layer import model_norm
from .layers import build_layer
from .layers_cross import memory_graph
from .sequence import Kind
from .spec import ModelSpec, kinds_of


def embedded(b: Builder, spec: ModelSpec, table: Value, tokens: Value, given: dict[str, Value], prefix: str = "") -> Value:
    """Tokens as columns, with what stands at their positions."""
    x = ops.embedding(table, tokens)
    x = ops.scale(x, by=spec.embed_scale) if spec.embed_scale != 1 else x
    if not spec.learned_positions:
        return x
    type_ = tensor_type(table.type.dtype, spec.position_rows, spec.hidden)
    places = b.param(f"{prefix}positions", type_, Init("normal", (spec.init_std,)))
    p = given["p"]
    p = ops.shift_positions(p, by=spec.position_start) if spec.position_start else p
    return ops.add(x, ops.embedding(places, p))


def relative_table(b: Builder, spec: ModelSpec, blocks: tuple[Kind, ...], dtype: str, prefix: str = "") -> dict[str, Value]:
    """The table of biases that attention of this stack shares, if it has one."""
    if not (found := relative_of(blocks)):
        return {}
    relative, count = found
    type_ = tensor_type(dtype, relative.buckets, count)
    return {"table": b.param(f"{prefix}relative", type_, Init("normal", (spec.init_std,)))}


def sources(b: Builder) -> dict[str, Value]:
    """The inputs of an encoder: its tokens, and how many of each row are real, counted from its first."""
    return {"source": b.input("source", tensor_type("i64", "b", "u")), "lengths": b.input("lengths", tensor_type("i64", "b"))}


def encoded(b: Builder, spec: ModelSpec, table: Value, given: dict[str, Value]) -> Value:
    """The encoder's result, behind its final norm."""
    assert spec.encoder is not None
    own, dtype, blocks = dict(given), table.type.dtype, spec.encoder.blocks
    if spec.learned_positions or any(getattr(kind, "rope", None) for kind in blocks):
        own["p"] = ops.positions(given["source"])
    x = embedded(b, spec, table, given["source"], own, "encoder_")
    own |= relative_table(b, spec, blocks, dtype, "encoder_")
    graphs: dict[Any, Graph] = {}
    for name, kind in kinds_of(blocks).items():
        types = {n: own[n].type for n in _reads(kind, own)}
        graphs[kind] = build_layer(kind, spec, dtype, types, f"encoder_{name}", "u")
    for i, kind in enumerate(blocks):
        with b.at(f"encoder.{i}"):
            mine = _forked(own, len(spec.blocks) + i)
            x = b.call(graphs[kind], x, *(mine[n] for n in _reads(kind, own)), params=f"encoder.{i}")
    return b.call(_final(spec, dtype, x.type), x, params="encoder.final")


def _reads(kind: Kind, given: Mapping[str, Value]) -> tuple[str, ...]:
    """Which of these values an encoder's block takes."""
    wanted = [("p", bool(kind.rope)), ("table", bool(kind.relative)), ("lengths", True)] if isinstance(kind, Attention) else []
    return tuple(n for n, does in (*wanted, ("seed", "seed" in given)) if does)


def _forked(given: Mapping[str, Value], stream: int) -> dict[str, Value]:
    """What is given, with a seed of its own for one block."""
    seed = {"seed": ops.fork_seed(given["seed"], stream=stream)} if "seed" in given else {}
    return {**given, **seed}


def _final(spec: ModelSpec, dtype: str, type_: TensorType) -> Graph:
    """The norm behind an encoder's last block."""
    b = Builder("encoder_norm", "layer")
    x = b.input("x", type_)
    with b.at("encoder_norm"):
        y = model_norm(spec, x, lambda suffix, init: b.param(f"norm{suffix}", tensor_type(dtype, spec.hidden), init))
    return b.finish([y])


def memories(b: Builder, spec: ModelSpec, memory: Value) -> dict[int, tuple[Value, Value]]:
    """Keys and values of each cross attention, by the number of its block."""
    made: dict[int, tuple[Value, Value]] = {}
    graphs: dict[Any, Graph] = {}
    for name, kind in kinds_of(spec.blocks).items():
        if isinstance(kind, Cross):
            graphs[kind] = memory_graph(kind, spec, memory.type.dtype, memory.type, name)
    for i, kind in enumerate(spec.blocks):
        if isinstance(kind, Cross):
            with b.at(f"layers.{i}"):
                made[i] = b.call(graphs[kind], memory, params=f"layers.{i}")
    return made


def remembered(b: Builder, spec: ModelSpec, dtype: str) -> dict[int, tuple[Value, Value]]:
    """These as inputs, of a program that decodes what was encoded before."""
    made: dict[int, tuple[Value, Value]] = {}
    for i, kind in enumerate(spec.blocks):
        if isinstance(kind, Cross):
            type_ = tensor_type(dtype, "b", "u", kind.kv_heads, kind.head_dim)
            made[i] = (b.input(f"keys_{i}", type_), b.input(f"values_{i}", type_))
    return made
