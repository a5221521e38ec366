"""Running a program: every distinct layer compiled once, sequence length and batch left symbolic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import fx

from ..ir import Graph
from ..lowering.program import Program, plain
from .ahead import Code, compile_ahead, direct, wants_gradients

Call = Callable[..., Any]

# Variants of one layer: training or not, batch of one or more, one token or more, each dtype that is met.
VARIANTS = 64


class CompiledLayer(torch.nn.Module):
    """One layer as compiled code; the same code serves every call of it, at every length."""

    def __init__(self, module: fx.GraphModule, graph: Graph, fingerprint: str) -> None:
        super().__init__()
        self.module, self.graph, self.fingerprint = module, graph, fingerprint
        self.symbolic = [[i for i, d in enumerate(v.type.dims) if isinstance(d.size, str)] for v in graph.inputs]
        self.crosses = _crosses(graph)
        self.variants = dict[tuple[Any, ...], list[Code | None]]()
        self.seen = set[tuple[Any, ...]]()

    @cached_property
    def compiled(self) -> Any:
        """The layer under `torch.compile`, for operands that it is not compiled for ahead of the call.

        The bound method: a GraphModule wraps its call in error handling that costs time and hides what went wrong.
        An op that runs over a mesh axis is a conversation with other ranks: the code around it is compiled.
        """
        return torch.compile(self.module.forward, fullgraph=not self.crosses)

    def forward(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():  # an outer compile or export sees the plain module
            return self.module(*args)
        call = self._ahead(args) if not self.crosses and direct(args) else None
        return self._traced(args) if call is None else call(*args)

    def _ahead(self, args: Sequence[torch.Tensor]) -> Call | None:
        """Code compiled ahead that serves these operands, None where there can be none."""
        known = self.variants.setdefault(self._variant(args), [])
        for code in known:
            if code is None or code.serves(args):
                return code and code.call
        known.append(code := compile_ahead(self.module, self.graph, args, self.fingerprint))
        return code and code.call

    def _variant(self, args: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """What code compiled ahead is for: dtypes, sizes but for variables over one, and which parameters learn."""
        wanted, count = wants_gradients(args), len(self.symbolic)
        sizes = tuple(min(args[i].shape[d], 2) for i, dims in enumerate(self.symbolic) for d in dims)
        learns = tuple(a.requires_grad for a in args[count:]) if wanted else ()
        return (sizes, tuple(a.dtype for a in args), wanted, learns, torch.is_grad_enabled(), torch.is_inference_mode_enabled())

    def _traced(self, args: Sequence[torch.Tensor]) -> Any:
        key = self._key(args)
        if key not in self.seen:
            self.seen.add(key)
            return self._first(args)
        return self.compiled(*args)

    def _first(self, args: Sequence[torch.Tensor]) -> Any:
        """Compile a variant: its sizes stay symbols, and a batch and a length that happen to be equal are kept apart."""
        import torch._dynamo as dynamo  # slow to import, and its switches have no public name
        import torch.compiler.config as caches
        import torch.fx.experimental._config as shapes

        for i, dims in enumerate(self.symbolic):
            for d in dims:
                if args[i].shape[d] > 1:
                    dynamo.maybe_mark_dynamic(args[i], d)
        apart = cast("Any", shapes).patch(use_duck_shape=False)
        tagged = cast("Any", caches).patch(cache_key_tag=self.fingerprint)
        with dynamo.config.patch(recompile_limit=VARIANTS), apart, tagged:
            return self.compiled(*args)

    def _key(self, args: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """What a compiled variant is for: which symbolic sizes are one, dtypes, and whether gradients are wanted."""
        ones = tuple(args[i].shape[d] == 1 for i, dims in enumerate(self.symbolic) for d in dims)
        grad = torch.is_grad_enabled() and any(a.requires_grad for a in args)
        return (ones, args[0].dtype, args[-1].dtype, grad, torch.is_autocast_enabled(args[0].device.type))


def _crosses(graph: Graph) -> bool:
    return any(n.attrs.get("over") for n in graph.nodes) or any(map(_crosses, graph.callees))


class Runner:
    """A program ready to be called with inputs and parameters; `compiled` layers are shared by programs that have them."""

    def __init__(self, program: Program, compiled: dict[Graph, CompiledLayer] | None) -> None:
        self.program, self.entry, self.step = program, program.entry, None
        self.paths, self.eager = [name.split(".") for name in program.parameters], compiled is None
        if compiled is None:
            return
        self.entry = fx.GraphModule(program.entry, program.entry.graph, "Entry")
        for (name, module), layer in zip(program.layers.items(), program.graph.layers, strict=True):
            if layer not in compiled:
                compiled[layer] = CompiledLayer(module, layer, program.fingerprint)
            self.entry.add_module(name, compiled[layer])
        self.step = program.step and program.step({layer: compiled[layer] for layer in program.graph.layers})

    def __call__(
        self, inputs: Sequence[torch.Tensor], params: Sequence[torch.Tensor], *, in_place: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """The program's results; in place, new states may be written where the given ones are.

        Eager calls without a gradient are those of who wants an answer before a compiler would be done: they are torch code
        alone. With gradients, steps are many, and what is built for them is paid back. No cache decides it, so bits stay.
        """
        if self.eager and not torch.compiler.is_compiling() and not wants_gradients([*inputs, *params]):
            with plain():
                return self.entry(*inputs, *params)
        made = self.step(inputs, params, in_place) if self.step is not None else None
        return self.entry(*inputs, *params) if made is None else made
