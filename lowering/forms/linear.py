"""Linears in the type in which this processor multiplies fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor

# Types whose products this processor emulates, several times slower than float32's. Asked of the processor and not of a
# clock: the answer, and so the bits, are the same in every run.
_HAS = torch.cpu.get_capabilities()
_NATIVE = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
EMULATED = frozenset(dtype for dtype, names in _NATIVE.items() if not any(_HAS.get(n) for n in names))


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x w^T + bias; bf16 and f16 go through float32 on processors without instructions for them.

    A single row is read-bound, and stays as it is: widening its weights would cost more than the product.
    """
    w, bias = w.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.device.type != "cpu" or x.dtype not in EMULATED or all(n == 1 for n in x.shape[:-1]):
        return F.linear(x, w, bias)
    return F.linear(x.float(), w.float(), None if bias is None else bias.float()).to(x.dtype)
