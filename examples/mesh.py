"""A model on two processes: its sequences split over ranks, trained, and saved as one process would save it.

    torchrun --nproc-per-node 2 examples/mesh.py

Writes model.safetensors and the folder shards, which any mesh reads, into the folder it is started in.
"""

from __future__ import annotations

import sys

import plait
import torch

SPEC = {
    "name": "small", "vocab": 256, "hidden": 64, "pattern": "G*M-", "tied": True, "mlp": {"width": 128},
    "gdn": {"key_heads": 2, "value_heads": 4, "key_dim": 16, "value_dim": 16},
    "attention": {"heads": 4, "head_dim": 16}, "mamba2": {"heads": 4, "head_dim": 16, "state": 16},
}  # fmt: skip


def main() -> None:
    place = plait.init("cp=2")
    model = plait.compile(SPEC, dtype="f32", jit=False, mesh="cp=2", place="attention=ring order=zigzag")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(256, (2, 128), generator=torch.Generator().manual_seed(0))  # the same on every rank
    for step in range(10):
        loss = model.loss(*plait.shard_batch(model, tokens), local=True)  # or model.loss(tokens): each rank takes its part
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if place.rank == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    model.save("model.safetensors")
    model.save_sharded("shards")
    plait.close()


if __name__ == "__main__":
    try:
        main()
    except plait.PlaitError as error:
        sys.exit(f"mesh: {error}")
