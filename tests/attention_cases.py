"""Attention over split tokens, in many shapes: programs of one device and of ranks, and how their numbers are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from plait.ir import evaluate, parse, parse_mesh, simulate

Tensor = torch.Tensor
F64 = torch.float64
WAYS = ("kv", "ring")


@dataclass(frozen=True)
class Given:
    """One attention: its sizes, its packed segments, its options."""

    ranks: int = 2
    tokens: int = 12
    order: str = ""  # of zigzag, whether there is one and whether it is that of segments: '', 'zigzag' or 'packed'
    batch: int = 1
    heads: tuple[int, int] = (4, 2)
    widths: tuple[int, int] = (5, 3)
    cu: tuple[int, ...] = ()
    sinks: bool = False
    options: str = ""

    @property
    def said(self) -> str:
        """The order as types say it."""
        return {"": "", "zigzag": f"zigzag({self.ranks})", "packed": f"zigzag({self.ranks},packed)"}[self.order]


def named(given: Given) -> str:
    """What follows q, k and v."""
    return "".join([", sinks" * given.sinks, ", cu=cu" * bool(given.cu), given.options and f", {given.options}"])


def program(given: Given, lines: Sequence[str]) -> str:
    (h, g), (d, e) = given.heads, given.widths
    inputs = f"q: f64[b, s, {h}, {d}], k: f64[b, s, {g}, {d}], v: f64[b, s, {g}, {e}]"
    inputs += f", sinks: f64[{h}]" * given.sinks + ", cu: i64[n]" * bool(given.cu)
    return f"def f({inputs}):\n" + "".join(f"    {line}\n" for line in lines)


def whole(given: Given) -> str:
    """The program of one device."""
    return program(given, [f"y = attention(q, k, v{named(given)})", "return y"])


def split(given: Given, way: str) -> str:
    """The same, which puts tokens in order, splits them, and gives the whole result in natural order."""
    said, cu, lines = given.said, ", cu" * bool(given.cu), list[str]()
    for x in "qkv":
        lines += [f"{x}0 = reorder({x}{cu}, dim=1, order='{said}')", f"{x}1 = shard({x}0, axis='cp', dim=1)"]
    lines += [f"o1 = attention(q1, k1, v1{named(given)}, over='cp', by='{way}', order='{said}')"]
    lines += ["o2 = all_gather(o1, axis='cp', dim=1)", f"y = reorder(o2{cu}, dim=1, was='{said}')", "return y"]
    return program(given, lines)


def tensors(given: Given) -> list[Tensor]:
    (h, g), (d, e), b, s = given.heads, given.widths, given.batch, given.tokens
    shapes = [(b, s, h, d), (b, s, g, d), (b, s, g, e), *([(h,)] if given.sinks else [])]
    drawn = [torch.randn(shape, dtype=F64).requires_grad_() for shape in shapes]
    return [*drawn, *([torch.tensor(given.cu)] if given.cu else [])]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def with_gradients(y: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    floats = [x for x in leaves if x.is_floating_point()]
    weight = torch.arange(1.0, y.numel() + 1, dtype=F64).sin().view(y.shape)
    return [y, *torch.autograd.grad((y * weight).sum(), floats)]


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def check(given: Given, way: str) -> None:
    """The split program means what one device computes, and so do its gradients."""
    leaves = tensors(given)
    one = with_gradients(evaluate(parse(whole(given)), *leaves), leaves)
    many = with_gradients(simulate(parse(split(given, way)), parse_mesh(f"cp={given.ranks}"), *leaves), leaves)
    same(many, one)


GIVEN = {
    "plain": Given(),
    "odd local length": Given(tokens=14),
    "one token each": Given(3, 3),
    "three ranks, a batch": Given(3, 21, batch=2),
    "four ranks, one key head": Given(4, 20, heads=(3, 1), batch=2),
    "zigzag": Given(2, 20, "zigzag"),
    "zigzag of three": Given(3, 18, "zigzag", batch=2, sinks=True),
    "zigzag of four": Given(4, 24, "zigzag", heads=(2, 2)),
    "all see all": Given(3, 15, options="causal=False"),
    "all see all in zigzag": Given(3, 12, "zigzag", options="causal=False, softcap=1.5", sinks=True),
    "window": Given(4, 20, options="window=3"),
    "window of a rank": Given(4, 20, options="window=5", sinks=True, batch=2),
    "window of one": Given(2, 14, options="window=1"),
    "window in zigzag": Given(4, 24, "zigzag", options="window=4, softcap=2.0"),
    "window, not causal": Given(3, 15, options="window=2, causal=False"),
    "sinks": Given(3, 15, sinks=True, batch=2),
    "softcap and scale": Given(2, 14, options="softcap=0.5, scale=1.25"),
    "packed": Given(3, 15, cu=(0, 4, 4, 9, 15)),
    "packed, sinks, window": Given(3, 15, cu=(0, 1, 2, 12, 15), sinks=True, options="window=3, softcap=2.0"),
    "packed, all see all": Given(2, 14, cu=(0, 0, 5, 14, 14), options="causal=False"),
    "packed, window, not causal": Given(2, 14, cu=(0, 5, 14), options="causal=False, window=2"),
    "packed at the borders": Given(4, 20, cu=(0, 5, 10, 15, 20)),
    "packed under zigzag": Given(2, 16, "zigzag", cu=(0, 3, 3, 11, 16), sinks=True),
    "zigzag of segments": Given(2, 20, "packed", cu=(0, 4, 4, 12, 20)),
    "zigzag of segments of three": Given(3, 30, "packed", cu=(0, 6, 18, 30), sinks=True, options="window=4"),
    "zigzag of segments, all see all": Given(2, 12, "packed", cu=(0, 8, 12), options="causal=False"),
}  # fmt: skip

# Queries and keys of different lengths.
UNEVEN = """def f(q: f64[b, t@cp, 4, 3], k: f64[b, s@cp, 2, 3], v: f64[b, s@cp, 2, 5], at: i64[()]):
    y = attention(q, k, v{at}{options}, over='cp', by='{way}')
    return y
"""


def crossed_by(way: str, order: str = "") -> str:
    """Heads over one axis, a way over another; the order is that of all ranks of both."""
    lines = list[str]()
    for x in "qkv":
        lines += [f"{x}0 = reorder({x}, dim=1, order='{order}')", f"{x}1 = shard({x}0, axis='r', dim=1)"]
        lines += [f"{x}2 = shard({x}1, axis='a', dim=1)", f"{x}3 = all_to_all({x}2, axis='a', src=1, dst=2)"]
    lines += [f"o0 = attention(q3, k3, v3, over='r', by='{way}', order='{order}')"]
    lines += ["o1 = all_to_all(o0, axis='a', src=2, dst=1)", "o2 = all_gather(o1, axis='a', dim=1)"]
    lines += ["o3 = all_gather(o2, axis='r', dim=1)", f"y = reorder(o3, dim=1, was='{order}')", "return y"]
    return program(Given(heads=(8, 4)), lines)
