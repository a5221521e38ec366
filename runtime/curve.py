"""The loss curve of a run as a picture: one figure, written as SVG and as PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from ..ir import DataError
from ..ir.files import write_atomic, write_text
from .rundir import Point

Spot = tuple[float, float]
WIDTH, HEIGHT = 900, 520
LEFT, RIGHT, TOP, BOTTOM = 64, 876, 64, 462
INK, FAINT, GRID, LEVEL = "#24292f", "#6e7781", "#e4e8ec", "#b35900"
TRAIN, VALID = "#9db7d5", "#0b5cad"


@dataclass(frozen=True)
class Stroke:
    """A line through points, dashed when `dash` is its period."""

    points: tuple[Spot, ...]
    color: str
    width: float
    dash: float = 0.0


@dataclass(frozen=True)
class Label:
    """Text in lower case; `anchor` says which part of it stands at `at`: start, middle or end of its base line."""

    at: Spot
    text: str
    color: str = FAINT
    anchor: str = "start"
    size: float = 14.0


Mark = Stroke | Label


def write_curve(points: Sequence[Point], path: str | Path, levels: Mapping[str, float] | None = None) -> tuple[Path, Path]:
    """Write PATH.svg and PATH.png: training and validation loss by step, and a named level line for each of `levels`."""
    from .raster import png

    marks = curve(points, levels or {})
    svg_path, png_path = Path(f"{path}.svg"), Path(f"{path}.png")
    write_text(svg_path, svg(marks))
    data = png(marks, WIDTH, HEIGHT)

    def fill(beside: Path) -> None:
        beside.write_bytes(data)

    write_atomic(png_path, fill)
    return svg_path, png_path


def curve(points: Sequence[Point], levels: Mapping[str, float]) -> list[Mark]:
    """The figure as strokes and labels, the lowest first."""
    if len(points) < 2:
        raise DataError(f"a curve of {len(points)} points cannot be drawn, it needs two; train for more steps")
    valid = [(float(p.step), p.valid) for p in points]
    trained = [(float(p.step), p.loss) for p in points if p.loss is not None]
    frame = _frame([*valid, *trained], levels)
    marks = [*_axes(frame), *_levels(frame, levels)]
    for series, color, width in ((trained, TRAIN, 2.0), (valid, VALID, 3.0)):
        marks.append(Stroke(tuple(frame.place(p) for p in _below(series, frame.high)), color, width))
    return [*marks, *_legend(valid[-1][1], trained[-1][1])]


@dataclass(frozen=True)
class Frame:
    """The ranges shown."""

    last: float
    low: float
    high: float

    def place(self, spot: Spot) -> Spot:
        """From step and loss to the page."""
        x = LEFT + (RIGHT - LEFT) * spot[0] / self.last
        return x, BOTTOM - (BOTTOM - TOP) * (spot[1] - self.low) / (self.high - self.low)


def _frame(spots: Sequence[Spot], levels: Mapping[str, float]) -> Frame:
    """Wide enough for the last half of the curve and every level; the steep first steps may leave at the top."""
    last = max(x for x, _ in spots)
    later = [y for x, y in spots if x >= last / 10] + list(levels.values())
    low, high = min([*later, *(y for _, y in spots)]), max(later)
    room = max(high - low, 0.1) * 0.12
    step = _nice((high - low + 2 * room) / 5)
    return Frame(last, max(0.0, math.floor((low - room) / step) * step), math.ceil((high + room) / step) * step)


def _nice(step: float) -> float:
    """The nearest larger one of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= step * 0.999)


def _ticks(low: float, high: float, count: int) -> list[float]:
    step = _nice((high - low) / count)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _axes(frame: Frame) -> list[Mark]:
    marks = list[Mark]()
    for y in _ticks(frame.low, frame.high, 6):
        at = frame.place((0.0, y))[1]
        marks += [Stroke(((LEFT, at), (RIGHT, at)), GRID, 1), Label((LEFT - 10, at + 5), f"{y:.3g}", anchor="end")]
    for x in _ticks(0.0, frame.last, 8):
        at = frame.place((x, 0.0))[0]
        marks += [Stroke(((at, BOTTOM), (at, BOTTOM + 6)), FAINT, 1), Label((at, BOTTOM + 24), f"{x:g}", anchor="middle")]
    marks.append(Stroke(((LEFT, BOTTOM), (RIGHT, BOTTOM)), FAINT, 1.5))
    marks.append(Label((RIGHT, BOTTOM + 46), "step", anchor="end"))
    return [*marks, Label((LEFT - 44, TOP - 28), "loss, nats per byte", INK, size=16)]


def _levels(frame: Frame, levels: Mapping[str, float]) -> list[Mark]:
    marks = list[Mark]()
    for name, value in levels.items():
        at = frame.place((0.0, value))[1]
        marks.append(Stroke(((LEFT, at), (RIGHT, at)), LEVEL, 1.5, dash=8))
        marks.append(Label((RIGHT, at - 7), f"{name} {value:.3f}", LEVEL, "end"))
    return marks


def _legend(valid: float, trained: float) -> list[Mark]:
    """Above the frame, on the right."""
    marks, at = list[Mark](), RIGHT - 330.0
    for text, color, width in ((f"validation {valid:.3f}", VALID, 3.0), (f"train {trained:.3f}", TRAIN, 2.0)):
        marks += [Stroke(((at, TOP - 33), (at + 28, TOP - 33)), color, width), Label((at + 38, TOP - 28), text, INK)]
        at += 195
    return marks


def _below(series: Sequence[Spot], high: float) -> list[Spot]:
    """The part of a curve from where it first comes below `high`; later peaks are cut there."""
    start = next((i for i, (_, y) in enumerate(series) if y <= high), len(series) - 1)
    shown = [(x, min(y, high)) for x, y in series[start:]]
    if start:
        (x0, y0), (x1, y1) = series[start - 1], series[start]
        shown.insert(0, (x0 + (x1 - x0) * (y0 - high) / max(y0 - y1, 1e-12), high))
    return shown


def svg(marks: Sequence[Mark], width: int = WIDTH, height: int = HEIGHT) -> str:
    """Marks as an SVG document."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    lines = [f'{head} font-family="system-ui, sans-serif">', f'<rect width="{width}" height="{height}" fill="white"/>']
    for mark in marks:
        if isinstance(mark, Label):
            (x, y), look = mark.at, f'fill="{mark.color}" font-size="{mark.size:g}" text-anchor="{mark.anchor}"'
            lines.append(f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(mark.text)}</text>')
        else:
            dash = f' stroke-dasharray="{mark.dash * 0.6:g} {mark.dash * 0.4:g}"' if mark.dash else ""
            look = f'fill="none" stroke="{mark.color}" stroke-width="{mark.width:g}" stroke-linejoin="round"{dash}'
            lines.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)}" {look}/>')
    return "\n".join([*lines, "</svg>"]) + "\n"
