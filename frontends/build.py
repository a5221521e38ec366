"""A model spec to IR: an entry graph that calls one graph per distinct layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ir import ZEROS, Builder, Graph, Init, SpecError, TensorType, Value, ops, tensor_type
from .encode import embedded, encoded, memories, relative_table, remembered, sources
from .encoder import relative_of
from .kinds import Attention, Moe
from .kinds_cross import Cross
from .kinds_scan import Lru
from .layer import model_norm
from .layers import build_layer
from .layers_shared import adapters, shared_graph, weights_name
from .parallel import Parallel
from .shared import Shared
from .spec import ModelSpec, named_kinds

TASKS = ("logits", "loss", "memory", "reply")

Crossing = dict[int, tuple[Value, Value]]  # keys and values by the number of the block that reads them


@dataclass(frozen=True)
class Plan:
    """What is built: the task, the dtype, and which optional inputs the program has."""

    task: str = "logits"
    dtype: str = "bf16"
    packed: bool = False  # with segment borders `cu`
    training: bool = False  # with dropout and its seed


def build(spec: ModelSpec, *, task: str = "logits", dtype: str = "", packed: bool = False, training: bool = False) -> Graph:
    """The program `tokens -> logits`, or `tokens, labels -> loss`; labels[b, t] is the token wanted after position t.

    Inputs in order: tokens i64[b, s]; labels i64[b, s] for the loss; cu i64[n+1] when packed; seed i64[] when the spec
    has dropout and it trains. Parameters: `embed`, `positions` if learned, `layers.N.*`, `final.norm`, and `head` unless tied.

    With an encoder, `source i64[b, u]` and `lengths i64[b]` stand behind labels; what it makes of them is the task `memory`,
    the keys and values of every cross attention, and `reply` takes tokens, lengths and these: `tokens -> logits`.
    """
    plan = Plan(task, dtype or spec.dtype, packed, training and spec.dropout > 0)
    b = Builder(_identifier(spec.name))
    _check(spec, plan)
    if task == "memory":
        return _memory(b, spec, plan)
    tokens = b.input("tokens", tensor_type("i64", "b", "s"))
    given = {n: b.input(n, t) for n, t in _optional(plan).items()}
    seen = _sources(b, spec, plan)
    table = _embed(b, spec, plan)
    crossing = _crossing(b, spec, plan, table, {**given, **seen})
    shared = {k: v for k, v in {**given, **seen}.items() if k not in ("labels", "source")}
    if spec.learned_positions or any(map(needs_positions, spec.blocks)):
        shared["p"] = ops.positions(tokens, **({"cu": given["cu"]} if packed else {}))
    x = embedded(b, spec, table, tokens, shared)
    shared |= relative_table(b, spec, spec.blocks, plan.dtype)
    x, losses = _blocks(b, spec, plan, x, shared, crossing)
    return b.finish([_finish(b, spec, plan, x, table, given, losses)])


def _check(spec: ModelSpec, plan: Plan) -> None:
    """Refuse programs that this spec has none of."""
    if plan.task in ("memory", "reply") and not spec.encoder:
        raise SpecError(f"{spec.name}: the program {plan.task!r} is of models with an encoder, and this one has none")
    if plan.packed and (spec.encoder or relative_of(spec.blocks)):
        what = "an encoder" if spec.encoder else "a relative bias"
        raise SpecError(f"{spec.name}: has {what}; segments cannot be packed in one row, give each a row of its own")


def _embed(b: Builder, spec: ModelSpec, plan: Plan) -> Value:
    return b.param("embed", tensor_type(plan.dtype, spec.vocab, spec.hidden), Init("normal", (spec.init_std,)))


def _sources(b: Builder, spec: ModelSpec, plan: Plan) -> dict[str, Value]:
    """What a model with an encoder takes besides: the encoder's tokens, unless these were read before."""
    if not spec.encoder:
        return {}
    return {"lengths": b.input("lengths", tensor_type("i64", "b"))} if plan.task == "reply" else sources(b)


def _crossing(b: Builder, spec: ModelSpec, plan: Plan, table: Value, given: dict[str, Value]) -> Crossing:
    """Keys and values of every cross attention."""
    if not spec.encoder:
        return {}
    return remembered(b, spec, plan.dtype) if plan.task == "reply" else memories(b, spec, encoded(b, spec, table, given))


def _memory(b: Builder, spec: ModelSpec, plan: Plan) -> Graph:
    """What is computed once of the encoder's tokens."""
    given = sources(b)
    made = memories(b, spec, encoded(b, spec, _embed(b, spec, plan), given))
    return b.finish([value for pair in made.values() for value in pair])


def _identifier(name: str) -> str:
    text = "".join(c if c.isalnum() else "_" for c in name)
    return text if text[0].isalpha() else f"model_{text}"


def _optional(plan: Plan) -> dict[str, TensorType]:
    found = {"labels": tensor_type("i64", "b", "s")} if plan.task == "loss" else {}
    if plan.packed:
        found["cu"] = tensor_type("i64", "n+1")
    if plan.training:
        found["seed"] = tensor_type("i64")
    return found


def _blocks(
    b: Builder, spec: ModelSpec, plan: Plan, x: Value, shared: dict[str, Value], crossing: Crossing
) -> tuple[Value, list[Value]]:
    """Call the graph of every block in turn; balance losses are collected."""
    layers: dict[Any, Graph] = {}
    asides: dict[Any, Graph] = {}
    shared = {**shared, "embedded": x, "aside": x}  # its type: a place's own comes before every call
    if crossing:
        shared = {**shared, **_pair(crossing, next(iter(crossing)))}
    losses = list[Value]()
    for name, kind in named_kinds(spec).items():
        title = layer_name(name)
        reads = {n: shared[n].type for n in _reads(kind, plan) if n in shared}
        layers[kind] = build_layer(kind, spec, plan.dtype, reads, title)
        if isinstance(kind, Shared):
            asides[kind] = shared_graph(kind, spec, plan.dtype, {n: shared[n].type for n in _shared_reads(kind, plan)})
    for i, kind in enumerate(spec.blocks):
        with b.at(f"layers.{i}"):
            own = {**shared, "seed": ops.fork_seed(shared["seed"], stream=i)} if plan.training else {**shared}
            own |= _pair(crossing, i) if isinstance(kind, Cross) else {}
            if isinstance(kind, Shared):
                brought = [
                    *(shared[n] for n in _shared_reads(kind, plan)),
                    *adapters(b, kind, spec, plan.dtype, f"adapters_{i}"),
                ]
                own["aside"] = b.call(asides[kind], x, *brought, params=f"shared.{kind.weights}")  # type: ignore[assignment] # one result
            made = b.call(layers[kind], x, *(own[n] for n in _reads(kind, plan) if n in own), params=f"layers.{i}")
        x, *balance = made if isinstance(made, tuple) else (made,)
        losses += balance
    return x, losses


def _pair(crossing: Crossing, i: int) -> dict[str, Value]:
    """Keys and values of one block's cross attention, as it names them."""
    return dict(zip(("keys", "values"), crossing[i], strict=True))


def _shared_reads(kind: Shared, plan: Plan) -> tuple[str, ...]:
    """What shared weights read beside the layer below."""
    return ("embedded", *(["p"] if kind.attention.rope else []), *(["cu"] if plan.packed else []))


def layer_name(name: str) -> str:
    """What the graph of a distinct kind is called: `attention` itself is an op."""
    return name.replace("attention", "self_attention")


def ways_of(spec: ModelSpec) -> str:
    """The ways that kinds ask for, by name of their layers, as `place` takes them: `self_attention=ring gdn=chain`."""
    kinds = named_kinds(spec).items()
    asked = {layer_name(name): getattr(getattr(kind, "mixer", kind), "cp", "") for name, kind in kinds}
    asked |= {weights_name(kind): kind.attention.cp for _, kind in kinds if isinstance(kind, Shared)}
    return " ".join(f"{name}={way}" for name, way in asked.items() if way)


def needs_positions(kind: Any) -> bool:
    """Whether a block of this kind reads where tokens stand."""
    if isinstance(kind, Shared):
        return needs_positions(kind.attention) or needs_positions(kind.mixer)
    return isinstance(kind, Lru) or bool(getattr(kind, "rope", None))


def _reads(kind: Any, plan: Plan) -> tuple[str, ...]:
    """Which shared values a block of this kind takes."""
    mixes = kind.mixes if isinstance(kind, Parallel) else kind.kind not in ("mlp", "moe")
    found = ["aside"] if isinstance(kind, Shared) else ["keys", "values", "lengths"] if isinstance(kind, Cross) else []
    found += ["table"] if isinstance(kind, Attention) and kind.relative else []
    found += ["p"] if needs_positions(kind.mixer if isinstance(kind, Shared) else kind) else []
    return (*found, *(["cu"] if mixes and plan.packed else []), *(["seed"] if plan.training else []))


def _finish(
    b: Builder, spec: ModelSpec, plan: Plan, x: Value, table: Value, given: dict[str, Value], losses: list[Value]
) -> Value:
    """Final norm and head: logits, or the mean cross entropy plus the balance losses."""
    head = Builder("head", "layer")
    h = head.input("x", x.type)
    w = head.input("w", tensor_type(plan.dtype, spec.vocab, spec.hidden))
    labels = [head.input("labels", given["labels"].type)] if plan.task == "loss" else []
    with head.at("head"):
        n = model_norm(spec, h, lambda suffix, init: head.param(f"norm{suffix}", tensor_type(plan.dtype, spec.hidden), init))
        n = n if spec.logit_scale == 1 else ops.scale(n, by=spec.logit_scale)
        if spec.head_bias:
            bias = ops.fixed(head.param("head_bias", tensor_type(plan.dtype, spec.vocab), ZEROS))
            out = ops.linear(n, w, bias)
            out = ops.softcap(out, cap=spec.logit_softcap) if spec.logit_softcap else out
            out = ops.cross_entropy(out, labels[0]) if labels else out
        elif labels:
            out = ops.linear_cross_entropy(n, w, labels[0], softcap=spec.logit_softcap)
        else:
            out = ops.linear(n, w)
            out = ops.softcap(out, cap=spec.logit_softcap) if spec.logit_softcap else out
    weight = table if spec.tied else b.param("head", table.type, Init("normal", (spec.init_std,)))
    y = b.call(head.finish([out]), x, weight, *([given["labels"]] if labels else []), params="final")
    for loss in losses if plan.task == "loss" else ():
        y = ops.add(y, loss)
    return y


def has_balance_losses(spec: ModelSpec) -> bool:
    """Whether training adds more than the cross entropy."""
    return any(isinstance(k, Moe) and (k.aux_loss or k.z_loss) for k in spec.blocks)
