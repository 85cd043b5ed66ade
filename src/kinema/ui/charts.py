"""Line charts as HTML and SVG, made here: the lines stretch with the page, the labels keep their size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 1000.0, 360.0
MAX_POINTS = 700


@dataclass(frozen=True)
class Line:
    """One series. ``kind``: a class of the style sheet (``raw``, ``main``, ``mean``, ``shade-1`` ... ``shade-9``)."""

    name: str
    points: Points
    kind: str = "main"


def chart(title: str, lines: Sequence[Line], note: str = "", log: bool = False) -> str:
    """One chart with ticks, grid and a readout of the nearest step under the pointer; empty text without points.

    A few extreme values must not flatten the rest: the frame leaves out what lies above 1.3 times the 99th
    percentile, and says how many points that are. ``log``: logarithmic height, if all values are positive.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    # An average repeats what was measured, and a spike in it many times: where both are drawn, the latter decides.
    values = sorted(y for line in [line for line in lines if line.kind == "raw"] or lines for _, y in line.points)
    lines = [Line(line.name, thinned(line.points), line.kind) for line in lines]
    log = log and values[0] > 0
    low, high = values[0], values[-1]
    crest = values[min(len(values) - 1, math.ceil(0.99 * (len(values) - 1)))]
    above = 0
    if not log and high > low and high - low > 1.3 * (crest - low) > 0:
        high = low + 1.3 * (crest - low)
        above = sum(value > high for value in values)
    ticks = log_ticks(low, high) if log else nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = min(line.points[0][0] for line in lines), max(line.points[-1][0] for line in lines)

    def across(x: float) -> float:
        return 0.5 if last == first else (x - first) / (last - first)

    def up(y: float) -> float:
        if high == low:
            return 0.5
        return math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)

    marks = [tick for tick in nice_ticks(first, last, 5) if first <= tick <= last]
    grid = "".join(f'<path d="M0 {_y(up(tick))}H{WIDTH:.0f}"/>' for tick in ticks)
    drawn = "".join(_path(line, across, up) for line in lines)
    y_labels = "".join(f'<span class="y" style="top:{100 * (1 - up(t)):.2f}%">{number(t)}</span>' for t in ticks)
    x_labels = "".join(f'<span class="x" style="left:{100 * across(t):.2f}%">{number(t)}</span>' for t in marks)
    if above:
        note = f"{note} {above} of {len(values)} points lie above the frame.".strip()
    spoken = "; ".join(
        f"{line.name} from {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in lines
    )
    data = json.dumps(
        [
            [line.name, [[round(x, 3), float(f"{y:.5g}")] for x, y in line.points]]
            for line in lines
            if line.kind != "raw"
        ],
        separators=(",", ":"),
    )
    label = escape(f"{title} over steps {number(first)} to {number(last)}: {spoken}")
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"""<figure class="chart">
<figcaption><b>{escape(title)}</b>{_legend(lines)}</figcaption>
<div class="plot" data-lines="{escape(data)}" data-from="{first:g}" data-to="{last:g}">
<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" role="img"
 aria-label="{label}">
<g class="grid">{grid}</g>{drawn}</svg>
{y_labels}{x_labels}<i class="cursor" hidden></i><output hidden></output></div>
{below}</figure>"""


def _legend(lines: Sequence[Line]) -> str:
    """Names beside a stroke in the line's own style; the shades of a ramp are named at its ends alone."""
    shades = [line for line in lines if line.kind.startswith("shade")]
    named = [line for line in lines if line not in shades]
    ends = shades if len(shades) <= 2 else [shades[0], shades[-1]]
    words = [f'<span class="key {line.kind}">{escape(line.name)}</span>' for line in (*named, *ends)]
    return f'<span class="legend">{"".join(words)}</span>' if len(lines) > 1 else ""


def _path(line: Line, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    points = [(across(x) * WIDTH, _y(max(-0.2, min(1.2, up(y))))) for x, y in line.points]
    if len(points) == 1:  # a line of no length with round ends is a dot
        points = points * 2
    return f'<path class="line {line.kind}" d="M' + "L".join(f"{x:.1f} {y}" for x, y in points) + '"/>'


def _y(share: float) -> str:
    return f"{HEIGHT * (1 - share):.1f}"


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Exponential moving average over a hundredth of the points, five at least, without bias towards the start."""
    keep = 1 - 1 / max(5.0, 0.01 * len(points))
    total = weight = 0.0
    result = []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        result.append((x, total / weight))
    return result


def thinned(points: Points, count: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most ``count`` points (and the last): of each stretch the lowest and the highest, in their order."""
    if len(points) <= count:
        return list(points)
    stretch = math.ceil(2 * len(points) / count)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) that span [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten from at or below ``low`` to at or above ``high``; powers alone if they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low <= 100 else (1,)
    every = [factor * 10.0**power for power in powers for factor in factors]
    below = max((tick for tick in every if tick <= low * 1.000001), default=every[0])
    above = min((tick for tick in every if tick >= high * 0.999999), default=every[-1])
    return [tick for tick in every if below <= tick <= above] or [low]


def number(value: float) -> str:
    """Short: ``1.2k``, ``0.034``, ``2e-5``."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10000:
        return f"{value / 1000:.4g}k"
    if size < 1e-4:
        mantissa, _, exponent = (
            f"{value:.2g}".partition("e") if "e" in f"{value:.2g}" else f"{value:.1e}".partition("e")
        )
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
