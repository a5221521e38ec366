"""A kernel of a placed program as one rank runs it: no axes, and of what is split a rank's share of the size."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from ..ir import Dim, Graph, Mesh, PlaitError, TensorType, retype
from .rows import Declined


def local_kernel(kernel: Graph, mesh: Mesh | None) -> Graph:
    """The kernel over the types of a rank's own tensors. Raises Declined where a share cannot be said."""
    types = [v.type for v in kernel.inputs]
    if not any(d.axes or d.order for t in types for d in t.dims) and not any(t.partial for t in types):
        return kernel
    if mesh is None:
        raise Declined("its tensors are split over a mesh that the lowering was not told")
    try:
        return retype(kernel, [_local(t, mesh) for t in types])
    except PlaitError as error:
        raise Declined(f"over a rank's own tensors it has no types: {error}") from None


def _local(type_: TensorType, mesh: Mesh) -> TensorType:
    return replace(type_, dims=tuple(_share(d, mesh) for d in type_.dims), partial=frozenset[str]())


def _share(dim: Dim, mesh: Mesh) -> Dim:
    """A number divided by the ranks; a symbol that is split is another one, since the whole may stand beside it."""
    if not dim.axes:
        return dim.bare
    ranks = prod(mesh[axis] for axis in dim.axes)
    if isinstance(dim.size, int):
        return Dim(dim.size // ranks)
    if not dim.size.isidentifier():
        raise Declined(f"{dim} has no share that is one symbol")
    return Dim("_".join([dim.size, *dim.axes]))
