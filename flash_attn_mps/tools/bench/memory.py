"""How much memory a call takes at its peak, beyond what was there before."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ...timing import Call, synchronize


def peak(call: Call, device: torch.device | str) -> int:
    """Bytes, output included.

    On MPS torch counts no peak: taken is what the driver's heaps grow by from an empty cache, which comes in steps of
    some MiB.
    """
    kind = torch.device(device).type
    synchronize(device)
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if kind == "mps":
        torch.mps.empty_cache()
        before = torch.mps.driver_allocated_memory()
        call()
        synchronize(device)
        return max(0, torch.mps.driver_allocated_memory() - before)
    return _of_cpu(call)


def _of_cpu(call: Call) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        most = max(most, live)
    return most
