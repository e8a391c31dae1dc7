"""The outcome of a self-test: a table, and a file to attach to an issue."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...text_table import aligned
from ...tiers import BY_NAME
from ...tiers.metal import compiler
from . import run
from .cases import DTYPES, FEATURES
from .run import Outcome

_STATUSES = (run.RIGHT, run.WRONG, run.NOT_COMPILED, run.RAISED, run.NOT_SERVED)
_SHOWN = 10


def table(outcomes: Sequence[Outcome]) -> str:
    """Cases by tier, dtype and outcome, and the largest error in percent of what is allowed."""
    rows: list[tuple[object, ...]] = [("tier", "dtype", *_STATUSES, "largest error, % of allowed")]
    for tier in BY_NAME:
        for dtype in DTYPES:
            some = [o for o in outcomes if (o.case.tier, o.case.dtype) == (tier, dtype)]
            counts = Counter(o.status for o in some)
            worst = max((o.share for o in some), default=0.0)
            if some:
                rows.append((tier, dtype, *(counts[status] or "-" for status in _STATUSES), f"{100 * worst:.0f}"))
    return aligned(rows)


def failures(outcomes: Sequence[Outcome]) -> str:
    """The first failures, and how to run them again; nothing if there are none."""
    failed = [o for o in outcomes if o.failed]
    lines = []
    for outcome in failed[:_SHOWN]:
        error = f", {outcome.share:.3g} times the allowed error" if outcome.status == run.WRONG else ""
        first_line = outcome.detail.splitlines()[0] if outcome.detail else ""
        lines += [f"{outcome.status}{error}: {first_line}", f"    mtlflashattn selftest --case '{outcome.case}'"]
    if len(failed) > _SHOWN:
        lines.append(f"... and {len(failed) - _SHOWN} more")
    return "\n".join(lines)


def write(
    file: Path, facts: dict[str, str], level: str, metal: bool, seconds: float, outcomes: Sequence[Outcome]
) -> None:
    """Everything that someone without such a machine needs. Raises OSError."""
    data = {
        "machine": facts,
        "level": level,
        "metal tested": metal,
        "seconds": round(seconds, 1),
        "cases": len(outcomes),
        "outcomes": Counter(f"{o.case.tier} {o.case.dtype} {o.status}" for o in outcomes),
        "failures": [described(o) for o in outcomes if o.failed],
        "compiler": [
            {"specialization": specialization._asdict(), "log": log}
            for specialization, log in compiler.failures.items()
        ],
    }
    file.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")


def described(outcome: Outcome) -> dict:
    """As JSON has it."""
    return {
        "case": str(outcome.case),
        "status": outcome.status,
        "error, of allowed": outcome.share,
        "detail": outcome.detail,
        **outcome.case._asdict(),
        "call": FEATURES[outcome.case.feature]._asdict(),
    }
