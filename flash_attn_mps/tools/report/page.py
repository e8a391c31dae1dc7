"""A report as one HTML file, and as lines for a terminal. The page is that of `bench` with more sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ..bench import page, report
from . import stages
from .compare import Change


def render(data: Mapping[str, Any], changes: Sequence[Change] | None) -> str:
    """The whole page. `changes`: since an earlier report; None if there is none."""
    device = data["machine"].get("device", "this machine")
    lines = [line.partition(": ")[::2] for line in summary(data)]
    body = [_section("In short", page.rows(("", ""), lines, lambda n: not _stage_is_right(data, lines[n][0])))]
    if changes is not None:
        body.append(_section("What changed since the report before", _changes(changes)))
    body += [_selftest(data), _hazards(data), _probes(data), _tune(data)]
    bench = data.get("bench")
    if isinstance(bench, list):
        body.append(page.charts([report.from_data(m) for m in bench]))
    else:
        body.append(_section("Speed", _unavailable(bench)))
    intro = (
        "Everything that this project wants to know of a machine: right results, known bugs of PyTorch, what the GPU "
        "could do, and what it does. It names no person, no folder and no serial number. Please attach it to an issue "
        "together with the JSON file next to it."
    )
    return page.document(f"mtlflashattn report: {device}", f"Report of {device}", intro, data["machine"], "".join(body))


def summary(data: Mapping[str, Any]) -> list[str]:
    """A line for each stage, "name: what came of it"."""
    lines = []
    words: dict[str, Callable[[Any], str]] = {
        "selftest": _selftest_words,
        "hazards": _hazards_words,
        "bench": _bench_words,
    }
    for stage, of_stage in words.items():
        found = data.get(stage)
        if isinstance(found, dict) and "error" in found:
            lines.append(f"{stage}: {found['error']}")
        elif found is not None:
            lines.append(f"{stage}: {of_stage(found)}")
    return lines


def is_right(data: Mapping[str, Any]) -> bool:
    """Has every stage run, and did nothing of ours go wrong?"""
    return all(_stage_is_right(data, stage) for stage in data)


def _stage_is_right(data: Mapping[str, Any], stage: str) -> bool:
    found = data[stage]
    if isinstance(found, dict) and "error" in found:
        return False
    if stage == "selftest":
        return not found["failed"]
    if stage == "hazards":
        return not any(row["ours"] > row["allowed"] for row in found["rows"])
    return stage != "bench" or not any(m.ours and m.seconds and m.differs for m in map(report.from_data, found))


def _selftest_words(found: Mapping[str, Any]) -> str:
    outcome = f"{found['failed']} FAILED" if found["failed"] else "all passed"
    return f"{found['cases']} of {found['of']} cases, {outcome}"


def _hazards_words(found: Mapping[str, Any]) -> str:
    rows = found["rows"]
    wrong = sum(row["torch"] > row["allowed"] for row in rows)
    ours = sum(row["ours"] > row["allowed"] for row in rows)
    return f"PyTorch gets {wrong} of {len(rows)} calls wrong that it is known for, this project {ours}"


def _bench_words(found: Sequence[Mapping[str, Any]]) -> str:
    measured = [report.from_data(m) for m in found]
    wrong = sum(m.ours and bool(m.seconds) and m.differs for m in measured)
    return f"{len({m.workload for m in measured})} workloads" + (f", WRONG results of ours: {wrong}" if wrong else "")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _unavailable(found: Any) -> str:
    why = found.get("error") or found.get("skipped") if isinstance(found, dict) else None
    return f"<p class=soft>{escape(why or 'Not run.')}</p>"


def _changes(changes: Sequence[Change]) -> str:
    if not changes:
        return "<p>Nothing beyond the noise of measurements.</p>"
    return page.rows(("", "before", "now"), [change[:3] for change in changes], lambda n: changes[n].worse)


def _selftest(data: Mapping[str, Any]) -> str:
    found = data.get("selftest")
    if not isinstance(found, dict) or "error" in found:
        return _section("Is every result right?", _unavailable(found))
    outcomes = found["outcomes"].items()
    body = f"<p>{escape(_selftest_words(found))}.</p>"
    body += page.rows(("tier, dtype, outcome", "cases"), [(name, str(count)) for name, count in outcomes])
    if found["failures"]:
        rows = [(f["case"], f["status"], f"{f['error, of allowed']:.3g}", f["detail"]) for f in found["failures"]]
        body += page.rows(("case", "outcome", "error, of allowed", ""), rows, lambda n: True)
    if found["refused"]:
        refused = [(r["specialization"], r["why"]) for r in found["refused"]]
        body += "<p>Kernels that are not used here:</p>" + page.rows(("kernel", "why not"), refused)
    return _section("Is every result right?", body)


def _hazards(data: Mapping[str, Any]) -> str:
    found = data.get("hazards")
    if not isinstance(found, dict) or "error" in found:
        return _section("Calls that PyTorch is known to get wrong", _unavailable(found))
    rows = [
        (
            row["issue"],
            "yes" if row["holds"] else "no",
            *(_error(row[who]) for who in ("torch", "ours", "allowed")),
            row["what"],
        )
        for row in found["rows"]
    ]
    head = ("issue", "known here", "torch's error", "ours", "allowed", "what goes wrong")
    note = "<p>PyTorch's attention is taken over here: torch's column is this project's.</p>"
    body = page.rows(head, rows, lambda n: found["rows"][n]["surprising"])
    return _section("Calls that PyTorch is known to get wrong", (note if found["taken over"] else "") + body)


def _error(value: float) -> str:
    """What raises, or gives NaN or another shape, is infinitely wrong."""
    return f"{value:.2g}" if value < stages.INFINITE else "infinite"


def _probes(data: Mapping[str, Any]) -> str:
    found = data.get("probes")
    if not isinstance(found, dict) or "error" in found:
        return _section("What this machine could do", _unavailable(found))
    return _section("What this machine could do", page.rows(("", ""), list(found.items())))


def _tune(data: Mapping[str, Any]) -> str:
    found = data.get("tune")
    if not isinstance(found, dict) or "winners" not in found:
        return _section("Tuned kernels", _unavailable(found))
    rows = [
        (w["call"], w["variant"], f"{w['seconds'] * 1e3:.3f}", f"{w['default_seconds'] * 1e3:.3f}")
        for w in found["winners"]
    ]
    return _section("Tuned kernels", page.rows(("call", "fastest", "ms", "default's ms"), rows))
