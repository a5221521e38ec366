"""The way of a reorder of split tokens: each rank sends the tokens that belong to others, and sorts what it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from typing import Any

import torch

from ..crossing import Exchange, Here, Way
from ..ops.collective import reorder
from ..orders import Zigzag, parse_order, permutation
from ..sizes import value
from ..types import TensorType

Tensor = torch.Tensor


def _leaving(types: Sequence[TensorType | None], attrs: Mapping[str, Any], ranks: int, sizes: Mapping[str, int]) -> int:
    """Exact where chunks do not depend on the borders of segments; else as if every token left its rank."""
    type_ = types[0]
    assert type_ is not None
    held = type_.bytes({**sizes}) // ranks
    orders = [parse_order(attrs[name]) for name in ("was", "order")]
    if any(isinstance(o, Zigzag) and o.packed for o in orders):
        return held
    units = lcm(ranks, *(2 * o.parts for o in orders if isinstance(o, Zigzag)))
    if value(type_.dims[attrs["dim"]].size, sizes) % units:
        return held
    there = _places(attrs["was"], attrs["order"], units).reshape(ranks, -1) // (units // ranks)
    leaving = max(int((to != rank).sum()) for rank, to in enumerate(there))
    return held * leaving // (units // ranks)


def _places(was: str, order: str, length: int, cu: Tensor | None = None) -> Tensor:
    """i64[length]: where each token goes, by where it is."""
    return permutation(order, length, cu).argsort()[permutation(was, length, cu)]


@reorder.way("exchange", sent=_leaving)
def _(here: Here, x: Tensor, cu: Tensor | None = None) -> Way:
    """Tokens go straight to the ranks that hold them in the new order; what stays is not sent."""
    dim, local = here.attrs["dim"], x.shape[here.attrs["dim"]]
    places = _places(here.attrs["was"], here.order, local * here.ranks, cu).reshape(here.ranks, local)
    target = places // max(1, local)
    sizes, expected = target[here.rank].bincount(minlength=here.ranks), (target == here.rank).sum(1)
    leaving = places[here.rank].argsort().to(x.device)
    rows = x.movedim(dim, 0).index_select(0, leaving)
    arrived = yield Exchange(rows, tuple(sizes.tolist()), tuple(expected.tolist()))
    order = torch.cat([p[t == here.rank].sort().values for p, t in zip(places, target, strict=True)]).argsort()
    return arrived.index_select(0, order.to(x.device)).movedim(0, dim)
