"""`mtlflashattn report`: all that can be known of this machine in five minutes, to attach to an issue."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

_MINUTES = 5.0
_NAME = "mtlflashattn-report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="default: mps if it is available, else cpu")
    parser.add_argument(
        "--minutes", type=float, default=_MINUTES, help=f"about how long it may take (default: {_MINUTES:g})"
    )
    for kind in ("json", "html"):
        parser.add_argument(
            f"--{kind}",
            type=Path,
            default=Path(f"{_NAME}.{kind}"),
            metavar="FILE",
            help=f"where to write it (default: {_NAME}.{kind})",
        )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="the JSON file of an earlier report, to say what changed (default: the one that is overwritten)",
    )


def run(arguments: argparse.Namespace) -> int:
    import torch

    from flash_attn_mps import project
    from flash_attn_mps.tools import machine
    from flash_attn_mps.tools.report import compare, page, stages

    device = arguments.device or ("mps" if torch.backends.mps.is_available() else "cpu")
    if unusable := machine.unusable(device):
        print(unusable, file=sys.stderr)
        return 2
    before = None
    try:
        if arguments.against is not None:
            before = compare.read(arguments.against)
        elif arguments.json.exists():
            before = compare.read(arguments.json)
    except (OSError, ValueError) as error:
        print(f"--against: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{name}: {value}" for name, value in stages.facts(device).items()))
    print(f"This takes about {arguments.minutes:g} minutes. Please leave the machine alone meanwhile.\n")

    def save(data: dict) -> None:
        arguments.json.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    try:
        data = stages.collected(device, 60.0 * arguments.minutes, save)
        changes = None if before is None else compare.changes(before, data)
        arguments.html.write_text(page.render(data, changes), encoding="utf-8")
    except OSError as error:
        print(f"Could not write the report: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Interrupted. {arguments.json} has what was done before.", file=sys.stderr)
        return 1
    print("\n".join(page.summary(data)))
    for change in changes or ():
        print(f"changed: {change.what}: {change.before} -> {change.now}")
    right = page.is_right(data)
    asked = "Please attach both" if right else "Something is wrong here. Please attach both"
    print(f"\nReport: {arguments.html}, {arguments.json}. {asked} to an issue in {project.ISSUES}.")
    return 0 if right else 1
