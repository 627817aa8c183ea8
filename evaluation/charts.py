"""Charts as SVG text, drawn by hand: no script, no font, no picture from elsewhere; they take the page's colours.

Each is 360 units wide, the width of a phone, with one row a domain, so that any number of domains has room and letters
stay legible when it is shown at its own size. Colours are never the only difference: marks differ in shape and are
named. A chart is one picture to a screen reader, with a title and a description; the page holds its numbers as a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 360
_LEFT, _RIGHT, _TOP, _ROW = 112, 54, 26, 30
_SPAN = WIDTH - _LEFT - _RIGHT
# Height of a small line, within a row.
_RISE = 22
# Characters of a name that fit left of a row.
_NAME_CHARS = 16
# Half the width of a 95% interval, in standard errors.
Z95 = 1.96


@dataclass(frozen=True)
class Mark:
    """A value with its standard error, of one model.

    Attributes:
        role: candidate, live or base: decides shape and colour.
    """

    role: str
    value: float
    se: float


@dataclass(frozen=True)
class Axis:
    """What a chart's width stands for."""

    low: float
    high: float
    unit: str

    def x(self, value: float) -> float:
        """Where a value is, held within the chart."""
        inside = max(self.low, min(self.high, value))
        return _LEFT + _SPAN * (inside - self.low) / ((self.high - self.low) or 1.0)

    def drawn(self, rows: int) -> list[Markup]:
        """Lines at round values, and the unit."""
        found = [_text("tick", 4, _TOP - 11, self.unit)]
        for tick in self.ticks():
            kind = "zero" if tick == 0 and self.low < 0 else "rule"
            found.append(_path(kind, f"M{self.x(tick):.1f} {_TOP - 6}V{_TOP + _ROW * rows}"))
            found.append(_text("tick", self.x(tick), _TOP - 11, f"{tick:.3g}", "middle"))
        return found

    def ticks(self) -> list[float]:
        """At most five round values."""
        least = ((self.high - self.low) or 1.0) / 4
        power = 10.0 ** math.floor(math.log10(least))
        step = next(part * power for part in (1, 2, 2.5, 5, 10) if part * power >= least * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * number for number in range(first, last + 1)]


def dots(title: str, says: str, rows: Mapping[str, Sequence[Mark]], axis: Axis) -> Markup:
    """Values of several models on each row, with 95% intervals; the first one's value is written out."""
    parts = axis.drawn(len(rows))
    for number, (name, marks) in enumerate(rows.items()):
        y = _y(number)
        parts.append(_name(name, y))
        for lane, mark in enumerate(marks):
            at = y + (lane - (len(marks) - 1) / 2) * 8
            start, end = (axis.x(mark.value + sign * Z95 * mark.se) for sign in (-1, 1))
            parts.append(_path(f"bar {mark.role}", f"M{start:.1f} {at:.1f}H{end:.1f}"))
            parts.append(_shape(mark.role, axis.x(mark.value), at))
        if marks:
            parts.append(_value(f"{marks[0].value:.1f}", y))
    return _svg(title, says, len(rows), parts)


def lines(title: str, says: str, rows: Mapping[str, Sequence[float | None]], axis: Axis) -> Markup:
    """A small line a row over the same points, with its last value; None where there is no point."""
    parts = []
    height = (axis.high - axis.low) or 1.0
    for number, (name, values) in enumerate(rows.items()):
        floor = _y(number) + _RISE / 2
        parts += [_name(name, _y(number)), _path("rule", f"M{_LEFT} {floor:.1f}H{_LEFT + _SPAN}")]
        points = [
            (_LEFT + _SPAN * at / max(len(values) - 1, 1), floor - _RISE * (value - axis.low) / height)
            for at, value in enumerate(values)
            if value is not None
        ]
        if points:
            parts.append(_path("line", "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)))
        parts += [_shape("candidate", x, y) for x, y in points]
        if values and values[-1] is not None:
            parts.append(_value(f"{values[-1]:.1f}", _y(number)))
    return _svg(title, says, len(rows), parts, top=_TOP)


def bars(title: str, says: str, rows: Mapping[str, tuple[str, float]], axis: Axis) -> Markup:
    """A bar a row from nought, with its value; each row has a class besides its value."""
    parts = axis.drawn(len(rows))
    for number, (name, (kind, value)) in enumerate(rows.items()):
        y = _y(number)
        start, end = sorted((axis.x(0), axis.x(value)))
        parts.append(_name(name, y))
        parts.append(
            Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="14"/>').format(
                kind, start, y - 7, max(1.0, end - start)
            )
        )
        parts.append(_value(f"{value:.3g}", y))
    return _svg(title, says, len(rows), parts)


def _svg(title: str, says: str, rows: int, parts: Sequence[Markup], top: int = 0) -> Markup:
    name = "chart-" + "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    return Markup(
        '<svg viewBox="0 {5} {0} {1}" role="img" aria-labelledby="{2}-title {2}-says">'
        '<title id="{2}-title">{3}</title><desc id="{2}-says">{4}</desc>{6}</svg>'
    ).format(WIDTH, _TOP + _ROW * rows + 4 - top, name, title, says, top, Markup("").join(parts))


def _y(row: int) -> float:
    """The middle of a row."""
    return _TOP + _ROW * row + _ROW / 2


def _path(kind: str, drawn: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(kind, drawn)


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def _name(name: str, y: float) -> Markup:
    shown = name if len(name) <= _NAME_CHARS else name[: _NAME_CHARS - 1] + "…"
    return _text("name", 4, y + 4, shown)


def _value(text: str, y: float) -> Markup:
    return _text("value", WIDTH - 4, y + 4, text, "end")


def _shape(role: str, x: float, y: float) -> Markup:
    if role == "live":
        return Markup('<rect class="live" x="{:.1f}" y="{:.1f}" width="7" height="7"/>').format(x - 3.5, y - 3.5)
    if role == "base":
        return _path("base", f"M{x:.1f} {y - 4.5:.1f}l4.5 8h-9z")
    return Markup('<circle class="candidate" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(x, y)
