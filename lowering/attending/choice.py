"""Which attentions are torch's, and which ones the generated kernels', and why.

SDPA is the fastest for what it knows: attention to all keys or to all before. Windows, segments, softcaps, sinks and
caches that are longer than what stands in them would need a mask, or logits, of as many numbers as there are pairs.
FlexAttention takes such masks as functions, but makes its table of blocks anew for each length and set of segments, runs
inside torch.compile alone, has no room for sinks in its softmax, and no backward on a CPU where it could be checked.
What SDPA takes has its bits: torch's flash backward adds up the gradient of queries in no fixed order unless torch is told to.
"""

from __future__ import annotations

from typing import Any

from ...ir import DTYPES, Node
from .traits import WIDEST


def alone(causal: bool, at: bool, queries: Any, keys: Any) -> bool:
    """Whether a mask of every key, or of every one before, is all that an attention without further options hides."""
    return not causal or (not at and queries == keys)


def left(node: Node) -> str:
    """Why a node is torch's on a CUDA device; empty where generated kernels run it."""
    return unfit(node) or ("" if needs(node) else "SDPA: its own kernels know causal and full attention")


def unfit(node: Node) -> str:
    """Why generated kernels could not run a node, nor a decode step of it; empty where they could."""
    q, k, v, *_ = (None if x is None else x.type for x in node.inputs)
    assert q is not None and k is not None and v is not None
    if (most := WIDEST.get(DTYPES[q.dtype])) is None:
        return f"SDPA, or by hand: products of {q.dtype} are no tensor core's"
    widths = [x.dims[3].size for x in (q, v)]
    if any(isinstance(n, int) and n > most for n in widths):
        heads = f"heads of {widths[0]} and {widths[1]} channels"
        return f"SDPA, masks made on the device: {heads}; a program's registers take 1 to {most} of {q.dtype}"
    return ""


def needs(node: Node) -> tuple[str, ...]:
    """What of a node SDPA could only do with a mask, or not at all."""
    q, k, _, sinks, cu, at = (None if x is None else x.type for x in node.inputs)
    assert q is not None and k is not None
    causal, last = bool(node.attrs.get("causal", True)), node.inputs[2]
    found = {
        "a window": node.attrs.get("window"),
        "a softcap": node.attrs.get("softcap"),
        "sinks": sinks,
        "packed segments": cu,
        "keys before the first query": not alone(causal, at is not None, q.dims[1].size, k.dims[1].size),
        "values of other widths than keys": last is not None and last.type.dims[3].size != k.dims[3].size,
    }
    return tuple(name for name, there in found.items() if there)


def taken(node: Node) -> str:
    """Why generated kernels run a node."""
    *most, last = needs(node)
    return f"generated Triton: SDPA has no kernel of its own for {', '.join(most)}{' and ' if most else ''}{last}"
