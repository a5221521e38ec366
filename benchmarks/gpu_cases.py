"""The cases of the GPU table: kernel graphs at real shapes, and what users run for them today, in torch and in Liger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from gpu_rules import Rule, rule_rows
from plait.ir import DTYPES, Graph, TensorType, parse
from plait.ir.gradient import Backward, backward
from plait.ir.sizes import value as size_value
from plait.lowering.gpu.report import kernel_bytes
from torch import Tensor

Results = Tensor | tuple[Tensor, ...]
Function = Callable[..., Results]


@dataclass(frozen=True)
class Case:
    """One kernel; `target` is the share of the floor to reach, forward and backward, where there is one."""

    id: str
    shape: str
    text: str
    plain: Function  # the plain expression, on the operands that `given` makes of the kernel's
    target: tuple[float | None, float | None]
    liger: Callable[[], Function] | None = None
    given: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list  # leaves all but the positions where they are
    as_op: bool = False  # ours is the torch op under torch.compile, not a bare launch
    quick: bool = False

    @property
    def graph(self) -> Graph:
        return parsed(self.text)

    @property
    def name(self) -> str:
        return self.graph.name + "_op" * self.as_op


@dataclass(frozen=True)
class Layer:
    """A whole layer, forward and backward; `target` is the ratio over the same torch code without row kernels."""

    id: str
    shape: str
    text: str
    target: float

    @property
    def graph(self) -> Graph:
        return parsed(self.text)

    @property
    def name(self) -> str:
        return self.graph.name


@cache
def parsed(text: str) -> Graph:
    return parse(text)


# -- the kernels --------------------------------------------------------------------------

NORM_GATE = """
@kernel
def norm_gate(z: bf16[b, s, 4096], o: bf16[b, s, 32, 128], w: bf16[128]):
    g = reshape(z, pattern='... (h=32 d) -> ... h d')
    n = rms_norm(o, w)
    a = silu(g)
    m = mul(n, a)
    y = reshape(m, pattern='b t h d -> b t (h d)')
    return y
"""
PREAMBLE = """
@kernel
def preamble(x: bf16[b, s, 8192], w: bf16[8192, 4]):
    y, final = causal_conv1d(x, w, act='silu')
    q, k, v = split(y, sizes=(2048, 2048, 4096))
    i = reshape(q, pattern='... (h=16 d) -> ... h d')
    j = reshape(k, pattern='... (h=16 d) -> ... h d')
    m = l2_norm(i)
    n = l2_norm(j)
    u = reshape(v, pattern='... (h=32 d) -> ... h d')
    return m, n, u
"""
CONV = """
@kernel
def conv_silu(x: bf16[b, s, 8192], w: bf16[8192, 4]):
    y, final = causal_conv1d(x, w, act='silu')
    return y
"""
ADD_NORM = """
@kernel
def add_norm_4096(x: bf16[b, s, 4096], d: bf16[b, s, 4096], w: bf16[4096]):
    r = add(x, d)
    y = rms_norm(r, w, eps=1e-05)
    return r, y
"""
ADD_NORM_CENTERED = """
@kernel
def add_norm_2048(x: bf16[b, s, 2048], d: bf16[b, s, 2048], w: bf16[2048]):
    r = add(x, d)
    y = rms_norm(r, w, zero_centered=True)
    return r, y
"""
SWIGLU = """
@kernel
def swiglu(x: bf16[b, s, 28672]):
    g, u = split(x, sizes=(14336, 14336))
    a = silu(g)
    y = mul(a, u)
    return y
"""
QK_ROPE_PART = """
@kernel
def qk_norm_rope_256(q: bf16[b, s, 16, 256], k: bf16[b, s, 2, 256], w: bf16[256], v: bf16[256], p: i64[b, s]):
    m = rms_norm(q, w, zero_centered=True)
    n = rms_norm(k, v, zero_centered=True)
    y = rope(m, p, theta=10000000.0, fraction=0.25)
    z = rope(n, p, theta=10000000.0, fraction=0.25)
    return y, z
"""
QK_ROPE = """
@kernel
def qk_norm_rope_128(q: bf16[b, s, 32, 128], k: bf16[b, s, 8, 128], w: bf16[128], v: bf16[128], p: i64[b, s]):
    m = rms_norm(q, w)
    n = rms_norm(k, v)
    y = rope(m, p, theta=500000.0)
    z = rope(n, p, theta=500000.0)
    return y, z
"""
GATES = """
@kernel
def gates(x: bf16[b, s, 32], dt_bias: f32[32], A_log: f32[32], z: bf16[b, s, 32]):
    h = widen(x)
    t = add_bias(h, dt_bias)
    d = softplus(t)
    a = neg_exp(A_log)
    y = scale_columns(d, a)
    g = sigmoid(z)
    return y, g
"""
GDN_LAYER = """
def gdn_layer(x: bf16[b, s, 2048], *, norm: bf16[2048] = constant(0.0), w_in: bf16[12352, 2048] = normal(0.02),
              conv: bf16[8192, 4] = uniform(-0.5, 0.5), dt_bias: f32[32] = constant(1.0),
              A_log: f32[32] = log_uniform(1.0, 16.0), out_norm: bf16[128] = constant(1.0),
              w_out: bf16[2048, 4096] = normal(0.02), norm2: bf16[2048] = constant(0.0),
              w_up: bf16[11264, 2048] = normal(0.02), w_down: bf16[2048, 5632] = normal(0.02)):
    n = rms_norm(x, norm, zero_centered=True)
    i = linear(n, w_in)
    mixed, z, b, a = split(i, sizes=(8192, 4096, 32, 32))
    c, final = causal_conv1d(mixed, conv, act='silu')
    q, k, v = split(c, sizes=(2048, 2048, 4096))
    q1 = reshape(q, pattern='... (h=16 d) -> ... h d')
    q2 = l2_norm(q1)
    k1 = reshape(k, pattern='... (h=16 d) -> ... h d')
    k2 = l2_norm(k1)
    v1 = reshape(v, pattern='... (h=32 d) -> ... h d')
    a1 = widen(a)
    a2 = add_bias(a1, dt_bias)
    a3 = softplus(a2)
    a4 = neg_exp(A_log)
    decay = scale_columns(a3, a4)
    beta = sigmoid(b)
    o, state = gated_delta_rule(q2, k2, v1, decay, beta, scale=0.08838834764831845)
    z1 = reshape(z, pattern='... (h=32 d) -> ... h d')
    o1 = rms_norm(o, out_norm)
    z2 = silu(z1)
    o2 = mul(o1, z2)
    o3 = reshape(o2, pattern='b t h d -> b t (h d)')
    delta = linear(o3, w_out)
    r = add(x, delta)
    n2 = rms_norm(r, norm2, zero_centered=True)
    h = linear(n2, w_up)
    g, u = split(h, sizes=(5632, 5632))
    g1 = silu(g)
    m = mul(g1, u)
    delta2 = linear(m, w_down)
    y = add(r, delta2)
    return y
"""

# -- operands -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A kernel's operands and cotangents at some number of tokens."""

    graph: Graph
    xs: Sequence[Tensor]
    dys: Sequence[Tensor]


def problem(graph: Graph, tokens: int, device: str) -> Problem:
    """The same numbers every time."""
    rng = torch.Generator(device).manual_seed(0)
    made = [random_tensor(v.type, tokens, rng) for v in (*graph.inputs, *graph.outputs)]
    return Problem(graph, made[: len(graph.inputs)], made[len(graph.inputs) :])


def random_tensor(type_: TensorType, tokens: int, rng: torch.Generator) -> Tensor:
    """Numbers of size one; whole numbers are positions."""
    shape = [size_value(d.size, {"b": 1, "s": tokens}) for d in type_.dims]
    if not type_.is_float:
        return torch.arange(shape[-1], device=rng.device).expand(shape).contiguous()
    return torch.randn(shape, generator=rng, device=rng.device).to(DTYPES[type_.dtype])


def gradient_of(graph: Graph) -> Backward:
    """The backward kernel that training runs: what is less to read of the results than of the operands is read."""
    return backward(graph, results=True)


def traffic(graph: Graph, mode: str, tokens: int) -> int:
    """Bytes that the kernel of a row reads and writes."""
    return kernel_bytes(graph if mode == "fwd" else gradient_of(graph).graph, {"b": 1, "s": tokens})


# -- the plain torch expressions ----------------------------------------------------------


def norm(x: Tensor, w: Tensor, eps: float = 1e-6, centered: bool = False) -> Tensor:
    """RMSNorm as the models write it: Llama's, or Qwen3-Next's zero-centered one."""
    h = x.float()
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (n * (1.0 + w.float())).to(x.dtype) if centered else w * n.to(x.dtype)


def norm_gate(z: Tensor, o: Tensor, w: Tensor) -> Tensor:
    gated = norm(o, w).float() * F.silu(z.unflatten(-1, o.shape[-2:]).float())
    return gated.to(o.dtype).flatten(-2)


def conv_silu(x: Tensor, w: Tensor) -> Tensor:
    """Shifted products, which Inductor makes one kernel of; a library's convolution would stand between two transposes."""
    t, taps = x.shape[1], w.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    return F.silu(sum(padded[:, i : i + t].float() * w[:, i].float() for i in range(taps))).to(x.dtype)  # type: ignore[arg-type] # not 0


def l2_norm(x: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def preamble(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (part.unflatten(-1, (-1, 128)) for part in conv_silu(x, w).split((2048, 2048, 4096), -1))
    return l2_norm(q), l2_norm(k), v


def add_norm(x: Tensor, d: Tensor, w: Tensor, eps: float = 1e-5, centered: bool = False) -> tuple[Tensor, ...]:
    r = x + d
    return r, norm(r, w, eps, centered)


def add_norm_centered(x: Tensor, d: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return add_norm(x, d, w, 1e-6, True)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Transformers' rotation of the first part of each head."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos.unsqueeze(2) + torch.cat([-b, a], -1) * sin.unsqueeze(2), rest], -1)


def qk_norm_rope(q: Tensor, k: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return rotated(norm(q, w), cos, sin), rotated(norm(k, v), cos, sin)


def qk_norm_rope_centered(q: Tensor, k: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return tuple(rotated(norm(x, weight, centered=True), cos, sin) for x, weight in ((q, w), (k, v)))


def tables(width: int, theta: float) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """Positions become tables of cosines and sines, which models make once for all layers."""

    def given(xs: Sequence[Tensor]) -> Sequence[Tensor]:
        q, p = xs[0], xs[-1]
        angle = p.double()[..., None] * theta ** (-torch.arange(0, width, 2, device=p.device).double() / width)
        whole = torch.cat([angle, angle], -1)
        return [*xs[:-1], whole.cos().to(q.dtype), whole.sin().to(q.dtype)]

    return given


def gates(x: Tensor, dt_bias: Tensor, a_log: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    return -a_log.exp() * F.softplus(x.float() + dt_bias), z.sigmoid()


# -- Liger's kernels, called on the same operands -----------------------------------------


def liger_add_norm(eps: float, centered: bool) -> Callable[[], Function]:
    def found() -> Function:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Fused

        offset, casting = (1.0, "gemma") if centered else (0.0, "llama")

        def call(x: Tensor, d: Tensor, w: Tensor) -> Results:
            y, r = Fused.apply(x, d, w, eps, offset, casting, False)
            return r, y

        return call

    return found


def liger_swiglu() -> Function:
    from liger_kernel.ops import swiglu as module

    packed = getattr(module, "LigerFusedGateUpSiLUMulFunction", None)  # of newer versions: it copies no half

    def call(x: Tensor) -> Results:
        flat = x.flatten(0, -2)
        y = packed.apply(flat) if packed is not None else module.LigerSiLUMulFunction.apply(*flat.chunk(2, -1))
        return y.unflatten(0, x.shape[:-1])

    return call


def liger_qk_norm_rope(centered: bool) -> Callable[[], Function]:
    """Two norms and a rotation, three launches; the rotation writes over the norms' results."""

    def found() -> Function:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Norm
        from liger_kernel.ops.rope import LigerRopeFunction as Rope

        offset, casting = (1.0, "gemma") if centered else (0.0, "llama")

        def call(q: Tensor, k: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Results:
            m, n = (Norm.apply(x, weight, 1e-6, offset, casting, False) for x, weight in ((q, w), (k, v)))
            y, z = Rope.apply(m.transpose(1, 2), n.transpose(1, 2), cos, sin)
            return y.transpose(1, 2), z.transpose(1, 2)

        return call

    return found


# -- the table ----------------------------------------------------------------------------

BEST, NORMS, CONVS = (0.88, 0.80), (0.80, None), (0.75, None)
CASES: tuple[Case, ...] = (
    Case("G3", "8192 x 32 x 128", NORM_GATE, norm_gate, NORMS, quick=True),
    Case("G3", "8192 x 32 x 128, as an op", NORM_GATE, norm_gate, NORMS, as_op=True),
    Case("G4", "8192 x 8192, 4 taps", PREAMBLE, preamble, CONVS, quick=True),
    Case("G4", "8192 x 8192, 4 taps", CONV, conv_silu, CONVS),
    Case("G5", "8192 x 4096", ADD_NORM, add_norm, BEST, liger_add_norm(1e-5, False), quick=True),
    Case("G5", "8192 x 2048", ADD_NORM_CENTERED, add_norm_centered, BEST, liger_add_norm(1e-6, True)),
    Case("G5", "8192 x 2 x 14336", SWIGLU, swiglu, BEST, liger_swiglu, quick=True),
    Case("G5", "8192, 16 q / 2 kv x 256", QK_ROPE_PART, qk_norm_rope_centered, BEST, liger_qk_norm_rope(True), tables(64, 1e7)),
    Case("G5", "8192, 32 q / 8 kv x 128", QK_ROPE, qk_norm_rope, BEST, liger_qk_norm_rope(False), tables(128, 5e5)),
    Case("gates", "8192 x 32", GATES, gates, (None, None)),
)
LAYERS: tuple[Layer, ...] = (Layer("G8", "8192 x 2048, MLP 5632", GDN_LAYER, 1.3),)
MODES, LAYER_MODES = ("fwd", "bwd"), ("fwd", "fwd+bwd")
Row = tuple[Case | Layer | Rule, str]


def rows() -> dict[str, Row]:
    """Every row of the table by its key, in order."""
    pairs = [(case, mode) for case in CASES for mode in MODES] + [(layer, mode) for layer in LAYERS for mode in LAYER_MODES]
    return {**{f"{case.name}:{mode}": (case, mode) for case, mode in pairs}, **rule_rows()}
