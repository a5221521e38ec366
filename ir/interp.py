"""Run a graph without compiling it: on global tensors, or on a pretend mesh of several named axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .crossing import Here
from .errors import PlacementError, TypeMismatch
from .graph import Graph, Node, Value, parameters
from .op import OpDef, across
from .orders import permutation
from .types import Mesh, TensorType

Params = Mapping[str, torch.Tensor]


def evaluate(graph: Graph, *tensors: torch.Tensor | None, params: Params | None = None) -> Any:
    """Every op's reference in turn. Tensors are the inputs in order; `params` the parameters, natural, by full name."""
    outs = _run(graph, tensors, _in_order(graph, params or {}), _evaluate_node)
    return outs[0] if len(outs) == 1 else outs


def _run(
    graph: Graph, inputs: Sequence[Any], params: Mapping[str, Any], step: Callable[..., tuple[Any, ...]]
) -> tuple[Any, ...]:
    if len(inputs) != len(graph.inputs):
        raise TypeMismatch(f"{graph.name} takes {len(graph.inputs)} inputs, got {len(inputs)}")
    if missing := [v.name for v in graph.params if v.name not in params]:
        raise TypeMismatch(f"{graph.name}: parameters {', '.join(missing)} are missing")
    env: dict[Value, Any] = dict(zip(graph.inputs, inputs, strict=True)) | {v: params[v.name] for v in graph.params}
    for node in graph.nodes:
        args = [env[v] if v is not None else None for v in node.inputs]
        env.update(zip(node.outputs, step(node, args, params), strict=True))
    return tuple(env[v] for v in graph.outputs)


def below(params: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The parameters under `prefix.`, by their names there."""
    return {k[len(prefix) + 1 :]: v for k, v in params.items() if k.startswith(prefix + ".")}


def _inner_params(node: Node, params: Mapping[str, Any]) -> Mapping[str, Any]:
    return below(params, node.attrs["params"]) if "params" in node.attrs else {}


def _evaluate_node(node: Node, args: list[Any], params: Params) -> tuple[Any, ...]:
    if isinstance(node.op, Graph):
        return _run(node.op, args, _inner_params(node, params), _evaluate_node)
    out = node.op.reference(*args, **node.attrs)
    return out if isinstance(out, tuple) else (out,)


def simulate(graph: Graph, mesh: Mesh, *tensors: torch.Tensor, params: Params | None = None) -> Any:
    """Every rank of the mesh in one process, each op on local shards only; takes and gives global tensors.

    Inputs and results are in the orders that their types say, parameters in their natural ones. Autograd flows through, so
    gradients of inputs and parameters are those of the program that the ranks run together.
    """
    ranks = mesh.ranks
    if len(tensors) != len(graph.inputs):
        raise TypeMismatch(f"{graph.name} takes {len(graph.inputs)} inputs, got {len(tensors)}")
    if missing := [name for name in parameters(graph) if name not in (params or {})]:
        raise TypeMismatch(f"{graph.name}: parameters {', '.join(missing)} are missing")
    given = _shards_of_params(graph, mesh, params or {})
    inputs = [scatter(t, v.type, mesh) for t, v in zip(tensors, graph.inputs, strict=True)]

    def step(node: Node, args: list[Any], inner: Mapping[str, Any]) -> tuple[Any, ...]:
        if isinstance(node.op, Graph):
            return _run(node.op, args, _inner_params(node, inner), step)
        if node.op.rank_rule:
            return (_collective(node, args[0], mesh),)
        if node.attrs.get("over"):
            return _across(node, args, mesh)
        per_rank = [
            node.op.reference(*[a[r] if a is not None else None for a in args], **node.attrs) for r in range(len(ranks))
        ]
        return tuple([o[i] if isinstance(o, tuple) else o for o in per_rank] for i in range(len(node.outputs)))

    outs = tuple(gather(x, v.type, mesh) for x, v in zip(_run(graph, inputs, given, step), graph.outputs, strict=True))
    return outs[0] if len(outs) == 1 else outs


def _in_order(graph: Graph, params: Params) -> dict[str, torch.Tensor]:
    """Parameters in the orders that their types say."""
    types = parameters(graph)
    return {k: arranged(x, types[k][0]) if k in types else x for k, x in params.items()}


def arranged(whole: torch.Tensor, type_: TensorType, cu: torch.Tensor | None = None) -> torch.Tensor:
    """A global tensor with every dim in the order that its type says; `cu` are the borders where that is one of segments."""
    for i, dim in enumerate(type_.dims):
        whole = whole.index_select(i, permutation(dim.order, whole.shape[i], cu).to(whole.device)) if dim.order else whole
    return whole


def natural(whole: torch.Tensor, type_: TensorType, cu: torch.Tensor | None = None) -> torch.Tensor:
    """What `arranged` undoes."""
    for i, dim in enumerate(type_.dims):
        back = permutation(dim.order, whole.shape[i], cu).argsort() if dim.order else None
        whole = whole if back is None else whole.index_select(i, back.to(whole.device))
    return whole


def _shards_of_params(graph: Graph, mesh: Mesh, params: Params, prefix: str = "") -> dict[str, Any]:
    found = {prefix + v.name: scatter(arranged(params[prefix + v.name], v.type), v.type, mesh) for v in graph.params}
    for node in graph.nodes:
        if node.callee is not None and "params" in node.attrs:
            found |= _shards_of_params(node.callee, mesh, params, f"{prefix}{node.attrs['params']}.")
    return found


def _collective(node: Node, shards: list[torch.Tensor], mesh: Mesh) -> list[torch.Tensor]:
    out = list(shards)
    for group in mesh.groups(node.attrs["axis"]):
        moved = node.op.rank_rule([shards[r] for r in group], **node.attrs)  # type: ignore[union-attr] # step checked that it is an op with a rule
        for rank, tensor in zip(group, moved, strict=True):
            out[rank] = tensor
    return out


def _across(node: Node, args: list[Any], mesh: Mesh) -> tuple[Any, ...]:
    """An op that runs over an axis: the ranks of every group in lockstep, each on its own shards."""
    axis = node.attrs["over"]
    out: list[list[Any]] = [[None] * len(mesh.ranks) for _ in node.outputs]
    for group in mesh.groups(axis):
        places = [Here.of(node.attrs, len(group), i, _reference) for i in range(len(group))]
        made = across(node.op, places, [[a[r] if a is not None else None for a in args] for r in group])  # type: ignore[arg-type] # an op has `over`
        for rank, results in zip(group, made, strict=True):
            for i, tensor in enumerate(results):
                out[i][rank] = tensor
    return tuple(out)


def _reference(op: OpDef, *operands: Any, **attrs: Any) -> Any:
    return op.reference(*operands, **attrs)


def scatter(whole: torch.Tensor, type_: TensorType, mesh: Mesh) -> list[torch.Tensor]:
    """Each rank's part of a global tensor; a partial value is the whole on the first rank of the axis and 0 elsewhere."""
    return [_part(whole, type_, mesh, at) for at in mesh.ranks]


def _part(whole: torch.Tensor, type_: TensorType, mesh: Mesh, at: dict[str, int]) -> torch.Tensor:
    part = whole
    for i, dim in enumerate(type_.dims):
        for axis in dim.axes:
            if part.shape[i] % mesh[axis]:
                raise TypeMismatch(f"dim {i} of {type_} is {part.shape[i]} long, which {axis}={mesh[axis]} ranks do not divide")
            part = part.chunk(mesh[axis], i)[at[axis]]
    first = all(at[axis] == 0 for axis in type_.partial)
    return part if first else torch.zeros_like(part)


def gather(shards: list[torch.Tensor], type_: TensorType, mesh: Mesh) -> torch.Tensor:
    """The global tensor that the ranks' parts make up."""
    parts = list(zip(mesh.ranks, shards, strict=True))
    split = [axis for d in type_.dims for axis in reversed(d.axes)]  # the innermost slices stand closest
    for axis in [*split, *(name for name, _ in mesh.axes if name not in split)]:
        dims = [i for i, d in enumerate(type_.dims) if axis in d.axes]
        parts = _merge(parts, axis, dims[0] if dims else None, axis in type_.partial)
    return parts[0][1]


Placed = tuple[dict[str, int], torch.Tensor]


def _merge(parts: list[Placed], axis: str, dim: int | None, partial: bool) -> list[Placed]:
    groups: dict[tuple[tuple[str, int], ...], list[torch.Tensor]] = {}
    for at, tensor in parts:
        groups.setdefault(tuple((k, v) for k, v in at.items() if k != axis), []).append(tensor)

    def join(group: list[torch.Tensor]) -> torch.Tensor:
        if dim is not None:
            return torch.cat(group, dim)
        if partial:
            return torch.stack(group).sum(0)
        if not all(torch.allclose(group[0].double(), x.double(), rtol=1e-4, atol=1e-6, equal_nan=True) for x in group[1:]):
            raise PlacementError(f"ranks along {axis} hold different values of what should be one; a collective is missing")
        return group[0]

    return [(dict(rest), join(group)) for rest, group in groups.items()]
