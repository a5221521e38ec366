"""Accuracy beside Liger: the same inputs through both sides' Triton kernels, interpreted, against float64.

    pip install liger-kernel==0.8.5
    python benchmarks/liger.py [--json PATH]

No GPU is needed: launches of both sides run in plait's interpreter, which checks every access. Errors are relative, in
the norm of all elements. What Liger has no kernel for (gated norms, decay gates, convolutions) is not here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plait.ir import DTYPES, Graph, TensorType, evaluate, parse, retype
from plait.ir.gradient import backward
from plait.lowering.gpu import load, run
from plait.lowering.rows import row_kernel
from plait.lowering.rows.launch import launch

Tensor = torch.Tensor
RESULTS = Path(__file__).parent / "results" / "liger-accuracy.json"
SHAPES = ((1, 64), (63, 128), (65, 1000), (130, 48), (3, 8192))  # rows, width
DTYPE_NAMES = ("f32", "bf16")
TEXTS = {
    "rms_norm": "x: {t}[s, {w}], w: {t}[{w}]): y = rms_norm(x, w); return y",
    "layer_norm": "x: {t}[s, {w}], w: {t}[{w}], v: {t}[{w}]): y = layer_norm(x, w, v); return y",
    "add_rms_norm": "x: {t}[s, {w}], d: {t}[s, {w}], w: {t}[{w}]): r = add(x, d); y = rms_norm(r, w); return y, r",
    "silu_mul": "a: {t}[s, {w}], b: {t}[s, {w}]): g = silu(a); y = mul(g, b); return y",
    "gelu_mul": "a: {t}[s, {w}], b: {t}[s, {w}]): g = gelu(a, approximate='tanh'); y = mul(g, b); return y",
}


@dataclass(frozen=True)
class Row:
    """One operation, shape and dtype: the largest relative error of each side, results and gradients."""

    name: str
    rows: int
    width: int
    dtype: str
    ours: float
    theirs: float
    ours_gradient: float
    theirs_gradient: float


# -- our side -----------------------------------------------------------------------------


def graph_of(name: str, width: int, dtype: str) -> Graph:
    return parse(f"@kernel\ndef {name}_kernel({TEXTS[name].format(t=dtype, w=width)}")


def interpreted(graph: Graph, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A row kernel's results, on the CPU."""
    kernel = row_kernel(graph)
    functions = load(kernel.source, kernel.name)

    def step(function: str, programs: int, arguments: Mapping[str, Any], warps: int) -> None:
        run(getattr(functions, function), programs, **arguments)

    return launch(kernel, xs, step)


def ours(graph: Graph, xs: Sequence[Tensor], dys: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients."""
    made = backward(graph)
    return [*interpreted(graph, xs)], [*interpreted(made.graph, [*(xs[i] for i in made.reads), *dys])]


# -- their side ---------------------------------------------------------------------------


@contextmanager
def interpreting() -> Generator[None]:
    """Launches of any Triton kernel run interpreted."""
    from triton.runtime.jit import JITFunction

    before = JITFunction.__getitem__
    JITFunction.__getitem__ = lambda kernel, grid: partial(run, kernel, grid)  # type: ignore[method-assign] # the one way in
    try:
        yield
    finally:
        JITFunction.__getitem__ = before  # type: ignore[method-assign]


def peers() -> dict[str, Callable[..., Any]]:
    """Liger's functions, called as ours are."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "gemma", False),
        "layer_norm": lambda x, w, v: LigerLayerNormFunction.apply(x, w, v, 1e-5),
        "add_rms_norm": lambda x, d, w: LigerFusedAddRMSNormFunction.apply(x, d, w, 1e-6, 0.0, "gemma", False),
        "silu_mul": lambda a, b: LigerSiLUMulFunction.apply(a, b),
        "gelu_mul": lambda a, b: LigerGELUMulFunction.apply(a, b),
    }


def differentiated(fn: Callable[..., Any], xs: Sequence[Tensor], dys: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients through autograd."""
    leaves = [x.clone().requires_grad_() for x in xs]
    made = fn(*leaves)
    results = [*made] if isinstance(made, tuple | list) else [made]
    return [y.detach() for y in results], [*torch.autograd.grad(results, leaves, [dy.clone() for dy in dys])]


# -- the table ----------------------------------------------------------------------------


def worst(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))


def row(name: str, rows: int, width: int, dtype: str, peer: Callable[..., Any]) -> Row:
    rng = torch.Generator().manual_seed(0)
    graph = graph_of(name, width, dtype)
    shapes = [[d.size if isinstance(d.size, int) else rows for d in v.type.dims] for v in (*graph.inputs, *graph.outputs)]
    tensors = [torch.randn(s, generator=rng, dtype=torch.float64).to(DTYPES[dtype]) for s in shapes]
    xs, dys = tensors[: len(graph.inputs)], tensors[len(graph.inputs) :]
    exact = retype(graph, [TensorType("f64", v.type.dims) for v in graph.inputs])
    want = differentiated(partial(evaluate, exact), [x.double() for x in xs], [d.double() for d in dys])
    mine = ours(graph, xs, dys)
    with interpreting():
        other = differentiated(peer, xs, dys)
    found = [worst(side[i], want[i]) for i in (0, 1) for side in (mine, other)]
    return Row(name, rows, width, dtype, *found)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, default=RESULTS, help=f"where the figures go (default {RESULTS.name})")
    path: Path = options.parse_args().json
    found = list[Row]()
    print(f"{'operation':14}{'rows x width':>14}{'':6}{'ours':>10}{'Liger':>10}{'gradient':>12}{'Liger':>10}")
    for name, peer in peers().items():
        for rows, width in SHAPES:
            for dtype in DTYPE_NAMES:
                print(f"{name} {rows} x {width} {dtype}", end="\r", file=sys.stderr)
                r = row(name, rows, width, dtype, peer)
                found.append(r)
                numbers = f"{r.ours:10.1e}{r.theirs:10.1e}{r.ours_gradient:12.1e}{r.theirs_gradient:10.1e}"
                print(f"{name:14}{f'{rows} x {width}':>14} {dtype:5}{numbers}")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([asdict(r) for r in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
