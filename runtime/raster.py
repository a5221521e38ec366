"""Strokes and labels to a PNG: every mark becomes line segments, every segment is smoothed by its distance."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .curve import Label, Mark, Spot, Stroke

SCALE = 2  # pixels per unit of the page: sharp on today's screens
Segment = tuple[Spot, Spot]
Array = np.ndarray[Any, np.dtype[np.float64]]

# A 5 x 7 font: five columns a glyph, the lowest bit on top.
FONT = {
    " ": "0000000000", "(": "001c224100", ")": "0041221c00", ",": "00a0600000", "-": "0808080808", ".": "0060600000",
    "/": "2010080402", "0": "3e4141413e", "1": "00427f4000", "2": "4261514946", "3": "2141454b31", "4": "1814127f10",
    "5": "2745454539", "6": "3c4a494930", "7": "0171090503", "8": "3649494936", "9": "064949291e", ":": "0036360000",
    "a": "2054545478", "b": "7f48444438", "c": "3844444420", "d": "384444487f", "e": "3854545418", "f": "087e090102",
    "g": "18a4a4a47c", "h": "7f08040478", "i": "00447d4000", "j": "2040443d00", "k": "7f10284400", "l": "00417f4000",
    "m": "7c04180478", "n": "7c08040478", "o": "3844444438", "p": "fc24242418", "q": "18242424fc", "r": "7c08040408",
    "s": "4854545420", "t": "043f444020", "u": "3c4040207c", "v": "1c2040201c", "w": "3c4030403c", "x": "4428102844",
    "y": "1ca0a0a07c", "z": "4464544c44",
}  # fmt: skip


def png(marks: Sequence[Mark], width: int, height: int) -> bytes:
    """Marks on white, as the bytes of a PNG file."""
    page = np.full((height * SCALE, width * SCALE, 3), 255.0)
    for mark in marks:
        if isinstance(mark, Label):
            _paint(page, list(_lettered(mark)), mark.color, mark.size / 10)
        else:
            _paint(page, list(_dashes(mark)), mark.color, mark.width)
    return encode(page.round().astype(np.uint8))


def encode(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """PNG bytes of pixels u8[height, width, 3]."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _paint(page: Array, segments: Sequence[Segment], color: str, width: float) -> None:
    """Blend segments over the page; where they meet the colour is laid on once."""
    cover, reach = np.zeros(page.shape[:2]), width * SCALE / 2 + 0.5
    for start, end in segments:
        (x0, y0), (x1, y1) = ((x * SCALE, y * SCALE) for x, y in (start, end))
        left, right = _span(x0, x1, reach, page.shape[1])
        top, low = _span(y0, y1, reach, page.shape[0])
        y, x = np.mgrid[top:low, left:right] + 0.5
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2
        along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / max(length, 1e-9), 0, 1)
        far = np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0))
        cover[top:low, left:right] = np.maximum(cover[top:low, left:right], np.clip(reach - far, 0, 1))
    ys, xs = np.nonzero(cover)
    ink = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    page[ys, xs] += cover[ys, xs, None] * (ink - page[ys, xs])


def _span(a: float, b: float, reach: float, size: int) -> tuple[int, int]:
    return max(0, int(min(a, b) - reach)), min(size, int(max(a, b) + reach) + 2)


def _dashes(stroke: Stroke) -> Iterator[Segment]:
    """The segments of a stroke; a dashed one is cut into pieces."""
    for (x0, y0), (x1, y1) in pairwise(stroke.points):
        length = float(np.hypot(x1 - x0, y1 - y0))
        count = max(1, round(length / stroke.dash)) if stroke.dash else 1
        shown = 0.6 if stroke.dash else 1.0
        for i in range(count):
            a, b = i / count, (i + shown) / count
            yield (x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))


def _lettered(label: Label) -> Iterator[Segment]:
    """A label as segments: neighbouring dots of each glyph are joined, which rounds a dot font into lines."""
    dot = label.size / 10
    back = {"start": 0.0, "middle": 0.5, "end": 1.0}[label.anchor] * (6 * len(label.text) - 1) * dot
    for i, letter in enumerate(label.text.lower()):
        x, y = label.at[0] - back + 6 * i * dot, label.at[1] - 6.5 * dot
        for (c, r), (c2, r2) in _joined(_dots(FONT.get(letter, FONT["-"]))):
            yield (x + c * dot, y + r * dot), (x + c2 * dot, y + r2 * dot)


def _dots(glyph: str) -> set[tuple[int, int]]:
    columns = bytes.fromhex(glyph)
    return {(c, r) for c in range(5) for r in range(8) if columns[c] >> r & 1}


def _joined(dots: set[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Every pair of dots that touch, corners only where no side does; a dot alone is joined to itself."""
    for c, r in sorted(dots):
        yield (c, r), (c, r)
        for near in ((c + 1, r), (c, r + 1)):
            if near in dots:
                yield (c, r), near
        for up in (-1, 1):
            if (c + 1, r + up) in dots and (c + 1, r) not in dots and (c, r + up) not in dots:
                yield (c, r), (c + 1, r + up)
