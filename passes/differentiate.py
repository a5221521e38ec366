"""Gradients as IR: a program becomes one that computes its results and the gradients of its inputs and parameters."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from ..ir import Builder, Graph, Node, PassError, Replay, TensorType, Value, ops, parameters
from ..ir.dump import unique
from ..ir.gradient import Cotangents, carrying, cotangent_type, named, needed, pull, reverse
from .registry import Outcome, register
from .remarks import Remark
from .tokens import tokens_of


@dataclass(frozen=True)
class Halves:
    """A layer as two: what runs forward and leaves values behind, and what runs backward on them."""

    forward: Graph  # results of the layer, then saved values
    backward: Graph | None  # inputs: of the layer, results of `forward`, cotangents; None where nothing flows
    reads: tuple[int, ...]  # which inputs of the layer it takes
    keeps: tuple[int, ...]  # which results of `forward` it takes
    given: tuple[int, ...]  # of which results it takes the cotangents
    of: tuple[int, ...]  # of which inputs its first results are the cotangents
    params: tuple[str, ...]  # of which parameters the others are the gradients


Case = tuple[Graph, tuple[bool, ...], tuple[bool, ...]]  # a layer, which results have cotangents, which inputs want theirs
Known = dict[Case, Halves]


@register(numerics="reassociates", model=True, gradients=True)
def differentiate(graph: Graph) -> Outcome:
    """The program with its gradients: cotangents of float results come in, those of float inputs and parameters go out.

    Inputs are the given ones, then one cotangent for every float result; results the given ones, then the cotangent of
    every float input and the gradient of every float parameter (zeros where nothing flows), all in order. A layer becomes
    `<layer>_forward`, whose last results are saved values, and `<layer>_backward`, which takes them.
    """
    floats = [v.type.is_float for v in graph.outputs]
    leaves = [v for v in (*graph.inputs, *graph.params) if v.type.is_float]
    if not carrying(graph, leaves, graph.outputs):
        why = "no float result depends on a float input or parameter"
        raise PassError(f"{graph.name}: nothing is differentiable: {why}; differentiate a program that gives a float")
    _check_shared(graph)
    known = Known()
    joint = _Joint(graph, f"{graph.name}_gradients", floats, [v.type.is_float for v in graph.inputs], known)
    inputs = [(f"d_{v.name}", joint.of_input(v)) for v in graph.inputs if v.type.is_float]
    params = [(f"d_{name}".replace(".", "_"), d) for name, d in joint.of_params().items()]
    results = [(v.name, joint.env[v]) for v in graph.outputs] + inputs + params
    made = named(joint.b.finish([v for _, v in results]), [name for name, _ in results])
    return made, tuple(_remark(halves) for halves in known.values())


def _check_shared(graph: Graph) -> None:
    """Refuse parameters of one full name and two types: their gradients have no sum."""
    types = dict[str, TensorType]()
    for name, type_ in _all_parameters(graph):
        if types.setdefault(name, type_) != type_:
            why = "layers called with one prefix share their parameters; give each layer a prefix of its own"
            raise PassError(f"{graph.name}: parameter {name} is {types[name]} in one layer and {type_} in another; {why}")


def _all_parameters(graph: Graph, prefix: str = "") -> Iterator[tuple[str, TensorType]]:
    """Every parameter by its full name, once for every layer that has it."""
    yield from ((prefix + v.name, v.type) for v in graph.params)
    for node in graph.nodes:
        if node.callee is not None and node.callee.role == "layer":
            yield from _all_parameters(node.callee, f"{prefix}{node.attrs['params']}.")


def _remark(halves: Halves) -> Remark:
    name = halves.forward.name.removesuffix("_forward")
    if halves.backward is None:
        return Remark("note", "gradient", name, "nothing flows through it")
    kept = [halves.forward.outputs[i] for i in halves.keeps]
    why = f"its backward takes {len(kept)} values, {tokens_of(halves.forward).bytes(kept)} bytes a token"
    return Remark("passed", "gradient", name, why)


class _Joint:
    """A graph and its gradient in one builder: first what runs forward, then what runs backward."""

    def __init__(self, graph: Graph, name: str, present: Sequence[bool], wanted: Sequence[bool], known: Known) -> None:
        replay = Replay(graph, name=name)
        self.graph, self.b, self.env = graph, replay.builder, replay.env
        self.sums, self.calls = Cotangents(self.b), dict[Node, tuple[Halves, tuple[Value, ...]]]()
        leaves = [v for v, asked in zip(graph.inputs, wanted, strict=True) if asked]
        results = [v for v, there in zip(graph.outputs, present, strict=True) if there]
        self.flows = carrying(graph, [*leaves, *(v for v in graph.params if v.type.is_float)], results)
        for node in graph.nodes:
            layer = node.callee is not None and node.callee.role == "layer"
            self.env.update(zip(node.outputs, self._call(node, known) if layer else replay.keep(node), strict=True))
        self.forward = tuple(self.b.nodes)
        fresh = unique(v.name for v in (*self.b.inputs, *self.b.params))
        self.cotangents = [self.b.input(fresh(f"d_{v.name}"), cotangent_type(v.type)) for v in results]
        for value, cotangent in zip(results, self.cotangents, strict=True):
            self.sums.add(value, cotangent)
        reverse(graph.nodes, self.sums, self.flows, self._pull)
        self.b.loc = ""

    def _call(self, node: Node, known: Known) -> Sequence[Value]:
        """The forward half of a layer in its place."""
        layer = node.callee
        assert layer is not None
        case = (layer, tuple(v in self.flows for v in node.outputs), tuple(v in self.flows for v in node.operands))
        if case not in known:
            known[case] = _halves(*case, known)
        halves = known[case]
        names = [v.name for v in (*node.outputs, *halves.forward.outputs[len(node.outputs) :])]
        made = self.b.emit(halves.forward, [self.env[v] for v in node.operands], node.attrs, names, node.loc)
        self.calls[node] = halves, made
        return made[: len(node.outputs)]

    def _pull(self, node: Node, given: Sequence[Value | None], asked: Sequence[bool]) -> Sequence[Value | None]:
        """The cotangents of a node's operands; the gradients of a layer's parameters are noted under their full names."""
        if node not in self.calls:
            return pull(self.b, node, self.env, given, asked)
        halves, made = self.calls[node]
        if halves.backward is None:
            return [None] * len(node.inputs)
        inputs = [self.env[node.operands[i]] for i in halves.reads] + [made[i] for i in halves.keeps]
        inputs += [given[i] or ops.zeros_like(self.env[node.outputs[i]]) for i in halves.given]
        params = [f"{node.attrs['params']}.{name}" for name in halves.params]
        names = [f"d_{node.operands[i].name}" for i in halves.of] + [f"d_{p}".replace(".", "_") for p in params]
        found = self.b.emit(halves.backward, inputs, node.attrs, names, node.loc)
        for name, gradient in zip(params, found[len(halves.of) :], strict=True):
            self.sums.add(name, gradient)
        flown = dict(zip(halves.of, found, strict=False))
        return [flown.get(i) for i in range(len(node.inputs))]

    def of_input(self, value: Value) -> Value:
        """The cotangent of an input."""
        return self.sums.whole(value) or ops.zeros_like(self.env[value])

    def of_params(self) -> dict[str, Value]:
        """The gradient of every float parameter by its full name; types say what is still to be summed over ranks."""
        own = {v.name: v for v in self.graph.params}
        found = {n: self.sums.total(own.get(n, n)) for n, (type_, _) in parameters(self.graph).items() if type_.is_float}
        return {n: d or ops.zeros_like(self.env[own[n]]) for n, d in found.items()}


def _halves(layer: Graph, present: tuple[bool, ...], wanted: tuple[bool, ...], known: Known) -> Halves:
    """Differentiate a layer and cut it in two: what its gradient reads of the forward is saved."""
    joint = _Joint(layer, layer.name, present, wanted, known)
    b, own = joint.b, joint.b.inputs[: len(layer.inputs)]
    inputs = {i: d for i, v in enumerate(layer.inputs) if wanted[i] and (d := joint.sums.total(v)) is not None}
    params = joint.of_params()
    gradients = [*inputs.values(), *params.values()]
    nodes = needed(b.nodes[len(joint.forward) :], gradients)
    read = {*gradients, *(v for n in nodes for v in n.operands)}
    kept = [v for n in joint.forward for v in n.outputs if v in read]
    results = [joint.env[v] for v in layer.outputs]
    results += [v for v in kept if v not in results]
    taken = [*(v for v in own if v in read), *kept, *(v for v in joint.cotangents if v in read)]
    names = [f"d_{layer.inputs[i].name}" for i in inputs] + [f"d_{name}".replace(".", "_") for name in params]
    given = [i for i, there in enumerate(present) if there]
    return Halves(
        part_of(b, f"{layer.name}_forward", own, joint.forward, results, b.params),
        named(part_of(b, f"{layer.name}_backward", taken, nodes, gradients, read), names) if gradients else None,
        reads=tuple(i for i, v in enumerate(own) if v in read),
        keeps=tuple(results.index(v) for v in kept),
        given=tuple(i for i, v in zip(given, joint.cotangents, strict=True) if v in read),
        of=tuple(inputs),
        params=tuple(params),
    )


def part_of(
    b: Builder, name: str, inputs: Sequence[Value], nodes: Sequence[Node], results: Sequence[Value], read: Container[Value]
) -> Graph:
    """A graph of some of the nodes that were built, with the parameters it reads."""
    params = {v: init for v, init in zip(b.params, b.inits, strict=True) if v in read}
    return Graph(name, tuple(inputs), tuple(params), tuple(params.values()), tuple(nodes), tuple(results), b.role)
