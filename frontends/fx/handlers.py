"""What aten calls mean as ops of the IR: one function per call, which gives None where no op means the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir import Value
from ...ir.ops.aten import NAMES
from ...ir.rearrange import permuted, viewed

if TYPE_CHECKING:
    from .build import Tracing

Made = Value | tuple[Value, ...] | None
Call = Any  # an fx.Node, whose arguments have no types of their own
Handler = Callable[["Tracing", Call], Made]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Name the calls, `add.Tensor` or all overloads of `silu`, that a function translates."""

    def define(rule: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, rule))
        return rule

    return define


def argument(node: Call, index: int, name: str, default: Any = None) -> Any:
    """An argument by place or by name."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def is_tensor(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor)


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def constant(t: Tracing, x: Any) -> Any:
    """What a known tensor without dims is, or the argument itself."""
    if is_tensor(x) and x in t.known.nodes and x.meta["val"].dim() == 0 and x.meta["val"].is_floating_point():
        return float(t.known.value(x, t.known.probes[0]))
    return x


def dtype_of(node: Call) -> str:
    return NAMES.get(node.meta["val"].dtype, "")


def rank(node: Call) -> int:
    return node.meta["val"].dim()


# -- pointwise ------------------------------------------------------------------------------


def _unary(op: str) -> Handler:
    return lambda t, node: t.emit(op, t.value(node.args[0])) if _float(node) else None


for _call, _op in (
    ("silu.default", "silu"), ("relu.default", "relu"), ("sigmoid.default", "sigmoid"), ("rsqrt.default", "rsqrt"),
    ("tanh.default", "tanh"),
):  # fmt: skip
    HANDLERS[_call] = _unary(_op)


def _float(node: Call) -> bool:
    return node.meta["val"].dtype.is_floating_point


@handles("gelu.default")
def _gelu(t: Tracing, node: Call) -> Made:
    return t.emit("gelu", t.value(node.args[0]), approximate=argument(node, 1, "approximate", "none"))


@handles("softplus.default")
def _softplus(t: Tracing, node: Call) -> Made:
    usual = (argument(node, 1, "beta", 1), argument(node, 2, "threshold", 20)) == (1, 20)
    return t.emit("softplus", t.value(node.args[0])) if usual else None


@handles("neg.default")
def _neg(t: Tracing, node: Call) -> Made:
    return t.emit("scale", t.value(node.args[0]), by=-1.0) if _float(node) else None


@handles("exp.default")
def _exp(t: Tracing, node: Call) -> Made:
    return t.emit("scale", t.emit("neg_exp", t.value(node.args[0])), by=-1.0) if _float(node) else None


@handles("pow.Tensor_Scalar", "square.default")
def _square(t: Tracing, node: Call) -> Made:
    power = argument(node, 1, "exponent", 2)
    x = t.value(node.args[0])
    if not _float(node) or power not in (2, 3, -0.5):
        return None
    if power == 3:
        return t.emit("mul", x, t.emit("mul", x, x))
    return t.emit("mul", x, x) if power == 2 else t.emit("rsqrt", x)


@handles("clamp.default", "clamp_min.default")
def _clamp(t: Tracing, node: Call) -> Made:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if not _float(node) or not is_number(low) or (high is not None and not is_number(high)):
        return None
    return t.emit("clamp", t.value(node.args[0]), low=float(low), **({} if high is None else {"high": float(high)}))


@handles("to", "_to_copy.default", "type_as.default", "float.default", "_autocast_to_full_precision.default")
def _to(t: Tracing, node: Call) -> Made:
    x, dtype = t.value(node.args[0]), dtype_of(node)
    if x.type.dtype == "f64" and dtype in ("f32", "bf16", "f16"):
        return t.emit("aten", x, target="aten.to.dtype", args=f"x0, {dtype}")
    return t.as_dtype(x, dtype)


@handles("dropout.default", "feature_dropout.default", "alpha_dropout.default", "native_dropout.default")
def _dropout(t: Tracing, node: Call) -> Made:
    off = not node.args[1] or not argument(node, 2, "train", True)
    return t.value(node.args[0]) if off else None


@handles(
    "clone.default", "contiguous.default", "alias.default", "detach.default", "lift_fresh_copy.default", "positive.default"
)
def _same(t: Tracing, node: Call) -> Made:
    return t.value(node.args[0]) if "detach" not in str(node.target) or not _float(node) else None


@handles("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "rsub.Scalar", "add.Scalar", "mul.Scalar", "div.Scalar")
def _arithmetic(t: Tracing, node: Call) -> Made:
    """Two tensors, or a tensor and a number."""
    kind = str(node.target).split(".")[1]
    if argument(node, 2, "alpha", 1) != 1 or not _float(node):
        return None
    a, b = (constant(t, x) for x in node.args[:2]) if node not in t.known.nodes else node.args[:2]
    if is_tensor(a) and is_tensor(b):
        return _two(t, node, kind, a, b)
    if is_number(a) and is_tensor(b) and kind in ("add", "mul"):
        a, b = b, a
    if not is_tensor(a) or not is_number(b):
        return None
    return _with_number(t, node, kind, a, float(b))


def _with_number(t: Tracing, node: Call, kind: str, a: Any, by: float) -> Made:
    x = t.as_dtype(t.value(a), dtype_of(node))
    if x is None or (kind == "div" and by == 0):
        return None
    if kind == "rsub":
        return t.emit("shift", t.emit("scale", x, by=-1.0), by=by)
    op, value = {"add": ("shift", by), "sub": ("shift", -by), "mul": ("scale", by), "div": ("scale", 1 / (by or 1))}[kind]
    return t.emit(op, x, by=value)


def _two(t: Tracing, node: Call, kind: str, a: Any, b: Any) -> Made:
    """As large as the result first where order does not matter; a quotient by a root is a product."""
    if kind == "div":
        return _over_root(t, node, a, b)
    if kind not in ("add", "sub", "mul"):
        return None
    x, y = (t.as_dtype(t.value(v), dtype_of(node)) for v in (a, b))
    if x is None or y is None:
        return None
    if kind != "sub" and t.shape(a) != t.shape(node):
        x, y = y, x
    shape, other = x.type.shape, y.type.shape
    if shape == other:
        return t.emit(kind, x, y)
    if shape != t.shape(node) or kind == "sub":
        return None
    return _broadcast(t, kind, x, y) or t.emit("aten", x, y, target=f"aten.{kind}.Tensor", args="x0, x1")


def _over_root(t: Tracing, node: Call, a: Any, b: Any) -> Made:
    if str(b.target) != "aten.sqrt.default" or dtype_of(a) != dtype_of(b):
        return None
    x, y = t.value(a), t.emit("rsqrt", t.value(b.args[0]))
    if t.shape(a) != t.shape(node):
        return None
    return t.emit("mul", x, y) if x.type == y.type else _broadcast(t, "mul", x, y)


def _broadcast(t: Tracing, kind: str, x: Value, y: Value) -> Value | None:
    """A vector for every row, or a number per row."""
    shape, other = x.type.shape, y.type.shape
    if len(other) > 1 and other == (*[1] * (len(other) - 1), *shape[-1:]):
        flat = t.view(y, viewed(other, other[-1:]))
        y, other = (y, other) if flat is None else (flat, other[-1:])
    if other == shape[-1:]:
        return t.emit({"add": "add_bias", "mul": "scale_columns"}[kind], x, y)
    if kind == "mul" and other == (*shape[:-1], 1):
        return t.emit("scale_rows", x, t.emit("reshape", y, pattern="... u=1 -> ..."))
    if kind == "mul" and len(other) == 2 and other == (*shape[-2:-1], 1):
        return t.emit("scale_heads", x, t.emit("reshape", y, pattern="h u=1 -> h"))
    return None


# -- sums over rows ---------------------------------------------------------------------------


@handles("mean.dim", "sum.dim_IntList")
def _rows(t: Tracing, node: Call) -> Made:
    dims, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    x = t.value(node.args[0])
    if (
        not dims
        or len(dims) != 1
        or dims[0] not in (-1, rank(node.args[0]) - 1)
        or not x.type.is_float
        or rank(node.args[0]) < 1
    ):
        return None
    made = t.emit("row_mean" if "mean" in str(node.target) else "row_sum", x)
    made = t.as_dtype(made, dtype_of(node))
    return t.emit("reshape", made, pattern="... -> ... u=1") if keep and made is not None else made


@handles("var.correction", "var.dim")
def _variance(t: Tracing, node: Call) -> Made:
    """The mean square of what is left without the mean."""
    dims, biased = argument(node, 1, "dim"), node.kwargs.get("correction", argument(node, 2, "unbiased", 1)) in (0, False)
    if not biased or not dims or len(dims) != 1 or dims[0] not in (-1, rank(node.args[0]) - 1):
        return None
    x = t.value(node.args[0])
    mean = t.as_dtype(t.emit("row_mean", x), x.type.dtype)
    if mean is None:
        return None
    apart = t.emit("aten", x, t.emit("reshape", mean, pattern="... -> ... u=1"), target="aten.sub.Tensor", args="x0, x1")
    made = t.as_dtype(t.emit("row_mean", t.emit("mul", apart, apart)), dtype_of(node))
    keep = argument(node, 3, "keepdim", False)
    return t.emit("reshape", made, pattern="... -> ... u=1") if keep and made is not None else made


# -- views --------------------------------------------------------------------------------------


@handles(
    "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int", "unsqueeze.default",
    "squeeze.dim", "squeeze.dims", "squeeze.default", "view_as.default", "reshape_as.default",
)  # fmt: skip
def _view(t: Tracing, node: Call) -> Made:
    return t.view(t.value(node.args[0]), viewed(t.shape(node.args[0]), t.shape(node)))


@handles("transpose.int", "swapaxes.default", "permute.default", "t.default", "numpy_T.default", "movedim.int", "mT.default")
def _permute(t: Tracing, node: Call) -> Made:
    x, n = t.value(node.args[0]), rank(node.args[0])
    order = list(range(n))
    kind = str(node.target).split(".")[1]
    if kind == "permute":
        order = [int(d) % n for d in node.args[1]]
    elif kind in ("t", "numpy_T"):
        order = order[::-1]
    elif kind == "movedim":
        return None
    elif kind == "mT":
        order[-2:] = [n - 1, n - 2]
    else:
        i, j = (int(d) % n for d in node.args[1:3])
        order[i], order[j] = order[j], order[i]
    return t.view(x, permuted(t.shape(node.args[0]), order))


@handles("expand.default", "expand_as.default")
def _expand(t: Tracing, node: Call) -> Made:
    """Nothing, or heads that several others share."""
    was, now = t.shape(node.args[0]), t.shape(node)
    x = t.value(node.args[0])
    if was == now:
        return x
    apart = [i for i, (m, n) in enumerate(zip(was, now, strict=False)) if m != n]
    if len(was) == len(now) == 4 and apart in ([1], [2]) and x.type.is_float and isinstance(now[apart[0]], int):
        return _one_head_again(t, x, apart[0], int(now[apart[0]]))
    if len(was) != len(now) or len(was) != 5 or apart not in ([2], [3]) or not isinstance(now[apart[0]], int):
        return None
    return _heads_again(t, x, apart[0], int(now[apart[0]])) if x.type.is_float else None


def _one_head_again(t: Tracing, x: Value, at: int, r: int) -> Value:
    """[b 1 s d], or [b s 1 d], for r heads."""
    if at == 2:
        return t.emit("repeat_heads", x, r=r)
    turned = t.emit("repeat_heads", t.emit("reshape", x, pattern="b g s d -> b s g d"), r=r)
    return t.emit("reshape", turned, pattern="b s g d -> b g s d")


def _heads_again(t: Tracing, x: Value, at: int, r: int) -> Value | None:
    """[b g 1 s d], or [b s g 1 d], with its dim of one r times as long."""
    before, after = {
        2: ("b g u=1 s d -> b s g d", "b s (g r={}) d -> b g r s d"),
        3: ("b s g u=1 d -> b s g d", "b s (g r={}) d -> b s g r d"),
    }[at]
    heads = t.emit("reshape", x, pattern=before)
    return t.emit("reshape", t.emit("repeat_heads", heads, r=r), pattern=after.format(r))


@handles("repeat_interleave.self_int")
def _repeat(t: Tracing, node: Call) -> Made:
    r, dim = node.args[1], argument(node, 2, "dim")
    x = t.value(node.args[0])
    if len(x.type.dims) != 4 or not isinstance(r, int) or dim is None or not x.type.is_float:
        return None
    if dim % 4 == 2:
        return t.emit("repeat_heads", x, r=r)
    if dim % 4 != 1:
        return None
    turned = t.emit("repeat_heads", t.emit("reshape", x, pattern="b g s d -> b s g d"), r=r)
    return t.emit("reshape", turned, pattern="b s g d -> b g s d")


@handles("split.Tensor", "split_with_sizes.default", "chunk.default", "split.sizes")
def _split(t: Tracing, node: Call) -> Made:
    """Sections of the last dim, or of the middle one of three."""
    n = rank(node.args[0])
    dim = argument(node, 2, "dim", 0) % n
    sizes = tuple(v.shape[dim] for v in node.meta["val"])
    if not (dim == n - 1 or (dim, n) == (1, 3)) or not all(isinstance(x, int) for x in sizes) or not _floats(node):
        return None
    x = t.value(node.args[0])
    if len(sizes) == 1:
        return (x,)
    if dim == n - 1:
        return t.all("split", x, sizes=sizes)
    parts = t.all("split", t.emit("reshape", x, pattern="a c t -> a t c"), sizes=sizes)
    return tuple(t.emit("reshape", part, pattern="a t c -> a c t") for part in parts)


def _floats(node: Call) -> bool:
    return node.args[0].meta["val"].dtype.is_floating_point


@handles("slice.Tensor")
def _slice(t: Tracing, node: Call) -> Made:
    """All of it, or a section of the last dim."""
    x, n = t.value(node.args[0]), rank(node.args[0])
    if t.shape(node.args[0]) == t.shape(node):
        return x
    dim, start, step = argument(node, 1, "dim", 0) % n, argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    width, wanted = t.shape(node.args[0])[-1], t.shape(node)[-1]
    if not isinstance(width, int) or not isinstance(wanted, int) or not isinstance(start, int):
        return None
    if dim == n - 1 and step == 2 and start in (0, 1) and width == 2 * wanted and _float(node):
        apart = t.emit("reshape", x, pattern="... (n r=2) -> ... (r n)")
        return t.all("split", apart, sizes=(wanted, wanted))[start]
    if dim != n - 1 or step != 1 or not _float(node) or not wanted or start < -width:
        return None
    at = start % width if start < 0 else start
    sizes = [at, wanted, width - at - wanted]
    made = t.all("split", x, sizes=tuple(s for s in sizes if s))
    return made[1 if at else 0]


@handles("cat.default")
def _cat(t: Tracing, node: Call) -> Made:
    parts, n = node.args[0], rank(node)
    values = [t.as_dtype(t.value(x), dtype_of(node)) for x in parts if t.shape(x)[-1] != 0]
    if argument(node, 1, "dim", 0) % n != n - 1 or not values or not _float(node) or any(v is None for v in values):
        return None
    made = values[0]
    for value in values[1:]:
        made = t.emit("concat", made, value)
    return made


@handles("_operator.getitem", "<built-in function getitem>")
def _getitem(t: Tracing, node: Call) -> Made:
    made = t.env[node.args[0]]
    return made[node.args[1]] if isinstance(made, tuple) else made
