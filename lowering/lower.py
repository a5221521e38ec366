"""Graph -> Program: fx modules whose calls are forms and references."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..ir import Graph, Mesh, Node, OpDef, PlaitError, Value, ops, parameters
from .cpp.step_run import step_of
from .cpp_ops import Rows, Waiting, cpp_op
from .cpp_parts import parted
from .foreign import foreign_call
from .gpu.tuned import digest as tuned_digest
from .local import local_kernel
from .program import Choice, Program, fingerprint
from .reshape import view_steps
from .rows import Declined
from .table import TARGETS, choose, standing
from .triton_ops import KernelOp, backward_declined, kernel_op


def lower(graph: Graph, *, target: str = "cpu", mesh: Mesh | None = None, eager: bool = False) -> Program:
    """One fx module per distinct layer, and an entry over them. Raises PlaitError for a target nobody knows.

    An eager one is run as it is: C++ for it waits for the first call that wants a gradient. Of a placed program it is
    what one rank of the mesh runs; its collectives meet the other ranks.
    """
    if target not in TARGETS:
        raise PlaitError(f"no target called {target!r}; there are {', '.join(TARGETS)}")
    choices = list[Choice]()
    layers = dict[str, fx.GraphModule]()
    names = dict[Graph, str]()
    for layer in graph.layers:
        name = names[layer] = f"layer{len(layers)}"
        layers[name] = _Emitter(layer, target, choices, mesh=mesh, eager=eager).module()
    entry = _Emitter(graph, target, choices, layers, names, mesh, eager)
    mark = fingerprint() + (tuned_digest() if target in ROW_KERNELS else "")  # configurations are compiled in
    step = step_of(graph, target) if mesh is None else None
    return Program(graph, target, entry.module(), layers, tuple(parameters(graph)), tuple(choices), mark, step)


ROW_KERNELS = ("cuda", "interpreter")  # targets on which a kernel is one op


def carries(graph: Graph, node: Node) -> bool:
    """Whether a recurrence takes its state from the graph's inputs, where none else reads it, and gives the new one out.

    Of such a program nobody may still read the old state, as of caches that are written in place.
    """
    if not isinstance(node.op, OpDef) or node.op not in ops.FAMILY or node.attrs.get("over"):
        return False
    state = dict(zip((o.name for o in node.op.inputs), node.inputs, strict=True))["state"]
    alone = state in graph.inputs and graph.uses[state] == (node,) and state not in graph.outputs
    return alone and node.outputs[1] in graph.outputs


class _Emitter:
    """Writes one graph as one fx module. Names in its source are of our making: a graph's own may come from a file."""

    def __init__(
        self, graph: Graph, target: str, choices: list[Choice], layers: dict[str, fx.GraphModule] | None = None,
        names: dict[Graph, str] | None = None, mesh: Mesh | None = None, eager: bool = False,
    ) -> None:  # fmt: skip
        self.mesh, self.eager = mesh, eager
        self.graph, self.target, self.choices, self.layers, self.names = graph, target, choices, layers or {}, names or {}
        self.root, self.fx = torch.nn.Module(), fx.Graph()
        self.env: dict[Value, fx.Node] = {}
        self.kernels: dict[Graph, str] = {}
        for name, layer in self.layers.items():
            self.root.add_module(name, layer)

    def module(self) -> fx.GraphModule:
        for i, value in enumerate(self.graph.inputs):
            self.env[value] = self.fx.placeholder(f"x{i}")
        self.params = {name: self.fx.placeholder(f"p{i}") for i, name in enumerate(parameters(self.graph))}
        self.env |= {v: self.params[v.name] for v in self.graph.params}
        for node in self.graph.nodes:
            self._results(node, self._call(node))
        self.fx.output(tuple(self.env[v] for v in self.graph.outputs))
        return fx.GraphModule(self.root, self.fx, self.graph.role.capitalize())

    def _call(self, node: Node) -> fx.Node:
        args = [self.env[v] if v is not None else None for v in node.inputs]
        if node.is_op("reshape"):
            return self._views(node)
        if node.is_op("aten"):
            self.choices.append(Choice(self.graph.name, str(node.attrs["target"]), node.loc, "torch", "no op here means it"))
            return foreign_call(self.fx, node, args)
        if not isinstance(node.op, Graph):
            run, runs, why = choose(node, self.target)
            given_up = self.target in ROW_KERNELS and carries(self.graph, node)
            why += "; a step writes the state where it stands" if given_up else ""
            self.choices.append(Choice(self.graph.name, node.op.name, node.loc, runs, why))
            while args and args[-1] is None:
                args.pop()
            attrs = {k: v for k, v in node.attrs.items() if v != node.op.attrs[k]}
            own = standing(node) | ({"carried": True} if given_up else {})
            return self.fx.call_function(run, tuple(args), attrs | own)
        if node.op.role == "layer":
            args += [self.params[f"{node.attrs['params']}.{name}"] for name in parameters(node.op)]
            return self.fx.call_module(self.names[node.op], tuple(args))
        return self.fx.call_module(self._kernel(node.op, node.loc), tuple(args))

    def _views(self, node: Node) -> fx.Node:
        made = self.env[node.operands[0]]
        for method, args in view_steps(node):
            made = self.fx.call_method(method, (made, *args))
        return made

    def _kernel(self, kernel: Graph, loc: str) -> str:
        if kernel not in self.kernels:
            name = self.kernels[kernel] = f"kernel{len(self.kernels)}"
            own = self._row_kernel(kernel, loc) if self.target in ROW_KERNELS else None
            own = self._cpp_kernel(kernel, loc) if self.target == "cpu" else own
            apart = parted(kernel) if self.target == "cpu" and own is None else kernel
            self.root.add_module(name, own or _Emitter(apart, self.target, self.choices, mesh=self.mesh).module())
        return self.kernels[kernel]

    def _row_kernel(self, kernel: Graph, loc: str) -> fx.GraphModule | None:
        """The kernel as one op; None, with the reason among the choices, where its ops run one by one."""
        try:
            made = kernel_op(local_kernel(kernel, self.mesh), interpreted=self.target == "interpreter")
        except Declined as declined:
            self.choices.append(Choice(self.graph.name, kernel.name, loc, "op by op", f"no row kernel: {declined}"))
            return None
        back = backward_declined(made.kernel)
        why = f"one pass forward; backward op by op: {back}" if back else "one pass forward, one backward"
        self.choices.append(Choice(self.graph.name, kernel.name, loc, "row kernel", why))
        return _called(made)

    def _cpp_kernel(self, kernel: Graph, loc: str) -> torch.nn.Module | None:
        """The kernel as one op in C++ where that is faster; op by op for one token a row, where a call would cost more."""
        if self.eager:
            apart = _Emitter(kernel, self.target, self.choices).module()
            return Waiting(apart, lambda: _Emitter(self.graph, self.target, [], mesh=self.mesh)._cpp_kernel(kernel, loc))
        try:
            made, why = cpp_op(local_kernel(kernel, self.mesh))
        except Declined:  # its ops stand among the choices one by one, fused by torch.compile
            return None
        self.choices.append(Choice(self.graph.name, kernel.name, loc, "C++ rows", why))
        return Rows(kernel, _called(made), _Emitter(kernel, self.target, []).module())

    def _results(self, node: Node, made: fx.Node) -> None:
        """Name the results; a graph always gives a tuple, an op only when it has several results."""
        if len(node.outputs) == 1 and not isinstance(node.op, Graph) and node.op.name != "split":
            self.env[node.outputs[0]] = made
            return
        for i, value in enumerate(node.outputs):
            if value in self.graph.uses or value in self.graph.outputs:
                self.env[value] = self.fx.call_function(operator.getitem, (made, i))


def _called(op: KernelOp) -> fx.GraphModule:
    """A kernel's op as a module that gives every result of its graph."""
    graph = fx.Graph()
    operands = tuple(graph.placeholder(f"x{i}") for i in range(len(op.kernel.inputs)))
    made = graph.call_function(op.call, operands)
    alone = len(op.kernel.outputs) == 1
    graph.output(tuple(made if alone else graph.call_function(operator.getitem, (made, i)) for i in op.order))
    return fx.GraphModule(torch.nn.Module(), graph, "Kernel")
