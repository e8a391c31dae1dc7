"""`mtlflashattn doctor`: what `import flash_attn` would give right here, and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from flash_attn_shim.commands import examine

_SECTIONS = (
    ("Our names", "owners"),
    ("Switches", "switches"),
    ("Hook", "hook"),
    ("System", "system"),
    ("Attention", "attention"),
    ("Libraries", "libraries"),
    ("PyTorch's own attention", "sdpa"),
    ("Programs", "programs"),
)

_WIDEST = 60  # columns of names beside their values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "program", nargs="*", help="a file, directory, module or package: say what its code decides, without running it"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    findings = examine.everything(arguments.program)
    print(json.dumps(findings, indent=2) if arguments.json else render(findings))
    return 0


def render(findings: dict[str, Any]) -> str:
    """The findings as plain text."""
    lines = []
    for name in findings["names"]:
        outcome = "this project's shim" if name["visible"] else (name["origin"] or "nothing (ModuleNotFoundError)")
        lines += [f"import {name['name']}  ->  {outcome}", f"    {name['why']}"]
        if name["visible"]:
            lines.append(f"    {name['origin']}")
    for title, key in _SECTIONS:
        lines += ["", title, *_table(findings[key])]
    if findings["advice"]:
        lines += ["", "Advice", *(f"  * {advice}" for advice in findings["advice"])]
    return "\n".join(lines)


def _table(values):
    width = max((len(name) for name in values if len(name) <= _WIDEST), default=0)
    for name, value in values.items():
        if isinstance(value, dict):
            yield f"  {name}"
            yield from (f"  {line}" for line in _table(value))
            continue
        parts = value if isinstance(value, list) else [value]
        if len(name) > _WIDEST:  # a path: its line is its own
            yield f"  {name}"
            yield from (f"    {part}" for part in parts)
        else:
            yield from (f"  {name if number == 0 else '':{width}}  {part}" for number, part in enumerate(parts))
