"""Measurements as a table of text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...text_table import aligned
from .contenders import STOCK
from .measure import Measurement
from .workloads import KINDS, Workload


def groups(measurements: Sequence[Measurement]) -> dict[str, dict[str, list[Measurement]]]:
    """By kind, then by the name of the workload, in the order in which they were measured."""
    found: dict[str, dict[str, list[Measurement]]] = {}
    for m in measurements:
        found.setdefault(m.workload.kind, {}).setdefault(m.workload.name, []).append(m)
    return found


def against_stock(group: Sequence[Measurement], m: Measurement) -> float | None:
    """How many times as fast as stock PyTorch; None where that has no time, or a wrong result."""
    stock = next((s for s in group if s.contender == STOCK and s.seconds and not s.differs), None)
    return None if stock is None or not m.seconds else stock.median / m.median


def cells(group: Sequence[Measurement], m: Measurement) -> tuple[str, ...]:
    """Time, spread of the rounds, TF/s, GB/s, peak MiB, speed against stock, remark."""
    if not m.seconds:
        return ("-",) * 6 + (m.why_not,)
    faster = against_stock(group, m)
    return (
        f"{m.median * 1e3:.3f}",
        f"{100 * m.spread:.0f}%",
        _digits(m.tflops),
        _digits(m.gbytes),
        _digits(m.memory / 2**20),
        "-" if faster is None else f"{faster:.2f}x",
        f"WRONG RESULT: off by {m.error:.3g} times what rounding explains" if m.differs else "",
    )


def _digits(value: float) -> str:
    """Three digits that count."""
    places = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(places, 0), 6)}f}"


HEAD = ("ms", "spread", "TF/s", "GB/s", "peak MiB", "of stock", "")


def table(measurements: Sequence[Measurement]) -> str:
    """A block for each kind, and in it each workload's name above the contenders."""
    blocks = []
    for kind, by_name in groups(measurements).items():
        rows = [(f"    {m.contender}", *cells(group, m)) for group in by_name.values() for m in group]
        head, *body = aligned([("", *HEAD[:-1]), *(row[:-1] for row in rows)], right=True).splitlines()
        lines = iter(f"{line}  {row[-1]}".rstrip() for line, row in zip(body, rows, strict=True))
        blocks += [f"{kind}: {KINDS[kind]}", head]
        for name, group in by_name.items():
            blocks += [f"  {name}", *(next(lines) for _ in group)]
        blocks.append("")
    return "\n".join(blocks)


def write_json(file: Path, facts: dict[str, str], measurements: Sequence[Measurement]) -> None:
    """Raises OSError."""
    data = {"machine": facts, "measurements": [as_data(m) for m in measurements]}
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def as_data(m: Measurement) -> dict:
    """As JSON has it."""
    data = {"workload": m.workload.name, **m.workload._asdict(), "contender": m.contender, "ours": m.ours}
    if not m.seconds:
        return {**data, "why not": m.why_not}
    return {
        **data,
        "median seconds": m.median,
        "seconds": m.seconds,
        "TF/s": m.tflops,
        "GB/s": m.gbytes,
        "peak bytes": m.memory,
        "error, of rounding": m.error,
    }


def from_data(data: Mapping[str, Any]) -> Measurement:
    """The measurement of which `as_data` made `data`, read from JSON."""
    fields = {name: data[name] for name in Workload._fields if name != "lengths"}
    workload = Workload(lengths=tuple(map(tuple, data["lengths"])), **fields)
    m = Measurement(workload, data["contender"], data["ours"])
    if "why not" in data:
        return m._replace(why_not=data["why not"])
    return m._replace(seconds=tuple(data["seconds"]), error=data["error, of rounding"], memory=data["peak bytes"])
