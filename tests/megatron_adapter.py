"""Plait's orders and mixers under the call shapes of the golden-case checker: `check.py --megatron tests.megatron_adapter`.

Layers are the product's own, run as they are and on pretend meshes in several ways; the answer is the one furthest from that
of one device, so that a checker sees the worst of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from plait.frontends.layers import MIXERS, Layer
from plait.frontends.load import load_spec
from plait.ir import (
    DTYPES,
    ZEROS,
    Builder,
    Graph,
    Node,
    Replay,
    Value,
    arranged,
    evaluate,
    natural,
    ops,
    parameters,
    parse_mesh,
    simulate,
    tensor_type,
)
from plait.ir.orders import permutation
from plait.passes import place

Tensor = torch.Tensor
Change = Callable[[Replay, Node, "list[Value | None]"], Sequence[Value] | None]

# -- orders -----------------------------------------------------------------------------------


def cp_order(length: int, cp: int, cu: Sequence[int] | None = None) -> Tensor:
    """Where the tokens that ranks hold, one rank's after another's, stand in the natural order."""
    order = f"zigzag({cp})" if cu is None else f"zigzag({cp},packed)"
    return permutation(order, length, None if cu is None else torch.tensor(cu))


def head_perm(split_sections: Sequence[int], cp: int) -> Tensor:
    """Features so permuted that a plain all-to-all gives each rank its share of every section."""
    return permutation(f"sections({cp},{','.join(map(str, split_sections))})", sum(split_sections))


# -- placements -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a layer is placed."""

    mesh: str
    recurrence: str
    order: str


def ways(lengths: Sequence[int], packed: bool) -> list[Way]:
    """All ways on two ranks in natural order and in Megatron's, two of them on four, where sequences divide into chunks."""
    zigzag = "zigzag-packed" if packed else "zigzag"
    two = [Way("cp=2", way, order) for way in ("heads", "states", "scan", "chain") for order in ("natural", zigzag)]
    four = [Way("cp=4", "heads", zigzag), Way("cp=4", "chain", zigzag)]
    return [way for way in (*two, *four) if all(n % (2 * int(way.mesh.removeprefix("cp="))) == 0 for n in lengths)]


def placed(graph: Graph, way: Way, x: Tensor, cu: Tensor | None, params: Mapping[str, Tensor]) -> Tensor:
    """The layer on a pretend mesh; tokens are given and come back in their natural order."""
    made, _ = place(graph, mesh=way.mesh, recurrence=way.recurrence, order=way.order)
    given = [arranged(x, made.inputs[0].type, cu), *([cu] if cu is not None else [])]
    return natural(simulate(made, parse_mesh(way.mesh), *given, params=params), made.outputs[0].type, cu)


def everywhere(graph: Graph, x: Tensor, cu: Tensor | None, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer's result on one device, and in every way."""
    inputs = [x, *([cu] if cu is not None else [])]
    found = {"one device": evaluate(graph, *inputs, params=params)}
    lengths = [x.shape[1]] if cu is None else cu.diff().tolist()
    for way in ways(lengths, cu is not None):
        found[f"{way.mesh} {way.recurrence} {way.order}"] = placed(graph, way, x, cu, params)
    return found


def furthest(found: Mapping[str, Tensor]) -> Tensor:
    one = found["one device"]
    return max(found.values(), key=lambda y: float((y.double() - one.double()).norm()) if y.isfinite().all() else torch.inf)


# -- layers -----------------------------------------------------------------------------------


def mixer(kind: str, fields: Mapping[str, Any], hidden: int, dtype: str, eps: float, packed: bool) -> Graph:
    """`x -> mixer(x)` of one kind, as the frontend builds it."""
    spec = load_spec({"name": "layer", "vocab": 2, "hidden": hidden, "norm_eps": eps, "blocks": [kind], kind: dict(fields)})
    b = Builder(kind)
    x = b.input("x", tensor_type(dtype, "b", "s", hidden))
    shared = {"cu": b.input("cu", tensor_type("i64", "n+1"))} if packed else {}
    made = MIXERS[kind](Layer(b, spec, dtype, shared), x, spec.blocks[0])
    assert isinstance(made, Value)
    return b.finish([made])


def varied(graph: Graph, change: Change) -> Graph:
    """The layer with some of its nodes changed, where a spec does not speak of it."""
    replay = Replay(graph)
    return replay.run(lambda node, inputs: change(replay, node, inputs))


def with_conv_bias(replay: Replay, node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
    if not node.is_op("causal_conv1d"):
        return None
    x, w, _, *rest = inputs
    assert w is not None
    bias = replay.builder.param("conv_bias", tensor_type(w.type.dtype, w.type.dims[0].size), ZEROS)
    return replay.builder.emit(node.op, [x, w, bias, *rest], node.attrs)


def with_wide_skip(replay: Replay, node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
    """The skip beside the recurrence has a number for every channel instead of every head."""
    if not node.is_op("scale_heads"):
        return None
    x, _ = inputs
    assert x is not None
    heads, width = (int(d.size) for d in x.type.dims[2:])
    wide = replay.builder.param("D_wide", tensor_type("f64" if x.type.dtype == "f64" else "f32", heads * width), ZEROS)
    flat = ops.scale_columns(ops.reshape(x, pattern="b t h d -> b t (h d)"), wide)
    return [ops.reshape(flat, pattern=f"b t (h={heads} d) -> b t h d")]


def without_norm(replay: Replay, node: Node, inputs: list[Value | None]) -> Sequence[Value] | None:
    return [x for x in inputs[:1] if x is not None] if node.is_op("rms_norm") else None


def run(graph: Graph, given: Mapping[str, Tensor], hidden: Tensor, cu: Sequence[int] | None) -> Tensor:
    """The worst of all placements; `hidden` and the result are [tokens, batch, features]."""
    types = parameters(graph)
    params = {name: given[name].reshape(_shape(type_.shape)).to(DTYPES[type_.dtype]) for name, (type_, _) in types.items()}
    borders = None if cu is None else torch.tensor(cu)
    return furthest(everywhere(graph, hidden.transpose(0, 1).contiguous(), borders, params)).transpose(0, 1)


def _shape(sizes: Sequence[int | str]) -> list[int]:
    return [int(n) for n in sizes]


def _dtype(x: Tensor) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == x.dtype)


def _known(params: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Megatron's parameters under the names that they have here."""
    return {ours: params[theirs] for ours, theirs in names.items() if theirs in params}


GDN = {
    "w_in": "in_proj.weight", "conv": "conv1d.weight", "conv_bias": "conv1d.bias", "A_log": "A_log", "dt_bias": "dt_bias",
    "out_norm": "out_norm.weight", "w_out": "out_proj.weight",
}  # fmt: skip
MAMBA2 = {**GDN, "out_norm": "norm.weight", "D": "D", "D_wide": "D"}


def gdn_forward(
    params: Mapping[str, Tensor], hidden: Tensor, num_key_heads: int, num_value_heads: int, key_dim: int, value_dim: int,
    eps: float, zero_centered: bool, cu: Sequence[int] | None, conv_bias: bool,
) -> Tensor:  # fmt: skip
    """Gated delta net: q | k | v | z | beta | alpha; a zero-centered norm's weight is stored less one."""
    fields = {"key_heads": num_key_heads, "value_heads": num_value_heads, "key_dim": key_dim, "value_dim": value_dim}
    graph = mixer("gdn", fields, hidden.shape[-1], _dtype(hidden), eps, cu is not None)
    given = _known(params, GDN)
    if zero_centered:
        given["out_norm"] = given["out_norm"] + 1
    return run(varied(graph, with_conv_bias) if conv_bias else graph, given, hidden, cu)


def mamba_forward(
    params: Mapping[str, Tensor], hidden: Tensor, nheads: int, headdim: int, ngroups: int, d_state: int, eps: float,
    rmsnorm: bool, cu: Sequence[int] | None, D_has_hdim: bool,
) -> Tensor:  # fmt: skip
    """Mamba-2: z | x | B | C | dt; gate, then a norm of every group."""
    fields = {"heads": nheads, "head_dim": headdim, "groups": ngroups, "state": d_state}
    graph = mixer("mamba2", fields, hidden.shape[-1], _dtype(hidden), eps, cu is not None)
    unread = {"D": hidden.new_zeros(nheads), "out_norm": hidden.new_ones(nheads * headdim)}
    given = {**unread, **_known(params, MAMBA2), **({"D": unread["D"]} if D_has_hdim else {})}
    if D_has_hdim:
        graph = varied(graph, with_wide_skip)
    if not rmsnorm:
        graph = varied(graph, without_norm)
    return run(graph, given, hidden, cu)
