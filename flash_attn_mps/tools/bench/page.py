"""Measurements as one HTML file: no scripts, nothing loaded from anywhere, light and dark."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape

from . import chart, report
from .contenders import STOCK
from .measure import Measurement
from .workloads import KINDS

# Light and dark, 3:1 against either ground. Stock is grey: it is what the others are measured by.
_COLOURS = (
    ("#77766f", "#98978f"),
    ("#2a6fd0", "#4b93ee"),
    ("#c2560c", "#ee7d33"),
    ("#1b8a5a", "#2fb37c"),
    ("#8a3fb5", "#b678dd"),
    ("#a17500", "#d19a00"),
    ("#c23a6b", "#ec6f9b"),
)

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbf9; --ink: #1d1d1b; --soft: #5d5c57; --line: #e2e1dc;
  --bad: #b3261e; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ground: #191918; --ink: #ecebe6; --soft: #a9a8a1; --line: #363633;
    --bad: #ff8a80; DARK }
}
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; } .soft, figcaption { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1rem; margin: 1rem 0;
  color: var(--soft); }
dt, dd { margin: 0; } figure { margin: 0; }
svg { width: 100%; display: block; }
text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink); }
text.tick, text.none { fill: var(--soft); } text.name { font-weight: 600; }
text.value { font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: 0 0 .5rem; padding: 0; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
details { margin-top: .5rem; } summary { cursor: pointer; color: var(--soft); }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .25rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; } .number { text-align: right; white-space: nowrap; }
.word { white-space: nowrap; } .remark { min-width: 14rem; color: var(--soft); }
tr.wrong td { color: var(--bad); } th[colspan] { padding-top: .8rem; } .scroll { overflow-x: auto; }
@media (max-width: 36rem) { body { padding: 1rem .75rem 3rem; } dl { grid-template-columns: 1fr; }
  dt { font-size: 13px; } dd { margin-bottom: .4rem; color: var(--ink); overflow-wrap: anywhere; }
  .texts tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  .texts tr:has(th) { display: none; }
  .texts td { display: block; padding: 0; border: 0; text-align: left; white-space: normal; overflow-wrap: anywhere; }
  .texts td:first-child { font-weight: 600; }
  .texts td[data-name]::before { content: attr(data-name) ": "; color: var(--soft); }
  .remark { white-space: nowrap; } }
"""


def render(facts: Mapping[str, str], measurements: Sequence[Measurement]) -> str:
    """The whole page. `facts`: of the machine."""
    device = facts.get("device", "")
    intro = (
        "Medians over rounds in alternating order, host side included. TF/s count the scores that the mask leaves; GB/s"
        " count q, k and v read once and the output written once."
    )
    title, heading = f"mtlflashattn bench: {device}", f"Attention on {device or 'this machine'}"
    return document(title, heading, intro, facts, charts(measurements))


def document(title: str, heading: str, intro: str, facts: Mapping[str, str], body: str) -> str:
    """A page of which `body` is HTML, the rest text."""
    style = _STYLE.replace("LIGHT", _variables(0)).replace("DARK", _variables(1))
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<h1>{escape(heading)}</h1><p class=soft>{escape(intro)}</p>"
        f"<dl>{listed}</dl>{body}</body></html>\n"
    )


def charts(measurements: Sequence[Measurement]) -> str:
    """A section for each kind of workload."""
    colours = _colours(measurements)
    return "".join(_section(kind, by_name, colours) for kind, by_name in report.groups(measurements).items())


def rows(head: Sequence[str], body: Sequence[Sequence[str]], wrong: Callable[[int], bool] = lambda n: False) -> str:
    """A table of texts; rows of which `wrong` is true, by their number, stand out.

    On a phone, a table with long texts shows the cells of a row below each other.
    """
    kinds = [_kind([row[n] for row in body]) for n in range(len(head))]
    lines = ["<tr>" + "".join(map(_th, head, kinds)) + "</tr>"] if any(head) else []
    for n, row in enumerate(body):
        kind = ' class="wrong"' if wrong(n) else ""
        lines.append(f"<tr{kind}>" + "".join(map(_td, ("", *head[1:]), kinds, row)) + "</tr>")
    texts = " class=texts" if "text" in kinds else ""
    return f"<div class=scroll><table{texts}>{''.join(lines)}</table></div>"


_NUMBER = re.compile(r"[-+\d.,]*(e[-+]?\d+)?[x%]?")
_WORD = 24  # characters that are not broken into lines


def _kind(column: Sequence[str]) -> str:
    """The class of its cells."""
    if all(_NUMBER.fullmatch(cell) for cell in column):
        return "number"
    return "word" if max(map(len, column)) <= _WORD else "text"


def _th(title: str, kind: str) -> str:
    return f'<th class="{kind}">{escape(title)}</th>'


def _td(title: str, kind: str, cell: str) -> str:
    name = f' data-name="{escape(title)}"' if title and cell else ""
    return f'<td class="{kind}"{name}>{escape(cell)}</td>'


def _variables(theme: int) -> str:
    return " ".join(f"--c{n}: {pair[theme]};" for n, pair in enumerate(_COLOURS))


def _colours(measurements: Sequence[Measurement]) -> dict[str, int]:
    """Stock is grey; the others follow in the order in which they ran."""
    others = [name for name in dict.fromkeys(m.contender for m in measurements) if name != STOCK]
    return {STOCK: 0, **{name: 1 + n % (len(_COLOURS) - 1) for n, name in enumerate(others)}}


def _section(kind: str, by_name: Mapping[str, Sequence[Measurement]], colours: Mapping[str, int]) -> str:
    by_name, absent = _without_absent(by_name)
    unit, metric = _metric(kind, [m for group in by_name.values() for m in group if m.seconds])
    title = f"{kind.capitalize()}: {KINDS[kind]}"
    groups = [
        chart.Group(name, [_bar(group, m, colours, metric, unit) for m in group]) for name, group in by_name.items()
    ]
    present = dict.fromkeys(m.contender for group in by_name.values() for m in group)
    legend = "".join(f'<li><i style="background:var(--c{colours[n]})"></i>{escape(n)}</li>' for n in present)
    notes = "".join(f"<p class=soft>{escape(f'{name}: {why}')}</p>" for name, why in absent.items())
    return (
        f"<section><h2>{escape(title)}</h2><p>{escape(_summary(by_name))}</p><ul class=legend>{legend}</ul>"
        f"<figure>{chart.bars(groups, unit, title)}<figcaption>{unit}, longer is better</figcaption></figure>{notes}"
        f"<details open><summary>All figures</summary><div class=scroll>{_table(by_name)}</div></details></section>"
    )


def _without_absent(
    by_name: Mapping[str, Sequence[Measurement]],
) -> tuple[Mapping[str, Sequence[Measurement]], dict[str, str]]:
    """Without those who ran none of the workloads; who they are, and why not."""
    every = [m for group in by_name.values() for m in group]
    ran = {m.contender for m in every if m.seconds}
    absent = {m.contender: m.why_not for m in reversed(every) if m.contender not in ran}
    return {name: [m for m in group if m.contender in ran] for name, group in by_name.items()}, absent


def _metric(kind: str, measured: Sequence[Measurement]) -> tuple[str, Callable[[Measurement], float]]:
    """Decoding is bound by memory, all else by arithmetic."""
    if kind == "decode":
        return "GB/s", lambda m: m.gbytes
    if max((m.tflops for m in measured), default=1.0) < 1.0:
        return "GF/s", lambda m: 1000 * m.tflops
    return "TF/s", lambda m: m.tflops


def _bar(
    group: Sequence[Measurement], m: Measurement, colours: Mapping[str, int], metric: Callable, unit: str
) -> chart.Bar:
    if not m.seconds:
        return chart.Bar(m.contender, colours[m.contender], None, _shortened(m.why_not), m.why_not)
    if m.differs:
        return chart.Bar(m.contender, colours[m.contender], None, "wrong result", "wrong result")
    faster = report.against_stock(group, m)
    label = f"{metric(m):.3g}" + (f"  ({faster:.2f}x)" if faster is not None and m.contender != STOCK else "")
    return chart.Bar(
        m.contender,
        colours[m.contender],
        metric(m),
        label,
        f"{m.contender}: {m.median * 1e3:.3f} ms, {metric(m):.3g} {unit}",
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _summary(by_name: Mapping[str, Sequence[Measurement]]) -> str:
    """The best tier of this project against stock PyTorch, over all workloads of the section."""
    gains = []
    for group in by_name.values():
        ours = [m for m in group if m.ours and m.seconds and not m.differs]
        found = [gain for m in ours if (gain := report.against_stock(group, m)) is not None]
        if found:
            gains.append(max(found))
    if not gains:
        return "No comparison with stock PyTorch."
    mean = math.exp(sum(map(math.log, gains)) / len(gains))
    calls = f"{len(gains)} workloads, geometric mean" if len(gains) > 1 else "one workload"
    return f"This project's fastest tier is {mean:.2f} times as fast as stock PyTorch ({calls})."


def _table(by_name: Mapping[str, Sequence[Measurement]]) -> str:
    kinds = ("word", *("number" for _ in report.HEAD[:-1]), "remark")
    head = "".join(map(_th, ("", *report.HEAD), kinds))
    rows = [f"<tr>{head}</tr>"]
    for name, group in by_name.items():
        rows.append(f'<tr><th colspan="{len(report.HEAD) + 1}">{escape(name)}</th></tr>')
        for m in group:
            shown = (m.contender, *report.cells(group, m))
            rows.append(
                ('<tr class="wrong">' if m.seconds and m.differs else "<tr>")
                + "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, shown, strict=True))
                + "</tr>"
            )
    return f"<table>{''.join(rows)}</table>"
