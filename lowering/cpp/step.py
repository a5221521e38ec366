"""A decode step as a tape: the cached program for one token a row, read once, run by one call of C++ where it can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, c_int, c_int64
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import groupby
from typing import Any

import torch

from ...ir import DTYPES, Graph, Node, OpDef, Value, parameters
from ...ir.sizes import value as bound_size
from ..reshape import view_steps
from ..table import choose
from . import step_attention, step_mixers, step_scans, step_text
from .build import addressable, library
from .step_places import FORMS  # those that know places, and with them all others
from .step_record import Declined, Ins, Step, Tape, arranged, instruction, key
from .step_share import units, waits

Tensor = torch.Tensor
Calls = Mapping[Graph, Callable[..., Any]]
Env = dict[Value, Any]


def source() -> str:
    """The C++ text, the same for every model."""
    attention = (step_attention.WRITES, step_attention.ATTENTION)
    mixers = (step_mixers.PLACES, *attention, step_mixers.STATES, step_scans.SCANS, step_mixers.EXPERTS)
    return "\n".join((step_text.base(), *mixers, step_text.ENTRY))


@cache
def machine() -> Any:
    """What runs a tape; None where there is no compiler, or one that fails."""
    made = library(source(), "step")
    if made is None:
        return None
    made.run.argtypes = (POINTER(Ins), c_int64, POINTER(c_int64), POINTER(c_int64), c_int64)
    made.run.restype = c_int
    return made.run


@dataclass(frozen=True)
class Plan:
    """A tape with its table of tensors: parameters, inputs, the arena, constants, results of torch code, results."""

    parts: tuple[Any, ...]  # instructions side by side, or a step that is torch code
    slots: Mapping[int, int]
    places: Mapping[int, int]  # in the arena
    arena: int  # bytes
    params: tuple[tuple[torch.dtype, torch.Size], ...]
    dtypes: tuple[torch.dtype, ...]  # of the inputs
    constants: tuple[Tensor, ...]
    calls: int  # slots that torch code fills
    fresh: tuple[Tensor, ...]  # shapes of the results that every step makes
    results: tuple[tuple[str, int], ...]  # ("input" | "call" | "fresh", which)
    over: Mapping[int, int]  # fresh results that may be written over an input


class _Writer:
    """Reads a graph with every size known, and writes what its nodes do."""

    def __init__(self, graph: Graph, target: str, calls: Calls, sizes: Mapping[str, int], given: set[int]) -> None:
        self.graph, self.target, self.calls, self.sizes, self.tape = graph, target, calls, sizes, Tape(given)

    def body(self, graph: Graph, env: Env, params: Mapping[str, Tensor]) -> list[Any]:
        for node in graph.nodes:
            made = self._node(graph, node, [env[v] if v is not None else None for v in node.inputs], params)
            env.update(zip(node.outputs, made, strict=True))
        return [env[v] for v in graph.outputs]

    def _node(self, graph: Graph, node: Node, given: list[Any], params: Mapping[str, Tensor]) -> Sequence[Any]:
        mark, turned = len(self.tape.steps), dict(self.tape.turned)
        try:
            return self._layer(node, given, params) if node.callee else self._op(node, given)
        except Declined:
            if graph.role != "graph" or (node.callee and node.callee.role == "kernel"):
                raise
            del self.tape.steps[mark:]
            self.tape.turned = turned  # what is deleted is made by nobody
            return self._torch(node, given, params)

    def _layer(self, node: Node, given: Sequence[Any], params: Mapping[str, Tensor]) -> list[Any]:
        callee = node.callee
        assert callee is not None
        own = self._own(node, params) if callee.role == "layer" else {}
        env: Env = dict(zip(callee.inputs, given, strict=True)) | {v: own[v.name] for v in callee.params}
        return self.body(callee, env, own)

    def _own(self, node: Node, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A layer's parameters by the names it calls them."""
        assert node.callee is not None
        return {name: params[f"{node.attrs['params']}.{name}"] for name in parameters(node.callee)}

    def _op(self, node: Node, given: list[Any]) -> Sequence[Any]:
        if node.is_op("reshape"):
            x = given[0]
            for method, args in view_steps(node):
                x = self.tape.view(x, method, *args)
            return (x,)
        assert isinstance(node.op, OpDef)
        run = FORMS.get(node.op.name)
        attrs = {k: v for k, v in node.attrs.items() if v != node.op.attrs[k]}
        while given and given[-1] is None:
            given.pop()
        if run is None or not _takes(run, len(given), attrs):
            raise Declined
        made = run(self.tape, *given, **attrs)
        return made if isinstance(made, (tuple, list)) else (made,)

    def _torch(self, node: Node, given: list[Any], params: Mapping[str, Tensor]) -> Sequence[Any]:
        """What has no form here runs as it does everywhere else, between two parts of the tape."""
        if node.callee is None:
            call, attrs = choose(node, self.target)[0], dict(node.attrs)
        else:
            call, attrs, given = self.calls[node.callee], {}, [*given, *self._own(node, params).values()]
        made = tuple(self._result(v) for v in node.outputs)
        self.tape.steps.append(Step("", tuple(given), made, call=call, attrs=attrs))
        return made

    def _result(self, value: Value) -> Tensor:
        sizes = [bound_size(d.size, self.sizes) for d in value.type.dims]
        return torch.empty(sizes, dtype=DTYPES[value.type.dtype], device="meta")


def _takes(run: Callable[..., Any], operands: int, attrs: Mapping[str, Any]) -> bool:
    """Whether a form knows all that it is told."""
    try:
        signature(run).bind(None, *range(operands), **attrs)
    except TypeError:
        return False
    return True


def plan(
    graph: Graph, target: str, calls: Calls, inputs: Sequence[Tensor], params: Sequence[Tensor], sizes: Mapping[str, int]
) -> Plan | None:
    """How one token a row goes through the program; None where nothing of it is C++ or something is not as it must be."""
    named = dict(zip(parameters(graph), params, strict=True))
    if not (addressable(*inputs, *params) and all(x.is_contiguous() for x in inputs)):
        return None
    shapes = {name: _shape(p) for name, p in named.items()}
    given = [_shape(x) for x in inputs]
    writer = _Writer(graph, target, calls, sizes, {key(x) for x in given})
    env: Env = dict(zip(graph.inputs, given, strict=True)) | {v: shapes[v.name] for v in graph.params}
    try:
        results = writer.body(graph, env, shapes)
    except Declined:
        return None
    return _planned(writer.tape, list(shapes.values()), given, results, params, inputs)


def _shape(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _planned(
    tape: Tape,
    params: list[Tensor],
    given: list[Tensor],
    results: list[Tensor],
    real: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> Plan | None:
    """Slots and places for everything that was written."""
    called = [r for s in tape.steps if not s.kind for r in s.results]
    made = [*params, *given, *called, *(shape for shape, _ in tape.constants)]
    known = {key(x) for x in made}
    fresh = list({key(r): r for r in results if key(r) not in known}.values())
    if not any(s.kind for s in tape.steps) or not all(r.is_contiguous() and r.storage_offset() == 0 for r in results):
        return None
    slots = {key(x): i for i, x in enumerate([*made, *fresh])}
    places, end = arranged(tape.steps, set(slots))
    slots |= dict.fromkeys(places, len(slots))
    kinds = {key(x): ("fresh", i) for i, x in enumerate(fresh)} | {key(x): ("call", i) for i, x in enumerate(called)}
    kinds |= {key(x): ("input", i) for i, x in enumerate(given)}
    if any(key(r) not in kinds for r in results):
        return None  # a parameter or a constant
    over = _over(tape.steps, given, results, fresh)
    old = {key(fresh[i]): key(given[at]) for i, at in over.items()}
    return Plan(
        parts=_parts(tape.steps, slots, places, old), slots=slots, places=places, arena=end,
        params=tuple((p.dtype, p.shape) for p in real), dtypes=tuple(x.dtype for x in inputs),
        constants=tuple(numbers for _, numbers in tape.constants), calls=len(called), fresh=tuple(fresh),
        results=tuple(kinds[key(r)] for r in results), over=over,
    )  # fmt: skip


def _parts(steps: Sequence[Step], slots: dict[int, int], places: dict[int, int], old: dict[int, int]) -> tuple[Any, ...]:
    made = list[Any]()
    for alike, group in groupby(steps, key=lambda s: bool(s.kind)):
        some = list(group)
        told = zip(some, map(units, some), waits(some, places, old), strict=True) if alike else ()
        made += [(Ins * len(some))(*(instruction(s, n, w, slots, places) for s, n, w in told))] if alike else some
    return tuple(made)


IN_PLACE = ("CONV", "RECURRENCE", "SELECTIVE_SCAN", "RG_LRU")  # each number of the state is read before it is written


def _over(steps: Sequence[Step], given: list[Tensor], results: list[Tensor], fresh: list[Tensor]) -> dict[int, int]:
    """Fresh results that may go where the input in their place stands: nothing reads that one later."""
    order, found = [key(x) for x in fresh], dict[int, int]()
    last = {key(x): i for i, s in enumerate(steps) for x in s.operands if x is not None}
    states = len(results) - len(given)  # results stand in the order of inputs, from behind
    for r, result in enumerate(results):
        at = r - states
        if key(result) not in order or at < 0:
            continue
        writes = [i for i, s in enumerate(steps) if key(result) in {key(x) for x in s.results}]
        old = given[at]
        same = old.shape == result.shape and old.dtype == result.dtype
        if same and len(writes) == 1 and steps[writes[0]].kind in IN_PLACE and last.get(key(old)) == writes[0]:
            found[order.index(key(result))] = at
    return found
