"""What `mtlflashattn tune` measured against torch's attention, by class of calls, and kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

from ..tiers.metal import store
from .call import Call

NEVER = math.inf
_SECTION = "sdpa"


class CallClass(NamedTuple):
    """Calls that are compared with torch's as one: which of both is faster depends on these and on the length."""

    dtype: str  # torch's name, without "torch."
    head_dim: int
    causal: bool
    gradient: bool
    route: str  # of torch: torch_paths.route


def class_of(call: Call, route: str) -> CallClass:
    return CallClass(str(call.dtype).removeprefix("torch."), call.head_dim, call.causal, call.gradient, route)


def load() -> dict[CallClass, float]:
    """What is stored for this machine and this torch; nothing, with a warning, from a file that is broken."""
    try:
        return dict(map(_entry, store.read().get(_SECTION, ())))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return store.broken(error)


def _entry(entry: dict) -> tuple[CallClass, float]:
    length = entry["length"]
    return CallClass(*(entry[field] for field in CallClass._fields)), NEVER if length is None else float(length)


def save(found: Mapping[CallClass, float]) -> None:
    """Add to what is stored. Raises OSError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be used is replaced
        merged = {**load(), **found}
    entries = [
        {**key._asdict(), "length": None if shortest == NEVER else shortest} for key, shortest in sorted(merged.items())
    ]
    store.write(_SECTION, entries)
