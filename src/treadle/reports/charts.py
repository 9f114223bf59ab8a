"""Charts as inline SVG: pure functions from numbers to markup that needs nothing from outside the page.

Ink and grid take the page's colours, so light and dark both read; every mark carries its value as a tooltip.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C7A00")
"""Okabe and Ito's colours, which colour-blind readers tell apart; the yellow darkened to stand on white."""

NEUTRAL = "#808080"
"""The base model, and whatever is nobody's."""


def colours(names: Sequence[str]) -> dict[str, str]:
    """Name → colour, in order; an eighth name begins again."""
    return {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(names)}


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map: what it shows, and how it is explained."""

    value: float
    text: str
    tip: str


def heat_map(
    cells: Mapping[tuple[str, str], Cell], *, title: str, row_head: str = "", highest: float | None = None
) -> Markup:
    """A map of rows × columns, both in order of first appearance; the fuller the blue, the larger the value.

    Args:
        cells: (row, column) → cell.
        title: what a screen reader says.
        row_head: what the rows are.
        highest: the value of the fullest blue; the largest there is if None.
    """
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    top = highest or max((abs(cell.value) for cell in cells.values()), default=0.0) or 1.0
    left = 16 + 6.5 * max(map(len, [*rows, row_head]), default=1)
    longest = max((len(cell.text) for cell in cells.values()), default=1)
    width = max(56.0, 14 + 6.5 * max(map(len, columns), default=1), 8 + 6.2 * longest)
    parts = [_text(left + (place + 0.5) * width, 14.0, column, "middle") for place, column in enumerate(columns)]
    parts.append(_text(left - 8, 14.0, row_head, "end", "muted"))
    for down, row in enumerate(rows):
        y = 22.0 + 20 * down
        parts.append(_text(left - 8, y + 14, row, "end"))
        for across, column in enumerate(columns):
            if (row, column) in cells:
                parts.append(_cell(cells[row, column], left + across * width, y, width, top))
    return _svg(parts, left + len(columns) * width + 4, 26.0 + 20 * len(rows), title)


def _cell(cell: Cell, x: float, y: float, width: float, top: float) -> Markup:
    strength = 0.04 + 0.86 * min(1.0, max(0.0, abs(cell.value) / top))
    ink = "on" if strength > 0.78 else "ink"  # whichever of white and the page's ink reads better in light mode
    return Markup(
        '<g><title>{}</title><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="19" rx="2" fill="{}" '
        'fill-opacity="{:.2f}"/><text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text></g>'
    ).format(cell.tip, x, y, width - 1, PALETTE[0], strength, ink, x + width / 2, y + 14, cell.text)


@dataclass(frozen=True)
class Bar:
    """One cell of a map of bars: shares of a whole by name, together at most 1, and how they are explained."""

    shares: Mapping[str, float]
    tip: str


def bar_map(bars: Mapping[tuple[str, str], Bar], tints: Mapping[str, str], *, title: str, row_head: str = "") -> Markup:
    """A map of rows × columns, both in order of first appearance; in each cell its shares from left to right.

    Args:
        bars: (row, column) → bar.
        tints: name of a share → its colour.
        title: what a screen reader says.
        row_head: what the rows are.
    """
    rows = list(dict.fromkeys(row for row, _ in bars))
    columns = list(dict.fromkeys(column for _, column in bars))
    left = 16 + 6.5 * max(map(len, [*rows, row_head]), default=1)
    width = max(76.0, 14 + 6.5 * max(map(len, columns), default=1))
    parts = [_text(left + (place + 0.5) * width, 14.0, column, "middle") for place, column in enumerate(columns)]
    parts.append(_text(left - 8, 14.0, row_head, "end", "muted"))
    for down, row in enumerate(rows):
        y = 22.0 + 16 * down
        parts.append(_text(left - 8, y + 11, row, "end"))
        for across, column in enumerate(columns):
            if (row, column) in bars:
                parts.append(_bar(bars[row, column], tints, left + across * width, y, width - 8))
    return _svg(parts, left + len(columns) * width + 4, 26.0 + 16 * len(rows), title)


def _bar(bar: Bar, tints: Mapping[str, str], x: float, y: float, width: float) -> Markup:
    mark = Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="13" fill="{}" fill-opacity="{}"/>')
    parts = [mark.format(x, y, width, NEUTRAL, 0.15)]
    for name, share in bar.shares.items():
        parts.append(mark.format(x, y, width * share, tints[name], 1))
        x += width * share
    return Markup("<g><title>{}</title>{}</g>").format(bar.tip, Markup("").join(parts))


@dataclass(frozen=True)
class Dot:
    """An estimate with its interval, drawn on the line of its label.

    Attributes:
        label: of the line.
        group: decides colour and shape.
        value: the estimate.
        low: lower end.
        high: upper end.
        tip: the tooltip.
    """

    label: str
    group: str
    value: float
    low: float
    high: float
    tip: str


def dot_chart(dots: Sequence[Dot], groups: Sequence[str], *, title: str) -> Markup:
    """Dots with their intervals on an axis from 0 to 1, a band a label, a line a group within it."""
    labels = list(dict.fromkeys(dot.label for dot in dots))
    tints = colours(groups)
    left, width = 16 + 6.8 * max(map(len, labels), default=1), 300.0
    band = 8 + 11.0 * len(groups)
    bottom = 8 + band * len(labels)
    parts = [_tick(left + width * share, bottom, f"{share:g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for down, label in enumerate(labels):
        parts.append(_text(left - 10, 8 + band * (down + 0.5) + 4, label, "end"))
    for dot in dots:
        y = 8 + band * labels.index(dot.label) + 9 + 11 * groups.index(dot.group)
        parts.append(_dot(dot, left, width, y, tints[dot.group]))
    return _svg(parts, left + width + 16, bottom + 20, title)


def _dot(dot: Dot, left: float, width: float, y: float, tint: str) -> Markup:
    low, high, middle = (left + width * share for share in (dot.low, dot.high, dot.value))
    return Markup(
        '<g><title>{}</title><line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}" stroke="{}" stroke-width="3" '
        'stroke-opacity="0.45" stroke-linecap="round"/><circle cx="{:.1f}" cy="{:.1f}" r="4.2" fill="{}"/></g>'
    ).format(dot.tip, low, high, y, y, tint, middle, y, tint)


def _tick(x: float, bottom: float, label: str) -> Markup:
    line = Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="4" y2="{:.1f}"/>').format(x, x, bottom)
    return line + _text(x, bottom + 14, label, "middle", "muted")


def line_chart(
    series: Mapping[str, Sequence[float]], tints: Mapping[str, str], *, title: str, x_label: str, y_label: str
) -> Markup:
    """One line a series over its places 1, 2, …; what is not a number leaves a gap."""
    values = [value for line in series.values() for value in line if math.isfinite(value)]
    low, high = min([*values, 0.0]), max([*values, 1e-9])
    longest = max(map(len, series.values()), default=1)
    left, top, width, height = 52.0, 10.0, 520.0, 200.0

    def x_of(place: int) -> float:
        return left + width * (place / max(1, longest - 1))

    def y_of(value: float) -> float:
        return top + height * (high - value) / ((high - low) or 1.0)

    parts: list[Markup] = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        line = '<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
        parts.append(Markup(line).format(left, left + width, y_of(value), y_of(value)))
        parts.append(_text(left - 6, y_of(value) + 4, f"{value:.2f}", "end", "muted"))
    for name, line in series.items():
        parts.append(_path(name, line, tints.get(name, NEUTRAL), x_of, y_of))
    parts.append(_text(left, top + height + 18, "1", "middle", "muted"))
    parts.append(_text(left + width, top + height + 18, str(longest), "middle", "muted"))
    parts.append(_text(left + width / 2, top + height + 18, x_label, "middle", "muted"))
    # The y label stands above the plot, where it needs no turned head.
    return Markup('<p class="axis">{}</p>').format(y_label) + _svg(parts, left + width + 20, top + height + 24, title)


def _path(
    name: str, line: Sequence[float], tint: str, x_of: Callable[[int], float], y_of: Callable[[float], float]
) -> Markup:
    steps: list[str] = []
    pen_up = True
    for place, value in enumerate(line):
        if math.isfinite(value):
            steps.append(f"{'M' if pen_up else 'L'}{x_of(place):.1f} {y_of(value):.1f}")
        pen_up = not math.isfinite(value)
    mark = '<path d="{}" fill="none" stroke="{}" stroke-width="2" stroke-linejoin="round"><title>{}</title></path>'
    return Markup(mark).format(" ".join(steps), tint, name)


def legend(tints: Mapping[str, str]) -> Markup:
    """A line of swatches with their names."""
    swatch = '<span class="key"><i style="background:{}"></i>{}</span>'
    return Markup('<p class="legend">{}</p>').format(
        Markup("").join(Markup(swatch).format(tint, name) for name, tint in tints.items())
    )


@dataclass(frozen=True)
class Goal:
    """A figure beside what it should reach.

    Attributes:
        name: of the figure.
        text: the figure and its goal in words.
        ratio: the figure as a multiple of the goal; None where there is no goal, or a goal of 0.
        holds: whether the goal is reached; None where nothing is judged.
    """

    name: str
    text: str
    ratio: float | None
    holds: bool | None


_VERDICTS = {True: "#009E73", False: "#D55E00", None: NEUTRAL}


def goal_chart(goals: Sequence[Goal], *, title: str) -> Markup:
    """A bar a figure from 0 to twice its goal: green where it holds, red where it is missed, grey where neither."""
    left, width = 16 + 6.5 * max((len(goal.name) for goal in goals), default=1), 200.0
    bottom = 8.0 + 22 * len(goals)
    judged = any(goal.ratio is not None for goal in goals)
    parts = [_tick(left + width / 2, bottom, "goal")] if judged else []
    bar = Markup('<g><title>{}</title><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="12" rx="2" fill="{}"/></g>')
    for down, goal in enumerate(goals):
        y, tint = 8.0 + 22 * down, _VERDICTS[goal.holds]
        parts.append(_text(left - 8, y + 13, goal.name, "end"))
        if goal.ratio is None:
            parts.append(bar.format(goal.text, left, y + 3, 3.0, tint))
        else:
            share = min(1.0, max(0.0, goal.ratio / 2)) if math.isfinite(goal.ratio) else 0.0
            parts.append(bar.format(goal.text, left, y + 3, max(3.0, width * share), tint))
        parts.append(_text(left + width + 12, y + 13, goal.text, "start"))
    longest = max((len(goal.text) for goal in goals), default=1)
    return _svg(parts, left + width + 20 + 6.2 * longest, bottom + 20, title)


def key(tints: Mapping[str, str]) -> Markup:
    """What `legend` says, as a drawing, for sheets that are no pages."""
    parts: list[Markup] = []
    x = 0.0
    for name, tint in tints.items():
        swatch = Markup('<rect x="{:.1f}" y="3" width="10" height="10" rx="2" fill="{}"/>')
        parts.append(swatch.format(x, tint) + _text(x + 15, 12.0, name, "start"))
        x += 35 + 6.5 * len(name)
    return _svg(parts, max(x, 1.0), 18.0, ", ".join(tints))


_SIZE = re.compile(r'viewBox="0 0 (\d+) (\d+)"')
# A ground of its own, so that the ink reads wherever the picture is shown, on white and on dark.
_STYLE = (
    "text{font:11px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}.head{font-weight:600;font-size:13px}"
    ".ink,.head{fill:#1c1e21}.muted{fill:#5f646b}.on{fill:#fff}.grid{stroke:#dcdfe3}.ground{fill:#fdfdfc}"
)


def sheet(panels: Sequence[tuple[str, Markup]], *, title: str) -> str:
    """A whole SVG file: the title, then each chart below its heading ("" for none).

    What a chart puts before its drawing for a page, such as the name of an axis, is left out: headings say it.
    """
    parts = [_text(16.0, 26.0, title, "start", "muted")]
    y, width = 40.0, 32 + 6.2 * len(title)
    for heading, chart in panels:
        drawing = Markup(chart[chart.index("<svg") :])
        across, down = (int(size) for size in _SIZE.findall(drawing)[0])
        if heading:
            parts.append(_text(16.0, y + 16, heading, "start", "head"))
            y += 26
        opened = Markup('<svg x="16" y="{:.0f}" width="{}" height="{}" ').format(y, across, down)
        parts.append(opened + Markup(drawing.removeprefix("<svg ")))
        y += down + 10
        width = max(width, across + 32.0, 32 + 7.4 * len(heading))
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{}" viewBox="0 0 {:.0f} {:.0f}" '
        'width="{:.0f}" height="{:.0f}"><style>{}</style>'
        '<rect class="ground" width="100%" height="100%" rx="6"/>{}</svg>'
    )
    body = Markup("").join(parts)
    return str(head.format(title, width, y + 8, width, y + 8, Markup(_STYLE), body)) + "\n"


def _text(x: float, y: float, content: str, anchor: str, kind: str = "ink") -> Markup:
    mark = '<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
    return Markup(mark).format(kind, x, y, anchor, content)


def _svg(parts: Sequence[Markup], width: float, height: float, title: str) -> Markup:
    head = (
        '<svg role="img" aria-label="{}" viewBox="0 0 {:.0f} {:.0f}" '
        'style="max-width:{:.0f}px;--width:{:.0f}px">{}</svg>'
    )
    return Markup(head).format(escape(title), width, height, width, width, Markup("").join(parts))
