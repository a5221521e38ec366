"""The C++ of a graph: every library that its ops call on the CPU, before any is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ...ir import Graph, Node
from . import attention, conv, lru, recurrence, scan, softmax
from .recurrence import Traits

_KEYS = {  # op -> whether it is a delta rule, and its kind of decay; operands begin with q, k, v, those of finals with k, v
    "gated_delta_rule": (True, "head"),
    "delta_rule": (True, "head"),
    "kimi_delta_attention": (True, "channel"),
    "ssd": (False, "head"),
    "gated_linear_attention": (False, "channel"),
    "retention": (False, "head"),
    "gated_delta_final": (True, "head"),
    "kimi_delta_final": (True, "channel"),
}
_DTYPES = ("f32", "bf16")
Rows = Callable[[Graph], Mapping[str, str]]


def _one_by_one(kernel: Graph) -> Mapping[str, str]:
    return {}


def sources(graph: Graph, rows: Rows = _one_by_one) -> dict[str, str]:
    """Name -> text of every library that a graph, its layers and its kernels call, in order of first call.

    `rows` gives those of a kernel that is one call; any other kernel is its ops.
    """
    return dict(_sources(graph, rows))


def _sources(graph: Graph, rows: Rows) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.callee is not None:
            own = rows(node.callee) if node.callee.role == "kernel" else {}
            yield from own.items() or _sources(node.callee, rows)
        elif node.is_op("linear_cross_entropy", "linear_token_losses", "head_parts"):
            yield softmax.NAME, softmax.source()
        elif node.is_op(*_KEYS):
            yield from _recurrence(node)
        elif node.is_op("causal_conv1d"):
            yield from _conv(node)
        elif node.is_op("selective_scan"):
            yield from _scan(node)
        elif node.is_op("attention", "biased_attention"):
            yield from _attention(node)
        elif node.is_op("rg_lru") and all(v.type.dtype in (*_DTYPES, "i64") for v in node.operands):
            yield lru.NAME, lru.source()


def _recurrence(node: Node) -> Iterator[tuple[str, str]]:
    types = [v.type for v in node.operands if v.type.dtype != "i64"]
    values = 1 if node.is_op("gated_delta_final", "kimi_delta_final") else 2
    width, out = types[0].dims[-1].size, types[values].dims[-1].size
    delta, decay = _KEYS[node.op.name]
    if not (isinstance(width, int) and isinstance(out, int) and all(t.dtype in _DTYPES for t in types)):
        return
    if 0 < width <= recurrence.WIDEST and out <= recurrence.WIDEST:
        traits = Traits(delta, decay, recurrence.padded(width), recurrence.padded(out))
        yield traits.name, recurrence.source(traits)


def _conv(node: Node) -> Iterator[tuple[str, str]]:
    x, w = (v.type for v in node.operands[:2])
    taps, act = w.dims[1].size, node.attrs["act"]
    if isinstance(taps, int) and 2 <= taps <= conv.MOST and x.dtype in _DTYPES and w.dtype in _DTYPES:
        yield conv.name_of(taps, act), conv.source(taps, act)


def _scan(node: Node) -> Iterator[tuple[str, str]]:
    types = [v.type for v in node.operands if v.type.dtype != "i64"]
    state = types[2].dims[1].size
    if isinstance(state, int) and 1 <= state <= scan.MOST and all(t.dtype in _DTYPES for t in types):
        yield scan.name_of(state), scan.source(state)


def _attention(node: Node) -> Iterator[tuple[str, str]]:
    types = [v.type for v in node.inputs[:3] if v is not None]
    widths = [t.dims[3].size for t in types]
    fits = all(isinstance(n, int) and 0 < n <= attention.WIDEST for n in widths)
    if fits and all(t.dtype in (*_DTYPES, "f16") for t in types):
        yield attention.NAME, attention.source()
