"""`MTLFLASHATTN_TRACE=1`: prints at exit how often attention was called: dtype, head dim, lengths, features, tier."""

from __future__ import annotations

import atexit
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from .problem import FEATURES, AttentionProblem
from .text_table import aligned


class Call(NamedTuple):
    dtype: str
    head_dim: str
    seqlen_q: int
    seqlen_k: int
    features: str
    tier: str


calls: Counter[Call] = Counter()
steps: Counter[tuple[str, str]] = Counter()  # what is done before attention, and how
at_exit: list[Callable[[], str]] = []  # what else is printed: text of others, empty for nothing
enabled = False


def enable() -> None:
    """Count calls from now on."""
    global enabled
    enabled = True


def record(p: AttentionProblem, tier: str) -> None:
    if not enabled:
        return
    head_dim, head_dim_v = p.q.shape[-1], p.v.shape[-1]
    dims = str(head_dim) if head_dim == head_dim_v else f"{head_dim}/{head_dim_v}"
    calls[Call(str(p.q.dtype).removeprefix("torch."), dims, p.max_seqlen_q, p.max_seqlen_k, _features(p), tier)] += 1


def record_step(step: str, reasons: list[str]) -> None:
    """Count what is done before attention: by a Metal kernel, or in torch for these `reasons`."""
    if enabled:
        steps[step, f"torch: {'; '.join(reasons)}" if reasons else "Metal"] += 1


def _features(p: AttentionProblem) -> str:
    """Like "causal+varlen+softcap"; "full" where nothing is hidden by position."""
    left, right = p.window
    words = {"window": f"window({left},{right})"}
    named = [words.get(name, name) for name in FEATURES if name in p.features]
    positional = p.features & {"causal", "window"}
    return "+".join(named if positional else ["full", *named])


def table() -> str:
    """The counts as lines of text, most frequent first."""
    head = (*(f.replace("_", " ") for f in Call._fields), "calls")
    rows = [head, *((*call, count) for call, count in calls.most_common())]
    return aligned(rows)


def _print_at_exit() -> None:
    print(f"mtlflashattn: {sum(calls.values())} attention calls" + (f"\n{table()}" if calls else ""), file=sys.stderr)
    if steps:
        rows = [("step", "by", "calls"), *((*step, count) for step, count in steps.most_common())]
        print(aligned(rows), file=sys.stderr)
    for text in filter(None, (text() for text in at_exit)):
        print(text, file=sys.stderr)


if os.environ.get("MTLFLASHATTN_TRACE", "").lower() not in ("", "0", "off", "false", "no"):
    enable()
    atexit.register(_print_at_exit)
