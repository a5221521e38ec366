"""Small inputs and parameters that make sense for a graph: tokens within the vocabulary, borders that rise, odd sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..ir import DTYPES, Dim, Graph, Init, Node, TensorType, Value, fill, ops, parameters
from ..ir.orders import multiple
from ..ir.sizes import value as size_value
from .verify import reached

Tensor = torch.Tensor
BATCH, TOKENS, OTHERS = 2, 7, (3, 9, 5, 11, 13)
PASSED_ON = (*ops.COLLECTIVES, *ops.UNDER_WAY, ops.reorder)


@dataclass(frozen=True)
class Sample:
    """Numbers for a program: sizes of symbols, inputs in natural token order, parameters by full name; all in float64."""

    sizes: Mapping[str, int]
    inputs: Mapping[str, Tensor]
    params: Mapping[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Inputs and parameters by name."""
        return {**self.inputs, **self.params}


def draw(graph: Graph, also: Sequence[Graph] = (), seed: int = 0) -> Sample:
    """A sample of the graph whose sizes suit the others too."""
    rng = torch.Generator().manual_seed(seed)
    sizes = choose_sizes((graph, *also))
    step = math.lcm(*(multiple(d.order) for d in _dims((graph, *also)) if "packed" in d.order))
    inputs = {v.name: _stepped(_input(graph, v, sizes, rng), is_borders(graph, v) * step) for v in graph.inputs}
    params = {name: _parameter(type_, init, sizes, rng) for name, (type_, init) in parameters(graph).items()}
    return Sample(sizes, inputs, params)


def is_borders(graph: Graph, value: Value) -> bool:
    """Whether an input is the borders of packed segments."""
    return any(name == "cu" for _, name in readers(graph, value))


def added(graph: Graph, value: Value, sample: Sample) -> Tensor:
    """An input that a pass adds, as a program starts: zeros, and a page for each row where there are pages."""
    made = torch.zeros(shape(value.type, sample.sizes), dtype=DTYPES[value.type.dtype])
    name = next((name for node, name in readers(graph, value) if node.is_op("page_write", "paged_attention")), "")
    if name == "slots":
        return torch.arange(made.numel()).view(made.shape)
    return torch.cat([torch.arange(len(made))[:, None], made[:, 1:] - 1], 1) if name == "table" else made


def _stepped(tensor: Tensor, step: int) -> Tensor:
    """Borders moved to multiples of what the order of every packed segment asks for."""
    return torch.cat([tensor[:-1].div(step, rounding_mode="floor") * step, tensor[-1:]]) if step > 1 else tensor


def choose_sizes(graphs: Sequence[Graph]) -> dict[str, int]:
    """A small number for every symbol, odd where no placement asks for a multiple; one sequence when it is packed."""
    divisor = dict[str, int]()
    for dim in _dims(graphs):
        if isinstance(dim.size, str) and dim.size.isidentifier():
            needed = math.lcm(2 ** len(dim.axes), multiple(dim.order))
            divisor[dim.size] = math.lcm(divisor.get(dim.size, 1), needed)
    inputs = [v for g in graphs for v in g.inputs]
    batch = {str(v.type.dims[0].size) for v in inputs if len(v.type.dims) > 1}
    tokens = {str(v.type.dims[1].size) for v in inputs if len(v.type.dims) > 1}
    packed = any(is_borders(g, v) for g in graphs for v in g.inputs)
    found, others = dict[str, int](), iter(OTHERS * 8)
    for symbol in dict.fromkeys(s for g in graphs for s in g.symbols):
        base = (1 if packed else BATCH) if symbol in batch else TOKENS if symbol in tokens else 2 if packed else next(others)
        step = divisor.get(symbol, 1)
        found[symbol] = base if base % step == 0 else 3 * step
    return found


def _dims(graphs: Sequence[Graph]) -> Iterator[Dim]:
    for graph in graphs:
        for part in reached(graph):
            for value in (*part.inputs, *part.params, *(v for n in part.nodes for v in n.outputs)):
                yield from value.type.dims


def shape(type_: TensorType, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size_value(s, sizes) for s in type_.shape)


def readers(graph: Graph, value: Value) -> Iterator[tuple[Node, str]]:
    """The ops that read a value, under which operand name, through calls and through what only moves it between ranks."""
    for node in graph.uses.get(value, ()):
        for i, operand in enumerate(node.inputs):
            if operand is not value:
                continue
            if isinstance(node.op, Graph):
                yield from readers(node.op, node.op.inputs[i])
            elif node.op in PASSED_ON:
                yield from readers(graph, node.outputs[0])
            else:
                yield node, node.op.inputs[i].name


def _input(graph: Graph, value: Value, sizes: Mapping[str, int], rng: torch.Generator) -> Tensor:
    wanted = shape(value.type, sizes)
    if value.type.is_float:
        return torch.randn(wanted, generator=rng, dtype=torch.float64)
    for node, name in readers(graph, value):
        if (made := _integers(node, name, wanted, sizes, rng)) is not None:
            return made
    return torch.randint(0, 4, wanted, generator=rng).to(torch.bool if value.type.dtype == "bool" else torch.int64)


def _integers(node: Node, name: str, wanted: tuple[int, ...], sizes: Mapping[str, int], rng: torch.Generator) -> Tensor | None:
    """What an op's integer operand may hold; None where the op does not care."""
    match node.op.name.removesuffix("_backward"), name:
        case "embedding" | "embedding_sum", "tokens":
            return torch.randint(0, node.attrs.get("v") or _size(node, 0, 0, sizes), wanted, generator=rng)
        case "cross_entropy" | "linear_cross_entropy", "labels":
            vocab = _size(node, 0, -1, sizes) if node.op.name.startswith("cross") else _size(node, 1, 0, sizes)
            labels = torch.randint(0, vocab, wanted, generator=rng)
            labels.view(-1)[:1] = node.attrs["ignore"]
            return labels
        case _, "cu":
            return _borders(wanted[0], _tokens_of(node, sizes))
        case "biased_attention", "lengths":
            return torch.randint(1, 1 + _size(node, 1, 1, sizes), wanted, generator=rng)
        case _, "at":
            return torch.zeros(wanted, dtype=torch.int64)
        case "page_write", "slots":
            room, count = _size(node, 0, 0, sizes) * _size(node, 0, 1, sizes), math.prod(wanted)
            return torch.cat([torch.randperm(room, generator=rng), torch.full((count,), -1)])[:count].view(wanted)
        case "paged_attention", "table":
            return torch.randint(0, _size(node, 1, 0, sizes), wanted, generator=rng)
        case "rope", "p":
            return torch.arange(wanted[1]).expand(wanted).contiguous()
        case "dispatch" | "load_balance_loss", "experts":
            bound = node.attrs.get("e") or _size(node, 0, -1, sizes)
            return torch.randint(0, bound, wanted, generator=rng)
        case "grouped_linear" | "grouped_outer" | "sum_experts", "counts":
            rows = _size(node, 0, 0, sizes)
            return torch.bincount(torch.randint(0, wanted[0], (rows,), generator=rng), minlength=wanted[0])
        case "combine" | "take_rows" | "sum_rows", "order":
            return torch.randperm(wanted[0], generator=rng)
        case "dropout" | "fork_seed", "seed":
            return torch.tensor(7)
        case _:
            return None


def _size(node: Node, operand: int, dim: int, sizes: Mapping[str, int]) -> int:
    return shape(node.operands[operand].type, sizes)[dim]


def _tokens_of(node: Node, sizes: Mapping[str, int]) -> int:
    return _size(node, 0, 1, sizes)


def _borders(count: int, tokens: int) -> Tensor:
    """0, ..., tokens in `count` rising steps of uneven length."""
    inner = [max(i, (tokens * i * i) // ((count - 1) ** 2)) for i in range(1, count - 1)]
    return torch.tensor([0, *inner, tokens][:count] if count > 1 else [0])


def _parameter(type_: TensorType, init: Init, sizes: Mapping[str, int], rng: torch.Generator) -> Tensor:
    """By its recipe, jittered so that ones, zeros and tiny weights matter too."""
    wanted = shape(type_, sizes)
    spread = 0.1 if len(wanted) < 2 else 0.7 / math.sqrt(wanted[-1])
    noise = torch.randn(wanted, generator=rng, dtype=torch.float64)
    return fill(init, wanted, rng).double() + spread * noise
