"""Ways in which people write rotations and attention: each is the op that it is, and what only looks alike is not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import plait
import pytest
import torch
from plait.ir import PlaitError
from plait.tracing import Traced, trace_module
from torch import nn

Tensor = torch.Tensor
WIDTH, HEADS = 16, 2


class Attend(nn.Module):
    """Attention of two heads of eight columns, in one way of writing it; odd ways of writing are not attention."""

    def __init__(self, *ways: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ways = ways
        self.embed, self.qkv = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        angles = torch.outer(torch.arange(32.0), 100.0 ** -(torch.arange(0, 8, 2) / 8))
        angles = torch.rand(32, 4) if "random" in ways else angles
        self.turns = torch.polar(torch.ones_like(angles), angles)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (y.unflatten(-1, (HEADS, 8)) for y in self.qkv(x).chunk(3, -1))
        q, k = (self.turned(y) for y in (q, k))
        hidden = torch.ones(*(tokens.shape[1],) * 2, dtype=torch.bool).triu(1)
        return self.mixed(q, k, v, hidden).flatten(2)

    def turned(self, y: Tensor) -> Tensor:
        length, count = y.shape[1], 4
        if "complex" in self.ways:
            pairs = torch.view_as_complex(y.float().reshape(*y.shape[:-1], count, 2))
            return torch.view_as_real(pairs * self.turns[:length].view(1, length, 1, count)).flatten(3).type_as(y)
        rates = 1.0 / (torch.tensor([1.0, 1.5, 7.0, 30.0]) * 50.0 ** (torch.arange(0, 8, 2) / 8))  # stretched, no law has them
        angles = (torch.arange(length).float()[:, None] * rates).repeat_interleave(2, -1)[None, :, None]
        across = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
        return y * (angles.cos() * 1.25) + across * (angles.sin() * 1.25)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        if "einsum" in self.ways:
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(hidden, -torch.inf).double()
            return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).type_as(v), v)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        scores = torch.where(hidden, torch.finfo(q.dtype).min, q @ k.mT) / (-3 if "below" in self.ways else 3)
        return (scores.softmax(-1) @ v).transpose(1, 2)


class Parts(nn.Module):
    """Columns written into an empty tensor, some of them again."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first, self.scale = first, nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        made[..., :4] = x[..., 2:] * self.scale[2:]
        made[..., self.first :] = x[..., self.first :]
        return made


def traced(module: nn.Module, x: Tensor) -> tuple[Traced, Counter[str]]:
    made = trace_module(module, x)
    got, want = plait.compile(made, jit=False)(x), module(x)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    return made, Counter(node.op.name for node in made.graph.nodes)


@pytest.mark.parametrize(
    ("ways", "wanted"),
    [
        (("complex", "einsum"), {"rope": 2, "attention": 1, "aten": 0}),
        (("pairs", "where"), {"rope": 2, "attention": 1, "aten": 0}),
        (("complex", "random", "below"), {"rope": 0, "attention": 0}),
    ],
    ids=str,
)
def test_rotations_and_attention(ways: tuple[str, ...], wanted: dict[str, int]) -> None:
    _, found = traced(Attend(*ways), torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0)))
    assert {name: found[name] for name in wanted} == wanted


def test_columns_written_one_after_the_other_are_a_concat() -> None:
    x = torch.randn(2, 5, 6)
    assert traced(Parts(4), x)[1]["concat"] == 1
    assert traced(Parts(3), x)[1]["concat"] == 0  # the second writes over the first


@pytest.mark.parametrize(
    ("equation", "op"), [("btc,chd->bthd", "linear"), ("bti,tio->bto", "head_linear"), ("btc,chd->bth", "aten")]
)
def test_letters_of_products(equation: str, op: str) -> None:
    """A projection, one of every head, and a sum that is no product."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x, self.w)

    x = torch.randn(2, 5, 4 if equation.startswith("bti") else 5)
    made, found = traced(Product(), x)
    targets = [n.attrs["target"] for n in made.graph.nodes if n.is_op("aten")]
    assert found[op] == 1 and ("aten.einsum.default" in targets) == (equation == "btc,chd->bth")


def test_complex_numbers_that_come_in_are_refused() -> None:
    class Turn(nn.Module):
        def forward(self, x: Any) -> Tensor:
            return torch.view_as_real(x * 2)

    with pytest.raises(PlaitError, match=r"x holds complex numbers; give torch\.view_as_real of it"):
        trace_module(Turn(), torch.randn(2, 3, dtype=torch.complex64), gradients=False)


def chunk_kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, None]:
    """A decay for every channel of the keys, a token at a time."""
    state, rows = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3]), list[Tensor]()
    for t in range(v.shape[1]):
        state = state * g[:, t].exp().unsqueeze(-1)
        read = (state * k[:, t].unsqueeze(-1)).sum(-2)
        state = state + k[:, t].unsqueeze(-1) * (beta[:, t].unsqueeze(-1) * (v[:, t] - read)).unsqueeze(-2)
        rows.append((state * q[:, t].unsqueeze(-1)).sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(rows, 1), None


class Kda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(6, 26, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g, beta = self.x(x).unsqueeze(2).split([6, 6, 7, 6, 1], -1)
        return chunk_kda(q, k, v, -torch.sigmoid(g), torch.sigmoid(beta.squeeze(-1)))[0]


def test_a_loop_over_tokens_is_met_by_its_name() -> None:
    torch.manual_seed(0)
    found = traced(Kda(), torch.randn(2, 5, 6))[1]
    assert found["kimi_delta_attention"] == 1 and found["mul"] == 0
