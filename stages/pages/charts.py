"""Line charts, histograms and heat strips as inline SVG without scripts; colours are the page's CSS variables.

Charts are 360 units wide: about the width of a phone's screen. Two fit next to each other on a desktop.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 26
MAX_TICKS = 5
MAX_BARS = 24
LOG_FROM = 10
"""Factor that values must span for a logarithmic axis."""
CELL = 11


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Args:
        name: Its name in the legend.
        points: Its points `(x, y)`; those that are not finite are skipped.
        css: The CSS class that colours it.
    """

    name: str
    points: Sequence[tuple[float, float]]
    css: str = "a"


def line_chart(title: str, series: Sequence[Series], x_label: str = "step", *, may_be_log: bool = False) -> Markup:
    """Draw lines over a common x axis, with the last value of each line in the legend.

    Args:
        title: Title of the figure.
        series: The lines.
        x_label: What the x axis counts.
        may_be_log: Whether the y axis is logarithmic if the values are positive and span more than `LOG_FROM`.

    Returns:
        A `<figure>` element; one without a chart if there is nothing to draw.
    """
    drawn = [Series(s.name, [p for p in s.points if all(map(math.isfinite, p))], s.css) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return Markup('<figure class="chart"><figcaption>{}: nothing was recorded</figcaption></figure>').format(title)
    x_ticks = nice_ticks([x for s in drawn for x, _ in s.points])
    ys = [y for s in drawn for _, y in s.points]
    is_log = may_be_log and min(ys) > 0 and max(ys) > LOG_FROM * min(ys)
    y_ticks = log_ticks(ys) if is_log else nice_ticks(ys)
    last_x = max(x for s in drawn for x, _ in s.points)
    x_ticks = [tick for tick in x_ticks if tick <= last_x] or x_ticks
    frame = _Frame((x_ticks[0], max(last_x, x_ticks[-1])), (y_ticks[0], y_ticks[-1]), is_log)
    lines = Markup("").join(_line(s, frame) for s in drawn)
    legend = Markup(" ").join(
        Markup('<span class="key {}">{} <b>{}</b></span>').format(s.css, s.name, format_value(s.points[-1][1]))
        for s in drawn
    )
    return Markup(
        '<figure class="chart"><figcaption><span class="title">{}</span> {}{}</figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg></figure>'
    ).format(
        title,
        legend,
        " (log)" if is_log else "",
        WIDTH,
        HEIGHT,
        f"{title} over {x_label}s",
        _axes(frame, x_ticks, y_ticks),
        lines,
    )


def heat_strip(title: str, rows: Sequence[str], columns: Sequence[str], values: dict[tuple[str, str], float]) -> Markup:
    """Draw a grid of cells whose colour is stronger for larger values, with the values as tooltips.

    Args:
        title: Title of the figure.
        rows: Names along the left side.
        columns: Names along the bottom, of which every fifth is shown.
        values: `(row, column)` -> value >= 0; cells without a value are empty.
    """
    if not values:
        return Markup("")
    largest = max(values.values()) or 1.0
    left = round(5.6 * max(map(len, rows))) + 8
    width, height = left + CELL * len(columns) + 4, CELL * len(rows) + 22
    cells = Markup("").join(
        Markup(
            '<rect class="cell" x="{}" y="{}" width="{s}" height="{s}" fill-opacity="{:.3f}"><title>{}</title></rect>'
        ).format(
            left + CELL * column,
            CELL * row,
            0.06 + 0.94 * values[(name, block)] / largest,
            f"block {block} {name}: {values[(name, block)]:.4f}",
            s=CELL - 1.5,
        )
        for row, name in enumerate(rows)
        for column, block in enumerate(columns)
        if (name, block) in values
    )
    names = Markup("").join(
        Markup('<text class="y" x="{}" y="{}">{}</text>').format(left - 6, CELL * row + 8.5, name)
        for row, name in enumerate(rows)
    )
    ticks = Markup("").join(
        Markup('<text class="x" x="{}" y="{}">{}</text>').format(left + CELL * (column + 0.5), height - 8, block)
        for column, block in enumerate(columns)
        if column % 5 == 0
    )
    return Markup(
        '<figure class="chart heat"><figcaption><span class="title">{}</span></figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" style="max-width:{}px">{}{}{}</svg></figure>'
    ).format(title, width, height, title, round(width * 1.5), cells, names, ticks)


def histogram(title: str, values: Sequence[float], x_label: str) -> Markup:
    """Draw a histogram with round bin edges, and median and maximum in the legend.

    Returns:
        A `<figure>` element; one without a chart if there are no values.
    """
    if not len(values):
        return Markup('<figure class="chart"><figcaption>{}: nothing to count</figcaption></figure>').format(title)
    ordered = sorted(values)
    borders = nice_ticks([0, ordered[-1]], MAX_BARS)
    counts = [bisect_left(ordered, right) - bisect_left(ordered, left) for left, right in itertools.pairwise(borders)]
    counts[-1] += len(ordered) - bisect_left(ordered, borders[-1])
    y_ticks = nice_ticks([0, max(counts)])
    frame = _Frame((borders[0], borders[-1]), (0, y_ticks[-1]))
    bars = Markup("").join(
        Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
            frame.x(left),
            frame.y(count),
            round(max(frame.x(right) - frame.x(left) - 1, 0.5), 1),
            round(frame.y(0) - frame.y(count), 1),
            f"{left:g} to {right:g} {x_label}: {count:,}",
        )
        for (left, right), count in zip(itertools.pairwise(borders), counts, strict=True)
    )
    x_ticks = [tick for tick in nice_ticks(borders) if tick <= borders[-1]]
    legend = f"median {ordered[len(ordered) // 2]:,.4g}, largest {ordered[-1]:,.4g} {x_label}"
    return Markup(
        '<figure class="chart"><figcaption><span class="title">{}</span> {}</figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg></figure>'
    ).format(title, legend, WIDTH, HEIGHT, f"{title}: {legend}", _axes(frame, x_ticks, y_ticks), bars)


def nice_ticks(values: Sequence[float], num_ticks: int = MAX_TICKS) -> list[float]:
    """Return about `num_ticks` equally spaced round numbers that enclose the values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = (low - abs(low) * 0.5, high + abs(high) * 0.5) if low else (0.0, 1.0)
    rough = (high - low) / (num_ticks - 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(values: Sequence[float]) -> list[float]:
    """Return round numbers that enclose positive values, about `MAX_TICKS` with equal steps on a logarithmic axis."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in range(low, high + 1) for digit in digits]
        first = max(index for index, tick in enumerate(ticks) if tick <= min(values) * (1 + 1e-9))
        last = min(index for index, tick in enumerate(ticks) if tick >= max(values) * (1 - 1e-9))
        if last - first < MAX_TICKS + 1:
            break
    shown = ticks[first : last + 1]
    step = math.ceil((len(shown) - 1) / MAX_TICKS) or 1
    chosen = shown[::step] if (len(shown) - 1) % step == 0 else [*shown[::step], shown[-1]]
    return [round(tick, 12) for tick in chosen]


def format_tick(value: float) -> str:
    """Format the label of a tick, without trailing zeros."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:g}"


def format_value(value: float) -> str:
    """Format a value with three significant digits."""
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"


@dataclass(frozen=True)
class _Frame:
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    is_log: bool = False

    def x(self, value: float) -> float:
        share = (value - self.x_range[0]) / ((self.x_range[1] - self.x_range[0]) or 1)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        value, low, high = map(math.log10, (value, *self.y_range)) if self.is_log else (value, *self.y_range)
        share = (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _axes(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Markup:
    grid = Markup("").join(
        Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text x="{}" y="{}" class="y">{}</text>').format(
            LEFT, WIDTH - RIGHT, LEFT - 6, frame.y(tick) + 3.5, format_tick(tick), y=frame.y(tick)
        )
        for tick in y_ticks
    )
    labels = Markup("").join(
        Markup('<text x="{}" y="{}" class="x">{}</text>').format(frame.x(tick), HEIGHT - BOTTOM + 15, format_tick(tick))
        for tick in x_ticks
    )
    return grid + labels


def _line(series: Series, frame: _Frame) -> Markup:
    points = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in series.points)
    dots = series.points if len(series.points) <= 12 else series.points[-1:]
    circles = Markup("").join(
        Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.2"><title>{}</title></circle>').format(
            series.css, frame.x(x), frame.y(y), f"{series.name} {format_value(y)} at {x:g}"
        )
        for x, y in dots
    )
    return Markup('<polyline class="line {}" points="{}"/>{}').format(escape(series.css), points, circles)
