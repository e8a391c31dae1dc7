"""`MTLFLASHATTN_TRACE=1`: prints at exit how often attention was called, and its gradients computed.

That is, for each kind of call (dtype, head dim, lengths, features) which tier ran the forward and which the backward
pass, and why the tiers that are asked before it did not.
"""

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


class Refusal(NamedTuple):
    """A tier that was asked for a pass, and did not run it."""

    tier: str
    direction: str
    why: str


Refusals = list[tuple[str, list[str]]]  # tiers in the order in which they were asked, and their reasons

calls: Counter[Call] = Counter()  # forward passes
gradients: Counter[Call] = Counter()  # backward passes
refusals: Counter[Refusal] = Counter()
steps: Counter[tuple[str, str]] = Counter()  # what is done before attention, and how
at_exit: list[Callable[[], str]] = []  # what else is printed: text of others, empty for nothing
enabled = False


def enable() -> None:
    """Count calls from now on."""
    global enabled
    enabled = True


def clear() -> None:
    """Count anew."""
    for counts in (calls, gradients, refusals, steps):
        counts.clear()


def record(p: AttentionProblem, tier: str, refused: Refusals, direction: str = "forward") -> None:
    """Count a pass over `p`, forward or backward, that `tier` ran after the tiers of `refused`."""
    head_dim, head_dim_v = p.q.shape[-1], p.v.shape[-1]
    dims = str(head_dim) if head_dim == head_dim_v else f"{head_dim}/{head_dim_v}"
    dtype, features = str(p.q.dtype).removeprefix("torch."), _features(p, direction)
    call = Call(dtype, dims, p.max_seqlen_q, p.max_seqlen_k, features, tier)
    (calls if direction == "forward" else gradients)[call] += 1
    for name, reasons in refused:
        refusals[Refusal(name, direction, "; ".join(reasons))] += 1


def record_step(step: str, reasons: list[str]) -> None:
    """Count what is done before attention: by a Metal kernel, or in torch for these `reasons`."""
    if enabled:
        steps[step, f"torch: {'; '.join(reasons)}" if reasons else "Metal"] += 1


def _features(p: AttentionProblem, direction: str) -> str:
    """Like "causal+varlen+softcap"; "full" where nothing is hidden by position."""
    left, right = p.window
    words = {"window": f"window({left},{right})"}
    features = p.features - {"gradients"} if direction == "backward" else p.features
    named = [words.get(name, name) for name in FEATURES if name in features]
    positional = features & {"causal", "window"}
    return "+".join(named if positional else ["full", *named])


def table() -> str:
    """The counts as lines of text, most frequent first; below them the tiers that were passed over, and other steps."""
    *what, tier = (field.replace("_", " ") for field in Call._fields)
    rows: list[tuple[object, ...]] = [(*what, "pass", tier, "calls")]
    for direction, counts in (("forward", calls), ("backward", gradients)):
        rows += [(*call[:-1], direction, call.tier, count) for call, count in counts.most_common()]
    tables = [rows] if calls or gradients else []
    if refusals:
        tables.append(
            [("passed over", "pass", "why", "calls"), *((*it, count) for it, count in refusals.most_common())]
        )
    if steps:
        tables.append([("step", "by", "calls"), *((*step, count) for step, count in steps.most_common())])
    return "\n".join(map(aligned, tables))


def _print_at_exit() -> None:
    counts = f"{calls.total()} attention calls, {gradients.total()} with gradients"
    print(f"mtlflashattn: {counts}" + (f"\n{table()}" if calls or gradients or steps else ""), file=sys.stderr)
    for text in filter(None, (text() for text in at_exit)):
        print(text, file=sys.stderr)


if os.environ.get("MTLFLASHATTN_TRACE", "").lower() not in ("", "0", "off", "false", "no"):
    enable()
    atexit.register(_print_at_exit)
