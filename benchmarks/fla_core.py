"""Accuracy beside flash-linear-attention: the same inputs through both sides' Triton kernels, interpreted, against float64.

    pip install --no-deps fla-core==0.6.0 einops
    python benchmarks/fla_core.py [--json PATH] [--quick]

No GPU is needed: launches of both sides run in plait's interpreter, which checks every access; tuned kernels take their first
configuration. Errors are relative, in the norm of all elements; the largest of the results, and the largest of the gradients.
The interpreter multiplies float32 exactly for both sides, whatever precision a kernel asks of tensor cores. Rows are kept as
they are made. The peer of `ssd` is simple_gla, the same recurrence with a dt of one; mamba-ssm's kernels are not at hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plait.ir import DTYPES, ops
from plait.ir.files import write_text
from plait.lowering.gpu import run
from plait.lowering.recurrent import faces

Tensor = torch.Tensor
RESULTS = Path(__file__).parent / "results" / "fla-accuracy.json"
SHAPES = ((63, 64, 1), (65, 128, 1), (100, 32, 2))  # tokens, channels of a head, value heads for each key head
DTYPE_NAMES = ("f32", "bf16")
SCALE = 0.125
HALF_ONLY = ("delta_rule",)  # in fla
MEMBERS = {  # gates beside q, k and v, and whether the peer takes grouped heads
    "gated_delta_rule": ("decay beta", True),
    "kimi_delta_attention": ("channel beta", False),
    "delta_rule": ("beta", False),
    "gated_linear_attention": ("channel", False),
    "ssd": ("decay one", False),
}


@dataclass(frozen=True)
class Row:
    """One operation, shape and dtype: the largest relative error of each side, results and gradients."""

    name: str
    tokens: int
    channels: int
    grouped: int
    dtype: str
    ours: float
    theirs: float
    ours_gradient: float
    theirs_gradient: float


@contextmanager
def interpreting() -> Generator[None]:
    """Launches of any Triton kernel run interpreted, tuned ones in their first configuration."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, Autotuner.run
    JITFunction.run, Autotuner.run = _run, _first  # type: ignore[method-assign] # the one way in
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = before  # type: ignore[method-assign]


def _run(
    kernel: Any, *args: Any, grid: Any, warmup: bool = False, num_warps: int = 0, num_stages: int = 0, **named: Any
) -> Any:  # fmt: skip
    bound = {**dict(zip(kernel.arg_names, args, strict=False)), **named}
    return run(kernel, grid(bound) if callable(grid) else grid, *args, **named)


def _first(tuner: Any, *args: Any, **named: Any) -> Any:
    tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
    return tuner.fn.run(*args, **{**named, **tuner.configs[0].all_kwargs()})


def peers() -> dict[str, Callable[..., Any]]:
    """fla's functions, called as ours are."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.simple_gla import chunk_simple_gla

    named: dict[str, Any] = {"scale": SCALE, "output_final_state": True}
    return {
        "gated_delta_rule": lambda q, k, v, g, b, s: chunk_gated_delta_rule(q, k, v, g, b, initial_state=s, **named),
        "kimi_delta_attention": lambda q, k, v, g, b, s: chunk_kda(q, k, v, g, b, initial_state=s, **named),
        "delta_rule": lambda q, k, v, b, s: chunk_delta_rule(q, k, v, b, initial_state=s, **named),
        "gated_linear_attention": lambda q, k, v, g, s: chunk_gla(q, k, v, g, initial_state=s, **named),
        "ssd": lambda q, k, v, g, b, s: chunk_simple_gla(q, k, v, g, initial_state=s, **named),
    }


def operands(name: str, tokens: int, width: int, grouped: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v in `dtype`; gates and the state to begin with in float32."""
    rng = torch.Generator().manual_seed(0)
    heads, gates = 2 * grouped, MEMBERS[name][0].split()
    q, k = torch.randn(2, 1, tokens, 2, width, generator=rng)
    v = torch.randn(1, tokens, heads, width, generator=rng)
    made = {
        "decay": -torch.rand(1, tokens, heads, generator=rng),
        "channel": -torch.rand(1, tokens, heads, width, generator=rng),
        "beta": torch.rand(1, tokens, heads, generator=rng),
        "one": torch.ones(1, tokens, heads),
    }
    key = torch.nn.functional.normalize(k, dim=-1)
    state = torch.randn(1, heads, width, width, generator=rng)
    return [*(x.to(dtype) for x in (q, key, v)), *(made[g] for g in gates), state]


def differentiated(fn: Callable[..., Any], xs: Sequence[Tensor], dys: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients through autograd; an operand that the peer does not read has none."""
    leaves = [x.clone().requires_grad_() for x in xs]
    results = [y for y in fn(*leaves) if isinstance(y, Tensor)][:2]
    given = [d.to(y.dtype) for d, y in zip(dys, results, strict=True)]
    grads = torch.autograd.grad(results, leaves, given, allow_unused=True)
    return [y.detach() for y in results], [torch.zeros_like(x) if g is None else g for x, g in zip(xs, grads, strict=True)]


def worst(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))


def row(name: str, shape: tuple[int, int, int], dtype: str, peer: Callable[..., Any]) -> Row:
    xs = operands(name, *shape, DTYPES[dtype])
    rng = torch.Generator().manual_seed(1)
    dys = [torch.randn(y.shape, generator=rng).to(torch.bfloat16) for y in (xs[2], xs[-1])]
    want = differentiated(partial(getattr(ops, name).reference, scale=SCALE), [x.double() for x in xs], dys)
    mine = differentiated(partial(faces(interpreted=True)[name], scale=SCALE), xs, dys)
    with interpreting():
        other = differentiated(peer, xs, dys)
    read = [i for i in range(len(xs)) if not (name == "ssd" and i == 4)]  # their kernel has no dt
    exact = want[0], [want[1][i] for i in read]
    sides = [(side[0], [side[1][i] for i in read]) for side in (mine, other)]
    found = [worst(side[part], exact[part]) for part in (0, 1) for side in sides]
    return Row(name, *shape, dtype, *found)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, default=RESULTS, help=f"where the figures go (default {RESULTS.name})")
    options.add_argument("--quick", action="store_true", help="the first shape alone; nothing is kept")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    found = list[Row]()
    print(f"{'operation':24}{'tokens x channels':>18}{'':8}{'ours':>10}{'fla':>10}{'gradient':>12}{'fla':>10}")
    for name, peer in peers().items():
        for shape in SHAPES[:1] if chosen.quick else SHAPES:
            if shape[2] > 1 and not MEMBERS[name][1]:
                continue
            for dtype in DTYPE_NAMES[name in HALF_ONLY :]:
                r = row(name, shape, dtype, peer)
                found.append(r)
                numbers = f"{r.ours:10.1e}{r.theirs:10.1e}{r.ours_gradient:12.1e}{r.theirs_gradient:10.1e}"
                print(f"{name:24}{f'{shape[0]} x {shape[1]} x{shape[2]}':>18} {dtype:7}{numbers}", flush=True)
                if not chosen.quick:
                    write_text(chosen.json, json.dumps([asdict(r) for r in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
