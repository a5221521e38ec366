"""Kernel graphs over tensors in hand: retyped, results told apart from views of operands, and run by torch code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..ir import DTYPES, OPS, Graph, PassError, Replay, TypeMismatch, Value, ops, retype
from ..ir.gradient import backward
from ..ir.sizes import value as size_value
from .forms.precision import own_precision
from .reshape import Step, view_steps
from .table import choose

Tensor = torch.Tensor
NAMES = {torch_dtype: name for name, torch_dtype in DTYPES.items()}
SHARING = ("reshape", "split", "last_token", "cast", "widen")  # ops whose references may give back their operand's memory


@dataclass(frozen=True)
class View:
    """A result that is an operand, or a part of one."""

    operand: int
    steps: tuple[Step, ...]

    def of(self, operands: Sequence[Tensor]) -> Tensor:
        made = operands[self.operand]
        for method, arguments in self.steps:
            made = getattr(made, method)(*arguments)
        return made


@dataclass(frozen=True)
class Layout:
    """A graph's results: those that are computed, each once, and where every result is among them or among operands."""

    computed: Graph
    places: tuple[int | View, ...]

    @property
    def views(self) -> bool:
        return any(isinstance(place, View) for place in self.places)

    def results(self, computed: Sequence[Tensor], operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Every result in order; one that stands twice is one tensor."""
        return tuple(place.of(operands) if isinstance(place, View) else computed[place] for place in self.places)


@lru_cache(maxsize=4096)
def layout(graph: Graph) -> Layout:
    """Tell a graph's results apart."""
    made, places = dict[Value, int](), list[int | View]()
    for value in graph.outputs:
        view = _view(graph, value)
        places.append(view if view is not None else made.setdefault(value, len(made)))
    return Layout(replace(graph, outputs=tuple(made)), tuple(places))


def _view(graph: Graph, value: Value) -> View | None:
    """The value as a view of an operand; None where it is computed."""
    steps = list[Step]()
    while (node := graph.makers.get(value)) is not None:
        if node.is_op("reshape"):
            steps = [*view_steps(node), *steps]
        elif node.is_op("split"):
            sizes, i = node.attrs["sizes"], node.outputs.index(value)
            steps = [("narrow", (-1, sum(sizes[:i]), sizes[i])), *steps]
        elif not (node.is_op("cast", "widen") and node.operands[0].type.dtype == value.type.dtype):
            return None
        value = node.operands[0]
    return View(graph.inputs.index(value), tuple(steps))


# -- types --------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def retyped(graph: Graph, dtypes: tuple[str, ...]) -> Graph:
    """The graph over inputs of these dtypes."""
    return retype(graph, [replace(v.type, dtype=d) for v, d in zip(graph.inputs, dtypes, strict=True)])


def fitted(graph: Graph, operands: Sequence[Tensor]) -> Graph:
    """The graph for operands as they are: autocast and `model.to` change float dtypes. Raises TypeMismatch for others."""
    for value, x in zip(graph.inputs, operands, strict=True):
        if x.dtype not in NAMES or x.is_floating_point() != value.type.is_float:
            must = "a float" if value.type.is_float else value.type.dtype
            raise TypeMismatch(f"{graph.name}: {value.name} is {x.dtype}, must be {must}")
    return retyped(graph, tuple(NAMES[x.dtype] for x in operands))


def bound(graph: Graph, operands: Sequence[Tensor]) -> dict[str, int]:
    """The number each symbolic size stands for. Raises TypeMismatch naming an operand that does not fit."""
    device = operands[0].device
    for value, x in zip(graph.inputs, operands, strict=True):
        if x.device != device:
            first = graph.inputs[0].name
            raise TypeMismatch(f"{graph.name}: {value.name} is on {x.device}, must be on {device} as {first} is")
    return sized(graph, [x.shape for x in operands])


def sized(graph: Graph, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The number each symbolic size stands for in operands of these shapes. Raises TypeMismatch as `bound` does."""
    env = dict[str, int]()
    for value, shape in zip(graph.inputs, shapes, strict=True):
        if len(shape) != len(value.type.dims):
            raise TypeMismatch(f"{graph.name}: {value.name} is {list(shape)}, must be {value.type}")
        for dim, n in zip(value.type.dims, shape, strict=True):
            must = env.setdefault(dim.size, n) if isinstance(dim.size, str) else dim.size
            if must != n:
                raise TypeMismatch(f"{graph.name}: {value.name} is {list(shape)}, its {dim.size} must be {must}")
    return env


def room(graph: Graph, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors for the results, their numbers still open: all that a tracer needs to know."""
    env, device = bound(graph, operands), operands[0].device
    return tuple(torch.empty(n, dtype=dtype, device=device) for n, dtype in result_shapes(graph, env))


def result_shapes(graph: Graph, env: Mapping[str, int]) -> list[tuple[list[int], torch.dtype]]:
    """Shape and dtype of every result where sizes stand for these numbers."""
    sizes = [[d.size for d in v.type.dims] for v in graph.outputs]
    shapes = [[env[n] if isinstance(n, str) and n in env else size_value(n, env) for n in dims] for dims in sizes]
    return [(shape, DTYPES[v.type.dtype]) for v, shape in zip(graph.outputs, shapes, strict=True)]


# -- gradients ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradient:
    """A backward kernel: which operands, results behind them, and cotangents it reads; whose cotangents it gives."""

    layout: Layout
    reads: tuple[int, ...]
    given: tuple[int, ...]
    of: tuple[int, ...]


@lru_cache(maxsize=4096)
def gradient(kernel: Graph, given: tuple[bool, ...], wanted: tuple[bool, ...]) -> Gradient | None:
    """The backward kernel where some cotangents are given and some are wanted, in the operands' dtypes; None if none flows."""
    there = tuple(i for i, v in enumerate(kernel.outputs) if given[i] and v.type.is_float)
    try:
        made = backward(kernel, wanted, given=[i in there for i in range(len(kernel.outputs))], results=True)
    except PassError:
        return None
    graph = _of_dtypes(made.graph, [kernel.inputs[i].type.dtype for i in made.of])
    return Gradient(layout(graph), made.reads, there, made.of)


def _of_dtypes(graph: Graph, dtypes: Sequence[str]) -> Graph:
    """The graph with its results cast to these dtypes."""
    if all(v.type.dtype == d for v, d in zip(graph.outputs, dtypes, strict=True)):
        return graph
    replay = Replay(graph)
    for node in graph.nodes:
        replay.env.update(zip(node.outputs, replay.keep(node), strict=True))
    b, found = replay.builder, [(replay.env[v], d) for v, d in zip(graph.outputs, dtypes, strict=True)]
    return b.finish(v if v.type.dtype == d else b.emit(ops.cast, [v], {"dtype": d}, [v.name])[0] for v, d in found)


# -- torch code ---------------------------------------------------------------------------


@own_precision
def run(graph: Graph, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results by the ops' forms and references, each in contiguous memory of its own."""
    bound(graph, operands)
    env: dict[Value | None, Tensor | None] = {None: None, **dict(zip(graph.inputs, operands, strict=True))}
    for node in graph.nodes:
        call, _, _ = choose(node, "cuda")
        # A form knows its op's attributes, not those that say how it runs over a split.
        own = OPS[node.op.name].attrs
        attrs = {k: v for k, v in node.attrs.items() if v != own[k]}
        made = call(*(env[v] for v in node.inputs), **attrs)
        env.update(zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=True))
    return tuple(_own(graph, v, env[v]) for v in graph.outputs)


def _own(graph: Graph, value: Value, made: Tensor | None) -> Tensor:
    assert made is not None
    if value not in graph.makers or graph.makers[value].is_op(*SHARING):
        return made.clone(memory_format=torch.contiguous_format)
    return made.contiguous()
