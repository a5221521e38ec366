"""The picture of a run: what is drawn where, in both formats."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from plait.ir import DataError
from plait.runtime.curve import curve, write_curve
from plait.runtime.rundir import Point


def test_the_picture(tmp_path: Path) -> None:
    points = [Point(s, s / 2, None if s == 0 else 2.5 - s / 100, 2.6 - s / 100) for s in range(0, 101, 10)]
    svg_path, png_path = write_curve(points, tmp_path / "loss", {"bigram <2>": 2.25})
    lines = [e for e in ElementTree.parse(svg_path).iter() if e.tag.endswith("polyline")]
    texts = [e.text for e in ElementTree.parse(svg_path).iter() if e.tag.endswith("text")]
    assert "bigram <2> 2.250" in texts and "validation 1.600" in texts and "train 1.500" in texts
    longest = max((e.attrib["points"].split() for e in lines), key=len)
    assert len(longest) == 11
    pixels = decoded(png_path.read_bytes())
    assert pixels.shape == (1040, 1800, 3)
    x, y = map(float, longest[5].split(","))
    assert pixels[round(2 * y), round(2 * x)].tolist() == [0x0B, 0x5C, 0xAD]
    assert (pixels == 255).all(2).mean() > 0.9


def decoded(data: bytes) -> np.ndarray[Any, Any]:
    """The pixels of an RGB PNG without filters; every checksum is checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = dict[bytes, bytes](), 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + body) == int.from_bytes(data[at + 8 + size : at + 12 + size])
        chunks[kind], at = body, at + 12 + size
    width, height = int.from_bytes(chunks[b"IHDR"][:4]), int.from_bytes(chunks[b"IHDR"][4:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


@pytest.mark.parametrize("values", [(2.0, 2.0), (1e-6, 1e-6), (900.0, 3.0), (5.0, 7.0)])
def test_any_curve_stays_on_the_page(values: tuple[float, float]) -> None:
    marks = curve([Point(0, 0, None, values[0]), Point(1, 1, values[1], values[1])], {"unigram": 3.0})
    spots = [p for m in marks for p in getattr(m, "points", ())]
    assert all(0 <= x <= 900 and 0 <= y <= 520 for x, y in spots)


def test_one_point_is_no_curve() -> None:
    with pytest.raises(DataError, match="needs two"):
        curve([Point(0, 0, None, 5.0)], {})
