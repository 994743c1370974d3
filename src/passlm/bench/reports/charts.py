"""Draws charts as inline SVG: bars with intervals, stacked bars, and lines with points.

This module does not know what is measured; `figures.py` decides what to draw. A chart is 360 units
wide, about the width of a phone, so that its text stays readable there. On a wide screen the charts
of a figure stand side by side, all with the same scale.

Colours are CSS classes: `c0` to `c7` for methods, `t0` to `t3` for the parts of a stacked bar. The
page sets their values, so they follow its theme. Each method colour has its own marker.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from passlm.bench.reports.markup import Markup, element, rounded

WIDTH = 360
COLOURS = 8
_LETTER = 6.2  # mean width of a letter at the font size of the page
_GUTTER = 136.0  # maximum width of the bars' labels
_VALUES = 42  # width of the column of values to the right of the bars
_ROW, _BAR = 24, 14
_TOP, _PLOT = 20, 190  # space above the plot of a line chart, and the height of the plot
_DASHES = (None, "6 3", "2 3", "8 3 2 3")
_MARKERS = (  # circle, square, triangle, diamond, inverted triangle, cross, wide bar, tall bar
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "M-3.2 -3.2h6.4v6.4h-6.4z",
    "M0 -4.4l4.4 7.6h-8.8z",
    "M0 -4.8l4.8 4.8l-4.8 4.8l-4.8 -4.8z",
    "M0 4.4l4.4 -7.6h-8.8z",
    "M-1.5 -4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "M-5 -2h10v4h-10z",
    "M-2 -5h4v10h-4z",
)


@dataclass(frozen=True)
class Look:
    """Colour, dash and marker of one method.

    Attributes:
        colour: number of the colour, 0 to `COLOURS` - 1; the marker has the same number.
        dash: number of the line's dash pattern, which distinguishes variants of one method.
        hollow: whether markers are drawn as outlines.
    """

    colour: int
    dash: int = 0
    hollow: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar with its value and confidence interval; the interval is None if it is not known."""

    label: str
    look: Look
    value: float
    interval: tuple[float, float] | None = None

    @property
    def end(self) -> float:
        """Largest value drawn: the upper end of the interval, or the value."""
        return self.interval[1] if self.interval else self.value

    def __str__(self) -> str:
        spread = f" ({' to '.join(map(rounded, self.interval))})" if self.interval else ""
        return f"{self.label} {rounded(self.value)}{spread}"

    def draw(self, scale: Scale, y: float) -> list[Markup]:
        """Return the bar, with a whisker for the interval."""
        drawn = [_bar(scale, 0, self.value, y, f"bar c{self.look.colour}")]
        if self.interval is not None:
            low, high = map(scale, self.interval)
            caps = [_path((x, y - 4), (x, y + 4)) for x in (low, high)]
            whisker = "".join([_path((low, y), (high, y)), *caps])
            drawn.append(element("path", d=whisker, class_="whisker"))
        return [*drawn, _value(rounded(self.value), y)]


@dataclass(frozen=True)
class Stack:
    """A stacked bar; part `i` has the class `t{i}`, and is None if it is not known."""

    label: str
    parts: tuple[float | None, ...]

    @property
    def end(self) -> float:
        """Sum of the known parts."""
        return sum(part or 0 for part in self.parts)

    def __str__(self) -> str:
        return f"{self.label} {rounded(self.end, 1)}"

    def draw(self, scale: Scale, y: float) -> list[Markup]:
        """Return the known parts, one after the other."""
        drawn, begun = [], 0.0
        for part, value in enumerate(self.parts):
            if value is not None:
                drawn.append(_bar(scale, begun, begun + value, y, f"t{part}"))
                begun += value
        return [*drawn, _value(rounded(self.end, 1), y)]


@dataclass(frozen=True)
class Series:
    """One or more points, optionally joined by a line."""

    label: str
    look: Look
    points: Sequence[tuple[float, float]]
    joined: bool = True

    def __str__(self) -> str:
        ends = dict.fromkeys((self.points[0], self.points[-1]))
        return f"{self.label} " + " to ".join(f"{short(y)} at {short(x)}" for x, y in ends)

    def draw(self, x_scale: Scale, y_scale: Scale) -> Markup:
        """Return the points and their line in the colour of `look`."""
        places = [(x_scale(x), y_scale(y)) for x, y in self.points]
        drawn = [_marker(self.look, x, y) for x, y in places]
        if self.joined and len(places) > 1:
            drawn.insert(0, _line(self.look, _path(*places)))
        return element("g", *drawn, class_=f"c{self.look.colour}")


@dataclass(frozen=True)
class Scale:
    """Linear map from values between `low` and `high` to coordinates from `begin` to `end`."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the coordinate of a value."""
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def bars(
    panels: Mapping[str, Sequence[Bar | Stack]], axis: str, reference: float | None = None
) -> Markup:
    """Draw horizontal bar charts.

    Args:
        panels: bars of each chart, from top to bottom, by the chart's name.
        axis: label of the value axis, with its unit.
        reference: value at which to draw a reference line, if any.
    """
    rows = [row for panel in panels.values() for row in panel]
    marks = ticks(max([row.end for row in rows] + [reference or 0]))
    gutter = min(_GUTTER, _LETTER * max(_letters(row.label) for row in rows))
    scale = Scale(0, marks[-1], 8 + gutter, WIDTH - _VALUES)
    middle = (scale.begin + scale.end) / 2
    charts = {}
    for name, panel in panels.items():
        bottom = _ROW * len(panel) + 4
        drawn = [_text(axis, middle, bottom + 30, "axis middle")]
        for mark in marks:
            drawn.append(_grid((scale(mark), 0), (scale(mark), bottom)))
            drawn.append(_text(short(mark), scale(mark), bottom + 14, "middle"))
        for number, row in enumerate(panel):
            y = 4 + _ROW * (number + 0.5)
            drawn += [_name(row.label, scale.begin, y), *row.draw(scale, y)]
        if reference is not None:
            line = _path((scale(reference), 0), (scale(reference), bottom))
            drawn.append(element("path", d=line, class_="reference"))
        charts[name] = _chart(bottom + 36, drawn, f"{axis}, {name}", panel)
    return _side_by_side(charts)


def lines(
    panels: Mapping[str, Sequence[Series]],
    x_axis: str,
    y_axis: str,
    levels: Mapping[str, float] | None = None,
    start: float = 0,
    at_values: bool = False,
) -> Markup:
    """Draw line charts whose y axis starts at 0.

    Args:
        panels: series of each chart by the chart's name; later series are drawn on top.
        x_axis: label of the x axis, with its unit.
        y_axis: label of the y axis, with its unit.
        levels: y value of a horizontal reference line, by the chart's name.
        start: where the x axis starts.
        at_values: put the ticks of the x axis at the points instead of at even distances.
    """
    points = [point for panel in panels.values() for one in panel for point in one.points]
    levels = levels or {}
    up = ticks(max([y for _, y in points] + [*levels.values()]))
    wide = max(max(x for x, _ in points), start + 1)
    left, right = 14 + _LETTER * max(len(short(mark)) for mark in up), WIDTH - 10
    bottom = _TOP + _PLOT
    x_scale, y_scale = Scale(start, wide, left, right), Scale(0, up[-1], bottom, _TOP)
    along = [mark for mark in ticks(wide, 12, whole=True) if start <= mark <= wide]
    if at_values:
        along = _apart({x for x, _ in points}, x_scale)
    frame = [_text(y_axis, 0, 10, "axis")]
    frame.append(_text(x_axis, (left + right) / 2, bottom + 32, "axis middle"))
    for mark in up:
        frame.append(_grid((left, y_scale(mark)), (right, y_scale(mark))))
        frame.append(_text(short(mark), left - 8, y_scale(mark) + 4, "end"))
    frame += [_text(short(mark), x_scale(mark), bottom + 16, "middle") for mark in along]
    charts = {}
    for name, panel in panels.items():
        drawn = [one.draw(x_scale, y_scale) for one in panel]
        if name in levels:
            y = y_scale(levels[name])
            drawn.insert(0, element("path", d=_path((left, y), (right, y)), class_="reference"))
        what = f"{y_axis} by {x_axis}, {name}"
        charts[name] = _chart(bottom + 38, [*frame, *drawn], what, panel)
    return _side_by_side(charts)


def ticks(top: float, most: int = 5, whole: bool = False) -> list[float]:
    """Return evenly spaced round numbers, from 0 to the first that is at least `top`.

    Args:
        top: value to reach.
        most: maximum number of steps.
        whole: whether all ticks must be whole numbers.
    """
    top = min(max(top, 1.0 if whole else 1e-12), 1e300)
    unit = 10.0 ** math.floor(math.log10(top / most))
    if whole:
        unit = max(unit, 1.0)
    multiples = (1, 2, 5, 10, 20) if whole else (1, 2, 2.5, 5, 10, 20)
    step = next(unit * times for times in multiples if top <= unit * times * most)
    return [step * count for count in range(1 + math.ceil(round(top / step, 6)))]


def _apart(values: Collection[float], scale: Scale) -> list[float]:
    """Return the values whose labels do not overlap; the largest value is always among them."""
    kept = [max(values)]
    for value in sorted(values, reverse=True)[1:]:
        letters = (_letters(short(value)) + _letters(short(kept[-1]))) / 2
        if scale(kept[-1]) - scale(value) >= _LETTER * (letters + 1):
            kept.append(value)
    return kept


def line_key(look: Look) -> Markup:
    """Return the legend's picture of a line with its marker."""
    return _key([_line(look, "M0 7H24"), _marker(look, 12, 7)], f" c{look.colour}")


def marker_key(look: Look) -> Markup:
    """Return the legend's picture of a marker without a line."""
    return _key([_marker(look, 12, 7)], f" c{look.colour}")


def part_key(part: int) -> Markup:
    """Return the legend's picture of a part of a stacked bar."""
    return _key([element("rect", x=5, y=1, width=14, height=12, class_=f"t{part}")])


def reference_key() -> Markup:
    """Return the legend's picture of the reference line."""
    return _key([element("path", d="M0 7H24", class_="reference")])


def short(value: float) -> str:
    """Format a number with three significant digits, or as a whole number from 1000 to 10^6."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _key(drawn: Sequence[Markup], colour: str = "") -> Markup:
    return element("svg", *drawn, viewBox="0 0 24 14", class_=f"key{colour}", aria_hidden="true")


def _chart(
    height: float, drawn: Sequence[Markup], what: str, shown: Sequence[Bar | Stack | Series]
) -> Markup:
    """Return a chart, with its content in words for screen readers."""
    words = f"{what}: {'; '.join(map(str, shown))}"
    box = f"0 0 {WIDTH} {height:g}"
    return element("svg", *drawn, viewBox=box, class_="chart", role="img", aria_label=words)


def _side_by_side(charts: Mapping[str, Markup]) -> Markup:
    """Return the charts side by side, each under its name."""
    figures = [
        element("figure", element("figcaption", name), drawn) for name, drawn in charts.items()
    ]
    return element("div", *figures, class_="panels")


def _bar(scale: Scale, begin: float, end: float, y: float, kind: str) -> Markup:
    width = max(0.0, scale(end) - scale(begin))
    top = y - _BAR / 2
    return element("rect", x=scale(begin), y=top, width=width, height=_BAR, class_=kind)


def _line(look: Look, path: str) -> Markup:
    dash = _DASHES[look.dash % len(_DASHES)]
    return element("path", d=path, class_="line", stroke_dasharray=dash)


def _grid(*ends: tuple[float, float]) -> Markup:
    return element("path", d=_path(*ends), class_="grid")


def _marker(look: Look, x: float, y: float) -> Markup:
    kind, place = "marker hollow" if look.hollow else "marker", f"translate({x:.1f} {y:.1f})"
    return element("path", d=_MARKERS[look.colour], transform=place, class_=kind)


def _path(*points: tuple[float, float]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _text(text: str, x: float, y: float, kind: str) -> Markup:
    return element("text", text, x=x, y=y, class_=kind)


def _value(text: str, y: float) -> Markup:
    """Return a bar's value, in the column to the right of the bars."""
    return _text(text, WIDTH, y + 4, "end strong")


def _name(label: str, left: float, y: float) -> Markup:
    """Return a bar's label, shortened to fit; the tooltip shows the full label."""
    cut = label
    while _LETTER * _letters(cut) > _GUTTER:
        cut = cut.removesuffix("…")[:-1] + "…"
    whole = [element("title", label)] if cut != label else []
    return element("text", cut, *whole, x=left - 6, y=y + 4, class_="end")


def _letters(text: str) -> int:
    """Return the width of a text in letters; wide East Asian characters count as two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
