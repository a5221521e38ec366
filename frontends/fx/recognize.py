"""What known values are: positions, rotary tables, masks; each found by its numbers at several sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir import OPS, PlaitError
from ...ir.ops import frequencies
from ...ir.ops.aten import NAMES
from .known import LARGEST, Known
from .views import PAIRS, bound

Tensor = torch.Tensor
LOW, HIGH = 1.0, 4.0  # of Llama 3's stretch; its factor the slowest frequency says, its length is a power of two
LENGTHS = (8192.0, *(2.0**n for n in (5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17)))


@dataclass(frozen=True)
class Table:
    """An op over positions and its attributes; without attributes it is the positions themselves."""

    op: str
    attrs: Mapping[str, Any]


def recognized(known: Known, batch: Any, length: Any) -> dict[fx.Node, Table]:
    """Every known value that is read by what is not known, where it has a name."""
    found = dict[fx.Node, Table]()
    for node in known.roots():
        made = _recognized(known, node, batch, length)
        if made is not None:
            found[node] = made
    return found


def _recognized(known: Known, node: fx.Node, batch: Any, length: Any) -> Table | None:
    value: Tensor = node.meta["val"]
    words = _words(value, batch, length)
    if words is None or known.largest(node) > LARGEST or value.dtype not in (*NAMES, *PAIRS):
        return None
    try:
        for table in _candidates(known, node, words, length):
            if all(_same(known, node, table, at, batch, length) for at in _sizes(known, node, length)):
                return table
    except (RuntimeError, PlaitError):  # what does not run at other sizes has no name
        return None
    return None


def _words(value: Tensor, batch: Any, length: Any) -> list[str] | None:
    """What each dim is: 1, b, t, or d for a number."""
    words = list[str]()
    for i, n in enumerate(value.shape):
        size, last = str(n), i == value.dim() - 1
        if size == "1":
            words.append("1")
        elif size == str(length) and ("t" not in words or i == value.dim() - 1 or size != str(batch)):
            words.append("t")
        elif size == str(batch) and "b" not in words:
            words.append("b")
        elif last and size.isdecimal():
            words.append("d")
        else:
            return None
    return words if "t" in words else None


def _sizes(known: Known, node: fx.Node, length: Any) -> Iterator[Mapping[str, int]]:
    """Sizes to look at it: the probes, and a length past every number it is made with."""
    yield from known.probes
    if not isinstance(length, int) and (top := known.largest(node)) > 1:
        yield dict.fromkeys(known.probes[0], 2) | {str(length): top + 3}


def _candidates(known: Known, node: fx.Node, words: list[str], length: Any) -> Iterator[Table]:
    value: Tensor = node.meta["val"]
    shape = " ".join(words)
    if value.dtype == torch.int64 and words in (["b", "t"], ["1", "t"]):
        yield Table("positions", {"shape": shape})
    elif words[-1] == "d" and words.count("t") == 1 and value.is_complex():
        for law in _laws(known, node, 2 * int(value.shape[-1])):
            yield Table("turns", {"width": 2 * int(value.shape[-1]), "shape": shape, "dtype": PAIRS[value.dtype], **law})
    elif words[-1] == "d" and words.count("t") == 1 and value.dtype.is_floating_point:
        yield from _rotary(known, node, shape)
    elif words[-2:] == ["t", "t"] and (value.dtype == torch.bool or value.dtype.is_floating_point):
        yield from _masks(known, node, shape, length)


def _masks(known: Known, node: fx.Node, shape: str, length: Any) -> Iterator[Table]:
    """The window is read off the last row at the largest size."""
    at = list(_sizes(known, node, length))[-1]
    value = known.value(node, at)
    last = value.reshape(-1, value.shape[-1])[-1]
    hidden = float("-inf")
    if value.dtype != torch.bool:
        hidden = float(value.min())
        last = last == 0
    attrs = {"shape": shape, "dtype": NAMES[value.dtype]} | ({} if value.dtype == torch.bool else {"hidden": hidden})
    seen = int(last.sum())
    yield Table("visible_table", attrs)
    if 0 < seen < value.shape[-1]:
        yield Table("visible_table", {**attrs, "window": seen})
    yield Table("visible_table", {**attrs, "causal": False})
    if value.dtype == torch.bool:
        yield Table("visible_table", {**attrs, "inverted": True})
        if 0 < seen < value.shape[-1]:
            yield Table("visible_table", {**attrs, "inverted": True, "window": value.shape[-1] - seen})


def _rotary(known: Known, node: fx.Node, shape: str) -> Iterator[Table]:
    value: Tensor = node.meta["val"]
    columns, dtype = int(value.shape[-1]), NAMES[value.dtype]
    for width, layouts in ((columns, ("halves", "pairs")), (2 * columns, ("once",))):
        for law in _laws(known, node, width):
            for layout in layouts:
                for part in ("cos", "sin"):
                    yield Table(
                        "rope_table", {"part": part, "width": width, "shape": shape, "dtype": dtype, "layout": layout, **law}
                    )


def _laws(known: Known, node: fx.Node, width: int) -> Iterator[dict[str, Any]]:
    """Laws that some value above it follows: as many frequencies as there are pairs; and what the table is multiplied by."""
    seen = set[tuple[float, ...]]()
    at = known.probes[0]
    for n in known.above(node):
        shape = n.meta["val"].shape if isinstance(n.meta.get("val"), Tensor) else ()
        if math.prod(bound(x, at) for x in shape) != width // 2 or not shape:
            continue
        values = known.value(n, at).flatten()
        if not values.is_floating_point() or not bool((values > 0).all()) or (key := tuple(values.tolist())) in seen:
            continue
        seen.add(key)
        for law in _fits(values, width):
            yield from ({**law, "amplitude": by} for by in known.factors(node))
    yield from _read_off(known, node, width)


def _read_off(known: Known, node: fx.Node, width: int) -> Iterator[dict[str, Any]]:
    """Laws of a table that was made before the trace: its second row says the base, rounded to a few digits."""
    if width < 4 or not known.lifted(node):
        return
    value = known.value(node, known.probes[-1])
    rows = value.reshape(-1, value.shape[-1])
    row = rows[1 if len(rows) > 1 else 0][: max(2, width // 2)]
    angles = [row.angle()] if value.is_complex() else [row.double().clamp(-1, 1).asin(), row.double().clamp(-1, 1).acos()]
    for angle in angles:
        for second in angle[1:3].tolist():  # in pairs the second column is the first frequency again
            raw = second ** (-width / 2) if 0 < second < 1 else 0.0
            for theta in dict.fromkeys(float(f"{raw:.{digits}g}") for digits in range(1, 6)):
                yield from ({"theta": theta, "rounded": rounded} for rounded in (True, False) if theta)


def _fits(values: Tensor, width: int) -> Iterator[dict[str, Any]]:
    if width == 2:
        yield {"theta": 10000.0}
        return
    raw = float(values[1]) ** (-width / 2)
    for length in (0.0, *LENGTHS):
        for digits in range(1, 17) if not length else (1, 2, 3, 4):
            theta = float(f"{raw:.{digits}g}")
            if values[0] == 1 and (law := _law(values, width, theta, length)) is not None:
                yield law
                break
    # Any frequencies are those of base 1, each divided by a number of its own.
    yield {"theta": 1.0, "divisors": tuple(1 / f for f in values.double().tolist())}


def _law(values: Tensor, width: int, theta: float, length: float) -> dict[str, Any] | None:
    """The law with this base and this length of a stretch, where the frequencies follow it."""
    rounded, like = values.dtype == torch.float32, values.new_empty((), dtype=torch.float64)
    factor = round(float(frequencies(width, theta, (), like, False)[-1] / values[-1]), 4) if length else 1.0
    stretch = (factor, LOW, HIGH, length) if length else ()
    made = frequencies(width, theta, stretch, like, rounded)
    close = torch.allclose(made.double(), values.double(), rtol=3e-7, atol=0)
    return {"theta": theta, "rounded": rounded, "scaling": stretch} if close else None


def _same(known: Known, node: fx.Node, table: Table, at: Mapping[str, int], batch: Any, length: Any) -> bool:
    value = known.value(node, at)
    b, t = (bound(n, at) if not isinstance(n, int) else n for n in (batch, length))
    p = torch.arange(t).expand(b, t)
    if table.op == "positions":
        return torch.equal(value.expand(b, t), p)
    attrs = {**_defaults("rope_table" if table.op == "turns" else table.op), **table.attrs}
    if table.op == "turns":
        made = [OPS["rope_table"].reference(p, **{**attrs, "part": x, "layout": "once"}) for x in ("cos", "sin")]
        return _close(known, node, torch.stack(made, -1), torch.view_as_real(value))
    made = OPS[table.op].reference(p, **attrs)
    return torch.equal(made, value) if table.op == "visible_table" else _close(known, node, made, value)


def _close(known: Known, node: fx.Node, made: Tensor, value: Tensor) -> bool:
    """Angles of float32 are right to its rounding, which grows with them."""
    if made.shape != value.shape or made.dtype != value.dtype:
        return False
    rough = any(x.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex64) for x in _tensors(known, node))
    within = max(4 * torch.finfo(value.dtype).eps, 3e-7 * max(*value.shape, 4)) if rough else 1e-12
    return torch.allclose(made.double(), value.double(), rtol=0, atol=within)


def _tensors(known: Known, node: fx.Node) -> list[Tensor]:
    return [v for n in known.above(node) if isinstance(v := n.meta.get("val"), Tensor)]


def _defaults(op: str) -> dict[str, Any]:
    return dict(OPS[op].attrs)
