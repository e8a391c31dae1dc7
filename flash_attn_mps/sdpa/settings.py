"""What the user, the machine and `mtlflashattn tune` say about which calls are taken."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from . import measured
from .measured import NEVER, CallClass
from .torch_paths import Version, version

SWITCH = "MTLFLASHATTN_SDPA"
MIN_GB = "MTLFLASHATTN_SDPA_MIN_GB"
MIN_SEQ = "MTLFLASHATTN_SDPA_MIN_SEQ"
FAST_MIN_SEQ = "MTLFLASHATTN_SDPA_FAST_MIN_SEQ"

GIB = 1 << 30
_LARGEST_BUDGET = 4 * GIB  # beyond it, releases up to 2.8 abort the process (pytorch#149261)


@dataclass(frozen=True, eq=False)
class Settings:
    """`min_seq`, `fast_min_seq`: what the user set, in tokens; None: nothing. `measured`: from which length on ours is
    faster, NEVER if it is not."""

    torch: Version
    budget: float  # bytes that torch's score matrix may have
    min_seq: float | None = None
    fast_min_seq: float | None = None
    measured: Mapping[CallClass, float] = field(default_factory=dict)


def read(env: Mapping[str, str] = os.environ) -> Settings:
    """From the environment, this torch, this machine's memory and what `mtlflashattn tune` stored for it."""
    gigabytes = _number(env, MIN_GB)
    return Settings(
        version(torch.__version__),
        default_budget() if gigabytes is None else gigabytes * GIB,
        _number(env, MIN_SEQ),
        _number(env, FAST_MIN_SEQ),
        measured.load(),
    )


def wanted(env: Mapping[str, str] = os.environ) -> bool:
    """Is the patch to be installed when the package is imported?"""
    return env.get(SWITCH, "").lower() in ("on", "1", "true", "yes")


def default_budget() -> int:
    """An eighth of what MPS may use, 4 GiB at most."""
    if not torch.backends.mps.is_available():
        return _LARGEST_BUDGET
    return min(_LARGEST_BUDGET, torch.mps.recommended_max_memory() // 8)


def _number(env: Mapping[str, str], name: str) -> float | None:
    text = env.get(name, "").strip().lower()
    if text in ("", "auto"):
        return None
    if text == "never":
        return NEVER
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        warnings.warn(f'ignoring {name}={env[name]}; expected a number from 0 on, "never" or "auto"', stacklevel=3)
        return None
    return number
