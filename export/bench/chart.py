"""The measurements of `dgm4 bench` as one chart: latency over the batch on the left, throughput on the right.

Drawn on a canvas that is SVG text or a Pillow picture; sizes are in pixels of the chart.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image, ImageDraw, ImageFont

from engine.errors import InputError
from engine.markup import css
from engine.render import INK, MUTED, TRACK, WHITE, Color
from export.bench.measure import Bench, Row

SUFFIXES = (".svg", ".png")
_COLORS: tuple[Color, ...] = ((31, 119, 180), (230, 120, 20), (46, 140, 60), (150, 60, 160), (140, 90, 70))
_SIZE = (1040, 420)
_TEXT = 13
_SCALE = 2  # pixels of a PNG to one of the chart
_MOST_TICKS = 6
Point = tuple[float, float]


class Canvas(Protocol):
    """What the chart is drawn on."""

    def line(self, points: Sequence[Point], color: Color, width: float) -> None:
        """Draw straight lines from point to point."""
        ...

    def dot(self, center: Point, color: Color) -> None:
        """Draw a small disc."""
        ...

    def text(self, at: Point, text: str, color: Color, anchor: str) -> None:
        """Write a line whose start, middle or end (`anchor`) stands at a point, vertically centred."""
        ...

    def encode(self) -> bytes:
        """The file's content."""
        ...


class Panel(NamedTuple):
    """A plot's corner and size, its title, and the scale of its values: value to share of the height."""

    corner: Point
    size: Point
    title: str
    scale: Callable[[float], float]
    ticks: Sequence[float]


def draw_chart(found: Bench, path: Path) -> bytes:
    """The chart as the content of an .svg or .png file; InputError for another name."""
    check_suffix(path)
    canvas: Canvas = _Svg() if path.suffix.lower() == ".svg" else _Png()
    batches = sorted({row.batch for row in found.rows})
    colors = _colors(found.rows)
    latencies = [row.total[name] for row in found.rows for name in ("p50", "p99")]
    rates = [row.pairs_per_s for row in found.rows]
    left = Panel((70, 70), (400, 280), "ms a call: p50, line to p99", *_log_scale(latencies))
    right = Panel((590, 70), (400, 280), "pairs a second", *_linear_scale(max(rates)))
    model = " ".join(found.model.values())
    canvas.text((70, 20), f"{model}, {found.options.tokens} tokens, end to end", INK, "start")
    for panel in (left, right):
        _draw_axes(canvas, panel, batches)
    for number, (name, color) in enumerate(colors.items()):
        rows = [row for row in found.rows if row.backend == name]
        _draw_latency(canvas, left, rows, batches, color, (number - (len(colors) - 1) / 2) * 14)
        _draw_rate(canvas, right, rows, batches, color)
        canvas.dot((80 + 170 * number, 400), color)
        canvas.text((92 + 170 * number, 400), f"{name} ({rows[0].device})", INK, "start")
    return canvas.encode()


def check_suffix(path: Path) -> None:
    """Raise InputError unless `path` is called as one of the kinds of files that can be drawn."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {path}: expected a name ending in {' or '.join(SUFFIXES)}")


def _colors(rows: Sequence[Row]) -> dict[str, Color]:
    names = list(dict.fromkeys(row.backend for row in rows))
    return {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(names)}


def _log_scale(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    """A scale from a tick below the values to one above; ticks at 1, 2 and 5 times powers of ten."""
    low, high = (math.log10(max(v, 1e-3)) for v in (min(values), max(values)))
    known = [m * 10**e for e in range(math.floor(low) - 1, math.ceil(high) + 1) for m in (1.0, 2.0, 5.0)]
    below = max(t for t in known if math.log10(t) <= low)
    above = min((t for t in known if math.log10(t) > high), default=10 ** math.ceil(high + 1))
    bottom, top = math.log10(below), math.log10(above)
    ticks = [t for t in known if below <= t <= above]
    if len(ticks) > _MOST_TICKS:
        ticks = [t for t in ticks if math.isclose(math.log10(t) % 1, 0, abs_tol=1e-9)] or ticks[::3]
    return lambda value: (math.log10(max(value, 1e-3)) - bottom) / (top - bottom), ticks


def _linear_scale(highest: float) -> tuple[Callable[[float], float], list[float]]:
    """A scale from 0 to a tick at or above `highest`, in steps of 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(max(highest, 1e-6)) - 0.3)
    step = next(m * power for m in (1, 2, 5, 10) if highest / (m * power) <= _MOST_TICKS - 1)
    count = math.ceil(highest / step)
    return lambda value: value / (count * step), [i * step for i in range(count + 1)]


def _place(panel: Panel, value: float, column: int, columns: int) -> Point:
    (x, y), (width, height) = panel.corner, panel.size
    return x + width * (column + 0.5) / columns, y + height * (1 - panel.scale(value))


def _draw_axes(canvas: Canvas, panel: Panel, batches: Sequence[int]) -> None:
    (x, y), (width, height) = panel.corner, panel.size
    canvas.text((x, y - 20), panel.title, MUTED, "start")
    for tick in panel.ticks:
        level = y + height * (1 - panel.scale(tick))
        canvas.line([(x, level), (x + width, level)], TRACK, 1)
        canvas.text((x - 8, level), f"{tick:g}", MUTED, "end")
    for column, batch in enumerate(batches):
        label = f"batch {batch}" if column == 0 else str(batch)
        canvas.text((x + width * (column + 0.5) / len(batches), y + height + 16), label, MUTED, "middle")


def _draw_latency(
    canvas: Canvas, panel: Panel, rows: Sequence[Row], batches: Sequence[int], color: Color, shift: float
) -> None:
    for row in rows:
        column = batches.index(row.batch)
        (x, middle), (_, end) = (
            _place(panel, row.total[name], column, len(batches)) for name in ("p50", "p99")
        )
        canvas.line([(x + shift, middle), (x + shift, end)], color, 2)
        canvas.line([(x + shift - 4, end), (x + shift + 4, end)], color, 2)
        canvas.dot((x + shift, middle), color)


def _draw_rate(
    canvas: Canvas, panel: Panel, rows: Sequence[Row], batches: Sequence[int], color: Color
) -> None:
    points = [_place(panel, row.pairs_per_s, batches.index(row.batch), len(batches)) for row in rows]
    canvas.line(points, color, 2)
    for point in points:
        canvas.dot(point, color)


class _Svg:
    def __init__(self) -> None:
        self._parts: list[str] = []

    def line(self, points: Sequence[Point], color: Color, width: float) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{css(color)}" stroke-width="{width:g}"/>'
        )

    def dot(self, center: Point, color: Color) -> None:
        self._parts.append(f'<circle cx="{center[0]:.1f}" cy="{center[1]:.1f}" r="4" fill="{css(color)}"/>')

    def text(self, at: Point, text: str, color: Color, anchor: str) -> None:
        self._parts.append(
            f'<text x="{at[0]:.1f}" y="{at[1] + 0.35 * _TEXT:.1f}" text-anchor="{anchor}" '
            f'fill="{css(color)}">{html.escape(text)}</text>'
        )

    def encode(self) -> bytes:
        width, height = _SIZE
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="system-ui,sans-serif" font-size="{_TEXT}">\n'
            f'<rect width="{width}" height="{height}" fill="{css(WHITE)}"/>\n'
        )
        return (head + "\n".join(self._parts) + "\n</svg>\n").encode()


class _Png:
    def __init__(self) -> None:
        self._image = Image.new("RGB", (_SIZE[0] * _SCALE, _SIZE[1] * _SCALE), WHITE)
        self._draw = ImageDraw.Draw(self._image)
        self._font = ImageFont.load_default(_TEXT * _SCALE)

    def line(self, points: Sequence[Point], color: Color, width: float) -> None:
        self._draw.line([_grow(p) for p in points], color, round(width * _SCALE))

    def dot(self, center: Point, color: Color) -> None:
        self._draw.circle(_grow(center), 4 * _SCALE, color)

    def text(self, at: Point, text: str, color: Color, anchor: str) -> None:
        kind = {"start": "lm", "middle": "mm", "end": "rm"}[anchor]
        self._draw.text(_grow(at), text, color, self._font, anchor=kind)

    def encode(self) -> bytes:
        buffer = io.BytesIO()
        self._image.save(buffer, "PNG", optimize=True)
        return buffer.getvalue()


def _grow(point: Point) -> Point:
    return point[0] * _SCALE, point[1] * _SCALE
