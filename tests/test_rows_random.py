"""Random kernel graphs: views, norms, gates, stencils and sums in any sequence, forward and backward, against float64."""

import random

import pytest
import torch
from plait.ir import Builder, Graph, Value, evaluate, ops, tensor_type
from plait.ir.gradient import backward
from plait.lowering.rows import Declined

from tests.row_cases import errors, exact, interpreted, operands

# Mild ops only: what is compared is the arithmetic, not how fast its errors grow.
ALONE = (
    ops.silu, ops.sigmoid, ops.tanh, ops.gelu, ops.softplus, ops.relu, ops.widen, ops.l2_norm,
    lambda x: ops.scale(x, by=0.7), lambda x: ops.shift(x, by=-0.3), lambda x: ops.softcap(x, cap=2.0),
    lambda x: ops.clamp(x, low=-1.0, high=1.5), lambda x: ops.rms_norm(x, eps=0.1), lambda x: ops.layer_norm(x, eps=0.1),
)  # fmt: skip


class Grower:
    """Grows one kernel graph over rows [b, s] of 12 or 24 columns, in one or several dims."""

    def __init__(self, seed: int) -> None:
        self.pick, self.b = random.Random(seed), Builder("grown", "kernel")
        self.width = self.pick.choice((12, 24))
        self.flat = [self.b.input(f"x{i}", tensor_type("f32", "b", "s", self.width)) for i in range(self.pick.randint(1, 3))]
        self.weight = self.b.input("w", tensor_type("f32", self.width))
        self.p = self.b.input("p", tensor_type("i64", "b", "s"))

    def grow(self) -> Graph:
        for _ in range(self.pick.randint(2, 7)):
            steps = (self.alone, self.alone, self.pair, self.column, self.heads, self.halves, self.row, self.taps)
            step = self.pick.choice(steps)
            self.flat.append(step(self.pick.choice(self.flat)))
        made = [v for v in self.flat if v not in self.b.inputs]
        results = self.pick.sample(made, min(len(made), self.pick.randint(1, 3)))
        return self.b.finish(results)

    def alone(self, x: Value) -> Value:
        return self.pick.choice(ALONE)(x)

    def pair(self, x: Value) -> Value:
        return self.pick.choice((ops.add, ops.mul, ops.sub))(x, self.pick.choice(self.flat))

    def column(self, x: Value) -> Value:
        return self.pick.choice((ops.add_bias, ops.scale_columns, ops.rms_norm))(x, self.weight)

    def heads(self, x: Value) -> Value:
        """Work on heads: a norm of each, or a turn."""
        h = self.pick.choice((2, 3))
        y = ops.reshape(x, pattern=f"... (h={h} d) -> ... h d")
        if self.pick.random() < 0.5 and (self.width // h) % 4 == 0:
            y = ops.rope(y, self.p, fraction=self.pick.choice((1.0, 0.5)), interleaved=self.pick.random() < 0.5)
        else:
            y = self.alone(y)
        return ops.reshape(y, pattern="... h d -> ... (h d)" if self.pick.random() < 0.8 else "... h d -> ... (d h)")

    def halves(self, x: Value) -> Value:
        """Parts of a row, each worked on, in another sequence."""
        n = self.pick.choice((4, self.width // 2))
        a, c = ops.split(x, sizes=(n, self.width - n))
        return ops.concat(self.alone(c), self.alone(a))

    def row(self, x: Value) -> Value:
        return ops.scale_rows(x, ops.sigmoid(ops.row_mean(self.pick.choice(self.flat))))

    def taps(self, x: Value) -> Value:
        """A short convolution whose taps are a view of the weight."""
        w = ops.reshape(self.weight, pattern="(c u=1) -> c u")
        pair = ops.concat(w, ops.scale(w, by=0.5))
        return ops.causal_conv1d(x, pair, act=self.pick.choice(("none", "silu")))[0]


def check(graph: Graph, seed: int) -> bool:
    """Hold one graph to 8 times the error of plain float32; False where it is declined."""
    sizes = {"b": 2, "s": 5}
    xs = operands(graph, sizes, seed)
    try:
        got = interpreted(graph, xs).results
    except Declined:
        return False
    plain = evaluate(graph, *xs)
    want = exact(graph, xs)
    floor = errors(plain if isinstance(plain, tuple) else (plain,), want)
    found = errors(got, want)
    assert all(a <= 8 * b + 2e-6 for a, b in zip(found, floor, strict=True)), (str(graph), found, floor)
    return True


@pytest.mark.parametrize("seed", range(40))
def test_random_kernels(seed: int) -> None:
    graph = Grower(seed).grow()
    check(graph, seed)
    if any(v.type.is_float for v in graph.inputs):
        check(backward(graph).graph, seed + 1)


def test_most_random_kernels_are_taken() -> None:
    taken = 0
    for seed in range(40):
        graph = Grower(seed).grow()
        for made in (graph, backward(graph).graph):
            try:
                from plait.lowering.rows import row_kernel

                row_kernel(made)
                taken += 1
            except Declined:
                pass
    assert taken > 60, taken


torch.set_num_threads(1)
