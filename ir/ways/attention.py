"""Ways of attention: queries stay, and keys and values come to them, all at once or one rank's after another's.

What a rank's queries see of some keys is one part, with the log of its denominators; parts merge in any order. All parts are
differentiated together, from the merged result: no part's own result is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from ..crossing import Gather, Here, Keep, Shift, Way
from ..errors import TypeMismatch
from ..ops.attention import attention, attention_part, attention_part_gradients
from ..ops.pointwise import wide
from ..ops.recurrence import segments
from ..orders import permutation
from ..types import BYTES, DTYPES, TensorType

Tensor = torch.Tensor


@dataclass(frozen=True)
class Part:
    """Some keys and values, and where they stand in the sequence."""

    k: Tensor
    v: Tensor
    places: Tensor


@dataclass(frozen=True)
class Asked:
    """What a rank's queries ask of every part."""

    here: Here
    q: Tensor
    sinks: Tensor | None
    cu: Tensor | None
    places: Tensor  # i64[t]: where the queries stand
    parts: Tensor  # i64[ranks, s]: where every rank's keys stand

    def near(self, places: Tensor) -> bool:
        """Whether any query may see any key of a part; a part that none sees costs nothing."""
        if not len(places) or not len(self.places):
            return False
        causal, window = self.here.attrs["causal"], self.here.attrs["window"]
        first, last = self.places.min(), self.places.max()
        if (causal and places.min() > last) or (window and places.max() <= first - window):
            return False
        if self.cu is None:
            return True
        of, to = (torch.searchsorted(self.cu[1:].contiguous(), x, right=True) for x in (self.places, places))
        return bool(to.max() >= of.min() and to.min() <= of.max())


def _keys_and_values(types: Sequence[TensorType | None], attrs: Mapping[str, Any], ranks: int, sizes: Mapping[str, int]) -> int:
    """A rank's own keys and values go to every other rank, or as often to the next."""
    k, v = types[1], types[2]
    assert k is not None and v is not None
    width = torch.promote_types(DTYPES[k.dtype], DTYPES[v.dtype]).itemsize
    return (ranks - 1) * ((k.count({**sizes}) + v.count({**sizes})) // ranks) * width


@attention.way("kv", sent=_keys_and_values)
def _(here: Here, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Way:
    """Every rank gets all keys and values, in one exchange."""
    asked = _asked(here, q, k, *rest)
    rows = yield Gather(_packed(k, v))
    keys, values = (x.flatten(1, 2) for x in _unpacked(rows, k, v))
    part = Part(keys, values, asked.parts.flatten())
    return _attended(asked, [part], _seen(asked, part))


@attention.way("ring", sent=_keys_and_values)
def _(here: Here, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Way:
    """Keys and values go round the ranks; each step's part is merged, and one that no query sees is passed on unread."""
    asked, kept, seen = _asked(here, q, k, *rest), list[Part](), _nothing(q, v)
    travelling = _packed(k, v)
    for step in range(here.ranks):
        if step:
            travelling = yield Shift(travelling)
        places = asked.parts[(here.rank - step) % here.ranks]
        if asked.near(places):
            keys, values = (x[:, 0] for x in _unpacked(travelling[None], k, v)) if step else (k, v)
            kept.append(Part(keys, values, places))
            seen = _merged(seen, _seen(asked, kept[-1]))
    o, lse = _with_sinks(seen, asked.sinks)
    yield Keep((o.to(q.dtype), lse))
    return _attended(asked, kept, seen)


def _and_cotangents(types: Sequence[TensorType | None], attrs: Mapping[str, Any], ranks: int, sizes: Mapping[str, int]) -> int:
    """Keys and values as in the forward; their cotangents, as wide as sums are, once more than that."""
    k, v = types[1], types[2]
    assert k is not None and v is not None
    wide_bytes = max(4, BYTES[k.dtype], BYTES[v.dtype])
    return _keys_and_values(types, attrs, ranks, sizes) + (k.count({**sizes}) + v.count({**sizes})) * wide_bytes


@attention.way_back("ring", sent=_and_cotangents)
def _(here: Here, operands: Sequence[Any], kept: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Way:
    """Keys and values go round again, and what queries add to their cotangents with them, until all are home."""
    q, k, v, *rest = operands
    (o, lse), (d_o,), asked = kept, cotangents, _asked(here, q, k, *rest)
    travelling, d_q = _packed(k, v), torch.zeros_like(wide(q))
    found = torch.zeros_like(wide(travelling))
    for step in range(here.ranks):
        if step:
            travelling = yield Shift(travelling)
            found = yield Shift(found)
        places = asked.parts[(here.rank - step) % here.ranks]
        if asked.near(places):
            keys, values = (x[:, 0] for x in _unpacked(travelling[None], k, v))
            own, d_k, d_v = here.run(
                attention_part_gradients, q, keys, values, o, lse, d_o, None, asked.places, places, asked.cu, **here.attrs
            )
            d_q, found = d_q + own, found + _packed(d_k, d_v)
    found = yield Shift(found)
    d_k, d_v = (x[:, 0] for x in _unpacked(found[None], k, v))
    d_sinks = None if asked.sinks is None else _to_sinks(asked.sinks, o, lse, d_o)
    return (d_q.to(q.dtype), d_k, d_v, d_sinks, *(None for _ in operands[4:]))


# -- what travels -----------------------------------------------------------------------------


def _asked(
    here: Here, q: Tensor, k: Tensor, sinks: Tensor | None = None, cu: Tensor | None = None, at: Tensor | None = None
) -> Asked:
    """The places of this rank's queries and of all keys; packed segments are those of the whole sequence."""
    t, s = q.shape[1] * here.ranks, k.shape[1] * here.ranks
    start = s - t if at is None else int(at)
    cu = None if cu is None else cu.cpu()  # places are numbers of the host: they say what there is to do
    if cu is not None:
        segments(q.shape[0], s, cu)
        if start or s != t:
            raise TypeMismatch(f"attention: {t} queries from place {start} on see {s} packed keys; cu needs as many, from 0 on")
    places = here.tokens(q.shape[1], cu) + start
    return Asked(here, q, sinks, cu, places, permutation(here.order, s, cu).reshape(here.ranks, -1))


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """Keys, then values, as one run of numbers."""
    return torch.cat([k.flatten(), v.flatten()])


def _unpacked(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """[ranks, numbers] to keys and values [b, ranks, s, g, ...], each rank's as this one's."""
    keys, values = rows.split([k.numel(), v.numel()], 1)
    return (
        keys.unflatten(1, k.shape).transpose(0, 1).to(k.dtype),
        values.unflatten(1, v.shape).transpose(0, 1).to(v.dtype),
    )


# -- parts ------------------------------------------------------------------------------------

Seen = tuple[Tensor, Tensor]  # o [b t h e] and lse [b t h], over some of the keys


def _seen(asked: Asked, part: Part) -> Seen:
    """What the queries see of a part; its gradient is made later, with that of all."""
    with torch.no_grad():
        return asked.here.run(attention_part, asked.q, part.k, part.v, asked.places, part.places, asked.cu, **asked.here.attrs)


def _nothing(q: Tensor, v: Tensor) -> Seen:
    """What queries see that see no key."""
    o = wide(q).new_zeros(*q.shape[:3], v.shape[-1])
    return o, torch.full_like(o[..., 0], -torch.inf)


def _merged(a: Seen, b: Seen) -> Seen:
    """Two parts as one; nothing where neither sees anything."""
    with torch.no_grad():
        share = torch.sigmoid(b[1] - a[1]).nan_to_num(0)[..., None]
        return torch.lerp(a[0], b[0], share), torch.logaddexp(a[1], b[1])


def _with_sinks(seen: Seen, sinks: Tensor | None) -> Seen:
    """Parts with the sinks as one logit more."""
    o, lse = seen
    if sinks is None:
        return seen
    with torch.no_grad():
        return o * torch.sigmoid(lse - sinks).nan_to_num(0)[..., None], torch.logaddexp(lse, wide(sinks).expand_as(lse))


def _attended(asked: Asked, parts: Sequence[Part], seen: Seen) -> Tensor:
    """The result of parts that are merged."""
    operands = [x for part in parts for x in (part.k, part.v)]
    return cast(Tensor, _Attended.apply(asked, [part.places for part in parts], seen, asked.q, asked.sinks, *operands))


class _Attended(torch.autograd.Function):
    """What is merged already, with the sinks as one logit more; its gradient goes to every part."""

    @staticmethod
    def forward(
        ctx: Any, asked: Asked, places: list[Tensor], seen: Seen, q: Tensor, sinks: Tensor | None, *keys: Tensor
    ) -> Any:
        o, lse = _with_sinks(seen, sinks)
        made = o.to(q.dtype)
        ctx.asked, ctx.places = asked, places
        ctx.save_for_backward(q, sinks, made, lse, *keys)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> Any:  # type: ignore[override] # torch declares *grad_outputs
        q, sinks, o, lse, *keys = ctx.saved_tensors
        asked, d_q, found = ctx.asked, torch.zeros_like(wide(q)), list[Tensor]()
        for k, v, places in zip(keys[::2], keys[1::2], ctx.places, strict=True):
            operands = (q, k, v, o, lse, d_o, None, asked.places, places, asked.cu)
            own, d_k, d_v = asked.here.run(attention_part_gradients, *operands, **asked.here.attrs)
            d_q += own
            found += [d_k.to(k.dtype), d_v.to(v.dtype)]
        return None, None, None, d_q.to(q.dtype), None if sinks is None else _to_sinks(sinks, o, lse, d_o), *found


def _to_sinks(sinks: Tensor, o: Tensor, lse: Tensor, d_o: Tensor) -> Tensor:
    """The weight of a sink times what its value, 0, is less than the result."""
    share = torch.exp(wide(sinks) - lse) * (wide(d_o) * wide(o)).sum(-1)
    return -share.sum((0, 1)).to(sinks.dtype)
