"""Line charts as inline SVG, drawn with nothing but text: they open anywhere and follow the page's colours.

Colours come from CSS variables of the page: ``--series-0`` … ``--series-3``, ``--ink``, ``--faint``, ``--grid``.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]

MOST_POINTS = 600  # of a line; about one a pixel and more can't be seen
MOST_HINTS = 120  # points of a line that show their value under the pointer
FEW_POINTS = 24  # up to so many are marked with dots
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 10, 26  # margins in pixels


def line_chart(
    title: str,
    series: Mapping[str, Sequence[Point]],
    *,
    width: int = 460,
    height: int = 220,
    reference: tuple[str, float] | None = None,
) -> str:
    """One picture with axes, ticks and, for several lines, a legend.

    Args:
      title: stands above the picture.
      series: (step, value) pairs in order, by the line's name, which may be empty if it is the only one; a value
        that is not finite breaks the line.
      width, height: of the drawing, in its own pixels; the page scales it.
      reference: label and height of a dashed horizontal line.

    Returns:
      A ``<figure>`` element; empty if no value is finite.
    """
    finite = [(x, y) for points in series.values() for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    levels = [y for _, y in finite] + ([reference[1]] if reference else [])
    x_ticks = nice_ticks(min(x for x, _ in finite), max(x for x, _ in finite), width // 90, whole=True)
    y_ticks = nice_ticks(min(levels), max(levels), height // 45)
    x_range = (min(x for x, _ in finite), max(x for x, _ in finite))
    to_x = _scale(x_range, (LEFT, width - RIGHT))
    to_y = _scale((y_ticks[0], y_ticks[-1]), (height - BOTTOM, TOP))
    parts = [_axes(x_ticks, y_ticks, to_x, to_y, width, height)]
    if reference:
        label, level = reference
        y = to_y(level)
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT + 4}" y="{y - 5:.1f}">{escape(label)}</text>')
    for index, (name, points) in enumerate(series.items()):
        parts.append(_line(name, points, f"var(--series-{index % 4})", to_x, to_y))
    legend = "".join(
        f"<span>{_swatch(index) if len(series) > 1 else ''}{escape(name)} <b>{format_number(_last(points))}</b></span>"
        for index, (name, points) in enumerate(series.items())
    )
    caption = f"<figcaption><strong>{escape(title)}</strong>{legend}</figcaption>"
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)} by step">'
    return f"<figure>{caption}{opening}{''.join(parts)}</svg></figure>"


def nice_ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """At most ``most + 2`` round numbers, 1, 2 or 5 times a power of ten apart, that enclose [low, high].

    Args:
      low, high: the range; where they are equal, it is widened.
      most: about how many.
      whole: only whole numbers.
    """
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = (low, low + 1) if whole else (low - margin, low + margin)
    rough = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def format_number(value: float) -> str:
    """A number short enough for an axis: ``12.5k``, ``1.24M``, ``0.0312``, ``3e-04``."""
    if not math.isfinite(value):
        return str(value)
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size * (10 if unit == "k" else 1):
            return f"{value / size:.4g}{unit}"
    if value and abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4g}"


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most about ``most`` points that keep the shape: of each stretch its lowest and its highest."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        ends = {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return kept


def _axes(x_ticks, y_ticks, to_x, to_y, width: int, height: int) -> str:
    parts = []
    for tick in y_ticks:
        y = to_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{format_number(tick)}</text>')
    for tick in x_ticks:
        x = to_x(tick)
        if LEFT - 1 <= x <= width - RIGHT + 1:
            parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{format_number(tick)}</text>')
    parts.append(f'<text x="{LEFT - 8}" y="{height - 8}" text-anchor="end">step</text>')
    return "".join(parts)


def _swatch(index: int) -> str:
    return f'<i style="background:var(--series-{index % 4})"></i>'


def _line(name: str, points: Sequence[Point], color: str, to_x, to_y) -> str:
    """The line, broken where a value is missing, and points that tell their value under the pointer."""
    pieces: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    whole = [point for piece in pieces for point in piece]
    parts = []
    for piece in filter(None, pieces):
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in thin(piece, MOST_POINTS))
        parts.append(f'<polyline class="line" stroke="{color}" points="{path}"/>')
    radius = 3 if len(whole) <= FEW_POINTS else 0
    for x, y in thin(whole, MOST_HINTS):
        hint = f"{escape(name)} {format_number(y)} at step {x:,.0f}".strip()
        dot = f'<circle r="{radius}" fill="{color}" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}"/>' if radius else ""
        parts.append(
            f'<g class="hint">{dot}<circle r="7" fill="transparent" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}"/>'
            f"<title>{hint}</title></g>"
        )
    return "".join(parts)


def _scale(domain: tuple[float, float], pixels: tuple[float, float]):
    (low, high), (first, last) = domain, pixels
    span = (high - low) or 1.0
    return lambda value: first + (value - low) / span * (last - first)


def _last(points: Sequence[Point]) -> float:
    return points[-1][1] if points else math.nan
