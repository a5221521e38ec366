"""Values as the trace has them: sizes of torch as sizes of the IR, and views as patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ir import Dim, TensorType, TypeMismatch
from ...ir.ops.aten import NAMES
from ...ir.sizes import Size, canonical

PAIRS = {torch.complex64: "f32", torch.complex128: "f64"}


@dataclass
class Symbols:
    """Names of torch's symbols: b and s for the batch and length of the first input, n1, n2, ... for others."""

    names: dict[str, str] = field(default_factory=dict[str, str])

    def name(self, symbol: Any) -> str:
        fresh = next(n for n in ("b", "s", *(f"n{i}" for i in range(1, 1000))) if n not in self.names.values())
        return self.names.setdefault(str(symbol), fresh)

    def size(self, n: Any) -> Size:
        """A number, or a product of symbols plus a number; a TypeMismatch for what is neither."""
        if isinstance(n, int):
            return n
        expr = n.node.expr
        if expr.is_Integer:
            return int(expr)
        offset, rest = expr.as_coeff_Add()
        factor, product = rest.as_coeff_Mul()
        powers = product.as_powers_dict() if product.is_Mul or product.is_Pow or product.is_Symbol else {}
        whole = powers and all(s.is_Symbol and p.is_Integer and p > 0 for s, p in powers.items())
        if not (whole and factor.is_Integer and offset.is_Integer):
            raise TypeMismatch(f"size {expr} of {', '.join(self.names) or 'the inputs'} is no product of symbols plus a number")
        symbols = [self.name(s) for s, p in sorted(powers.items(), key=str) for _ in range(int(p))]
        text = "*".join([str(int(factor)), *symbols]) + (f"{int(offset):+d}" if offset else "")
        return canonical(text)

    def type(self, x: torch.Tensor, where: str = "") -> TensorType:
        """The type of a traced tensor; complex numbers are pairs of real ones."""
        if x.dtype in PAIRS:
            return TensorType(PAIRS[x.dtype], (*(Dim(self.size(n)) for n in x.shape), Dim(2)))
        if x.dtype not in NAMES:
            raise TypeMismatch(f"{where or 'a value'} is {x.dtype}, must be one of {', '.join(map(str, NAMES))}")
        return TensorType(NAMES[x.dtype], tuple(Dim(self.size(n)) for n in x.shape))


def bound(n: Any, at: Mapping[str, int]) -> int:
    """The number that a traced size has where torch's symbols have these values."""
    if isinstance(n, int):
        return n
    return int(n.node.expr.subs({s: at[str(s)] for s in n.node.expr.free_symbols}))


def symbols_of(sizes: Sequence[Any]) -> set[str]:
    return {str(s) for n in sizes if not isinstance(n, int) for s in n.node.expr.free_symbols}
