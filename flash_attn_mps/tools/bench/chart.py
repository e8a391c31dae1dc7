"""Horizontal bars as SVG, for a page that brings the colours `--c0`, `--c1`, ... as CSS variables.

Widths are shares of the page's, and heights are pixels: on a phone bars are shorter and words as large as elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_LONGEST = 78.0  # percent of the width; what is right of the longest bar is for its value
_NAME, _BAR, _GAP, _BETWEEN = 20, 14, 3, 10


class Bar(NamedTuple):
    """`colour`: index of the series. `value` None: there is none, and `label` says why."""

    series: str
    colour: int
    value: float | None
    label: str
    hint: str


class Group(NamedTuple):
    name: str
    bars: Sequence[Bar]


def bars(groups: Sequence[Group], unit: str, title: str) -> str:
    """Groups of bars below their names on one axis from zero, each bar with its value."""
    top = max((bar.value or 0.0 for group in groups for bar in group.bars), default=0.0) or 1.0
    step = _step(top)
    parts, y = [], 0
    for group in groups:
        parts.append(_text(0.0, y + _NAME // 2, group.name, "start", "name"))
        y += _NAME
        for bar in group.bars:
            middle = y + _BAR // 2
            if bar.value is None:
                parts.append(_text(0.0, middle, f"{bar.series}: {bar.label}", "start", "none", 6, bar.hint))
            else:
                width = max(0.3, _LONGEST * bar.value / top)
                parts.append(
                    f'<rect width="{width:.2f}%" y="{y}" height="{_BAR}" rx="2" fill="var(--c{bar.colour})">'
                    f"<title>{escape(bar.hint)}</title></rect>"
                )
                parts.append(_text(width, middle, bar.label, "start", "value", 6))
            y += _BAR + _GAP
        y += _BETWEEN
    axis = []
    for n in range(int(top / step + 1e-9) + 1):
        x = _LONGEST * n * step / top
        axis.append(f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{y}" class="{"grid" if n else "axis"}"/>')
        axis.append(_text(x, y + 12, f"{n * step:g}", "middle" if n else "start", "tick"))
    axis.append(_text(100.0, y + 12, unit, "end", "tick"))
    return f'<svg height="{y + 24}" role="img" aria-label="{escape(title)}">{"".join(axis)}{"".join(parts)}</svg>'


def _step(top: float) -> float:
    """A round number that leaves three to six ticks."""
    power = 10.0
    while power > top:
        power /= 10
    while power * 10 <= top:
        power *= 10
    return next(power * part for part in (2, 1, 0.5, 0.2) if top / (power * part) >= 3)


def _text(percent: float, y: int, text: str, anchor: str, kind: str, beside: int = 0, hint: str = "") -> str:
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return (
        f'<text x="{percent:.2f}%" y="{y}" dx="{beside}" dominant-baseline="central" text-anchor="{anchor}" '
        f'class="{kind}">{escape(text)}{title}</text>'
    )
