"""Kernel graphs as text, and how row kernels of them are run by the interpreter with every access watched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from plait.ir import DTYPES, Graph, TensorType, evaluate, parse, retype
from plait.ir.gradient import backward
from plait.ir.sizes import value as size_value
from plait.lowering.gpu import Traffic, load, run, watch
from plait.lowering.rows import RowKernel, row_kernel
from plait.lowering.rows.launch import launch

Tensor = torch.Tensor

# W is the width of a row; kernels with heads have 4 of W / 4.
NORMS = """
@kernel
def norms(x: f32[b, s, W], z: f32[b, s, W], w: f32[W], v: f32[W]):
    r = add(x, z)
    n = rms_norm(r, w, zero_centered=True)
    m = layer_norm(z, v, w)
    k = l2_norm(m)
    y = mul(n, k)
    return r, y
"""
NORM_GATE = """
@kernel
def norm_gate(o: f32[b, s, 4, W//4], w: f32[W//4], z: f32[b, s, W]):
    g = reshape(z, pattern='... (h=4 d) -> ... h d')
    n = rms_norm(o, w)
    a = silu(g)
    m = mul(n, a)
    y = reshape(m, pattern='... h d -> ... (h d)')
    return y
"""
GROUPED = """
@kernel
def grouped(o: f32[b, s, 4, W//4], x: f32[b, s, 4, W//4], D: f32[4], z: f32[b, s, W], w: f32[W]):
    d = scale_heads(x, D)
    a = add(o, d)
    r = reshape(a, pattern='... h d -> ... (h d)')
    g = silu(z)
    m = mul(r, g)
    y = rms_norm(m, w, groups=2)
    return y
"""
ACTIVATIONS = """
@kernel
def activations(x: f32[b, s, W], y: f32[b, s, W], w: f32[W]):
    a = gelu(x)
    c = gelu(y, approximate='tanh')
    d = mul(a, c)
    e = relu2(y)
    f = relu(x)
    g = softplus(e)
    h = softcap(g, cap=5.0)
    i = clamp(h, low=0.25, high=4.0)
    j = sigmoid(f)
    k = mul(i, j)
    l = add(d, k)
    m = scale(l, by=1.5)
    n = add_bias(m, w)
    return n, h
"""
GLU = """
@kernel
def glu(x: f32[b, s, 2*W]):
    g, u = split(x, sizes=(W, W))
    a = silu(g)
    y = mul(a, u)
    return y
"""
GATES = """
@kernel
def gates(x: f32[b, s, W], bias: f32[W], A_log: f32[W], z: f32[b, s, W], r: f32[b, s, 1]):
    h = widen(x)
    t = add_bias(h, bias)
    d = softplus(t)
    a = neg_exp(A_log)
    y = scale_columns(d, a)
    g = sigmoid(z)
    q = sigmoid(r)
    e = reshape(q, pattern='... u=1 -> ...')
    k = scale_rows(g, e)
    return y, k
"""
CONV = """
@kernel
def conv(x: f32[b, s, W], w: f32[W, 4], bias: f32[W], state: f32[b, W, 3]):
    y, final = causal_conv1d(x, w, bias, state, act='silu')
    z, last = causal_conv1d(y, w)
    return z, final
"""
PREAMBLE = """
@kernel
def preamble(x: f32[b, s, 2*W], w: f32[2*W, 4]):
    y, final = causal_conv1d(x, w, act='silu')
    q, k = split(y, sizes=(W, W))
    i = reshape(q, pattern='... (h=4 d) -> ... h d')
    j = reshape(k, pattern='... (h=4 d) -> ... h d')
    m = l2_norm(i)
    return m, j
"""
QKV = """
@kernel
def qkv(x: f32[b, s, 2*W+W//4], w: f32[W//4], p: i64[b, s]):
    q, g, k = split(x, sizes=(W, W, W//4))
    i = reshape(q, pattern='... (h=4 d) -> ... h d')
    j = reshape(k, pattern='... (h=1 d) -> ... h d')
    m = rms_norm(i, w, zero_centered=True)
    n = rms_norm(j, w)
    o = rope(m, p, fraction=0.5)
    r = rope(n, p, interleaved=True, scaling=(8.0, 1.0, 5.0, 0.0), amplitude=1.25)
    t = rope(i, p, fraction=0.5, scaling=(8.0, 1.0, 4.0, 64.0), inverse=True)
    return o, g, r, t
"""
# name -> text, and the widths that its reshapes allow; a norm of one number has a gradient of nothing but rounding
CASES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "norms": (NORMS, (1, 48, 64, 128, 1000)), "norm_gate": (NORM_GATE, (8, 48, 64, 128, 1000)),
    "grouped": (GROUPED, (8, 48, 64, 128, 1000)), "activations": (ACTIVATIONS, (1, 48, 64, 128, 1000)),
    "glu": (GLU, (1, 48, 64, 128, 1000)), "gates": (GATES, (1, 48, 64, 128, 1000)), "conv": (CONV, (1, 48, 64, 128, 1000)),
    "preamble": (PREAMBLE, (8, 48, 64, 128, 1000)), "qkv": (QKV, (16, 48, 64, 128, 160)),
}  # fmt: skip
ROWS = ((1, 1), (1, 63), (5, 13), (4, 25), (2, 65))  # batch, tokens: 1, 63, 65, 100, 130 rows


def graph_of(text: str, width: int, dtype: str = "f32") -> Graph:
    """The kernel graph of a text at a width, its floats of a dtype."""
    for old, new in (("2*W+W//4", 2 * width + width // 4), ("2*W", 2 * width), ("W//4", width // 4), ("W", width)):
        text = text.replace(old, str(new))
    return typed(parse(text), dtype)


def typed(graph: Graph, dtype: str) -> Graph:
    """The same graph over floats of another dtype."""
    return retype(graph, [TensorType(dtype if v.type.is_float else v.type.dtype, v.type.dims) for v in graph.inputs])


def operands(graph: Graph, sizes: Mapping[str, int], seed: int = 0) -> list[Tensor]:
    """Random operands; whole numbers are positions."""
    rng = torch.Generator().manual_seed(seed)
    made = list[Tensor]()
    for v in graph.inputs:
        shape = [size_value(d.size, sizes) for d in v.type.dims]
        if v.type.is_float:
            made.append(torch.randn(shape, generator=rng, dtype=torch.float64).to(DTYPES[v.type.dtype]))
        else:
            made.append(torch.arange(shape[-1]).expand(shape) + 3)
    return made


@dataclass(frozen=True)
class Ran:
    """What a kernel gave, and what it touched."""

    kernel: RowKernel
    results: tuple[Tensor, ...]
    traffic: Traffic


def interpreted(graph: Graph, xs: Sequence[Tensor]) -> Ran:
    """A kernel's results: buffers start as NaN, and an access outside of an operand is an error."""
    kernel = row_kernel(graph)
    functions, seen = load(kernel.source, kernel.name), set[int]()
    named = {f"p_x{i}": x for i, x in enumerate(xs)}

    def step(function: str, programs: int, arguments: Mapping[str, Any], warps: int) -> None:
        for name, x in arguments.items():
            if name.startswith(("p_y", "p_s")) and x.data_ptr() not in seen:
                seen.add(x.data_ptr())
                x.fill_(float("nan"))
        run(getattr(functions, function), programs, **arguments, num_warps=warps)

    with watch(named) as traffic:
        results = launch(kernel, xs, step)
    return Ran(kernel, results, traffic)


def exact(graph: Graph, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The graph's own meaning in float64."""
    made = evaluate(typed(graph, "f64"), *[x.double() if x.is_floating_point() else x for x in xs])
    return made if isinstance(made, tuple) else (made,)


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """The relative error of each result, in the norm of all its elements; NaN stays NaN."""
    return [
        float((a.double() - w).norm() / w.norm().clamp_min(1e-30)) if w.numel() else 0.0 for a, w in zip(got, want, strict=True)
    ]


def gradient_of(graph: Graph, xs: Sequence[Tensor], sizes: Mapping[str, int]) -> tuple[Graph, list[Tensor]]:
    """The backward kernel of a graph, and operands for it: those it reads, and random cotangents."""
    made = backward(graph)
    fresh = operands(made.graph, sizes, seed=1)
    return made.graph, [*(xs[i] for i in made.reads), *fresh[len(made.reads) :]]
