"""`mtlflashattn bench`: this project, stock PyTorch and other packages on the same calls."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

_SECONDS = 40  # of timing, in the default set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kinds", nargs="*", metavar="kind", help="prefill, decode, varlen, window, training (default: all)"
    )
    parser.add_argument("--full", action="store_true", help="more dtypes, head dims and lengths: about ten minutes")
    parser.add_argument("--device", help="default: the first available of mps, cuda, cpu")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help=f"seconds to spend on timing (default: {_SECONDS})"
    )
    parser.add_argument(
        "--hub", action="store_true", help="also time kernels from the Hugging Face hub (downloads them)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with charts, in one file")


def run(arguments: argparse.Namespace) -> int:
    # Otherwise PyTorch's profiler, which counts memory on the CPU, writes lines of its own to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from flash_attn_mps import timing
    from flash_attn_mps.tools import machine
    from flash_attn_mps.tools.bench import contenders, measure, page, report, workloads
    from flash_attn_mps.tools.progress import Progress

    unknown = [kind for kind in arguments.kinds if kind not in workloads.KINDS]
    if unknown:
        print(f"unknown kind {unknown[0]}; choose from: {', '.join(workloads.KINDS)}.", file=sys.stderr)
        return 2
    device = arguments.device or machine.best_device()
    if unusable := machine.unusable(device):
        print(unusable, file=sys.stderr)
        return 2
    device_type = device.partition(":")[0]
    kinds = arguments.kinds or list(workloads.KINDS)
    chosen = [w for w in workloads.workloads(device_type, arguments.full) if w.kind in kinds]
    entrants = contenders.contenders(device_type, arguments.full, arguments.hub)
    facts = machine.facts(device)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()) + "\n")
    budget = arguments.seconds / len(workloads.workloads(device_type, False))
    watch = timing.stopwatch(device)
    measurements = []
    with Progress(len(chosen) * len(entrants), "bench") as progress:
        try:
            for workload in chosen:

                def tick(contender: str, name: str = workload.name) -> None:
                    progress.step(f"{name}: {contender}")

                measurements += measure.measure(workload, entrants, device, budget, watch, tick)
        except KeyboardInterrupt:
            print("Interrupted; these are the results so far.", file=sys.stderr)
    if not measurements:
        return 1
    print(report.table(measurements))
    print("of stock: speed relative to F.scaled_dot_product_attention. TF/s counts visible scores only.")
    try:
        if arguments.json:
            report.write_json(arguments.json, facts, measurements)
        if arguments.html:
            arguments.html.write_text(page.render(facts, measurements), encoding="utf-8")
    except OSError as error:
        print(f"Could not write the report: {error}", file=sys.stderr)
        return 1
    return 1 if any(m.ours and m.differs for m in measurements) else 0
