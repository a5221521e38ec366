"""TracedModel: a traced module's program with the module's own weights, called as the module is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..ir import DTYPES, DataError, Graph, TensorType
from ..lowering.program import Program
from .runner import CompiledLayer, Runner

Tensor = torch.Tensor


class TracedModel(torch.nn.Module):
    """Runs and trains as the module that was traced; parameters and buffers are that module's, by its own names."""

    def __init__(
        self, program: Program, module: torch.nn.Module, weights: Sequence[Callable[[torch.nn.Module], Tensor]], example: Any,
        inputs: Sequence[int], outputs: Sequence[int | None], out_spec: Any, *, compiled: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.program, self._find = program, tuple(weights)
        self._leaves, self._spec = pytree.tree_flatten(example)
        self._inputs, self._outputs, self._out_spec = tuple(inputs), tuple(outputs), out_spec
        self._run = _runner(program) if compiled else program.entry
        for name, tensor in module.named_parameters(remove_duplicate=False):
            holder(self, name).register_parameter(name.rpartition(".")[2], tensor)
        kept = set(module.state_dict())
        for name, tensor in module.named_buffers(remove_duplicate=False):
            holder(self, name).register_buffer(name.rpartition(".")[2], tensor, persistent=name in kept)
        self.train(module.training)

    @property
    def graph(self) -> Graph:
        return self.program.graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives; arguments stand as they did in the example."""
        results = self._run(*self._given(args, kwargs), *(find(self) for find in self._find))
        leaves = [None if i is None else results[i] for i in self._outputs]
        return pytree.tree_unflatten(leaves, self._out_spec)

    def _given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The graph's inputs; what does not stand as it did in the example is refused."""
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        if spec != self._spec:
            raise DataError(f"the call is {spec}, must be as in the example that was traced: {self._spec}")
        for i, (given, was) in enumerate(zip(leaves, self._leaves, strict=True)):
            if i not in self._inputs and given != was:
                raise DataError(f"argument {i} is {given!r}, but the module was traced with {was!r}; trace it again")
        made, sizes = [leaves[i] for i in self._inputs], dict[str, int]()
        for x, value in zip(made, self.graph.inputs, strict=True):
            _check(x, value.name, value.type, sizes)
        return made


def _runner(program: Program) -> Callable[..., tuple[Tensor, ...]]:
    """Each distinct layer compiled once; a program without layers is compiled as a whole."""
    if not program.layers:
        return CompiledLayer(program.entry, program.graph, program.fingerprint)
    return Runner(program, {}).entry


def holder(root: torch.nn.Module, name: str) -> torch.nn.Module:
    """The submodule that a dotted name stands in, made where there is none."""
    for part in name.split(".")[:-1]:
        if part not in dict(root.named_children()):
            root.add_module(part, torch.nn.Module())
        root = root.get_submodule(part)
    return root


def _check(x: Any, name: str, type_: TensorType, sizes: dict[str, int]) -> None:
    """A tensor must have the traced dtype, and equal sizes where the graph says so."""
    fits = isinstance(x, Tensor) and x.dtype == DTYPES[type_.dtype] and x.dim() == len(type_.dims)
    for n, size in zip(x.shape if fits else (), type_.shape, strict=False):
        fits = fits and n == (
            sizes.setdefault(size, n) if isinstance(size, str) and size.isidentifier() else size if isinstance(size, int) else n
        )
    if not fits:
        shown = f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise DataError(f"{name} is {shown}, must be {type_}; trace the module on an example of this kind")
