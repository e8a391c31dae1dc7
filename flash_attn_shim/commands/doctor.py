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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    findings = examine.everything()
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
    width = max(map(len, values), default=0)
    for name, value in values.items():
        if isinstance(value, dict):
            yield f"  {name}"
            yield from (f"  {line}" for line in _table(value))
        else:
            for number, part in enumerate(value if isinstance(value, list) else [value]):
                yield f"  {name if number == 0 else '':{width}}  {part}"
