"""Line charts as inline SVG. Knows series of numbers; knows no run.

The numbers stand in the SVG too, as JSON, so that the page's script can read out what lies under the pointer.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 36
MAX_POINTS = 500
"""Points of a drawn line; more would be finer than the chart's pixels."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line: points where either number is missing or not finite are gaps. `colour` is a CSS class "c0".."c7"."""

    label: str
    colour: str
    xs: Sequence[float | None]
    ys: Sequence[float | None]
    faint: bool = False
    marks: bool = False
    dashed: bool = False


def smoothed(ys: Sequence[float | None], *, weight: float) -> list[float | None]:
    """An exponential mean, corrected for its start (Kingma & Ba 2014, section 3); missing numbers stay missing.

    `weight` in [0, 1) is what the past keeps at each number.
    """
    total, mass = 0.0, 0.0
    result: list[float | None] = []
    for y in ys:
        if y is None or not math.isfinite(y):
            result.append(None)
            continue
        total = weight * total + (1 - weight) * y
        mass = weight * mass + (1 - weight)
        result.append(total / mass)
    return result


def thinned(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: of each stretch of neighbours its lowest and its highest, so that no spike is lost."""
    if len(points) <= limit:
        return points
    width = len(points) / (limit // 2)
    kept: list[tuple[float, float]] = []
    for index in range(limit // 2):
        stretch = points[round(index * width) : round((index + 1) * width)]
        if stretch:
            low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
            kept += [low] if low == high else sorted((low, high))
    return kept


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str, x_text: Callable[[float], str], y_text: Callable[[float], str]
) -> str:
    """The chart as an `<svg>` element, empty text when no series has a point.

    The vertical range leaves out the wildest hundredth of the numbers above the rest, so that the first steps of a run do not
    flatten what follows.
    """
    lines = [(one, _points(one)) for one in series]
    lines = [(one, points) for one, points in lines if points]
    if not lines:
        return ""
    xs = [x for _, points in lines for x, _ in points]
    ys = sorted(y for _, points in lines for _, y in points)
    left, right = min(xs), max(xs)
    low, high = ys[0], ys[min(len(ys) - 1, math.ceil(len(ys) * 0.99))]
    if right == left:
        left, right = left - 0.5, right + 0.5
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - y) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
        f" data-chart='{_data(lines, place, x_text, y_text)}'>"
    ]
    clip = "clip-" + re.sub(r"\W+", "-", f"{title} {x_label}".lower())
    parts.append(
        f'<clipPath id="{clip}">'
        f'<rect x="{_LEFT}" y="{_TOP}" width="{WIDTH - _LEFT - _RIGHT}" height="{HEIGHT - _TOP - _BOTTOM}"/></clipPath>'
    )
    for y in ticks(low, high):
        _, down = place(left, y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{down + 4}" text-anchor="end">{escape(y_text(y))}</text>')
    for x in ticks(left, right):
        across, _ = place(x, low)
        parts.append(f'<text class="tick" x="{across}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(x_text(x))}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{HEIGHT - _BOTTOM}" y2="{HEIGHT - _BOTTOM}"/>')
    parts.append(f'<text class="tick" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<g clip-path="url(#{clip})">')
    for one, points in lines:
        css = f"line {one.colour}" + " faint" * one.faint + " dashed" * one.dashed
        placed = [place(x, y) for x, y in thinned(points)]
        parts.append(f'<polyline class="{css}" points="{" ".join(f"{x},{y}" for x, y in placed)}"/>')
        if one.marks:
            parts += [f'<circle class="mark {one.colour}" cx="{x}" cy="{y}" r="3"/>' for x, y in placed]
    parts.append("</g></svg>")
    return "".join(parts)


def _points(series: Series) -> list[tuple[float, float]]:
    pairs = zip(series.xs, series.ys, strict=True)
    return [(x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)]


def _data(
    lines: list[tuple[Series, list[tuple[float, float]]]],
    place: Callable[[float, float], tuple[float, float]],
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
) -> str:
    """For the script: of each line its label, colour, and [across, down, x as text, y as text] of its points."""
    shown = [
        {
            "label": one.label,
            "colour": one.colour,
            "points": [[*place(x, y), x_text(x), y_text(y)] for x, y in thinned(points, 240)],
        }
        for one, points in lines
        if not one.faint
    ]
    return escape(json.dumps(shown, ensure_ascii=False, separators=(",", ":")), quote=True)
