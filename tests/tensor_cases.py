"""Programs that the tests of features, batch and experts over ranks share, and how their numbers are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from plait.frontends.build import build
from plait.frontends.load import load_spec
from plait.ir import Graph, Mesh, evaluate, ops, parse, simulate
from plait.passes import Remark, check_types
from plait.passes.samples import draw

from tests import programs

WIDE = {
    "name": "wide", "vocab": 64, "hidden": 20, "blocks": ["gdn", "attention", "mamba2", "kda", "mlp", "moe"],
    "gdn": {"key_heads": 2, "value_heads": 8, "key_dim": 4, "value_dim": 5},
    "attention": {"heads": 8, "kv_heads": 2, "head_dim": 6, "rope": {}, "gate": True, "qk_norm": True, "sinks": True,
                  "bias": True, "out_bias": True},
    "mamba2": {"heads": 8, "groups": 1, "state": 4, "head_dim": 3},
    "kda": {"heads": 4, "head_dim": 8}, "mlp": {"width": 12, "bias": True},
    "moe": {"experts": 4, "top_k": 2, "width": 8, "aux_loss": 0.01, "z_loss": 0.01, "shared_width": 12, "shared_gate": True},
}  # fmt: skip


def wide(task: str = "loss", packed: bool = False, training: bool = False, **fields: object) -> Graph:
    return build(load_spec({**WIDE, **fields}), task=task, dtype="f64", packed=packed, training=training)


def agree(before: Graph, after: Graph, *, gradients: bool = False) -> None:
    """Well typed, the same when read back, and the same numbers and gradients on ranks; with `gradients`, as IR too."""
    programs.agree(before, after)
    if gradients:
        programs.gradients_agree(before, programs.gradients(after))


def agree_on(before: Graph, after: Graph, mesh: Mesh, dim: str = "s") -> None:
    """The same loss, and the same gradients of every parameter, on a mesh of up to four ranks that split tokens or batch."""
    check_types(after)
    more = parse("def f(x: f64[b, s, 3]):\n    return x\n".replace(dim, f"{dim}@x@y", 1))
    sample = draw(before, (after, more))
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in sample.tensors.items()}
    inputs = [leaves[v.name] for v in before.inputs]
    wanted = [t for t in leaves.values() if t.requires_grad]
    was, now = evaluate(before, *inputs, params=leaves), simulate(after, mesh, *inputs, params=leaves)
    pairs = zip((was, *torch.autograd.grad(was, wanted)), (now, *torch.autograd.grad(now, wanted)), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in pairs)


def layer(model: Graph, name: str) -> Graph:
    return next(g for g in model.layers if g.name == name)


def moves(part: Graph) -> Counter[str]:
    """Exchanges between ranks; a shard moves nothing."""
    return Counter(n.op.name for n in part.nodes if n.op in ops.COLLECTIVES and n.op is not ops.shard)


def lines(said: Sequence[Remark], kind: str) -> list[str]:
    return [f"{r.what} {r.where}: {r.why}" for r in said if r.kind == kind]


def types(part: Graph) -> dict[str, str]:
    """Parameters and their types, without the dtype."""
    return {v.name: str(v.type)[str(v.type).index("[") :] for v in part.params}
