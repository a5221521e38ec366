"""How a model lies on processes: who has which part of what, and what all of them do as one."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist

from ..ir import Graph, TensorType, parameters
from ..lowering.forms.traffic import summed
from .mesh import Place, together
from .parts import part_of, whole_of

Tensor = torch.Tensor


@dataclass(frozen=True)
class Layout:
    """The processes of a placed model: all that were started, those that run its program, and where parameters live.

    Axes of the mesh that was joined beside those of the program are torch's: copies under DistributedDataParallel or
    fully_shard, which call the model with batches of their own.
    """

    world: Place
    place: Place  # along the axes of the model alone
    types: Mapping[str, TensorType]  # of the parameters

    def due(self, type_: TensorType) -> tuple[str, ...]:
        """The axes over which ranks' cotangents of such a value are added up, in the order of the mesh."""
        split = {axis for d in type_.dims for axis in d.axes}
        return tuple(name for name, size in self.place.mesh.axes if name not in split | type_.partial and size > 1)

    def leads(self, type_: TensorType) -> bool:
        """Whether this rank is the one that a whole value's cotangent is given to."""
        return all(self.place.groups[axis].rank == 0 for axis in self.due(type_))


def layout_of(graph: Graph, world: Place, place: Place) -> Layout:
    """The layout that a placed program asks for."""
    return Layout(world, place, {name: type_ for name, (type_, _) in parameters(graph).items()})


def leading(layout: Layout | None) -> bool:
    """Whether this process speaks and writes for all."""
    return layout is None or layout.world.rank == 0


@contextmanager
def as_one(layout: Layout | None) -> Generator[None]:
    """What fails on one process fails on all."""
    if layout is None:
        yield
        return
    with together(layout.world):
        yield


# -- tensors that are placed as a parameter is ------------------------------------------------


def own_part(layout: Layout | None, name: str, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that is placed as parameter `name` is."""
    return whole if layout is None else part_of(whole, layout.types[name], layout.place, name=name).contiguous()


def whole_tensors(layout: Layout | None, parts: Mapping[str, Tensor], of: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors as one process has them; `of` says as which parameter each is placed, the others are whole already."""
    if layout is None:
        return dict(parts)
    with torch.no_grad():
        return {k: whole_of(x, layout.types[of[k]], layout.place) if k in of else x for k, x in parts.items()}


def take_parts(layout: Layout, parts: Mapping[str, Tensor], of: Mapping[str, str], whole: Mapping[str, Tensor]) -> None:
    """Fill tensors with this rank's parts of whole ones."""
    with torch.no_grad():
        for name, own in parts.items():
            own.copy_(own_part(layout, of[name], whole[name]) if name in of else whole[name])


# -- gradients --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """Over which axes each of a group of gradients is added up."""

    axes: tuple[tuple[str, ...], ...]
    at: str


def added_up(gradients: Sequence[Tensor], sums: Sums) -> list[Tensor]:
    """Complete gradients: those that are added up over the same axes travel together."""
    done = [*gradients]
    alike = dict[tuple[tuple[str, ...], torch.dtype], list[int]]()
    for i, (gradient, axes) in enumerate(zip(gradients, sums.axes, strict=True)):
        alike.setdefault((axes, gradient.dtype), []).append(i)
    for (axes, _), places in alike.items():
        flat = torch.cat([gradients[i].reshape(-1) for i in places])
        for axis in axes:
            flat = summed(flat, axis, sums.at)
        for i, x in zip(places, flat.split([gradients[i].numel() for i in places]), strict=True):
            done[i] = x.view_as(gradients[i])
    return done


class _Entering(torch.autograd.Function):
    """Parameters on their way into the program; their gradients on the way out are added up over ranks."""

    @staticmethod
    def forward(ctx: Any, sums: Sums, *params: Tensor) -> Any:
        ctx.sums = sums
        return tuple(p.view_as(p) for p in params)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        return None, *added_up(gradients, ctx.sums)


class _Leaving(torch.autograd.Function):
    """A result; of a whole one, the cotangent is given to one rank, since ranks' cotangents add up."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, leads: bool) -> Any:
        ctx.leads = leads
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        return d_y if ctx.leads else torch.zeros_like(d_y), None


def entering(layout: Layout, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters whose gradients will be complete: one exchange for each layer, when its backward is done."""
    if not torch.is_grad_enabled():
        return dict(params)
    found = dict(params)
    groups = dict[str, list[str]]()
    for name, x in params.items():
        if x.requires_grad and layout.due(layout.types[name]):
            groups.setdefault(name.rpartition(".")[0], []).append(name)
    for prefix, names in groups.items():
        axes = tuple(layout.due(layout.types[n]) for n in names)
        at = f"the gradients of {prefix or ', '.join(names)}"
        found |= zip(names, _Entering.apply(Sums(axes, at), *(params[n] for n in names)), strict=True)
    return found


def leaving(layout: Layout, y: Tensor, type_: TensorType) -> Tensor:
    """A result as users take it: `backward` of it is that of the global value."""
    return cast(Tensor, _Leaving.apply(y, layout.leads(type_)))


def clip_gradients(layout: Layout | None, named: Mapping[str, torch.nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit`; the norm before."""
    if layout is None:
        return torch.nn.utils.clip_grad_norm_(named.values(), limit)
    squares = dict[tuple[str, ...], list[Tensor]]()
    for name, p in named.items():
        if p.grad is not None:
            split = tuple(axis for d in layout.types[name].dims for axis in d.axes)
            squares.setdefault(split, []).append(p.grad.detach().float().square().sum())
    sums = [_over(torch.stack(of).sum(), axes, "the norm of the gradients") for axes, of in squares.items()]
    norm = sum(sums, torch.zeros(())).sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for p in named.values():
        if p.grad is not None:
            p.grad.mul_(scale.to(p.grad.device, p.grad.dtype))
    return norm


def _over(x: Tensor, axes: Iterable[str], at: str) -> Tensor:
    for axis in axes:
        x = summed(x[None], axis, at)[0]
    return x


# -- numbers that all processes share ---------------------------------------------------------


def agreed(layout: Layout | None, seconds: float, asked: bool) -> tuple[float, bool]:
    """One clock, that of the first process, and one answer to whether any process was asked to stop."""
    if layout is None:
        return seconds, asked
    told = torch.tensor([seconds if layout.world.rank == 0 else -math.inf, float(asked)], dtype=torch.float64)
    told = told.to(layout.world.device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return float(told[0]), bool(told[1] > 0)
