"""Horizontal bars as SVG, for a page that brings the colours `--c0`, `--c1`, ... as CSS variables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _LEFT, _RIGHT = 940, 320, 110
_BAR, _GAP, _BETWEEN = 16, 3, 16


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
    """Groups of bars below each other on one axis from zero, each bar with its value."""
    top = max((bar.value or 0.0 for group in groups for bar in group.bars), default=0.0) or 1.0
    step = _step(top)
    plot = _WIDTH - _LEFT - _RIGHT

    def x(value: float) -> float:
        return _LEFT + plot * value / top

    parts, y = [], 8.0
    for group in groups:
        height = len(group.bars) * (_BAR + _GAP) - _GAP
        parts.append(_text(_LEFT - 12, y + height / 2, group.name, "end", "name"))
        for bar in group.bars:
            middle = y + _BAR / 2
            if bar.value is None:
                parts.append(_text(_LEFT + 6, middle, f"{bar.series}: {bar.label}", "start", "none"))
            else:
                width = max(1.5, x(bar.value) - _LEFT)
                # Square at the axis, rounded at the end of the value.
                r = min(3.0, width / 2)
                shape = (
                    f"M{_LEFT},{y:.1f}h{width - r:.1f}q{r},0 {r},{r}v{_BAR - 2 * r}q0,{r} -{r},{r}h-{width - r:.1f}z"
                )
                parts.append(f'<path d="{shape}" fill="var(--c{bar.colour})"><title>{escape(bar.hint)}</title></path>')
                parts.append(_text(_LEFT + width + 6, middle, bar.label, "start", "value"))
            y += _BAR + _GAP
        y += _BETWEEN
    bottom = y - _BETWEEN + 8
    axis = []
    for n in range(int(top / step + 1e-9) + 1):
        axis.append(f'<line x1="{x(n * step):.1f}" x2="{x(n * step):.1f}" y1="0" y2="{bottom:.1f}" class="grid"/>')
        axis.append(_text(x(n * step), bottom + 14, f"{n * step:g}", "middle", "tick"))
    axis.append(_text(_WIDTH - _RIGHT + 12, bottom + 14, unit, "start", "tick"))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {bottom + 26:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(axis)
        + "".join(parts)
        + f'<line x1="{_LEFT}" x2="{_LEFT}" y1="0" y2="{bottom:.1f}" class="axis"/></svg>'
    )


def _step(top: float) -> float:
    """A round number that leaves three to six ticks."""
    power = 10.0
    while power > top:
        power /= 10
    while power * 10 <= top:
        power *= 10
    return next(power * part for part in (2, 1, 0.5, 0.2) if top / (power * part) >= 3)


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" dominant-baseline="central" text-anchor="{anchor}" class="{kind}">'
        f"{escape(text)}</text>"
    )
