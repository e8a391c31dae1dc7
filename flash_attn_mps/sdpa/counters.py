"""How often calls were taken, left to torch or fell through to it, by reason: exact under any number of threads."""

from __future__ import annotations

import itertools
import threading

from ..text_table import aligned

TAKEN, LEFT, FELL = "taken", "left", "fell through"
ELSEWHERE = "not on MPS"


class _Tally:
    """A count that needs no lock to go up: the next value of an `itertools.count` is one step of the interpreter."""

    def __init__(self) -> None:
        self.up = itertools.count().__next__
        self._not_counted = 0  # each look takes a value too

    def look(self, forget: bool = False) -> int:
        """What was counted, under the lock."""
        value = self.up()
        counted = value - self._not_counted
        self._not_counted = value + 1 if forget else self._not_counted + 1
        return counted


_lock = threading.Lock()
_tallies: dict[tuple[str, str], _Tally] = {}


def count(outcome: str, reason: str) -> None:
    tally = _tallies.get((outcome, reason))
    if tally is None:
        with _lock:
            tally = _tallies.setdefault((outcome, reason), _Tally())
    tally.up()


def stats() -> dict[str, dict[str, int]]:
    """outcome -> reason -> calls, the most frequent reason first."""
    with _lock:
        counts = {key: tally.look() for key, tally in _tallies.items()}
    found: dict[str, dict[str, int]] = {TAKEN: {}, LEFT: {}, FELL: {}}
    for (outcome, reason), calls in sorted(counts.items(), key=lambda item: -item[1]):
        if calls:
            found[outcome][reason] = calls
    return found


def clear() -> None:
    with _lock:
        for tally in _tallies.values():
            tally.look(forget=True)


def table() -> str:
    """The counts as lines of text; empty if there are none."""
    rows = [(outcome, reason, calls) for outcome, reasons in stats().items() for reason, calls in reasons.items()]
    if not rows:
        return ""
    return "mtlflashattn: calls of scaled_dot_product_attention\n" + aligned([("outcome", "reason", "calls"), *rows])
