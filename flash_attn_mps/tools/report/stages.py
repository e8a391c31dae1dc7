"""The stages of a report, each within its share of the time; what one raises is what is reported of it."""

from __future__ import annotations

import math
import os
import random
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import describe, sdpa, timing
from ...tiers.metal import compiler, gpu, simdgroup, tensorops, tensorops_probe, tune
from .. import machine
from ..bench import contenders, measure, workloads
from ..bench import report as bench_report
from ..progress import Progress
from ..selftest import cases
from ..selftest import report as selftest_report
from ..selftest import run as selftest
from ..selftest.unproved import unproved
from . import hazards, probes

FORMAT = 1
INFINITE = 1e300  # as JSON takes it
_CPU_SCALE = 1 / 256  # of the probes' sizes there


class Stage(NamedTuple):
    """`run`: of the device and the seconds that it may take, to what `plain` takes."""

    name: str
    share: float  # of the whole time
    run: Callable[[str, float], Any]


def facts(device: str) -> dict[str, str]:
    """What the report is of: no name of a person, a machine or a folder, and no serial number."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {**machine.facts(device), "memory": f"{memory:.0f} GiB"}
    if gpu.os_build():
        found["macOS build"] = gpu.os_build()
    if gpu.is_virtual():
        found["virtual"] = "yes: the GPU is that of a virtual machine, whose failures are not this project's"
    if reason := compiler.unavailable(device):
        found["Metal"] = f"not tested: {reason}"
    else:
        found["tensor operations"] = tensorops_probe.described()
    return found


def collected(device: str, seconds: float, save: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The whole report. `save` gets it after each stage: a machine may hang in the next."""
    data: dict[str, Any] = {"format": FORMAT, "machine": facts(device)}
    for stage in STAGES:
        began = time.monotonic()
        try:
            found = stage.run(device, seconds * stage.share)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        data[stage.name] = found
        data.setdefault("seconds", {})[stage.name] = round(time.monotonic() - began, 1)
        save(plain(data))
    return plain(data)


def plain(value: Any) -> Any:
    """`value` as JSON takes it, infinities and NaN as 1e300, and without paths but for their last part: exceptions name
    files, and files name people."""
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return INFINITE
    if isinstance(value, str):
        return _without_folders(value)
    return value


_PATHS = (
    re.compile(r"""(?<=['"])[~/][^'"\n]*/(?=[^/'"\n]*['"])"""),  # in quotes, where it may have spaces
    re.compile(r"""(?<![\w.*/])~?/(?:[\w.@+-][^/\s'",:;()]*/)+"""),
)


def _without_folders(text: str) -> str:
    text = text.replace(str(Path.home()), "~")
    for path in _PATHS:
        text = path.sub(".../", text)
    return text


def _selftest(device: str, seconds: float) -> dict[str, Any]:
    """As many of the quick cases as there is time for, in a random order that is the same everywhere; bfloat16 last,
    which some GPUs of the first generations are said to fail at so that what follows fails too."""
    chosen = list(cases.cases("quick", compiler.unavailable(device) is None))
    random.Random(0).shuffle(chosen)
    chosen.sort(key=lambda case: case.dtype == "bfloat16")
    end, outcomes = time.monotonic() + seconds, []
    with Progress(len(chosen), "selftest") as progress, unproved(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel that does not compile is in the report
        for dtypes in (("float16", "float32"), ("bfloat16",)):
            some = [case for case in chosen if case.dtype in dtypes]
            until = end if "bfloat16" in dtypes else end - seconds / 4
            for case in some:
                if time.monotonic() > until:
                    break
                progress.step(str(case), 0)
                outcomes.append(selftest.run(case, device))
                progress.step()
        failures = dict(compiler.failures)
    failed = [outcome for outcome in outcomes if outcome.failed]
    return {
        "cases": len(outcomes),
        "of": len(chosen),
        "failed": len(failed),
        "outcomes": dict(Counter(f"{o.case.tier} {o.case.dtype} {o.status}" for o in outcomes)),
        "failures": [selftest_report.described(outcome) for outcome in failed],
        "refused": [{"specialization": str(s), "why": why} for s, why in failures.items()],
    }


def _hazards(device: str, seconds: float) -> dict[str, Any]:
    rows = []
    with Progress(len(hazards.ISSUES), "hazards") as progress:
        for row in hazards.run(device):
            rows.append({**row._asdict(), "surprising": row.surprising})
            progress.step(row.issue)
    return {"taken over": sdpa.is_installed(), "rows": rows}


def _probes(device: str, seconds: float) -> dict[str, str]:
    scale = _CPU_SCALE if torch.device(device).type == "cpu" else 1.0
    all_of_them = probes.of(device, timing.stopwatch(device), scale)
    end, found = time.monotonic() + seconds, {}
    with Progress(len(all_of_them), "probes") as progress:
        for name, probe in all_of_them.items():
            if time.monotonic() < end:
                progress.step(name, 0)
                found[name] = probes.found(probe)
            progress.step()
    return found


def _tune(device: str, seconds: float) -> dict[str, Any]:
    """The long causal calls of two head dims, among the neighbours of the default; what is found is saved, as
    `MTLFLASHATTN_TUNE=auto` does."""
    if reason := compiler.unavailable(device):
        return {"skipped": reason}
    end, rows = time.monotonic() + seconds, []
    classes = [(dtype, head_dim) for dtype in ("float16", "bfloat16") for head_dim in (64, 128)]
    with Progress(len(classes), "tune") as progress:
        for dtype, head_dim in classes:
            progress.step(f"{dtype}, head dim {head_dim}", 0)
            if time.monotonic() < end:
                q = torch.empty(1, _LONG, 1, head_dim, dtype=getattr(torch, dtype), device=device)
                p = describe.dense(q, q, q, describe.CallOptions(causal=True))
                winner = tune.briefly(p, simdgroup.FORWARD if tensorops.TIER.limits(p) else tensorops.FORWARD)
                rows.append({"call": f"{dtype}, head dim {head_dim}, causal, long", **winner._asdict()})
            progress.step()
    return {"winners": rows}


_LONG = 4096  # queries


def _bench(device: str, seconds: float) -> list[dict[str, Any]]:
    """The default set, the workloads that most programs have first, until the time is over."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, which counts memory on the CPU, is not quiet
    kind = torch.device(device).type
    chosen = workloads.workloads(kind, False)
    chosen.sort(key=lambda workload: max(k for _, k in workload.lengths) > 2048)
    entrants = contenders.contenders(kind, False, False)
    watch = timing.stopwatch(device)
    end, found = time.monotonic() + seconds, []
    with Progress(len(chosen) * len(entrants), "bench") as progress:
        for n, workload in enumerate(chosen):
            if (left := end - time.monotonic()) < 0:
                break

            def tick(contender: str, name: str = workload.name) -> None:
                progress.step(f"{name}: {contender}")

            found += measure.measure(workload, entrants, device, left / (len(chosen) - n), watch, tick)
    return [bench_report.as_data(m) for m in found]


# What says most comes first. The self-test leaves no kernel behind, so what is timed after it has proved itself.
STAGES = (
    Stage("selftest", 0.35, _selftest),
    Stage("hazards", 0.05, _hazards),
    Stage("probes", 0.15, _probes),
    Stage("tune", 0.15, _tune),
    Stage("bench", 0.3, _bench),
)
