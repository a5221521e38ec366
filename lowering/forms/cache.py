"""Writing keys and values into a preallocated cache."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def cache_write(cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
    """x at positions at, at + 1, ... of the cache [b m g d], in place: nothing else may still read the old one."""
    return cache.index_copy_(1, torch.arange(x.shape[1], device=x.device) + at, x.to(cache.dtype))
