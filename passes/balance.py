"""Balance: the work of causal attention that each rank has in an order of tokens, and which order that asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ir import Builder, Graph, Node, Replay, TypeMismatch, Value, ops, parse_mesh
from ..ir.orders import permutation
from .exchanges import token_bytes
from .registry import Outcome, register
from .remarks import Remark


def pairs(order: str, ranks: int, cu: Sequence[int], window: int = 0) -> tuple[int, ...]:
    """Pairs of a query and a key that each rank's causal attention has; `cu` are the borders of its segments."""
    borders = torch.as_tensor([*cu], dtype=torch.int64)
    tokens = int(borders[-1]) if len(borders) else 0
    if len(borders) < 2 or int(borders[0]) or bool((borders.diff() < 0).any()):
        raise TypeMismatch(f"cu is {[*cu][:8]}; borders of segments start at 0 and rise, (0, tokens) for one segment")
    if ranks < 1 or tokens % ranks:
        raise TypeMismatch(f"{tokens} tokens do not divide over {ranks} ranks; pad to a multiple of {max(ranks, 1)}")
    at = torch.arange(tokens)
    keys = at - borders[torch.searchsorted(borders, at, right=True) - 1] + 1
    seen = keys.clamp(max=window) if window else keys
    return tuple(seen[permutation(order, tokens, borders)].reshape(ranks, -1).sum(1).tolist())


def imbalance(order: str, ranks: int, cu: Sequence[int], window: int = 0) -> float:
    """The busiest rank's pairs over the mean of all ranks; 1 is even, and so is no work at all."""
    found = pairs(order, ranks, cu, window)
    return max(found) * ranks / sum(found) if sum(found) else 1.0


@register(numerics="reassociates")
def balance(
    graph: Graph, *, mesh: str = "cp=2", axis: str = "cp", seq: int = 32768, segments: int = 1, worth: float = 2000.0
) -> Outcome:
    """Causal attention over split tokens takes them in zigzag order, where the FLOPs that evens out are worth the exchange.

    Worth it: at least `worth` FLOPs of the busiest rank are saved for every byte that reordering its operands and result
    sends, at `seq` tokens (in `segments` of equal length, if packed). Then `move-reorders` brings reorders to where they
    cost least.
    """
    said, ranks = list[Remark](), parse_mesh(mesh)[axis]
    replay = Replay(graph)

    def visit(node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
        if not _natural(node, axis):
            return None
        borders = _borders(node, seq, segments)
        order = f"zigzag({ranks},packed)" if node.inputs[CU] is not None else f"zigzag({ranks})"
        now, then = (imbalance(o, ranks, borders, node.attrs["window"]) for o in ("", _even(order, borders, ranks)))
        gain = _saved(node, ranks, borders) / max(1, _sent(node, ranks, seq))
        told = f"the busiest rank has {now:.3f} of the mean in natural order, {then:.3f} in {order}; {gain:.0f} FLOPs a byte"
        if now <= then or gain < worth:
            said.append(Remark("missed", "balance", node.loc, f"{told}, must be {worth:.0f}"))
            return None
        said.append(Remark("passed", "balance", node.loc, told))
        return _reordered(replay.builder, node, inputs, order)

    return replay.run(visit), tuple(said)


CU = next(i for i, o in enumerate(ops.attention.inputs) if o.name == "cu")


def _natural(node: Node, axis: str) -> bool:
    """Whether it is causal attention that runs over the axis in natural order."""
    return node.is_op("attention") and node.attrs["over"] == axis and node.attrs["causal"] and not node.attrs["order"]


def _borders(node: Node, seq: int, segments: int) -> list[int]:
    count = segments if node.inputs[CU] is not None else 1
    if count < 1 or seq < 1 or seq % count:
        raise TypeMismatch(f"balance: seq is {seq}, segments is {segments}; seq must be a positive multiple of segments")
    return [*range(0, seq + 1, seq // count)]


def _even(order: str, borders: Sequence[int], ranks: int) -> str:
    """The order, if chunks of these segments are even; the natural one else, which gains nothing."""
    return order if all(n % (2 * ranks) == 0 for n in borders) else ""


def _saved(node: Node, ranks: int, borders: Sequence[int]) -> float:
    """FLOPs of one sequence that the busiest rank has above the mean."""
    q, v = node.operands[0].type, node.operands[2].type
    found = pairs("", ranks, borders, node.attrs["window"])
    heads, width = (int(q.dims[2].size), int(q.dims[3].size) + int(v.dims[3].size))
    return 2.0 * heads * width * (max(found) - sum(found) / ranks)


def _sent(node: Node, ranks: int, seq: int) -> int:
    """Bytes of one sequence that a rank sends at most: queries, keys, values there and the result back."""
    return sum(token_bytes(v) for v in (*node.operands[:3], node.outputs[0])) * seq // ranks


def _reordered(b: Builder, node: Node, inputs: Sequence[Value | None], order: str) -> Sequence[Value]:
    """The same attention over tokens in another order, and its result back in the natural one."""
    borders = inputs[CU] if "packed" in order else None
    ways = {"over": node.attrs["over"], "by": "exchange"}

    def turned(value: Value | None, was: str, now: str) -> Value:
        assert value is not None
        return b.emit(ops.reorder, [value, borders], {"was": was, "order": now, **ways}, [value.name])[0]

    given = [turned(x, "", order) for x in inputs[:3]]
    made = b.emit(ops.attention, [*given, *inputs[3:]], {**node.attrs, "order": order}, [node.outputs[0].name])
    return [turned(made[0], order, "")]
