"""A placed program on the ranks of a mesh: every process holds its own part and runs each op on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist

from ..ir import (
    DTYPES,
    Graph,
    Mesh,
    Node,
    PlaitError,
    TensorType,
    TypeMismatch,
    Value,
    arranged,
    gather,
    mesh_text,
    parameters,
    scatter,
)  # fmt: skip
from ..ir.interp import below
from ..ir.sizes import value
from ..lowering.forms.collectives import all_reduce
from ..lowering.table import choose, standing
from .mesh import Place, handshake

Tensor = torch.Tensor
Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Held:
    """What one rank holds: its parts of the inputs and of the parameters, by full name."""

    inputs: tuple[Tensor, ...]
    params: Params


@dataclass(frozen=True)
class Gradients:
    """What one rank has after a backward: its parts of the results, and of the gradients.

    A gradient is placed like what it is of, and whole where that is a sum over ranks.
    """

    results: tuple[Tensor, ...]
    inputs: tuple[Tensor | None, ...]  # None where the input is no float
    params: Params


def run(graph: Graph, place: Place, inputs: Sequence[Tensor], params: Params | None = None) -> tuple[Tensor, ...]:
    """Take global tensors, the same on every rank; give this rank's part of every result.

    The ranks compare program, mesh and inputs first: where they differ, all of them raise MeshError and nothing moves.
    """
    held = agreed(graph, place, inputs, params or {})
    return local(graph, held.inputs, held.params)


def gradients(
    graph: Graph, place: Place, inputs: Sequence[Tensor], params: Params, cotangents: Sequence[Tensor | None]
) -> Gradients:
    """Run, then differentiate: cotangents of the results (None for no float) are global, what comes back is this rank's.

    Complete: what the ranks' cotangents of a whole value add up to is added up.
    """
    held = agreed(graph, place, inputs, params, cotangents)
    floats = [v.type.is_float for v in graph.inputs]
    types = {k: t for k, (t, _) in parameters(graph).items()}
    leaves = [x.detach().requires_grad_(f) for x, f in zip(held.inputs, floats, strict=True)]
    named = {k: held.params[k].detach().requires_grad_(t.is_float) for k, t in types.items()}
    results = local(graph, leaves, named)
    seeds = [part(d, dual(v.type, place.mesh), place) for v, d in zip(graph.outputs, cotangents, strict=True) if d is not None]
    ends = [y for y, d in zip(results, cotangents, strict=True) if d is not None]
    of = [(v.type, x) for v, x in zip(graph.inputs, leaves, strict=True)] + [(types[k], x) for k, x in named.items()]
    wanted = [(t, x) for t, x in of if x.requires_grad]
    found = iter(torch.autograd.grad(ends, [x for _, x in wanted], seeds, materialize_grads=True))
    done = [completed(next(found), dual(t, place.mesh), place.mesh) if x.requires_grad else None for t, x in of]
    by_name = dict(zip(named, done[len(leaves) :], strict=True))
    detached = tuple(y.detach() for y in results)
    return Gradients(detached, tuple(done[: len(leaves)]), {k: d for k, d in by_name.items() if d is not None})


def local(graph: Graph, inputs: Sequence[Tensor], params: Params) -> tuple[Tensor, ...]:
    """The program on one rank's parts; collectives meet the other ranks, which must be running it too."""
    env: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True)) | {v: params[v.name] for v in graph.params}
    for node in graph.nodes:
        results = _step(node, [env[v] if v is not None else None for v in node.inputs], params)
        env.update(zip(node.outputs, results, strict=True))
    return tuple(env[v] for v in graph.outputs)


def _step(node: Node, args: list[Any], params: Params) -> tuple[Tensor, ...]:
    if isinstance(node.op, Graph):
        return local(node.op, args, below(params, node.attrs["params"]) if "params" in node.attrs else {})
    run, _, _ = choose(node, "reference")
    attrs = {k: v for k, v in node.attrs.items() if v != node.op.attrs[k]}
    made = run(*args, **attrs, **standing(node))
    return made if isinstance(made, tuple) else (made,)


# -- placement --------------------------------------------------------------------------------


def part(whole: Tensor, type_: TensorType, place: Place) -> Tensor:
    """This rank's part of a global tensor, on its device."""
    return scatter(whole, type_, place.mesh)[place.rank].to(place.device)


def gathered(values: Sequence[Tensor], types: Sequence[TensorType], place: Place) -> tuple[Tensor, ...]:
    """The global tensors that the ranks' parts make up, on every rank; refuses ranks that differ on what is one value."""
    return tuple(gather(_everywhere(x.detach(), place), t, place.mesh) for x, t in zip(values, types, strict=True))


def _everywhere(x: Tensor, place: Place) -> list[Tensor]:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in place.mesh.ranks]
    dist.all_gather(parts, x)
    return parts


def dual(type_: TensorType, mesh: Mesh) -> TensorType:
    """Where each rank's cotangent of such a value lives: split where it is, whole where it is partial, partial where whole."""
    split = {axis for d in type_.dims for axis in d.axes}
    return replace(type_, partial=frozenset(name for name, _ in mesh.axes) - split - type_.partial)


def completed(gradient: Tensor, type_: TensorType, mesh: Mesh) -> Tensor:
    """A gradient summed over the axes that its type calls partial, in the order of the mesh."""
    with torch.no_grad():
        for axis in (name for name, _ in mesh.axes if name in type_.partial):
            gradient = all_reduce(gradient, axis=axis)
    return gradient


# -- agreement --------------------------------------------------------------------------------


def agreed(
    graph: Graph, place: Place, inputs: Sequence[Tensor], params: Params, cotangents: Sequence[Tensor | None] = ()
) -> Held:
    """This rank's parts, once all ranks have said that they run the same program on the same tensors.

    A rank that cannot take its inputs tells the others before it raises.
    """
    by_name = sorted(params.items())
    facts = {
        "program": graph.key,
        "mesh": mesh_text(place.mesh),
        "inputs": ", ".join(map(_described, inputs)),
        "parameters": ", ".join(f"{k} {_described(x)}" for k, x in by_name),
        "cotangents": ", ".join(map(_described, cotangents)),
        "input checksum": _checksum(inputs),
        "parameter checksum": _checksum([x for _, x in by_name]),
        "cotangent checksum": _checksum(cotangents),
    }
    try:
        held = _held(graph, place, inputs, params)
    except PlaitError as error:
        handshake(place, facts, str(error))
        raise
    handshake(place, facts)
    return held


def _described(x: Tensor | None) -> str:
    if x is None:
        return "none"
    return f"{str(x.dtype).removeprefix('torch.')}{[*x.shape]}" + (" with gradient" if x.requires_grad else "")


def _checksum(given: Sequence[Tensor | None]) -> str:
    """A number for all values together: ranks that drew their own inputs or parameters would compute nonsense."""
    total = 0
    for x in given:
        if x is not None:
            total = crc32(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), total)
    return f"{total:08x}"


def _held(graph: Graph, place: Place, inputs: Sequence[Tensor], params: Params) -> Held:
    types = {k: t for k, (t, _) in parameters(graph).items()}
    if len(inputs) != len(graph.inputs):
        raise TypeMismatch(f"{graph.name} takes {len(graph.inputs)} inputs, got {len(inputs)}")
    if missing := [k for k in types if k not in params]:
        raise TypeMismatch(f"{graph.name}: parameters {', '.join(missing)} are missing")
    of = [(v.name, x, v.type) for v, x in zip(graph.inputs, inputs, strict=True)]
    sizes = _sizes([*of, *((k, params[k], t) for k, t in types.items())])
    for name, x, type_ in of:
        _fits(name, x, type_, sizes)
    for name, type_ in types.items():
        _fits(name, params[name], type_, sizes)
    named = {k: part(arranged(params[k], t), t, place) for k, t in types.items()}  # they are given in natural order
    return Held(tuple(part(x, t, place) for _, x, t in of), named)


def _sizes(of: Sequence[tuple[str, Tensor, TensorType]]) -> dict[str, int]:
    """What every symbol stands for, from the first dim that is one."""
    found = dict[str, int]()
    for _, x, type_ in of:
        for size, length in zip(type_.shape, x.shape, strict=False):
            if isinstance(size, str) and size.isidentifier():
                found.setdefault(size, length)
    return found


def _fits(name: str, x: Tensor, type_: TensorType, sizes: Mapping[str, int]) -> None:
    known = type_.symbols <= sizes.keys()
    wanted = [value(size, sizes) for size in type_.shape] if known else [*x.shape]
    if x.dtype != DTYPES[type_.dtype] or [*x.shape] != wanted:
        bound = ", ".join(f"{s}={sizes[s]}" for s in sorted(type_.symbols) if s in sizes)
        raise TypeMismatch(f"{name} is {_described(x)}, must be {type_}{f' with {bound}' if bound else ''}, whole")
