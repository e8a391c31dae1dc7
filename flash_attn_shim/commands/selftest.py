"""`mtlflashattn selftest`: is every result right on this machine?"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one or two minutes instead of about ten on a Mac")
    parser.add_argument("--full", action="store_true", help="every head dim and variant: about an hour on a Mac")
    parser.add_argument("--device", help="default: mps if it is available, else cpu")
    parser.add_argument("--case", nargs="+", metavar="CASE", help="run only these cases, named as in a report")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("mtlflashattn-selftest.json"),
        metavar="FILE",
        help="the report to attach to an issue (default: mtlflashattn-selftest.json)",
    )


def run(arguments: argparse.Namespace) -> int:
    from flash_attn_mps.tools.selftest.unproved import unproved

    with unproved():
        return _tested(arguments)


def _tested(arguments: argparse.Namespace) -> int:
    import torch

    from flash_attn_mps import project
    from flash_attn_mps.tiers import BY_NAME
    from flash_attn_mps.tiers.metal import compiler
    from flash_attn_mps.tools import machine
    from flash_attn_mps.tools.progress import Progress
    from flash_attn_mps.tools.selftest import cases, report
    from flash_attn_mps.tools.selftest import run as runner

    if arguments.quick and arguments.full:
        print("Choose --quick or --full, not both.", file=sys.stderr)
        return 2
    device = arguments.device or ("mps" if torch.backends.mps.is_available() else "cpu")
    if unusable := machine.unusable(device):
        print(unusable, file=sys.stderr)
        return 2
    without_metal = compiler.unavailable(device)
    level = "quick" if arguments.quick else "full" if arguments.full else "usual"
    try:
        chosen = [cases.parse(name) for name in arguments.case or ()] or list(cases.cases(level, not without_metal))
    except ValueError as error:
        print(f"--case: {error}", file=sys.stderr)
        return 2
    facts = machine.facts(device)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    began, outcomes = time.monotonic(), []
    with Progress(len(chosen), "selftest") as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel that does not compile is in the report
        try:
            for case in chosen:
                progress.step(str(case), 0)
                outcomes.append(runner.run(case, device))
                progress.step()
        except KeyboardInterrupt:
            print("Interrupted; these are the results so far.", file=sys.stderr)
    seconds = time.monotonic() - began
    metal = not without_metal and any(BY_NAME[o.case.tier].metal for o in outcomes)
    print(f"\n{report.table(outcomes)}\n")
    failed = sum(outcome.failed for outcome in outcomes)
    if failed:
        print(f"{report.failures(outcomes)}\n")
    print(
        f"{len(outcomes)} of {len(chosen)} cases in {seconds:.0f} s: {f'{failed} FAILED' if failed else 'all passed'}."
    )
    if compiler.failures:
        print(f"{len(compiler.failures)} kernels do not work here; where a call was right, another served it (--json).")
    if not metal:
        print(f"NO METAL KERNEL WAS TESTED: {without_metal or 'no case was for one'}.")
    try:
        report.write(arguments.json, facts, level, metal, seconds, outcomes)
    except OSError as error:
        print(f"--json: {error}", file=sys.stderr)
        return 1
    asked = f"; please attach it to an issue in {project.ISSUES}" if failed else ""
    print(f"Report: {arguments.json}{asked}.")
    return 1 if failed or len(outcomes) < len(chosen) else 0
