"""An eager module that nobody described: traced, raised to ops that passes know, fused, and trained with its own weights.

    python examples/trace.py

Prints what was raised and the fused program of one call; writes nothing.
"""

from __future__ import annotations

import plait
import torch
from plait.passes import DEFAULT, Pipeline
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    """Attention and a gated MLP, written out as in many places."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.first, self.second = heads, RMSNorm(width), RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, width = x.shape
        parts = self.qkv(self.first(x)).chunk(3, -1)
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in parts)
        hidden = torch.full((t, t), -torch.inf).triu(1)
        weights = F.softmax(q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5 + hidden, -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, t, width))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList([Block(32, 4) for _ in range(2)])
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main() -> None:
    torch.manual_seed(0)
    module = Model()
    tokens = torch.randint(64, (2, 21))
    traced = plait.trace_module(module, tokens)
    print(traced.report)
    print(Pipeline.parse(DEFAULT).run(traced.graph))
    model = plait.compile(traced, jit=False)
    print(f"largest difference {(model(tokens) - module(tokens)).abs().max():.1e}")
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)  # the weights are the module's own
    for step in range(10):
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
