"""What changed since an earlier report: on another torch, after an update of macOS, on another machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import stages

_NOISE = 0.05  # of a time


class Change(NamedTuple):
    """`worse`: is it something to look at?"""

    what: str
    before: str
    now: str
    worse: bool = False


def read(file: Path) -> dict[str, Any]:
    """An earlier report. Raises OSError, or ValueError saying what the file is instead."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no report: {error}") from None
    if not isinstance(data, dict) or data.get("format") != stages.FORMAT:
        raise ValueError(f"{file} is no report of format {stages.FORMAT}")
    return data


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """From one report to the next, in the order of its stages."""
    found = list(_texts("", before.get("machine"), now.get("machine")))
    for part in (_failures, _hazards, _probes, _winners, _speeds):
        found += part(before, now)
    return found


def _texts(prefix: str, before: Any, now: Any) -> Iterator[Change]:
    before, now = (x if isinstance(x, dict) else {} for x in (before, now))
    for name in dict.fromkeys([*before, *now]):
        old, new = str(before.get(name, "-")), str(now.get(name, "-"))
        if old != new:
            yield Change(prefix + name, old, new)


def _failures(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    old, new = ({f["case"]: f["status"] for f in _rows(data, "selftest", "failures")} for data in (before, now))
    for case in dict.fromkeys([*old, *new]):
        if old.get(case) != new.get(case):
            yield Change(f"self-test, {case}", old.get(case, "no failure"), new.get(case, "no failure"), case in new)


def _hazards(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    old, new = ({row["issue"]: row for row in _rows(data, "hazards", "rows")} for data in (before, now))
    for issue in (issue for issue in new if issue in old):
        for who in ("torch", "ours"):
            was, is_now = (row[issue][who] > row[issue]["allowed"] for row in (old, new))
            if was != is_now:
                words = {True: "wrong", False: "right"}
                yield Change(f"{issue}, {who}", words[was], words[is_now], is_now)


def _probes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """Those that are no measurement: their text must be the same."""
    old, new = (data.get("probes") for data in (before, now))
    if isinstance(old, dict) and isinstance(new, dict):
        for change in _texts("", old, new):
            was, is_now = _number(change.before), _number(change.now)
            if was is None or is_now is None or abs(is_now / was - 1) > 4 * _NOISE:
                yield change


def _winners(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    old, new = ({row["call"]: row["variant"] for row in _rows(data, "tune", "winners")} for data in (before, now))
    yield from _texts("fastest variant, ", {call: old[call] for call in old if call in new}, new if old else {})


def _speeds(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    old, new = (
        {(m["workload"], m["contender"]): m for m in data.get("bench", ()) if isinstance(m, dict)}
        for data in (before, now)
    )
    for key in (key for key in new if key in old):
        was, is_now = (m[key].get("median seconds") for m in (old, new))
        name = f"{key[0]}: {key[1]}"
        if was is None or is_now is None:
            if was != is_now:
                before_it, now_it = (m[key].get("why not", "runs") for m in (old, new))
                yield Change(name, before_it, now_it, is_now is None)
        elif abs(is_now / was - 1) > _NOISE:
            ratio = f"{was / is_now:.2f}x as fast" if was > is_now else f"{is_now / was:.2f}x as long"
            yield Change(name, f"{was * 1e3:.3f} ms", f"{is_now * 1e3:.3f} ms, {ratio}", is_now > was)


def _rows(data: Mapping[str, Any], stage: str, name: str) -> list[dict[str, Any]]:
    found = data.get(stage)
    return found.get(name, []) if isinstance(found, dict) else []


def _number(text: str) -> float | None:
    try:
        value = float(text.split(maxsplit=1)[0])
    except (ValueError, IndexError):
        return None
    return value or None
