"""Calls that are whole blocks in torch too: projections, embeddings, norms, attention, and what boundaries left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...ir import Value
from .handlers import Call, Made, argument, dtype_of, handles, rank

if TYPE_CHECKING:
    from .build import Tracing


@handles("linear.default")
def _linear(t: Tracing, node: Call) -> Made:
    bias = argument(node, 2, "bias")
    operands = [t.value(x) for x in node.args[:2]]
    return t.emit("linear", *operands, None if bias is None else t.value(bias))


@handles("mm.default", "matmul.default")
def _product(t: Tracing, node: Call) -> Made:
    """A matrix that every row is multiplied with is a projection."""
    x, w = node.args[0], node.args[1]
    if rank(x) == 2 and rank(w) == 3:  # of columns: tokens stand last
        columns = t.emit("reshape", t.value(w), pattern="b i t -> b t i")
        return t.emit("reshape", t.emit("linear", columns, t.value(x)), pattern="b t o -> b o t")
    if rank(w) != 2 or rank(x) < 2:
        return None
    return t.emit("linear", t.value(x), t.emit("reshape", t.value(w), pattern="i o -> o i"))


@handles("addmm.default")
def _addmm(t: Tracing, node: Call) -> Made:
    bias, x, w = (t.value(a) for a in node.args[:3])
    if node.kwargs or len(bias.type.dims) != 1:
        return None
    return t.emit("linear", x, t.emit("reshape", w, pattern="i o -> o i"), bias)


@handles("embedding.default")
def _embedding(t: Tracing, node: Call) -> Made:
    w, tokens = (t.value(a) for a in node.args[:2])
    return t.emit("embedding", w, tokens) if tokens.type.dtype == "i64" else None


@handles("layer_norm.default")
def _layer_norm(t: Tracing, node: Call) -> Made:
    x, shape = t.value(node.args[0]), node.args[1]
    w, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    operands = [None if a is None else t.value(a) for a in (w, bias)]
    if len(shape) != 1:
        return None
    return t.emit("layer_norm", x, *operands, eps=float(argument(node, 4, "eps", 1e-5)))


@handles("rms_norm.default")
def _rms_norm(t: Tracing, node: Call) -> Made:
    w, eps = argument(node, 2, "weight"), argument(node, 3, "eps")
    if len(node.args[1]) != 1 or eps is None:
        return None
    return t.emit("rms_norm", t.value(node.args[0]), None if w is None else t.value(w), eps=float(eps))


@handles("scaled_dot_product_attention.default")
def _attention(t: Tracing, node: Call) -> Made:
    """Without a mask it is attention; with one, whether it is depends on the mask, which rules see."""
    if argument(node, 3, "attn_mask") is not None or argument(node, 4, "dropout_p", 0.0):
        return None
    q, k, v = (t.value(a) for a in node.args[:3])
    causal, scale = bool(argument(node, 5, "is_causal", False)), node.kwargs.get("scale")
    if any(len(x.type.dims) != 4 for x in (q, k, v)) or (causal and q.type.shape[2] != k.type.shape[2]):
        return None
    if not node.kwargs.get("enable_gqa", False) and q.type.shape[1] != k.type.shape[1]:
        return None
    return heads_first(t, q, k, v, causal=causal, **({} if scale is None else {"scale": float(scale)}))


def heads_first(t: Tracing, q: Value, k: Value, v: Value, **attrs: Any) -> Value:
    """Attention of [b h t d]."""
    turned = [t.emit("reshape", x, pattern="b h t d -> b t h d") for x in (q, k, v)]
    return t.emit("reshape", t.emit("attention", *turned, **attrs), pattern="b t h d -> b h t d")


@handles("copy.default")
def _copy(t: Tracing, node: Call) -> Made:
    """What is copied over a tensor, in its shape and dtype."""
    made = t.as_dtype(t.value(node.args[1]), dtype_of(node))
    if made is None or t.shape(node.args[1]) == t.shape(node):
        return made
    return t.emit("aten", made, t.value(node.args[0]), target="aten.expand_as.default", args="x0, x1")


@handles("slice_scatter.default")
def _written(t: Tracing, node: Call) -> Made:
    """Columns written into an empty tensor one section after the other, up to its last: the sections side by side."""
    width, parts, at = t.shape(node)[-1], list[Any](), t.shape(node)[-1]
    while isinstance(node.args, tuple) and str(node.target) == "aten.slice_scatter.default" and at:
        dim, start, end = argument(node, 2, "dim", 0) % rank(node), argument(node, 3, "start") or 0, argument(node, 4, "end")
        last = end if isinstance(end, int) and isinstance(width, int) and end < width else width
        if dim != rank(node) - 1 or last != at or not isinstance(start, int) or argument(node, 5, "step", 1) != 1 or start < 0:
            return None
        parts, at, node = [node.args[1], *parts], start, node.args[0]
    values = [t.value(x) for x in parts]
    if at or any(not v.type.is_float for v in values):
        return None
    made = values[0]
    for value in values[1:]:
        made = t.emit("concat", made, value)
    return made


@handles("log_softmax.int", "softmax.int")
def _softmax(t: Tracing, node: Call) -> Made:
    """The last dim by one name, so that rules need one."""
    x, dim = t.value(node.args[0]), int(node.args[1]) % rank(node)
    wide = t.as_dtype(x, dtype_of(node))
    if dim != rank(node) - 1 or wide is None:
        return None
    return t.emit("aten", wide, target=str(node.target), args="x0, -1")
