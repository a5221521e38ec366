"""The whole grid that recurrence kernels are held to; the tests take a sample of it.

python -m tests.recurrent_grid numbers [--every 20]      interpreted, against float64: values and gradients
python -m tests.recurrent_grid targets [--every 1]       compiled ahead of time: no spills, shared memory
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from plait.ir import DTYPES, ops, parse
from plait.lowering.gpu import TARGETS, CompileError, compile_all, resources
from plait.lowering.recurrent import launches

from tests.test_recurrent_kernels import FORMS, GATES, error, operands, results

LIMITS = {"f32": 3e-6, "bf16": 1e-2, "f16": 1e-2}
SIZES = ((16, 16), (64, 64), (128, 128), (256, 256), (128, 64), (64, 128), (16, 256))
DECAY = 5  # o, final, and the gradients of q, k and v stand in front of its gradient
T = TypeVar("T")


@dataclass(frozen=True)
class Numbers:
    """One call, interpreted."""

    name: str
    tokens: int
    width: int
    grouped: int
    dtype: str

    def worst(self) -> float:
        """The largest relative error of a value or a gradient, as a part of what is allowed.

        A decay's gradient adds up as many terms of either sign as a state has: it is held to what they are together, and not
        to a sum that is next to nothing by chance.
        """
        xs = operands(self.name, self.tokens, r=self.grouped, k=self.width, v=self.width, dtype=DTYPES[self.dtype])
        got = results(FORMS[self.name], xs)
        want = results(getattr(ops, self.name).reference, [x.double() for x in xs])
        found = [error(a, b) for a, b in zip(got, want, strict=True)]
        if GATES[self.name][0] in ("head", "slope"):
            apart = self.apart([x.double() for x in xs])
            found[DECAY] *= float(want[DECAY].norm() / want[DECAY].norm().maximum(apart.norm()))
        return max(found) / LIMITS[self.dtype]

    def apart(self, xs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The gradient of the decay of every key channel, as if each had its own."""
        q, k, v, decay, *rest, state = xs
        channels = decay.expand(*v.shape[:3])[..., None].expand(*v.shape[:3], self.width)
        name = "kimi_delta_attention" if self.name == "gated_delta_rule" else "gated_linear_attention"
        if self.name == "ssd":
            v, rest = v * rest[0][..., None], []
        found = results(getattr(ops, name).reference, [q, k, v, channels, *rest, state])[DECAY]
        return found.sum((0, 1)) if GATES[self.name][0] == "slope" else found


@dataclass(frozen=True)
class Compiled:
    """All kernels of one member for one target."""

    name: str
    target: str
    dtype: str
    k: int
    v: int

    def faults(self) -> list[str]:
        """Kernels that spill, do not fit, or do not compile."""
        found = compile_all([x.job for x in launches(parse(self.text).nodes[0], self.target)])
        return [why for c in found if (why := str(c) if isinstance(c, CompileError) else _fault(c))]

    @property
    def text(self) -> str:
        """A program of this member alone: two value heads for each key head."""
        axes, beta, _ = GATES[self.name]
        key, value = (f"{self.dtype}[b, s, {n}, {w}]" for n, w in ((2, self.k), (4, self.v)))
        gate = {"": "", "head": "f32[b, s, 4]", "channel": f"f32[b, s, 4, {self.k}]", "slope": "f32[4]"}[axes]
        given = {"q": key, "k": key, "v": value} | ({"g": gate} if gate else {}) | ({"w": "f32[b, s, 4]"} if beta else {})
        declared = ", ".join(f"{n}: {t}" for n, t in given.items())
        return f"def f({declared}): o, final = {self.name}({', '.join(given)}); return o, final"


def _fault(c: object) -> str:
    from plait.lowering.gpu import Compiled as Code

    assert isinstance(c, Code)
    used = resources(c)
    fits = not used.spills and not used.stack and c.shared <= TARGETS[c.target].shared
    return "" if fits else f"{c.name}: {used.spills} spills, {used.stack} bytes of stack, {c.shared} shared"


NUMBERS = [Numbers(*case) for case in product(GATES, (1, 63, 65, 100, 130), (16, 64, 128, 256), (1, 2), LIMITS)]
COMPILED = [
    Compiled(name, target, dtype, k, v)
    for name, target, dtype, (k, v) in product(GATES, TARGETS, ("f32", "bf16", "f16"), SIZES)
]


def sample(cases: Sequence[T], every: int) -> list[T]:
    """Some cases, spread over all."""
    return [*cases[every // 2 :: every]]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("numbers", "targets"))
    options.add_argument("--every", type=int, default=1, help="take one case of so many")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    bad = 0
    tried: Sequence[Numbers | Compiled] = sample(NUMBERS if chosen.what == "numbers" else COMPILED, chosen.every)
    for case in tried:
        said, wrong = _said(case)
        bad += wrong
        print(f"{'FAILS ' if wrong else ''}{case}: {said}", flush=True)
    print(f"{len(tried) - bad} of {len(tried)} hold")
    return min(bad, 1)


def _said(case: Numbers | Compiled) -> tuple[str, bool]:
    if isinstance(case, Numbers):
        part = case.worst()
        return f"{part:.2f} of what is allowed", part >= 1
    faults = case.faults()
    return "; ".join(faults) or "fits", bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
