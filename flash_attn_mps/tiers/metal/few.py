"""Up to how many queries the decode kernel beats the tiled one: a default, or what `mtlflashattn tune` measured.

Up to the default the decode kernel makes no more products and reads keys and values no more often than the tiled one
(tests/metal/test_decode.py counts): once for 32 rows, queries times heads that share their keys. Its slices cost it up
to eight times the exponentials and shuffles at 32 queries, a tenth of the time that the products take on an M1; its
splits fill the GPU. With more queries the staged tiled kernel reads less, and fills the GPU by itself.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ... import timing
from ...problem import AttentionProblem
from . import gpu, store

DEFAULT = 32
ROWS_OF_A_TILE = 32  # of the decode kernel, at most: queries times heads that share their keys
_GROUPS_PER_CORE = 2  # threadgroups of the tiled kernel that keep a core busy
QUERIES = (8, 16, 32, 64, 128)  # that are timed
_SECTION = "few"
_ROUNDS = 5
_BATCH_SECONDS = 0.02
_KEYS, _HEADS, _HEADS_K = 8192, 32, 8

Run = Callable[[AttentionProblem], object]
_stored: dict[Class, int] | None = None  # None: the file has not been read


class Class(NamedTuple):
    """Calls that have the same limit."""

    dtype: str  # torch's name, without "torch."
    head_dim: int


def most(p: AttentionProblem) -> int:
    """With how many queries a sequence of `p` is still few."""
    stored = _stored if _stored is not None else _read()
    found = stored.get(Class(str(p.q.dtype).removeprefix("torch."), p.q.shape[-1])) if stored else None
    return default(p) if found is None else found


def default(p: AttentionProblem) -> int:
    """Where the tiled kernel alone fills the GPU, with fewer queries than elsewhere.

    A tile of 32 rows does some 32 operations for each byte of keys and values, as many as Apple's GPUs do in the time
    of reading it. With more rows than one tile has arithmetic takes the time, and the tiled kernel has less of it. An
    H200 agrees (docs/decode.md): at least 1.6 times as fast as the tiled kernel with one tile of up to 8 queries, 1.3
    times with one of 16, 0.5 to 1.3 times with more.
    """
    # With one split it may not depend on the other sequences of the batch.
    if p.num_splits == 1 or p.batch * p.heads < gpu.cores() * _GROUPS_PER_CORE:
        return DEFAULT
    return 16 if 16 * (p.heads // p.heads_k) <= ROWS_OF_A_TILE else 8


def forget() -> None:
    """Read the file anew."""
    global _stored
    _stored = None


def measure(
    of: Class, device: torch.device | str, watch: timing.Stopwatch, decode: Run, tiled: Run
) -> tuple[int, dict[int, tuple[float, float]]]:
    """The most of `QUERIES` such that decode is faster there and at all fewer, and seconds of both; 0 for none."""
    found, seconds = 0, {}
    for queries in QUERIES:
        p = _problem(of, queries, device)
        calls = _calls(p, decode=decode, tiled=tiled)
        times = timing.rounds(calls, watch, _ROUNDS, _BATCH_SECONDS)
        ours, theirs = (sorted(times[name])[_ROUNDS // 2] for name in calls)
        seconds[queries] = ours, theirs
        if ours > theirs:
            break
        found = queries
    return found, seconds


def _calls(p: AttentionProblem, **runs: Run) -> dict[str, Callable[[], object]]:
    return {name: functools.partial(run, p) for name, run in runs.items()}


def save(found: Mapping[Class, int]) -> None:
    """Add to what is stored. Raises OSError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be used is replaced
        merged = {**_read(), **found}
    store.write(_SECTION, [{**key._asdict(), "queries": queries} for key, queries in sorted(merged.items())])


def _read() -> dict[Class, int]:
    global _stored
    try:
        _stored = dict(map(_entry, store.read().get(_SECTION, ())))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _stored = store.broken(error)
    return _stored


def _entry(entry: dict[str, Any]) -> tuple[Class, int]:
    return Class(str(entry["dtype"]), int(entry["head_dim"])), int(entry["queries"])


def _problem(of: Class, queries: int, device: torch.device | str) -> AttentionProblem:
    dtype, generator = getattr(torch, of.dtype), torch.Generator().manual_seed(0)

    def randn(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(1, rows, heads, of.head_dim, generator=generator).to(device, dtype)

    q, k, v = randn(queries, _HEADS), randn(_KEYS, _HEADS_K), randn(_KEYS, _HEADS_K)
    return AttentionProblem(q, k, v, 1, queries, _KEYS, of.head_dim**-0.5)
