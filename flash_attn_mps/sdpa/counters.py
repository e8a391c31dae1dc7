"""How often calls were taken, left to torch or fell through to it, by reason: exact under any number of threads."""

from __future__ import annotations

import os
import threading

from ..tables import aligned

TAKEN, LEFT, FELL = "taken", "left", "fell through"

_lock = threading.Lock()
_counts: dict[tuple[str, str], int] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # another thread may have held it


def count(outcome: str, reason: str) -> None:
    key = (outcome, reason)
    with _lock:
        _counts[key] = _counts.get(key, 0) + 1


def stats() -> dict[str, dict[str, int]]:
    """outcome -> reason -> calls, the most frequent reason first."""
    with _lock:
        counts = dict(_counts)
    found: dict[str, dict[str, int]] = {TAKEN: {}, LEFT: {}, FELL: {}}
    for (outcome, reason), calls in sorted(counts.items(), key=lambda item: -item[1]):
        found[outcome][reason] = calls
    return found


def clear() -> None:
    with _lock:
        _counts.clear()


def table() -> str:
    """The counts as lines of text; empty if there are none."""
    rows = [
        (outcome, reason, calls) for outcome, reasons in stats().items() for reason, calls in reasons.items() if calls
    ]
    if not rows:
        return ""
    return "mtlflashattn: calls of scaled_dot_product_attention\n" + aligned([("outcome", "reason", "calls"), *rows])
